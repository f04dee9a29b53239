"""Local reconstruction: kept weights and norms move towards the dense model's hidden states, zeros stay, and no block gets worse."""

import copy
from typing import Any

import pytest
import torch
from families_table import FAMILIES
from models import llama, outputs_are_finite, phi3, token_rows

import hf_sparse.reconstruct as module
from hf_sparse import SparsityConfig, prune_
from hf_sparse.errors import ConfigError

ROWS = token_rows(16)


def config(update: Any = "reconstruct", **changes: Any) -> SparsityConfig:
    given: dict[str, Any] = {
        "metric": "wanda", "update": update, "calibration": ROWS, "num_samples": len(ROWS), "batch_size": 4,
        "options": {"reconstruct": {"steps": 24}},
    }  # fmt: skip
    return SparsityConfig(**{**given, **changes})


def pruned(update: Any = "reconstruct", **changes: Any) -> tuple[Any, Any]:
    model = llama().to(changes.pop("dtype", torch.float32))
    return model, prune_(model, config(update, **changes))


def untrained(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Any:
    """The model as it is pruned before its blocks are trained."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "_train", lambda *given: False)
        return pruned(**changes)[0]


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "unstructured"])
@pytest.mark.parametrize("axis", ["input", "output"])
def test_zeros_stay_and_nothing_else_becomes_one(pattern: str, axis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, report = pruned(pattern=pattern, axis=axis, sparsity=0.5)
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    before = untrained(monkeypatch, pattern=pattern, axis=axis, sparsity=0.5)
    block = (model.model.layers[0], before.model.layers[0])  # later masks depend on what was trained before
    for one, other in zip(block[0].parameters(), block[1].parameters(), strict=True):
        if one.ndim == 2:
            assert torch.equal(one != 0, other != 0)


def test_errors_of_the_blocks_fall() -> None:
    many: dict[str, Any] = {"calibration": token_rows(96, 32), "num_samples": 96}
    _, plain = pruned(("dense_stream", "admm"), **many)
    options = {"reconstruct": {"steps": 100, "learning_rate": 0.02}}
    _, trained = pruned(("dense_stream", "admm", "reconstruct"), options=options, **many)
    for before, after in zip(plain.blocks, trained.blocks, strict=True):
        assert after.output_error < before.output_error


def test_learning_the_samples_by_heart_is_seen_on_those_kept_for_checking() -> None:
    many_steps = {"reconstruct": {"steps": 200}}
    _, report = pruned(
        ("dense_stream", "admm", "reconstruct"),
        calibration=token_rows(8, 4),
        num_samples=8,
        batch_size=1,
        options=many_steps,
    )
    assert sum("did not lower the error" in note for note in report.notes) == 2


@pytest.mark.parametrize(("number", "checked"), [(1, [0]), (3, [0, 1, 2]), (4, [3]), (8, [7]), (17, [7, 15])])
def test_one_call_in_eight_is_kept_for_checking(number: int, checked: list[int]) -> None:
    train, check = module._split(number)
    assert check == checked
    assert number < 4 or not set(train) & set(check)
    assert sorted({*train, *check}) == list(range(number))


def test_norms_are_trained_and_all_else_is_left_alone() -> None:
    model, _ = pruned()
    dense = llama()
    changed = {
        name
        for (name, one), other in zip(model.named_parameters(), dense.parameters(), strict=True)
        if not torch.equal(one, other)
    }
    assert "model.layers.0.input_layernorm.weight" in changed
    assert not {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} & changed
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_sites_that_are_not_targeted_stay_as_they_are() -> None:
    model, _ = pruned(targets="mlp")
    attention = zip(
        model.model.layers[0].self_attn.parameters(), llama().model.layers[0].self_attn.parameters(), strict=True
    )
    assert all(torch.equal(one, other) for one, other in attention)


def test_gradients_are_left_as_the_caller_had_them() -> None:
    model = llama()
    attention = model.model.layers[0].self_attn
    attention.q_proj.weight.grad = torch.ones_like(attention.q_proj.weight)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    prune_(model, config(targets="mlp"))
    assert torch.equal(attention.q_proj.weight.grad, torch.ones_like(attention.q_proj.weight))
    others = (p for p in model.parameters() if p is not attention.q_proj.weight)
    assert all(parameter.grad is None for parameter in others)
    assert not model.model.layers[1].mlp.up_proj.weight.requires_grad
    assert attention.k_proj.weight.requires_grad


def test_rows_of_a_fused_matrix_that_are_not_targeted_stay_as_they_are() -> None:
    model = phi3()
    prune_(model, SparsityConfig(metric="magnitude", targets=["*.gate"]))
    fused = model.model.layers[0].mlp.gate_up_proj.weight
    gate, up = (part.clone() for part in fused.detach().chunk(2))
    prune_(model, config(targets=["*.up"]))
    new_gate, new_up = fused.detach().chunk(2)
    assert torch.equal(new_gate, gate)
    assert not torch.equal(new_up, up)


def test_what_the_allocation_leaves_dense_is_not_trained() -> None:
    dense, model = llama(), llama()
    report = prune_(model, config(allocation=[0.0, 0.5]))
    assert report.sparsity == 0.25
    for one, other in zip(model.model.layers[0].parameters(), dense.model.layers[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_site_of_which_nothing_is_left_does_not_stop_the_others() -> None:
    model = llama()
    report = prune_(
        model, config(pattern="unstructured", allocation="atp", sparsity=0.5, options={"atp": {"step": 1.0}})
    )
    assert [block.sparsity for block in report.blocks] == [0.0, 1.0]
    assert not any("no finite loss" in note for note in report.notes)


def test_the_same_seed_gives_the_same_weights() -> None:
    one, other = pruned()[0], pruned()[0]
    assert all(torch.equal(left, right) for left, right in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_trained_in_single_and_keep_their_dtype(dtype: torch.dtype) -> None:
    model, report = pruned(dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert not any("put back" in note for note in report.notes)


def test_training_that_does_not_help_is_undone_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model, report = pruned(options={"reconstruct": {"steps": 24, "learning_rate": 10.0}})
    plain = untrained(monkeypatch)
    notes = [note for note in report.notes if "put back" in note]
    assert len(notes) == 2
    assert "model.layers.0" in notes[0]
    for one, other in zip(model.model.layers[0].parameters(), plain.model.layers[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_nan_stops_training_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    true_error = module._error

    def broken(output: Any, target: torch.Tensor) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return true_error(output, target) * (torch.nan if torch.is_grad_enabled() else 1.0)

    monkeypatch.setattr(module, "_error", broken)
    _, report = pruned()
    assert sum(calls) == 2  # one step in each of two blocks
    assert sum("no finite loss" in note for note in report.notes) == 2


def test_the_batch_is_small_unless_a_size_is_given() -> None:
    _, report = pruned(batch_size="auto", options={"reconstruct": {"steps": 2, "batch_tokens": 32}})
    assert report.calibration["batch_size"] == 2


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"steps": 1.5}, {"learning_rate": -1.0}, {"learning_rate": "fast"}, {"step": 3}]
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="reconstruct"):
        config(options={"reconstruct": options})


@pytest.mark.parametrize("family", ["phi3", "gpt2", "qwen3_moe", "t5", "whisper"])
def test_families(family: str) -> None:
    model, inputs = FAMILIES[family].build()
    before = copy.deepcopy(model.state_dict())
    report = prune_(model, config(calibration=[inputs] * 2, num_samples=2, options={"reconstruct": {"steps": 4}}))
    assert report.sparsity == pytest.approx(0.5, abs=0.02)
    assert before.keys() == model.state_dict().keys()
    assert outputs_are_finite(model, inputs)
