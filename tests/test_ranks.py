"""Several processes prune one model: the masks of one process, one error for all, and no one left waiting."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from models import llama, mixtral, t5, token_rows
from processes.forked import Failed, die, many
from safetensors.torch import load_file
from torch import nn

from hf_sparse import SparsityConfig, prune_, ranks
from hf_sparse.blockwise import Run
from hf_sparse.errors import ConfigError
from hf_sparse.record import Recorder
from hf_sparse.registry import STATISTICS

ROWS = token_rows(7)
OUT_OF_STEP = 1e-4  # share of mask bits that ties within rounding may turn

pytestmark = pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="the processes are forked")


@pytest.fixture(autouse=True)
def soon_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ranks.TIMEOUT, "30")


def pruned(make: Callable[[], nn.Module], **fields: Any) -> dict[str, Any]:
    """A pruned model's weights and what its report says."""
    model = make()
    rows = fields.get("calibration", ROWS)
    given = {"calibration": rows, "num_samples": len(ROWS if rows is None else rows), "batch_size": 2, **fields}
    report = prune_(model, SparsityConfig(**given))
    return {
        "weights": {name: value.numpy() for name, value in model.state_dict().items()},
        "errors": [block.output_error for block in report.blocks], "tokens": [site.tokens for site in report.sites],
        "site errors": [site.output_error for site in report.sites], "processes": report.processes, "notes": report.notes,
        "batch_size": (report.calibration or {}).get("batch_size"),
    }  # fmt: skip


def check_same(one: dict[str, Any], found: dict[int, Any], world: int) -> None:
    """All processes have the same bits, and but for ties the masks of one process."""
    failed = [value for value in found.values() if isinstance(value, Failed)]
    assert not failed, failed
    assert len(found) == world
    for name, weight in found[0]["weights"].items():
        for other in range(1, world):
            assert numpy.array_equal(weight, found[other]["weights"][name]), name
    turned = sum(
        int(((weight != 0) != (one["weights"][name] != 0)).sum()) for name, weight in found[0]["weights"].items()
    )
    assert turned <= OUT_OF_STEP * sum(weight.size for weight in one["weights"].values())
    assert found[0]["processes"] == world
    assert found[0]["tokens"] == one["tokens"]
    for key in ("errors", "site errors"):
        here, there = ([value or 0.0 for value in given[key]] for given in (found[0], one))
        assert here == pytest.approx(there, rel=1e-2, abs=1e-6), key


# ------------------------------------------------------------------------------------------------ the same masks

UNSTRUCTURED = {"pattern": "unstructured", "sparsity": 0.5, "metric": "wanda"}
FAST = [{"metric": "wanda"}, {"metric": "sparsegpt"}, {}]
RECIPES = [
    {"metric": "dass"}, {"metric": "ria"}, {"metric": "wanda", "update": "dsnot"}, {"metric": "wanda", "update": "least_squares"},
    {"metric": "wanda", "update": "admm"}, {"update": ("dense_stream", "admm", "reconstruct"), "options": {"reconstruct": {"steps": 8}}},
    {"metric": "wanda", "update": "reconstruct", "options": {"reconstruct": {"steps": 8}}}, {**UNSTRUCTURED, "allocation": "owl"},
    {**UNSTRUCTURED, "allocation": "atp", "options": {"atp": {"selector": "alignment"}}}, {**UNSTRUCTURED, "allocation": "search"},
    {"metric": "wanda", "permute": True}, {"permute": True}, {"metric": "magnitude", "calibration": None},
]  # fmt: skip


def both(make: Callable[[], nn.Module], recipes: list[dict[str, Any]], folder: Path, world: int) -> None:
    found = many(lambda rank: [pruned(make, **recipe) for recipe in recipes], folder, world)
    for number, recipe in enumerate(recipes):
        print(recipe)  # shown where a test fails
        parts = {rank: value if isinstance(value, Failed) else value[number] for rank, value in found.items()}
        check_same(pruned(make, **recipe), parts, world)


def test_masks_are_those_of_one_process(tmp_path: Path) -> None:
    both(llama, FAST, tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("make", [llama, mixtral])
def test_every_recipe(make: Callable[[], nn.Module], world: int, tmp_path: Path) -> None:
    both(make, FAST + RECIPES, tmp_path, world)


@pytest.mark.slow
def test_encoder_and_decoder(tmp_path: Path) -> None:
    both(t5, [*FAST, {"metric": "wanda", "permute": True}], tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [{"metric": "wanda"}, {}])
def test_fewer_samples_than_processes(recipe: dict[str, Any], tmp_path: Path) -> None:
    rows = token_rows(1)
    found = many(lambda rank: pruned(llama, calibration=rows, **recipe), tmp_path, 3)
    check_same(pruned(llama, calibration=rows, **recipe), found, 3)


@pytest.mark.slow
def test_samples_of_many_lengths_and_kinds(tmp_path: Path) -> None:
    rows = [{"input_ids": token_rows(1, length, length)} for length in (5, 16, 9, 16, 3)]
    found = many(lambda rank: pruned(mixtral, metric="wanda", calibration=rows), tmp_path, 2)
    check_same(pruned(mixtral, metric="wanda", calibration=rows), found, 2)


@pytest.mark.slow
def test_blocks_that_share_weights_run_several_times(tmp_path: Path) -> None:
    from transformers import AlbertConfig, AlbertForMaskedLM

    def albert() -> nn.Module:
        torch.manual_seed(0)
        config = AlbertConfig(
            vocab_size=64, embedding_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        )  # fmt: skip
        return AlbertForMaskedLM(config).eval()

    found = many(lambda rank: pruned(albert, metric="wanda"), tmp_path, 3)
    check_same(pruned(albert, metric="wanda"), found, 3)


@pytest.mark.slow
def test_automatic_batches_leave_no_process_idle(tmp_path: Path) -> None:
    found = many(lambda rank: pruned(llama, metric="wanda", batch_size="auto"), tmp_path)
    assert found[0]["batch_size"] == 4  # of 7 samples, which one process takes in one batch


# ------------------------------------------------------------------------------------------------ errors


def broken(rank: int) -> Any:
    if rank == 1:
        Run.prune = lambda *given: 1 / 0  # type: ignore[method-assign]
    return pruned(llama, metric="wanda")


def killed(rank: int) -> Any:
    if rank == 1:
        Run.prune = lambda *given: die()  # type: ignore[method-assign,assignment]
    return pruned(llama, metric="wanda")


def interrupted(rank: int) -> Any:
    def stop(*given: Any) -> Any:
        raise KeyboardInterrupt

    if rank == 1:
        Run.prune = stop  # type: ignore[method-assign]
    return pruned(llama, metric="wanda")


def short_of_memory(rank: int) -> Any:
    seen = Recorder.seen

    def sparing(self: Recorder, operand: Any, x: torch.Tensor, product: torch.Tensor) -> None:
        if x.numel() // x.shape[-1] > 16:
            raise MemoryError("not enough memory")
        seen(self, operand, x, product)

    if rank == 1:
        Recorder.seen = sparing  # type: ignore[method-assign]
    return pruned(llama, metric="wanda", batch_size=4)["notes"]


def poisoned(rank: int) -> Any:
    """A model that gives infinite values for one sample, which only one process runs."""

    def make() -> nn.Module:
        model = llama()
        model.model.embed_tokens.weight.data[63] = float("inf")
        return model

    rows = [{"input_ids": token_rows(1, 16, 5).clamp_max(62)} for _ in range(4)]
    rows[3]["input_ids"][0, 3] = 63
    return pruned(make, metric="wanda", calibration=rows, batch_size=1)


def test_an_error_of_one_is_the_error_of_all(tmp_path: Path) -> None:
    found = many(broken, tmp_path)
    assert found[0] == found[1]
    assert found[0].kind == "PruningInterrupted"
    assert "ZeroDivisionError in process 1 of 2" in found[0].message


def test_a_killed_process_ends_the_others(tmp_path: Path) -> None:
    found = many(killed, tmp_path, 3)
    assert sorted(found) == [0, 2]
    for failed in found.values():
        assert failed.kind == "PruningInterrupted"
        assert "has lost another one, which was killed" in failed.message
        assert "start all of them again" in failed.message


@pytest.mark.slow
def test_an_interrupted_process_ends_the_others(tmp_path: Path) -> None:
    found = many(interrupted, tmp_path)
    assert found[1].kind == "KeyboardInterrupt"
    assert "process 1 was interrupted" in found[0].message


@pytest.mark.slow
def test_memory_that_runs_out_in_one_halves_the_batches_of_all(tmp_path: Path) -> None:
    found = many(short_of_memory, tmp_path)
    halved = [f"memory ran out; the batch size was halved to {size}" for size in (2, 1)]
    assert found == {0: halved, 1: halved}


@pytest.mark.slow
def test_data_that_overflow_are_named_once(tmp_path: Path) -> None:
    found = many(poisoned, tmp_path)
    assert found[0] == found[1]
    assert found[0].kind == "CalibrationError"
    assert "NaN or infinite for sample 3" in found[0].message


def other_data(rank: int) -> Any:
    return pruned(llama, metric="wanda", calibration=token_rows(7, seed=rank))


def other_config(rank: int) -> Any:
    return pruned(llama, metric=("wanda", "ria")[rank])


def other_weights(rank: int) -> Any:
    def make() -> nn.Module:
        model = llama()
        model.lm_head.weight.data[0, 0] += rank
        return model

    return pruned(make, metric="wanda")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "words"),
    [(other_data, "calibration samples"), (other_config, "'metric': 'ria'"), (other_weights, "weights")],
)
def test_what_differs_is_refused(work: Callable[[int], Any], words: str, tmp_path: Path) -> None:
    found = many(work, tmp_path)
    assert found[0] == found[1]
    assert found[0].kind == "ModelError"
    assert words in found[0].message


@pytest.mark.slow
def test_a_process_that_never_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ranks.TIMEOUT, "2")
    found = many(lambda rank: pruned(llama, metric="wanda") if rank == 0 else None, tmp_path)
    assert "not all processes began to prune" in found[0].message


@pytest.mark.slow
def test_one_process_may_prune_by_itself(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        with ranks.alone():
            return pruned(llama, metric=("wanda", "ria")[rank])["processes"]

    assert many(work, tmp_path) == {0: 1, 1: 1}


# ------------------------------------------------------------------------------------------------ in one process


def test_one_process_exchanges_nothing() -> None:
    numbers = torch.ones(3)
    with ranks.together():
        ranks.sum_(numbers)
        ranks.agree("anything", object())
        assert (ranks.count(), ranks.rank(), ranks.gather("it"), ranks.from_first(2)) == (1, 0, ["it"], 2)
        assert ranks.own([1.0, 2.0]) == [0, 1]
    assert torch.equal(numbers, torch.ones(3))


@pytest.mark.parametrize("entry", list(STATISTICS), ids=lambda entry: entry.name)
def test_merging_adds_up_the_sums(entry: Any) -> None:
    one, other, both_ = (entry.function(6) for _ in range(3))
    one.add(torch.randn(9, 6))
    other.add(torch.randn(5, 6))
    both_.merge(one)
    both_.merge(other)
    for mine, yours, sums in zip(one.sums(), other.sums(), both_.sums(), strict=True):
        mine += yours
        assert torch.equal(mine, sums)
    one.tokens += other.tokens
    assert torch.equal(one.value, both_.value)


@pytest.mark.parametrize("given", ["soon", "0", "-5", "nan", "inf"])
def test_a_timeout_is_a_number_of_seconds(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ranks.TIMEOUT, given)
    with pytest.raises(ConfigError, match="1 to 1000000 seconds"):
        ranks.timeout()


# ------------------------------------------------------------------------------------------------ the command line


def launched(*words: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "hf_sparse",
        "prune",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=240)


RECIPE = ("--metric", "wanda", "--calibration", "stdlib:calibration", "--num-samples", "5", "--sequence-length", "64")


@pytest.mark.slow
def test_the_command_writes_and_prints_once(tmp_path: Path) -> None:
    done = launched("embedded", str(tmp_path / "two"), *RECIPE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    assert "in 2 processes" in done.stdout
    subprocess.run([sys.executable, "-m", "hf_sparse", "prune", "embedded", str(tmp_path / "one"), *RECIPE], check=True)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    turned = sum(int(((one[name] != 0) != (two[name] != 0)).sum()) for name in one)
    assert turned <= OUT_OF_STEP * sum(weight.numel() for weight in one.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.slow
def test_the_command_fails_once(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    done = launched("embedded", str(tmp_path / "two"), *RECIPE, "--calibration", str(tmp_path / "empty.txt"))
    assert done.returncode == 1
    assert done.stderr.count("hf-sparse prune: error:") == 1
    assert not (tmp_path / "two").exists()
