"""The formulas of cost, against models counted by hand and the real models' own counts."""

from collections.abc import Callable
from math import isclose
from typing import Any

import pytest
import torch
from models import gpt2, llama, mixtral, phi3, t5, token_rows
from torch.utils.flop_counter import FlopCounterMode

from hf_sparse import SparsityConfig, cost
from hf_sparse.cost import BlockShape, Data, InputShape, Rates, Recipe, Work
from hf_sparse.families import find_sites
from hf_sparse.plan import select
from hf_sparse.registry import UPDATES
from hf_sparse.shapes import ModelShape, recipe_of, shape_of

# q, k, v read 4 features; o 4; the gated MLP has 6 neurons: counted by hand
TINY = BlockShape(
    parameters=4 * 8 + 4 * 4 + 4 * 12 + 6 * 4,
    inputs=(InputShape(4, 8, (4, 2, 2)), InputShape(4, 4, (4,)), InputShape(4, 12, (6, 6)), InputShape(6, 4, (4,))),
    hidden=4, attention=4,
)  # fmt: skip
DATA = Data(samples=3, length=5, batch=2)


def shape(model: Any, **changes: Any) -> ModelShape:
    inventory = find_sites(model)
    chosen, _ = select(inventory, SparsityConfig(pattern="2:4", metric="wanda", **changes))
    return shape_of(model, inventory, chosen)


@pytest.mark.parametrize("make", [llama, mixtral, gpt2, phi3, t5])
def test_counts_are_the_models_own(make: Callable[[], Any]) -> None:
    model = make()
    found, inventory = shape(model), find_sites(model)
    assert found.parameters == model.num_parameters()
    assert found.weights_pruned == sum(site.size for site in inventory.all())
    for told, block in zip(found.blocks, inventory.blocks, strict=True):
        assert told.parameters == sum(parameter.numel() for parameter in block.module.parameters())
    assert found.outside == found.parameters - sum(block.parameters for block in found.blocks)
    assert found.strange == ""


def test_only_targets_are_pruned() -> None:
    model = llama()
    found = shape(model, targets="mlp", exclude=("*.1.mlp.*",))
    assert [block.weights_pruned for block in found.blocks] == [3 * 32 * 48, 0]
    assert shape(model).head == model.lm_head.weight.numel()


def test_products_of_a_pass_are_those_that_torch_counts() -> None:
    model, rows = llama(), token_rows(4, 16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model(input_ids=rows, use_cache=False)
    counted = {str(key): value for key, value in counter.get_flop_counts()["Global"].items()}
    products = sum(value for name, value in counted.items() if "attention" not in name and "bmm" not in name)
    found = sum((cost.forward(block, Data(4, 16, 4), 4) for block in shape(model).blocks), Work())
    assert found.product == products
    assert found.attention == 2 * 2 * (4 * 16) * 16 * 32  # two blocks, half of the positions, scores and mixing


def test_experts_count_by_the_tokens_that_reach_them() -> None:
    block = shape(mixtral()).blocks[0]
    attention = 2 * 32 * 32 + 2 * 32 * 16
    assert block.active == attention + 2 * (3 * 32 * 48)  # two of four
    assert block.weights_pruned == attention + 4 * (3 * 32 * 48)


def test_a_block_counted_by_hand() -> None:
    work = cost.forward(TINY, DATA, 2)
    assert work.product == 2 * 15 * (32 + 16 + 48 + 24)
    assert work.attention == 2 * 15 * 5 * 4
    norms = cost.statistics(TINY, DATA, ["norm"])
    assert (norms.observed, norms.wide, norms.exchanged) == (15 * (4 + 4 + 4 + 6), 0, 0)
    grams = cost.statistics(TINY, DATA, ["gram"])
    assert grams.wide == 2 * (9 / 16) * 15 * (3 * 4**2 + 6**2)
    assert grams.observed == 0


def test_statistics_go_round_between_processes() -> None:
    four = cost.statistics(TINY, DATA, ["gram", "norm"], ranks=4)
    assert four.exchanged == 2 * 3 / 4 * 8 * (3 * 4**2 + 6**2 + 3 * 4 + 6)


@pytest.mark.parametrize(("ranks", "share"), [(1, 1.0), (2, 64 / 120), (3, 48 / 120), (8, 48 / 120)])
def test_solves_are_dealt_out_whole(ranks: int, share: float) -> None:
    # 48, 32, 24 and 16 weights; of two processes one gets 48 + 16
    assert cost.critical(TINY, ranks) == share


def test_laws_of_updates() -> None:
    recipe = Recipe(("sparsegpt",), frozenset({"gram"}), ("sparsegpt",), own_choice=True)
    solved = cost.solves(TINY, recipe)
    assert solved is not None
    assert isclose(solved["sparsegpt"].exact, 4 / 3 * (3 * 4**3 + 6**3))
    assert solved["sparsegpt"].wide == 8 * 16 + 4 * 16 + 12 * 16 + 4 * 36
    assert cost.masks(TINY, recipe).weighed == 120
    assert cost.masks(TINY, recipe).exact == 0  # chosen within the sweep
    scored = Recipe(("sparsegpt",), frozenset({"gram"}))
    assert (
        cost.masks(TINY, scored).exact == 3 * 64 + 4 * 0 + 2 * 64 + 64 + 216
    )  # a factor for each site: q k v, o, gate up, down


@pytest.mark.parametrize("entry", list(UPDATES), ids=lambda entry: entry.name)
def test_every_update_tells_its_cost(entry: Any) -> None:
    if entry.traits.get("runs_blocks"):
        assert cost.training(TINY, DATA, 10).wide > 0
        return
    law = entry.traits["cost"]
    options = dict(entry.options)
    small, large = law(8, 8, options), law(16, 16, options)
    assert isinstance(small, Work)
    times = entry.name != "none"
    assert large.seconds(_ONES) >= (4 if times else 0) * small.seconds(Rates(**{**_ONES.__dict__, "calls": 0.0})) * 0.9


_ONES = Rates(**dict.fromkeys(Work().__dict__, 1.0))


def test_an_update_without_a_law_is_not_foretold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(UPDATES["dsnot"].traits, "cost")
    assert cost.solves(TINY, Recipe(("wanda",), frozenset(), ("dsnot",))) is None


def test_memory_counted_by_hand() -> None:
    recipe = Recipe(("dass", "wanda"), frozenset({"norm"}), grouped=True)
    found = cost.memory(TINY, recipe, DATA, 2)
    assert found.hidden == 2 * 15 * 4 * 2
    assert found.statistics == 8 * (4 + 4 + 4 + 6)
    assert found.work == max(2 * 5 * 2 * (16 + 2 * 16), 12 * 6 * 4)
    assert found.total == found.hidden + found.statistics + found.work
    half = cost.memory(TINY, recipe, Data(4, 5, 2), 2, ranks=2)
    assert half.hidden == 2 * 10 * 4 * 2
    grams = cost.memory(TINY, Recipe(("sparsegpt",), frozenset({"gram"}), ("sparsegpt",)), DATA, 2)
    assert grams.statistics == 8 * (4 + 4 + 4 + 6) + 8 * (3 * 16 + 36)
    two = cost.memory(TINY, Recipe(("wanda",), frozenset({"norm"}), two_streams=True), DATA, 2)
    assert two.hidden == 2 * found.hidden
    assert two.stopped > 0


def test_work_adds_up() -> None:
    work = Work(product=2, read=1) + Work(product=3) * 2
    assert work == Work(product=8, read=1)
    assert work.seconds(Rates.per_second(product=4, read=0.5)) == 4
    assert cost.bitmask_bytes(100, 2, 0.5) == 100 + 13


def test_recipes() -> None:
    found = recipe_of(SparsityConfig(pattern="2:4", metric="dass"))
    assert (found.metrics, found.statistics, found.grouped) == (("dass", "wanda"), frozenset({"norm"}), True)
    found = recipe_of(SparsityConfig(pattern="unstructured", sparsity=0.5, metric="sparsegpt"))
    assert (found.updates, found.own_choice) == (("sparsegpt",), True)
    assert recipe_of(SparsityConfig(pattern="2:4")).two_streams
