"""What feeds what is proposed by name and proven by numbers, and a wrong proposal is found out."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from families_table import FAMILIES, expected_roles
from torch import nn

from hf_sparse.families import Inventory, find_sites
from hf_sparse.groups import PROBES, Feed, propose, prove
from hf_sparse.observe import eager_experts
from hf_sparse.sites import Rows, Site, stored_rows

# Values that do not go straight into o: norms over a head mix its channels, ConvBERT's o reads other columns too.
MIXED_VALUES = {
    "diffllama": {"model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"},
    "gemma4_text": {"model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"},
    "minimax": {"model.layers.0.self_attn.qkv_proj.v"},
    "olmo_hybrid": {"model.layers.0.linear_attn.v_proj"},
    "convbert": {"convbert.encoder.layer.0.attention.self.value", "convbert.encoder.layer.1.attention.self.value"},
}
NOT_RUN = {"blip": {f"text_model.encoder.layer.{index}.crossattention.self.value" for index in (0, 1)}}


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Inventory, Callable[[], object]]:
    model, inputs = FAMILIES[name].build()
    model = model.to(dtype)
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    return model, find_sites(model), lambda: model(**inputs)


def proposed(model: nn.Module, inventory: Inventory) -> tuple[list[Feed], dict[str, str]]:
    feeds: list[Feed] = []
    unresolved: dict[str, str] = {}
    for block in inventory.blocks:
        found, reasons = propose(model, block, inventory.sites[block.index])
        feeds += found
        unresolved |= reasons
    return feeds, unresolved


@pytest.mark.parametrize("name", FAMILIES)
def test_proposals_are_proven(name: str) -> None:
    model, inventory, run = made(name)
    feeds, unresolved = proposed(model, inventory)
    proven, wrong = prove(feeds, inventory.all(), run, model)
    assert set(wrong) == MIXED_VALUES.get(name, set()) | NOT_RUN.get(name, set())
    assert all(("did not run" in reason) == (site in NOT_RUN.get(name, set())) for site, reason in wrong.items())
    resolved = {feed.producer for feed in proven}
    for site in inventory.all():
        if site.role in ("gate", "up", "v") and name != "longcat_flash":  # whose last experts have no down projection
            assert site.name in resolved | set(wrong)
        if site.role is None:
            assert "no role" in unresolved[site.name]
        if site.role in ("q", "k", "o", "down"):
            assert site.name not in resolved | set(unresolved)


@pytest.mark.parametrize(
    "name", ["llama", "gemma", "qwen3", "phi3", "falcon_new", "falcon_multi_query", "dbrx", "starcoder2"]
)
def test_grouped_heads_repeat_rows_of_v(name: str) -> None:
    model, inventory, _ = made(name)
    feeds, _ = proposed(model, inventory)
    by_name = {site.name: site for site in inventory.all()}
    values = [feed for feed in feeds if by_name[feed.producer].role == "v"]
    assert values
    for feed in values:
        rows, columns = by_name[feed.producer].shape[0], by_name[feed.consumer].shape[1]
        assert columns > rows
        assert len(feed.rows) == columns
        assert set(feed.rows) == set(range(rows))


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss", "phi3", "qwen3_next", "bert", "t5_gated", "bloom"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_hides_nothing(name: str, dtype: torch.dtype) -> None:
    model, inventory, run = made(name, dtype)
    feeds, _ = proposed(model, inventory)
    proven, wrong = prove(feeds, inventory.all(), run, model)
    assert proven == feeds
    assert wrong == {}


def test_few_runs_and_nothing_changed() -> None:
    model, inventory, run = made("mixtral")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = run().logits  # type: ignore[attr-defined]
    runs: list[None] = []
    prove(proposed(model, inventory)[0], inventory.all(), lambda: (runs.append(None), run()), model)
    assert len(runs) == 1 + PROBES <= 4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(run().logits, logits)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_oss", "mixtral", "falcon_new", "bert"])
def test_a_permuted_feed_is_contradicted(name: str) -> None:
    model, inventory, run = made(name)
    feeds, _ = proposed(model, inventory)
    turned = [replace(feed, rows=feed.rows[1:] + feed.rows[:1]) for feed in feeds]
    proven, wrong = prove(turned, inventory.all(), run, model)
    assert proven == []
    assert set(wrong) == {feed.producer for feed in feeds}
    assert all("Noise in row" in reason or "did not run" in reason for reason in wrong.values())


def test_only_the_wrong_feed_is_dropped() -> None:
    model, inventory, run = made("llama")
    feeds, _ = proposed(model, inventory)
    bad = next(feed for feed in feeds if feed.producer.endswith("0.mlp.gate_proj"))
    mixed = [replace(feed, rows=feed.rows[::-1]) if feed is bad else feed for feed in feeds]
    proven, wrong = prove(mixed, inventory.all(), run, model)
    assert proven == [feed for feed in feeds if feed is not bad]
    assert set(wrong) == {bad.producer}


def test_wrong_split_of_interleaved_rows_is_contradicted() -> None:
    model, inventory, run = made("gpt_oss")
    feeds, _ = proposed(model, inventory)

    def halves(site: Site) -> Site:
        if site.rows is None:
            return site
        return replace(site, rows=Rows(1, 2, site.shape[0], site.rows.start, site.rows.stop))

    sites = [halves(site) for site in inventory.all()]
    proven, wrong = prove(feeds, sites, run, model)
    assert {feed.producer for feed in proven} == {site.name for site in sites if site.role == "v"}
    assert wrong.keys() == {site.name for site in sites if site.role in ("gate", "up")}


def test_wrong_grouping_of_heads_is_contradicted() -> None:
    model, inventory, run = made("llama")
    feeds, _ = proposed(model, inventory)
    alternating = tuple(column % 16 for column in range(32))
    turned = [replace(feed, rows=alternating) if "v_proj" in feed.producer else feed for feed in feeds]
    _, wrong = prove(turned, inventory.all(), run, model)
    assert wrong.keys() == {feed.producer for feed in feeds if "v_proj" in feed.producer}


def test_an_expert_that_no_token_reached_follows_the_proven_ones() -> None:
    model, inputs = FAMILIES["mixtral"].build()
    inventory = find_sites(model)
    feeds, _ = proposed(model, inventory)
    token = {"input_ids": inputs["input_ids"][:1, :1]}  # one token reaches two of four experts
    proven, wrong = prove(feeds, inventory.all(), lambda: model(**token), model)
    assert proven == feeds
    assert wrong == {}


def test_what_was_not_run_is_not_proven() -> None:
    model, inventory, _ = made("mixtral")
    feeds, _ = proposed(model, inventory)
    proven, wrong = prove(feeds, inventory.all(), lambda: None, model)
    assert proven == []
    assert all("did not run" in reason for reason in wrong.values())


def test_one_block_alone_is_enough() -> None:
    model, _ = FAMILIES["bert"].build()
    inventory = find_sites(model)
    block = inventory.blocks[1]
    feeds, _ = propose(model, block, inventory.sites[1])
    hidden = torch.randn(2, 5, 32)
    proven, wrong = prove(feeds, inventory.sites[1], lambda: block.module(hidden), model)
    assert (proven, wrong) == (feeds, {})


@pytest.mark.parametrize("activation", ["relu", "relu2", "gelu"])
def test_channels_that_an_activation_shuts_do_not_confuse(activation: str) -> None:
    family = replace(FAMILIES["llama"], settings={**FAMILIES["llama"].settings, "hidden_act": activation})
    model, inputs = family.build()
    inventory = find_sites(model)
    feeds, _ = proposed(model, inventory)
    small = {"input_ids": inputs["input_ids"][:1, :3]}
    assert prove(feeds, inventory.all(), lambda: model(**small), model) == (feeds, {})


class _Foreign(nn.Module):
    """A model in nobody's style, with a convolution and a bare parameter."""

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.widen = nn.Linear(16, 24)
            self.narrow = nn.Linear(24, 16)
            self.bare = nn.Parameter(torch.randn(16, 16))
            self.smooth = nn.Conv1d(16, 16, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.narrow(torch.relu(self.widen(x))) + x @ self.bare
            return x + self.smooth(x.mT).mT

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList(_Foreign.Cell() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for cell in self.cells:
            x = cell(x)
        return x


def test_a_foreign_model_has_sites_without_roles() -> None:
    model = _Foreign()
    inventory = find_sites(model)
    assert [site.name for site in inventory.sites[0]] == ["cells.0.widen", "cells.0.narrow"]
    assert {site.role for site in inventory.all()} == {None}
    others = ("bare", "smooth.weight")
    assert set(inventory.left_out) == {f"cells.{index}.{name}" for index in range(3) for name in others}
    feeds, unresolved = proposed(model, inventory)
    assert feeds == []
    assert set(unresolved) == {site.name for site in inventory.all()}


def test_eager_experts_restores_what_was_set() -> None:
    model, _, _ = made("mixtral")
    model.config._experts_implementation = "batched_mm"
    with eager_experts(model):
        assert model.config._experts_implementation == "eager"
    assert model.config._experts_implementation == "batched_mm"


def test_stored_rows() -> None:
    site = Site("x", "x", "weight", (4, 3), rows=Rows(2, 3, 2, 1, 2))
    assert stored_rows(site).tolist() == [2, 3, 8, 9]
    assert stored_rows(replace(site, rows=None)).tolist() == [0, 1, 2, 3]


def test_gated_families_are_many() -> None:
    assert len(FAMILIES) >= 100
    assert sum("gate" in expected_roles(name).values() for name in FAMILIES) >= 50
