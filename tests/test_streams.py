"""Fitting to the dense stream: what each site gets are the least squares of the pruned model's inputs and the dense one's products."""

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from families_table import FAMILIES
from models import llama, mixtral, outputs_are_finite, token_rows
from torch import nn

from hf_sparse import SparsityConfig, blockwise, is_sparse, prune_
from hf_sparse.errors import CalibrationError, ConfigError, HfSparseError, PruningInterrupted
from hf_sparse.lockstep import Lockstep
from hf_sparse.normal_equations import damped
from hf_sparse.registry import UPDATES
from hf_sparse.report import Report

STEP = {"iterations": 200, "damping": 0.01}


def config(rows: Any, **changes: Any) -> SparsityConfig:
    given: dict[str, Any] = {
        "metric": "wanda", "update": ("dense_stream", "least_squares"), "calibration": rows, "num_samples": len(rows),
        "options": {"least_squares": STEP, "dense_stream": {"inputs": 0.6, "residual": 0.8, "damping": 0.02}},
    }  # fmt: skip
    return SparsityConfig(**{**given, **changes})


def inputs_and_outputs(model: nn.Module, rows: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module name -> (input, output) as (tokens, features), of every Linear and block of one plain run."""
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or (name.startswith("model.layers.") and name.count(".") == 2):

            def look(module: nn.Module, given: Any, result: Any, name: str = name) -> None:
                result = result[0] if isinstance(result, tuple) else result
                found[name] = (given[0].flatten(0, -2).double(), result.flatten(0, -2).double())

            handles.append(module.register_forward_hook(look))
    with torch.no_grad():
        model(rows)
    for handle in handles:
        handle.remove()
    return found


def test_every_site_solves_its_normal_equations() -> None:
    rows = token_rows(12)
    dense, sparse = llama(), llama()
    prune_(sparse, config(rows))
    before, after = inputs_and_outputs(dense, rows), inputs_and_outputs(sparse, rows)
    checked = 0
    for name, module in sparse.named_modules():
        if not name.startswith("model.layers.") or not isinstance(module, nn.Linear):
            continue
        block = ".".join(name.split(".")[:3])
        weight = dense.get_submodule(name).weight.detach().double()
        x, x_dense = after[name][0], before[name][0]
        wanted = 0.6 * (x_dense - x) @ weight.T
        if name.endswith("o_proj"):
            wanted += 0.8 * (before[block][0] - after[block][0])
        if name.endswith("down_proj"):
            wanted += 0.8 * ((before[block][1] - before[name][1]) - (after[block][1] - after[name][1]))
        gram = x.T @ x
        target = weight + torch.linalg.solve(damped(gram, 0.02), (wanted.T @ x).T).T
        new = module.weight.detach().double()
        residual = ((target - new) @ damped(gram, 0.01))[new != 0]
        assert float(residual.norm()) <= 1e-3 * float((target @ damped(gram, 0.01)).norm()), name
        checked += 1
    assert checked == 14


def test_the_reports_errors_are_those_of_the_pruned_model_against_the_dense_one() -> None:
    rows = token_rows(12)
    dense, sparse = llama(), llama()
    report = prune_(sparse, config(rows))
    before, after = inputs_and_outputs(dense, rows), inputs_and_outputs(sparse, rows)
    for block in report.blocks:
        error = (after[block.name][1] - before[block.name][1]).norm() / before[block.name][1].norm()
        assert block.output_error == pytest.approx(float(error), rel=1e-4)


def test_the_batch_size_changes_nothing_but_rounding() -> None:
    rows, models = token_rows(12), [llama(), llama()]
    for model, size in zip(models, (1, 12), strict=True):
        prune_(model, config(rows, batch_size=size))
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "update",
    ["none", "dense_stream", ("dense_stream", "sparsegpt"), ("dense_stream", "admm"), ("dense_stream", "dsnot")],
)
@pytest.mark.parametrize("metric", ["magnitude", "dass"])
def test_any_metric_and_any_update_behind_it(update: Any, metric: str) -> None:
    model = llama()
    report = prune_(model, config(token_rows(12), update=update, metric=metric, options={}))
    assert report.sparsity == 0.5
    assert torch.isfinite(model(token_rows(2)).logits).all()


@pytest.mark.parametrize(
    "family",
    ["gemma3_text", "phi3", "gpt2", "gpt_neox", "qwen3_moe", "t5", "bart", "bert", "llava", "whisper", "mamba", "swin"],
)
def test_families(family: str) -> None:
    model, inputs = FAMILIES[family].build()
    report = prune_(model, config([inputs] * 3))
    assert report.sparsity == pytest.approx(0.5, abs=0.02)
    assert outputs_are_finite(model, inputs)


def test_experts_are_pruned_too_and_say_that_the_dense_stream_is_not_theirs() -> None:
    model = mixtral()
    report = prune_(model, config(token_rows(12)))
    experts = [site for site in report.sites if "experts" in site.name]
    assert len(experts) == 24
    assert all(site.sparsity == 0.5 for site in experts)
    assert all("dense stream" in site.note for site in experts if site.tokens)


def test_a_block_that_runs_several_times_is_refused_before_anything_changes() -> None:
    model, inputs = FAMILIES["albert"].build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match="several times"):
        prune_(model, config([inputs] * 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_too_few_tokens_are_told_with_the_numbers() -> None:
    with pytest.warns(UserWarning, match="20 calibration tokens cannot determine a Gram matrix of 48 inputs"):
        report: Report = prune_(llama(), config(token_rows(2, 10)))
    assert any("20 calibration tokens" in note for note in report.notes)
    assert report.sparsity == 0.5


def test_statistics_of_one_block_at_a_time_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[Any] = []
    most = 0

    class Counted(blockwise.Recorder):
        def __init__(self, *given: Any) -> None:
            nonlocal most
            super().__init__(*given)
            alive.append(weakref.ref(self))
            most = max(most, sum(one() is not None for one in alive))

    monkeypatch.setattr(blockwise, "Recorder", Counted)
    prune_(llama(layers=4), config(token_rows(12)))
    assert len(alive) == 4
    assert most == 1


def test_data_that_break_before_anything_changes_leave_the_model_and_its_claim() -> None:
    model = llama()
    prune_(model, SparsityConfig(metric="magnitude"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda *_: (torch.full((1, 1, 32), torch.nan),))
    with pytest.raises((CalibrationError, HfSparseError)) as caught:
        prune_(model, config(token_rows(12), targets=["*.o_proj"]))
    assert not isinstance(caught.value, PruningInterrupted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert is_sparse(model)


def test_when_memory_runs_out_before_anything_changes_the_batch_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    true_start = Lockstep.start

    def start(self: Lockstep, calls: Any) -> None:
        if len(calls) == 1:
            raise MemoryError
        true_start(self, calls)

    monkeypatch.setattr(Lockstep, "start", start)
    report = prune_(llama(), config(token_rows(12)))
    assert report.calibration["batch_size"] == 6
    assert any("halved" in note for note in report.notes)


def test_inside_the_callers_autocast_the_pruned_weights_are_used_and_solved_in_full() -> None:
    reports = {}
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            reports[autocast] = prune_(llama(), config(token_rows(12), update="least_squares"))
    for one, other in zip(reports[True].blocks, reports[False].blocks, strict=True):
        assert one.output_error == pytest.approx(other.output_error, rel=0.2)


def test_an_input_that_is_always_zero_does_no_harm_without_damping() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = 0
    options = {name: {"damping": 0.0} for name in ("dense_stream", "least_squares")}
    report = prune_(model, config(token_rows(12, 32), options=options))
    assert report.sparsity == 0.5
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_half_precision_weights_that_would_overflow_stay_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = UPDATES["least_squares"]
    monkeypatch.setitem(UPDATES._entries, "least_squares", replace(entry, function=lambda p: (p.target * 1e30, p.mask)))
    model = llama().half()
    report = prune_(model, config(token_rows(12), update="least_squares"))
    assert all("not finite" in site.note for site in report.sites)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_reordered_channels_do_not_disturb_the_dense_stream() -> None:
    report = prune_(llama(), config(token_rows(12), permute=True))
    assert report.permutations
    assert report.sparsity == 0.5
