"""Masked execution: dense where all is kept, causal, per sequence, refreshed when it says, and never without effect."""

from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from models import token_rows
from predictor_cases import FAMILIES, made, small_llama, traced
from transformers import DynamicCache

from hf_sparse.errors import ConfigError, ModelError
from hf_sparse.predictors.masked import masked
from hf_sparse.predictors.networks import KINDS, Predictor
from hf_sparse.predictors.select import Selection
from hf_sparse.predictors.train import _put_together
from hf_sparse.predictors.units import find_units, module_of

HALF = Selection(keep_neurons=0.5, keep_heads=0.5)
ALL = Selection(keep_neurons=1.0, keep_heads=1.0)
CASES = [
    *[(family, "shadow") for family in FAMILIES],
    *[("llama", kind) for kind in KINDS if kind != "shadow"],
    *[("phi3", "gate_first"), ("gemma", "gate_first"), ("gpt2", "oracle"), ("opt", "dejavu")],
]


def untrained(model: Any, folder: Path, kind: str = "shadow", neuron_block: int = 1, **options: Any) -> Predictor:
    """A predictor with random weights that differ from token to token: execution does not care what it has learned."""
    torch.manual_seed(1)
    predictor = _put_together(model, traced(model, folder, neuron_block=neuron_block), kind, options)
    for parameter in predictor.parameters():
        parameter.data.normal_()
    return predictor.eval().requires_grad_(False)


def logits(model: Any, rows: torch.Tensor, **settings: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=rows, **settings).logits


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_everything_kept_is_dense_exactly(family: str, kind: str, tmp_path: Path) -> None:
    model, rows = made(family), token_rows(2, 9, seed=5)
    dense = logits(model, rows)
    with masked(model, untrained(model, tmp_path, kind), ALL, prompt="masked"):
        assert torch.equal(logits(model, rows), dense)


@pytest.mark.parametrize(("family", "kind"), CASES)
@pytest.mark.parametrize(
    "selection", [Selection(keep_neurons=0.5), Selection(keep_neurons=1.0, keep_heads=0.5)], ids=["neurons", "heads"]
)
def test_masks_have_an_effect_of_either_kind(family: str, kind: str, selection: Selection, tmp_path: Path) -> None:
    model, rows = made(family), token_rows(2, 9, seed=5)
    dense = logits(model, rows)
    with masked(model, untrained(model, tmp_path, kind), selection, prompt="masked"):
        assert (logits(model, rows) - dense).abs().mean() > 1e-3 * dense.abs().mean()
    assert torch.equal(logits(model, rows), dense)  # and none afterwards


@pytest.mark.parametrize("neuron_block", [1, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_masked_units_are_zero(family: str, neuron_block: int, tmp_path: Path) -> None:
    model, rows, seen = made(family), token_rows(2, 7, seed=5), []
    predictor = untrained(model, tmp_path, neuron_block=neuron_block)
    block = find_units(model)[1]

    def look() -> None:
        for site in (block.o, block.down):
            module_of(model, site).register_forward_pre_hook(lambda _, args: seen.append(args[0]))

    look()  # hooks run in the order in which they were made: these see what the masks have not touched
    with masked(model, predictor, HALF, prompt="masked") as running:
        look()
        logits(model, rows)
        masks = running.masks[0]
    heads, heads_left, neurons, neurons_left = (values.reshape(14, -1) for values in seen)
    assert torch.equal(neurons_left, neurons * predictor.layout.expand(masks.neurons, 48).reshape(14, 48))
    assert torch.equal(heads_left, heads * masks.heads.reshape(14, 4).repeat_interleave(8, -1))
    groups = 48 // neuron_block
    assert masks.neurons.sum(-1).unique().tolist() == [max(1, round(groups / 2))]
    assert masks.heads.sum(-1).unique().tolist() == [2]


def test_blocks_that_are_dense_skip_nothing(tmp_path: Path) -> None:
    model, seen = small_llama(), {}
    with masked(model, untrained(model, tmp_path), HALF, prompt="masked"):
        for block in find_units(model):
            module_of(model, block.down).register_forward_pre_hook(
                lambda _, args, at=block.index: seen.__setitem__(at, int((args[0] == 0).sum()))
            )
        logits(model, token_rows(1, 8))
    assert seen == {0: 0, 1: 8 * 24, 2: 8 * 24}


# ------------------------------------------------------------------------------------------------ causal


@pytest.mark.parametrize(
    ("kind", "mode"),
    [*[(kind, "block") for kind in KINDS], *[(kind, "global") for kind in ("shadow", "static", "oracle")]],
)
def test_later_tokens_change_no_earlier_mask(kind: str, mode: str, tmp_path: Path) -> None:
    model, at = small_llama(), 6
    one, other = token_rows(1, 12, seed=2), token_rows(1, 12, seed=2)
    other[:, at + 1 :] = token_rows(1, 12, seed=3)[:, at + 1 :]
    selection = Selection(keep_neurons=0.5, keep_heads=0.5, mode=mode)
    found = []
    with masked(model, untrained(model, tmp_path, kind), selection, prompt="masked") as running:
        for rows in (one, other):
            outputs = logits(model, rows)
            found.append((outputs, dict(running.masks)))
    torch.testing.assert_close(found[0][0][:, : at + 1], found[1][0][:, : at + 1])
    changed = False
    for position, masks in found[0][1].items():
        for mine, theirs in zip(masks, found[1][1][position]):
            assert torch.equal(mine[:, : at + 1], theirs[:, : at + 1])
            changed |= not torch.equal(mine[:, at + 1 :], theirs[:, at + 1 :])
    assert changed == (kind != "static")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "oracle"])
@pytest.mark.parametrize("every", [1, 3])
def test_token_by_token_is_the_same_as_at_once(kind: str, every: int, tmp_path: Path) -> None:
    """With a cache, a dense prompt of one token aside: so the figures of one pass are those of decoding."""
    model, rows = small_llama(), token_rows(2, 10, seed=2)
    predictor = untrained(model, tmp_path, kind)
    with masked(model, predictor, HALF, refresh_every=every, prompt="masked"):
        at_once = logits(model, rows)
    cache, parts = DynamicCache(config=model.config), []
    with masked(model, predictor, HALF, refresh_every=every, prompt="masked"):
        for piece in rows.split([1, 1, 3, 1, 2, 1, 1], 1):
            parts.append(logits(model, piece, past_key_values=cache))
    torch.testing.assert_close(torch.cat(parts, 1), at_once, rtol=1e-4, atol=1e-4)


def test_sequences_of_a_batch_do_not_know_each_other(tmp_path: Path) -> None:
    model, rows = small_llama(), token_rows(3, 8, seed=4)
    with masked(model, untrained(model, tmp_path), HALF, refresh_every=2, prompt="masked") as running:
        together = logits(model, rows)
        masks = running.masks[1].neurons
        for row in range(3):
            torch.testing.assert_close(
                logits(model, rows[row : row + 1]), together[row : row + 1], rtol=1e-4, atol=1e-4
            )
            assert torch.equal(running.masks[1].neurons[0], masks[row])
    assert not torch.equal(masks[0], masks[1])


# ------------------------------------------------------------------------------------------------ prompt and refreshing


def test_a_prompt_is_dense_and_what_follows_is_not(tmp_path: Path) -> None:
    model, rows = small_llama(), token_rows(1, 9, seed=2)
    dense_cache, cache = DynamicCache(config=model.config), DynamicCache(config=model.config)
    dense = [logits(model, part, past_key_values=dense_cache) for part in (rows[:, :6], rows[:, 6:7])]
    with masked(model, untrained(model, tmp_path), HALF) as running:
        assert torch.equal(logits(model, rows[:, :6], past_key_values=cache), dense[0])
        assert running.masks == {}
        assert not torch.equal(logits(model, rows[:, 6:7], past_key_values=cache), dense[1])
        assert running.masks[0].neurons.shape == (1, 1, 48)


@pytest.mark.parametrize(
    "more", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}], ids=str
)
def test_generate(more: dict[str, Any], tmp_path: Path) -> None:
    model, rows = small_llama(), token_rows(1 if "prompt_lookup_num_tokens" in more else 2, 5, seed=2)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **more}
    dense = model.generate(rows, **settings)
    predictor = untrained(model, tmp_path)
    with masked(model, predictor, ALL):
        assert torch.equal(model.generate(rows, **settings), dense)
    with masked(model, predictor, Selection(keep_neurons=0.1, keep_heads=0.25)):
        assert not torch.equal(model.generate(rows, **settings), dense)
    assert torch.equal(model.generate(rows, **settings), dense)


def test_generating_in_another_thread(tmp_path: Path) -> None:
    """As streamers do."""
    model, rows, found = small_llama(), token_rows(1, 5, seed=2), []
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with masked(model, untrained(model, tmp_path), Selection(keep_neurons=0.1, keep_heads=0.25)):
        worker = Thread(target=lambda: found.append(model.generate(rows, **settings)))
        worker.start()
        worker.join()
        assert torch.equal(found[0], model.generate(rows, **settings))
    assert not torch.equal(found[0], model.generate(rows, **settings))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, rows = small_llama().to(dtype), token_rows(2, 9, seed=5)
    dense, predictor = logits(model, rows), untrained(model, tmp_path, kind)
    with masked(model, predictor, ALL, prompt="masked"):
        assert torch.equal(logits(model, rows), dense)
    with masked(model, predictor, HALF, prompt="masked"):
        sparse = logits(model, rows)
    assert sparse.dtype == dtype
    assert bool(sparse.isfinite().all())
    assert not torch.equal(sparse, dense)


def test_generating_without_a_cache_is_refused_since_it_would_be_dense(tmp_path: Path) -> None:
    model = small_llama()
    with masked(model, untrained(model, tmp_path), HALF), pytest.raises(ConfigError, match="without a cache"):
        model.generate(token_rows(1, 4), max_new_tokens=3, use_cache=False)


@pytest.mark.parametrize("kind", ["shadow", "gate_first"])
def test_choices_hold_between_refreshes(kind: str, tmp_path: Path) -> None:
    model, rows = small_llama(), token_rows(2, 11, seed=2)
    with masked(model, untrained(model, tmp_path, kind), HALF, refresh_every=4, prompt="masked") as running:
        logits(model, rows)
        masks = running.masks[0]
    for mask in masks:
        for start in (0, 4, 8):
            part = mask[:, start : start + 4]
            assert torch.equal(part, part[:, :1].expand_as(part))
        assert not torch.equal(mask[:, 3], mask[:, 4])


# ------------------------------------------------------------------------------------------------ refused


def test_training_is_refused(tmp_path: Path) -> None:
    model = small_llama()
    predictor = untrained(model, tmp_path)
    with pytest.raises(ModelError, match=r"model\.eval"), masked(model.train(), predictor, HALF):
        pass


def test_twice_is_refused_and_the_first_is_left_whole(tmp_path: Path) -> None:
    model, rows = small_llama(), token_rows(1, 5)
    dense, predictor = logits(model, rows), untrained(model, tmp_path)
    with masked(model, predictor, HALF, prompt="masked"):
        with pytest.raises(ModelError, match="already on"), masked(model, predictor, HALF):
            pass
        assert not torch.equal(logits(model, rows), dense)
    assert torch.equal(logits(model, rows), dense)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("kind", "options", "selection", "said"),
    [
        ("shadow", {"tells": ("heads",)}, HALF, "keep_neurons=0.5 needs a predictor that tells neurons"),
        ("gate_first", {"tells": ()}, HALF, "keep_heads=0.5 needs a predictor that tells heads"),
        ("dejavu", {}, Selection(mode="global"), "one by one"),
        ("gate_first", {}, Selection(mode="global"), "one by one"),
        ("shadow", {}, Selection(keep_neurons=(0.5, 0.5, 0.5)), "3 shares, 2 blocks skip"),
    ],
)
def test_what_a_predictor_cannot_choose_is_refused(
    kind: str, options: dict[str, Any], selection: Selection, said: str, tmp_path: Path
) -> None:
    model = small_llama()
    predictor = untrained(model, tmp_path, kind, **options)
    with pytest.raises(ConfigError, match=said), masked(model, predictor, selection):
        pass


def test_a_predictor_of_another_model_is_refused(tmp_path: Path) -> None:
    predictor = untrained(small_llama(), tmp_path)
    with (
        pytest.raises(ModelError, match="LlamaForCausalLM there, MistralForCausalLM here"),
        masked(made("mistral"), predictor, HALF),
    ):
        pass


def test_gates_are_needed_to_go_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gated feed-forwards"):
        untrained(made("opt"), tmp_path, "gate_first")


def test_an_oracle_does_not_generate(tmp_path: Path) -> None:
    model = small_llama()
    with masked(model, untrained(model, tmp_path, "oracle"), HALF), pytest.raises(ConfigError, match="cannot generate"):
        model.generate(token_rows(1, 4), max_new_tokens=3)


# ------------------------------------------------------------------------------------------------ choices that hold


def log_probability(model: Any, row: torch.Tensor, prompt: int) -> float:
    """Of what follows a prompt, token by token."""

    cache, total = DynamicCache(config=model.config), 0.0
    with torch.no_grad():
        logits = model(input_ids=row[None, :prompt], past_key_values=cache).logits[0, -1]
        for token in row[prompt:].tolist():
            total += float(logits.log_softmax(-1)[token])
            logits = model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
    return total


@pytest.mark.parametrize("every", [2, 3, 5])
def test_choices_that_hold_follow_their_beams(every: int, tmp_path: Path) -> None:
    model, rows = small_llama(), token_rows(2, 5, seed=4)
    with masked(model, untrained(model, tmp_path), HALF, refresh_every=every):
        found = model.generate(
            rows, attention_mask=torch.ones_like(rows), max_new_tokens=9, num_beams=4, do_sample=False, length_penalty=0.0,
            pad_token_id=0, eos_token_id=None, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        for row, score in zip(found.sequences, found.sequences_scores):
            assert float(score) == pytest.approx(log_probability(model, row, 5), abs=1e-3)
    assert not hasattr(model, "_reorder_cache")


@pytest.mark.parametrize("every", [2, 3, 5])
def test_guesses_that_are_taken_back_leave_choices_as_they_were(every: int, tmp_path: Path) -> None:
    model, rows = small_llama(), token_rows(1, 12, seed=4).repeat(1, 2)  # of what is said twice much is guessed
    settings: dict[str, Any] = {
        "attention_mask": torch.ones_like(rows), "max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
    }  # fmt: skip
    with masked(model, untrained(model, tmp_path), HALF, refresh_every=every):
        one_by_one = model.generate(rows, **settings)
        assert torch.equal(model.generate(rows, prompt_lookup_num_tokens=4, **settings), one_by_one)
