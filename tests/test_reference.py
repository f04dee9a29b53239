"""The published implementations' masks and perplexities on a small real model are reproduced."""

import json
import math
from pathlib import Path

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_sparse import SparsityConfig, prune_
from hf_sparse.allocations import BlockSize
from hf_sparse.registry import ALLOCATIONS

MAX_FLIPPED = 1e-4  # share of mask bits that a tie or rounding may flip
MAX_FLIPPED_IN_SWEEP = 1e-3  # the same where each choice depends on the values that those before it left
MAX_DIFFERENCE = 1e-3  # of updated weights, relative to the norm of their matrix
CASES = {
    "magnitude_2_4_all": {"metric": "magnitude"},
    "wanda_2_4_all": {"metric": "wanda"},
    "wanda_unstructured50_all": {"metric": "wanda", "pattern": "unstructured", "sparsity": 0.5},
    "dass_2_4_mlp": {"metric": "dass", "targets": "mlp"},
}


def perplexity(model: torch.nn.Module, rows: torch.Tensor) -> float:
    with torch.no_grad():
        losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in rows.split(32)]
    return math.exp(sum(losses) / len(rows))


def rows(test_data: Path, name: str) -> torch.Tensor:
    return torch.from_numpy(numpy.load(test_data / "reference" / f"{name}_ids.npy")).long()


@pytest.mark.parametrize("case", CASES)
def test_masks_and_perplexity_of_the_published_code(case: str, test_data: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(test_data / "models" / "stories260k")
    prune_(model, SparsityConfig(calibration=rows(test_data, "calib"), num_samples=64, batch_size=1, **CASES[case]))
    dropped = numpy.load(test_data / "reference" / f"{case}.npz")
    weights = model.state_dict()
    flipped = sum(int(((weights[name] == 0).numpy() != dropped[name]).sum()) for name in dropped.files)
    assert flipped <= MAX_FLIPPED * sum(dropped[name].size for name in dropped.files)
    published = json.loads((test_data / "reference" / "results.json").read_text())[case]["ppl"]
    assert perplexity(model, rows(test_data, "eval")) == pytest.approx(published, rel=0.005)


def test_sparsegpt_gives_the_masks_weights_and_perplexity_of_the_published_code(test_data: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(test_data / "models" / "stories260k")
    config = SparsityConfig(
        metric="sparsegpt",
        update="sparsegpt",
        calibration=rows(test_data, "calib"),
        num_samples=64,
        batch_size=1,
    )
    prune_(model, config)
    case = "sparsegpt_2_4_all"
    dropped = numpy.load(test_data / "reference" / f"{case}.npz")
    published = numpy.load(test_data / "reference" / f"{case}.weights.npz")
    weights = {name: weight.numpy() for name, weight in model.state_dict().items() if name in dropped.files}
    assert weights.keys() == set(dropped.files) == set(published.files)
    flipped = sum(int(((weights[name] == 0) != dropped[name]).sum()) for name in weights)
    assert flipped <= MAX_FLIPPED_IN_SWEEP * sum(weight.size for weight in weights.values())
    for name, weight in weights.items():
        both = (weight != 0) & ~dropped[name]  # where one mask drops what the other keeps, the values say nothing
        difference = numpy.linalg.norm((weight - published[name])[both]) / numpy.linalg.norm(published[name])
        assert difference <= MAX_DIFFERENCE, name
    expected = json.loads((test_data / "reference" / "results.json").read_text())[case]["ppl"]
    assert perplexity(model, rows(test_data, "eval")) == pytest.approx(expected, rel=0.005)


def test_masks_do_not_depend_on_the_batch_size(test_data: Path) -> None:
    kept = []
    for size in (1, 16):
        model = AutoModelForCausalLM.from_pretrained(test_data / "models" / "stories260k")
        prune_(
            model, SparsityConfig(metric="wanda", calibration=rows(test_data, "calib"), num_samples=64, batch_size=size)
        )
        kept.append({name: weight != 0 for name, weight in model.state_dict().items()})
    differing = sum(int((kept[0][name] != kept[1][name]).sum()) for name in kept[0])
    assert differing <= MAX_FLIPPED * sum(mask.numel() for mask in kept[0].values())


def test_owl_has_the_published_codes_rates_mask_and_perplexity(test_data: Path) -> None:
    case = "owl_wanda_unstructured60_M5_all"
    model = AutoModelForCausalLM.from_pretrained(test_data / "models" / "stories260k")
    calibration = rows(test_data, "calib")
    config = SparsityConfig(
        metric="wanda", pattern="unstructured", sparsity=0.6, allocation="owl", calibration=calibration, num_samples=64, batch_size=1,
        options={"owl": {"threshold": 5, "limit": 0.08}, "unstructured": {"rounding": "truncate"}},
    )  # fmt: skip
    report = prune_(model, config)
    published = json.loads((test_data / "reference" / "results.json").read_text())[case]
    measured, kept = (
        [float(word) for word in line.partition("[")[2].rstrip("]").replace(",", " ").split()]
        for line in published["owl_log"]
    )
    assert [block.measured for block in report.blocks] == pytest.approx(measured, abs=1e-3)
    blocks = [BlockSize(b.name, b.stack, {b.name: b.size}, b.measured) for b in report.blocks]
    rates = ALLOCATIONS["owl"].function(0.6, blocks, **config.options_of("owl"))
    assert list(rates.values()) == pytest.approx([1 - share for share in kept], abs=1e-4)  # type: ignore[attr-defined]
    dropped = numpy.load(test_data / "reference" / f"{case}.npz")
    weights = model.state_dict()
    flipped = sum(int(((weights[name] == 0).numpy() != dropped[name]).sum()) for name in dropped.files)
    assert flipped <= MAX_FLIPPED * sum(dropped[name].size for name in dropped.files)
    assert [block.sparsity for block in report.blocks] == pytest.approx(published["per_layer"], abs=1e-4)
    assert perplexity(model, rows(test_data, "eval")) == pytest.approx(published["ppl"], rel=0.005)
