"""What `hf-sparse bench` measures and says; how long anything takes is no matter here."""

import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch

from hf_sparse import SparsityConfig, native, prune_, use_sparse_kernels_
from hf_sparse.bench import CONTROL, DENSE, SPARSE, bench
from hf_sparse.cli import main
from hf_sparse.errors import ModelError
from hf_sparse.runtime import sparse_modules
from hf_sparse.runtime.timing import Times, interleaved, read_bandwidth

QUICK: dict[str, Any] = {"tokens": (1, 3), "prompt": 4, "new_tokens": 2, "prefill": 8, "seconds": 0.0, "rounds": 5}
WORDS = ["--tokens", "1", "--prompt", "4", "--new-tokens", "2", "--prefill", "8", "--seconds", "0"]
WAYS = [DENSE, CONTROL, SPARSE] if native.available() else [DENSE, SPARSE]


@pytest.fixture(autouse=True)
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_sparse.runtime.copies.copies_bytes", lambda: 1)
    monkeypatch.setattr("hf_sparse.bench.read_bandwidth", lambda: 1e9)


def pruned(family: str = "llama") -> Any:
    model = getattr(models, family)().bfloat16()
    prune_(model, SparsityConfig(metric="magnitude"))
    return model


def test_every_shape_in_every_way() -> None:
    model = pruned()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = bench(model, name="llama", **QUICK)
    shapes = {row.shape for row in found.table.rows}
    assert len(found.kernels) == len(shapes) * 2 * len(WAYS)
    assert [row.way for row in found.kernels[: len(WAYS)]] == WAYS
    assert [row.way for row in found.end_to_end] == 2 * WAYS
    for row in (*found.kernels, *found.end_to_end):
        assert row.rounds >= 5
        assert row.low <= row.milliseconds <= row.high
        assert row.way != DENSE or row.speedup == 1
    for row in found.kernels:
        assert row.bytes is not None
        assert row.bandwidth_share is not None
        assert row.bandwidth_share > 0
    assert not list(sparse_modules(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_that_generates_nothing() -> None:
    found = bench(pruned("bert"), **QUICK)
    assert found.kernels
    assert not found.end_to_end


def test_conv1d_is_measured_as_out_by_in() -> None:
    found = bench(pruned("gpt2"), **QUICK)
    assert {row.work for row in found.kernels} >= {"96 x 32, 50 % zeros", "128 x 32, 50 % zeros"}


def test_markdown_and_json() -> None:
    found = bench(pruned(), name="llama", **QUICK)
    lines = found.markdown().splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in tables} == {8}
    assert len(tables) == 4 + len(found.kernels) + len(found.end_to_end)
    again = json.loads(json.dumps(found.to_dict()))
    assert len(again["kernels"]) == len(found.kernels)
    assert again["machine"]["threads"] == torch.get_num_threads()


def test_nothing_to_measure() -> None:
    with pytest.raises(ModelError, match="no zeros"):
        bench(models.llama().bfloat16(), **QUICK)
    model = models.llama()
    prune_(model, SparsityConfig(metric="magnitude"))
    with pytest.raises(ModelError, match="bfloat16"):
        bench(model, **QUICK)
    model = pruned()
    use_sparse_kernels_(model, choose="always")
    with pytest.raises(ModelError, match="use_dense_kernels_"):
        bench(model, **QUICK)


@pytest.mark.parametrize("extra", [["--pattern", "2:4"], ["--sparsity", "0.7", "--random-weights"]])
def test_the_command(extra: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models.llama(bos_token_id=None).bfloat16().save_pretrained(tmp_path)
    capsys.readouterr()
    assert main(["bench", str(tmp_path), "--json", "--threads", "1", *WORDS, *extra]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["threads"] == 1
    assert {row["work"].partition(",")[2] for row in found["kernels"]} <= {" 50 % zeros", " 70 % zeros"}
    assert main(["bench", str(tmp_path), *WORDS, *extra]) == 0
    assert "| whole model |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong",
    [
        ["--tokens", "0"],
        ["--new-tokens", "0"],
        ["--threads", "-1"],
        ["--threads", "0"],
        ["--seconds", "nan"],
        ["--seconds", "-1"],
        ["--device", "cuda"],
        ["--pattern", "5:4"],
    ],
)
def test_refused(wrong: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models.llama().bfloat16().save_pretrained(tmp_path)
    assert main(["bench", str(tmp_path), *wrong]) == 1
    assert "error" in capsys.readouterr().err


def test_the_command_says_why_nothing_runs_sparse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models.llama(bos_token_id=None).save_pretrained(tmp_path)
    for extra in (["--dtype", "float32"], ["--random-weights", "--dtype", "float32", "--pattern", "2:4"]):
        assert main(["bench", str(tmp_path), *WORDS, *extra]) == 1
        assert ("no zeros" if len(extra) == 2 else "would round them to bfloat16") in capsys.readouterr().err
    assert main(["bench", str(tmp_path), *WORDS, "--pattern", "2:4", "--dtype", "bfloat16", "--prompt", "100"]) == 1
    assert "64 positions" in capsys.readouterr().err


def test_times() -> None:
    times = Times((1.0, 2.0, 3.0, 4.0, 5.0))
    assert (times.share(0.1), times.median, times.share(1)) == (1, 3, 5)
    turns: list[str] = []
    found = interleaved({"a": [lambda: turns.append("a")], "b": [lambda: turns.append("b")]}, 0.0, most=5)
    assert turns == ["a", "b"] * 6  # the first round warms up
    assert {len(times.seconds) for times in found.values()} == {5}
    assert len(interleaved({"a": [lambda: None]}, 0.0, least=12)["a"].seconds) == 12
    assert read_bandwidth(2**20, 1) > 0


def test_rounds_of_the_whole_model() -> None:
    assert {row.rounds for row in bench(pruned(), **{**QUICK, "rounds": 7}).end_to_end} == {7}


def test_a_model_in_training_mode_is_timed_as_it_runs() -> None:
    model = pruned().train()
    seen: list[bool] = []
    model.model.layers[0].register_forward_hook(lambda module, given, result: seen.append(module.training))
    bench(model, **QUICK)
    assert set(seen) == {False}
    assert model.training
