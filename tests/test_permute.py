"""permute=True: the dense model's function stays, the groups keep more importance, and every kept weight can be traced."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families_table import FAMILIES
from models import bert, llama, mixtral, phi3, t5, token_rows
from torch import nn

import hf_sparse
from hf_sparse import SparsityConfig, prune_
from hf_sparse.blockwise import Run
from hf_sparse.calibrate import make_batches, read_calibration, ready, survey
from hf_sparse.errors import CheckpointError, ConfigError, PruningInterrupted
from hf_sparse.families import find_sites
from hf_sparse.permute import Permutations, permute_, permuted_state_dict
from hf_sparse.permute.order import Part, _assigned, best_order, kept_importance
from hf_sparse.permute.places import Place, spaced
from hf_sparse.plan import select
from hf_sparse.sites import read

ROWS = token_rows()


def config(**changes: Any) -> SparsityConfig:
    given = {"metric": "wanda", "calibration": ROWS, "num_samples": len(ROWS), "permute": True}
    return SparsityConfig(**{**given, **changes})


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def enliven(model: nn.Module) -> nn.Module:
    """Norm weights and biases start as ones and zeros, which no order could spoil."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def permuted(model: nn.Module, rows: Any = None, **changes: Any) -> tuple[Permutations, list[str]]:
    """Reorder a model without pruning it."""
    settings = config(**{"calibration": ROWS if rows is None else rows, **changes})
    inventory = find_sites(model)
    chosen, _ = select(inventory, settings)
    run = Run(model, settings, inventory, chosen, dict.fromkeys((s.name for s in inventory.all()), settings.target))
    found = Permutations()
    samples = read_calibration(model, settings)
    with ready(model):
        run.survey = survey(model, inventory, samples.rows, True)
        permute_(run, samples.rows, make_batches(samples.rows, 4)[0], found)
    return found, run.notes


def answer(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        output = model(**inputs)
    return output.logits if "logits" in output else output[0]


# ------------------------------------------------------------------------------------------------ the order


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 4), (4, 8), (3, 5), (1, 2)])
@pytest.mark.parametrize("channels", [8, 40, 46, 300])
def test_an_order_holds_each_channel_once_and_keeps_no_less(keep: int, group: int, channels: int) -> None:
    torch.manual_seed(channels)
    part = Part(torch.rand(30, channels) ** 2 * torch.rand(channels), keep)
    order = best_order([part], group)
    assert order.sort().values.tolist() == list(range(channels))
    assert kept_importance([part], order, group) >= kept_importance([part], None, group)
    tail = channels // group * group
    assert order[tail:].tolist() == list(range(tail, channels))


def test_columns_that_crowd_one_group_are_spread() -> None:
    scores = torch.full((3, 16), 0.1)
    scores[:, :8] = 1.0  # the first two groups are strong, of which half would be lost
    order = best_order([Part(scores, 2)], 4)
    assert kept_importance([Part(scores, 2)], order, 4) == pytest.approx(24.0)


def test_a_best_order_stays() -> None:
    scores = torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(4)[None]
    assert best_order([Part(scores, 2)], 4).tolist() == list(range(16))


def test_rows_are_sampled_for_the_search_only() -> None:
    torch.manual_seed(0)
    part = Part(torch.rand(400, 32) * torch.rand(32), 2)
    order = best_order([part], 4, rows=20)
    assert kept_importance([part], order, 4) > kept_importance([part], None, 4)


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_the_assignment_is_scipys(size: int) -> None:
    from scipy.optimize import linear_sum_assignment

    gain = torch.randn(size, size, generator=torch.Generator().manual_seed(size))
    placed, won = _assigned(gain)
    rows, columns = linear_sum_assignment(gain.numpy(), maximize=True)
    best = float(gain[rows, columns].sum())
    assert float(gain[placed, torch.arange(size)].sum()) == pytest.approx(best, abs=1e-5)
    assert won == pytest.approx(best - float(gain.diagonal().sum()), abs=1e-5)


# ------------------------------------------------------------------------------------------------ places


@pytest.mark.parametrize("text", ["a.weight[0:8]", "a.weight[:, 4:8]", "a.up[3, :, 0:96:2]", "a.down[3, 1:96:2]"])
def test_places_are_written_as_numpy_writes_them(text: str) -> None:
    assert str(Place.parse(text)) == text


@pytest.mark.parametrize("text", ["", "a", "a[]", "a[:]", "a[0:8", "a[0:8, :]", "a[-1:3]", "a[x:3]", "a[1][0:3]"])
def test_what_is_no_place_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match="no place"):
        Place.parse(text)


def test_spaced() -> None:
    assert spaced([3, 5, 7]) == slice(3, 8, 2)
    assert spaced([4]) == slice(4, 5, 1)
    assert spaced([0, 2, 3]) is None
    assert spaced([3, 2, 1]) is None


# ------------------------------------------------------------------------------------------------ models

# What must have been reordered in each; families whose outputs are hidden states, say, keep their residual stream.
MODELS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "llama": (llama, {"mlp", "heads", "residual"}),
    "llama_tied": (lambda: llama(tie_word_embeddings=True), {"mlp", "heads", "residual"}),
    "llama_biases": (lambda: llama(attention_bias=True, mlp_bias=True), {"mlp", "heads", "residual"}),
    "mixtral": (mixtral, {"mlp", "heads", "residual"}),
    "phi3": (phi3, {"mlp", "heads", "residual"}),
    "bert": (bert, {"mlp", "heads", "residual"}),
    "t5": (t5, {"mlp", "heads", "residual"}),
}
NAMED = {
    "gpt2": {"mlp", "heads", "residual"},
    "gpt_neox": {"mlp", "heads", "residual"},
    "qwen2": {"mlp", "heads", "residual"},
    "qwen3": {"mlp", "residual"},  # heads of 6 values do not fit groups of four
    "gemma2": {"mlp", "heads", "residual"},
    "gemma3_text": {"mlp", "heads", "residual"},
    "olmo2": {"mlp", "heads", "residual"},
    "bloom": {"mlp", "heads", "residual"},
    "falcon_new": {"mlp", "heads", "residual"},
    "gpt_oss": {"mlp", "heads", "residual"},
    "dbrx": {"mlp", "heads", "residual"},
}


def sorts(names: Any) -> set[str]:
    return {"residual" if name == "residual" else "heads" if name[-1].isdigit() else "mlp" for name in names}


def check(model: nn.Module, inputs: dict[str, torch.Tensor], rows: Any) -> tuple[Permutations, list[str]]:
    before, dense = weights(model), answer(model, inputs)
    found, notes = permuted(model, rows, num_samples=1 if isinstance(rows, list) else len(ROWS))
    after = answer(model, inputs)
    assert float((after - dense).norm()) <= 1e-4 * float(dense.norm())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    places = {Place.parse(text).tensor for texts in found.places.values() for text in texts}
    assert changed <= places
    assert bool(changed) == bool(found.orders)
    return found, notes


@pytest.mark.parametrize("name", MODELS)
def test_the_dense_model_answers_the_same(name: str) -> None:
    make, expected = MODELS[name]
    model = enliven(make())
    inputs = {"input_ids": token_rows(2, seed=5)}
    if name == "t5":
        inputs["decoder_input_ids"] = token_rows(2, 6, seed=6)
    found, notes = check(model, inputs, ROWS)
    assert sorts(found.orders) == expected, notes


@pytest.mark.parametrize("name", NAMED)
def test_so_do_other_families(name: str) -> None:
    model, inputs = FAMILIES[name].build()
    found, notes = check(enliven(model), inputs, [inputs])
    assert sorts(found.orders) == NAMED[name], notes


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(NAMED)))
def test_no_family_is_broken(name: str) -> None:
    model, inputs = FAMILIES[name].build()
    check(enliven(model), inputs, [inputs])
