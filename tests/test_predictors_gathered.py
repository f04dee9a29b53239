"""Gathered execution gives what masked execution gives, reads nothing of what is left out, and leaves the model as it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import token_rows
from predictor_cases import made, small_llama
from test_predictors_masked import ALL, HALF, logits, untrained
from transformers import DynamicCache

from hf_sparse.errors import ConfigError, ModelError
from hf_sparse.predictors import gathered as ways
from hf_sparse.predictors.gathered import gathered
from hf_sparse.predictors.masked import masked
from hf_sparse.predictors.select import Selection
from hf_sparse.predictors.units import find_units, module_of

FAMILIES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "opt")
SETTINGS = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(autouse=True)
def _small_projections_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "LEAST_WEIGHTS", 0)


def decoded(model: Any, rows: torch.Tensor, prompt: int = 3) -> torch.Tensor:
    """Logits of a dense prompt and then token by token."""
    cache = DynamicCache(config=model.config)
    pieces = rows.split([prompt] + [1] * (rows.shape[1] - prompt), 1)
    return torch.cat([logits(model, piece, past_key_values=cache) for piece in pieces], 1)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_untouched(model: Any, before: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.is_contiguous()
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


CASES = [
    *[(family, "shadow") for family in FAMILIES],
    *[("llama", kind) for kind in ("dejavu", "static", "gate_first")],
    *[("phi3", "gate_first"), ("gemma", "gate_first"), ("opt", "dejavu")],
]


@pytest.mark.parametrize(("family", "kind"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gathered_is_masked_to_rounding(family: str, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, rows = made(family).to(dtype), token_rows(2, 9, seed=5)
    predictor = untrained(model, tmp_path, kind)
    before = weights(model)
    with masked(model, predictor, HALF):
        expected = decoded(model, rows)
    with gathered(model, predictor, HALF) as running:
        found = decoded(model, rows)
        assert set(running._rows) == {(at, of) for at in (0, 1) for of in ("neurons", "heads")}
    assert_untouched(model, before)
    dense = decoded(model, rows)
    assert (expected - dense).abs().mean() > 1e-2 * dense.abs().mean()
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    else:  # what is rounded differently may choose other units: most of the logits stay close
        assert (found - expected).abs().mean() < 0.25 * (dense - expected).abs().mean()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("neuron_block", [1, 16, 32])
def test_generating_gives_the_same_tokens(family: str, neuron_block: int, tmp_path: Path) -> None:
    model, rows = made(family), token_rows(2, 5, seed=2)
    predictor = untrained(model, tmp_path, neuron_block=neuron_block)
    with masked(model, predictor, HALF):
        expected = model.generate(rows, **SETTINGS)
    with gathered(model, predictor, HALF):
        assert torch.equal(model.generate(rows, **SETTINGS), expected)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(
    "more", [{"num_beams": 3}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}], ids=str
)
def test_ways_of_generating(more: dict[str, Any], every: int, tmp_path: Path) -> None:
    model, rows = small_llama(), token_rows(1 if "prompt_lookup_num_tokens" in more else 2, 5, seed=2)
    predictor = untrained(model, tmp_path)
    with masked(model, predictor, HALF, refresh_every=every):
        expected = model.generate(rows, **SETTINGS, **more)
    with gathered(model, predictor, HALF, refresh_every=every):
        assert torch.equal(model.generate(rows, **SETTINGS, **more), expected)


@pytest.mark.parametrize("kind", ["shadow", "gate_first"])
def test_a_batch_with_padding(kind: str, tmp_path: Path) -> None:
    model, rows = small_llama(), token_rows(3, 6, seed=2)
    attention = torch.ones_like(rows)
    attention[0, :3] = attention[1, :1] = 0
    predictor = untrained(model, tmp_path, kind)
    with masked(model, predictor, HALF):
        expected = model.generate(rows, attention_mask=attention, **SETTINGS)
    with gathered(model, predictor, HALF):
        assert torch.equal(model.generate(rows, attention_mask=attention, **SETTINGS), expected)


@pytest.mark.parametrize("selection", [Selection(keep_neurons=0.5, keep_heads=0.5, mode="global"), Selection(keep_neurons=(1.0, 0.3), keep_heads=(0.25, 1.0))], ids=["global", "shares"])  # fmt: skip
def test_choices_of_different_sizes(selection: Selection, tmp_path: Path) -> None:
    """Over all blocks at once the sequences of a batch keep different numbers in a block."""
    model, rows = small_llama(), token_rows(3, 9, seed=5)
    predictor = untrained(model, tmp_path)
    with masked(model, predictor, selection) as running:
        expected = decoded(model, rows)
        counts = {tuple(mask.sum(-1).flatten().tolist()) for masks in running.masks.values() for mask in masks if mask is not None}  # fmt: skip
    with gathered(model, predictor, selection):
        torch.testing.assert_close(decoded(model, rows), expected, rtol=1e-4, atol=1e-4)
    assert any(len(set(each)) > 1 for each in counts) == (selection.mode == "global")


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_kept_is_dense_exactly(family: str, tmp_path: Path) -> None:
    model, rows = made(family), token_rows(2, 9, seed=5)
    dense = decoded(model, rows)
    with gathered(model, untrained(model, tmp_path), ALL):
        assert torch.equal(decoded(model, rows), dense)


# ------------------------------------------------------------------------------------------------ really skipped


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "static"), ("phi3", "static"), ("opt", "static"), ("llama", "gate_first")]
)
def test_rows_that_are_left_out_are_not_read(family: str, kind: str, tmp_path: Path) -> None:
    """Not a number in all of them changes nothing; it would spread to all logits."""
    model, rows = made(family), token_rows(1, 6, seed=5)
    predictor = untrained(model, tmp_path, kind)
    cache = DynamicCache(config=model.config)
    with gathered(model, predictor, HALF) as running:
        logits(model, rows[:, :5], past_key_values=cache)
        expected = logits(model, rows[:, 5:], past_key_values=cache)
        cache.crop(-1)
        with torch.no_grad():
            for position in running.feeds:
                spoil(model, running, position, gate=kind != "gate_first")
        assert torch.equal(logits(model, rows[:, 5:], past_key_values=cache), expected)
    assert logits(model, rows).isnan().all()


def spoil(model: Any, running: Any, position: int, gate: bool) -> None:
    block = running.units[position]
    neurons, channels = (
        torch.zeros(block.neurons, dtype=torch.bool),
        torch.zeros(block.heads * block.head_size, dtype=torch.bool),
    )
    neurons[running._rows[position, "neurons"].indices[0]] = True
    channels[running._rows[position, "heads"].indices[0]] = True
    for site, kept in ((block.down, neurons), (block.o, channels)):
        module_of(model, site).weight[:, ~kept] = float("nan")
    for site in (block.up, block.gate if gate else None):
        if site is not None:
            start = 0 if site.rows is None else site.rows.start * site.rows.inner
            module_of(model, site).weight[start : start + block.neurons][~neurons] = float("nan")
    q = running.attentions[position]
    q.q.weight[q.q_rows[~channels]] = float("nan")


# ------------------------------------------------------------------------------------------------ the model stays whole


def fails(inside: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    inside.update(found)
    raise ZeroDivisionError


def test_weights_are_what_they_were_also_when_something_fails(tmp_path: Path) -> None:
    model = small_llama()
    predictor, before, inside = untrained(model, tmp_path), weights(model), {}
    with pytest.raises(ZeroDivisionError), gathered(model, predictor, HALF):
        fails(inside, weights(model))
    assert all(torch.equal(inside[name], value) for name, value in before.items())
    assert_untouched(model, before)


def test_a_pass_that_fails_leaves_the_next_ones_whole(tmp_path: Path) -> None:
    model, rows = small_llama(), token_rows(1, 7)
    predictor = untrained(model, tmp_path)
    down = module_of(model, find_units(model)[1].down)
    with gathered(model, predictor, HALF):
        expected = decoded(model, rows)
        handle = down.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decoded(model, rows)
        handle.remove()
        assert torch.equal(decoded(model, rows), expected)


def test_changes_made_inside_last(tmp_path: Path) -> None:
    model = small_llama()
    down = module_of(model, find_units(model)[1].down)
    with gathered(model, untrained(model, tmp_path), HALF), torch.no_grad():
        assert not down.weight.is_contiguous()  # column after column
        assert down.weight.untyped_storage().nbytes() == down.weight.nbytes  # and only so
        down.weight[3, 5] = 42
    assert down.weight[3, 5] == 42


def test_saving_inside(tmp_path: Path) -> None:
    model, rows = small_llama(), token_rows(1, 5)
    with gathered(model, untrained(model, tmp_path / "traces"), HALF):
        model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "saved"), rows), logits(model, rows))


def test_gradients_take_the_masked_way(tmp_path: Path) -> None:
    model, rows = small_llama(), token_rows(1, 6)
    cache = DynamicCache(config=model.config)
    with gathered(model, untrained(model, tmp_path), HALF) as running:
        logits(model, rows[:, :5], past_key_values=cache)
        model(input_ids=rows[:, 5:], past_key_values=cache).logits.sum().backward()
        assert not running._rows
    assert module_of(model, find_units(model)[1].up).weight.grad is not None


@pytest.mark.slow
def test_compiled(tmp_path: Path) -> None:
    model, rows = small_llama(), token_rows(1, 7)
    predictor = untrained(model, tmp_path)
    with gathered(model, predictor, HALF):
        expected = decoded(model, rows)
        model.compile(backend="eager")
        torch.testing.assert_close(decoded(model, rows), expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ refused


def test_what_cannot_be_gathered_is_refused(tmp_path: Path) -> None:
    model = small_llama()
    predictor, before = untrained(model, tmp_path), weights(model)
    with pytest.raises(ModelError, match="float16"), gathered(model.half(), predictor, HALF):
        pass
    model.float()
    with pytest.raises(ModelError, match=r"model\.eval"), gathered(model.train(), predictor, HALF):
        pass
    model.eval()
    with (
        gathered(model, predictor, HALF),
        pytest.raises(ModelError, match="already on"),
        masked(model, predictor, HALF),
    ):
        pass
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert before.keys() == weights(model).keys()
    with (
        pytest.raises(ConfigError, match="cannot generate"),
        gathered(model, untrained(model, tmp_path / "oracle", "oracle"), HALF),
    ):
        pass


def test_other_modules_are_refused(tmp_path: Path) -> None:
    model = made("gpt2")
    predictor = untrained(model, tmp_path)
    with pytest.raises(ModelError, match="Conv1D; chosen rows are read from plain"), gathered(model, predictor, HALF):
        pass


def test_norms_over_all_neurons_or_heads(tmp_path: Path) -> None:
    """What is left out would change what is kept."""
    model, rows = small_llama(), token_rows(1, 6)
    predictor, block = untrained(model, tmp_path), find_units(model)[1]
    attention = model.get_submodule(block.o.module.rpartition(".")[0])
    attention.q_norm = torch.nn.LayerNorm(block.heads * block.head_size)
    with gathered(model, predictor, HALF) as running:
        assert running.attentions[0].q is None
        decoded(model, rows)
    model.get_submodule(block.down.module.rpartition(".")[0]).norm = torch.nn.LayerNorm(block.neurons)
    with pytest.raises(ModelError, match="a norm over all of them"), gathered(model, predictor, HALF):
        pass
