"""Every family in the table is pruned, block by block, with the dependency-aware metric; and reloads as it was saved."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families_table import FAMILIES
from models import outputs_are_finite

from hf_sparse import SparsityConfig, prune_, report
from hf_sparse.errors import ConfigError
from hf_sparse.families import find_sites
from hf_sparse.sites import read

SHARED_BLOCKS = ("albert",)  # the same block runs several times in one pass


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_pruned_to_the_pattern_by_dass(family: str) -> None:
    model, inputs = FAMILIES[family].build()
    found = prune_(model, SparsityConfig(metric="dass", calibration=[inputs], num_samples=1))
    sites = {site.name: site for site in find_sites(model).all()}
    assert {entry.name for entry in found.sites} == set(sites)
    for entry in found.sites:
        weight = read(model, sites[entry.name])
        rows = weight if entry.axis == "input" else weight.T
        whole = rows.shape[1] // 4 * 4
        assert bool(((rows[:, :whole] != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all()), entry.name
        assert entry.metric in ("dass", "wanda", "magnitude")
        assert entry.metric == "dass" or entry.note, f"{entry.name} fell back without a word"
    assert all(block.output_error is not None and block.output_error >= 0 for block in found.pruned_blocks)
    with torch.no_grad():
        model(**inputs)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_saved_and_loaded_bit_equal(family: str, tmp_path: Path) -> None:
    model, _ = FAMILIES[family].build()
    made = prune_(model, SparsityConfig(metric="magnitude"))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    before, after = model.state_dict(), again.state_dict()
    assert set(before) == set(after)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert report(again).zeros == made.zeros


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*calibration tokens cannot determine")
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_pruned_by_the_default_recipe(family: str) -> None:
    model, inputs = FAMILIES[family].build()
    # A matrix of thousands of inputs, as one of the tiny models has, takes minutes to factorise.
    wide = tuple(site.name for site in find_sites(model).all() if site.shape[1] > 1024)
    config = SparsityConfig(calibration=[inputs] * 3, num_samples=3, exclude=wide)
    if family in SHARED_BLOCKS:
        with pytest.raises(ConfigError, match="several times in one pass"):
            prune_(model, config)
        config = replace(config, update="admm")
    found = prune_(model, config)
    assert found.sparsity == pytest.approx(0.5, abs=0.02)
    assert not any("not finite" in site.note for site in found.sites)
    assert all(site.metric == "wanda" or "magnitude instead" in site.note for site in found.sites)
    assert outputs_are_finite(model, inputs)
