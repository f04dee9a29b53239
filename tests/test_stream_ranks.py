"""Several processes prune from disk to disk: the first one writes, and a run that lost a process goes on."""

import argparse
import io
import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from models import llama, token_rows
from processes.forked import Failed, die, many
from safetensors.torch import load_file

from hf_sparse import SparsityConfig, prune_, ranks
from hf_sparse.cli import prune as prune_command
from hf_sparse.stream import prune_checkpoint
from hf_sparse.streaming.session import Session
from hf_sparse.streaming.work import work_folder

ROWS = token_rows(7)
pytestmark = [
    pytest.mark.usefixtures("no_pictures"),
    pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="the processes are forked"),
]


@pytest.fixture(autouse=True)
def soon_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ranks.TIMEOUT, "30")


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    llama(4).save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    (tmp_path / "groups").mkdir()
    return tmp_path / "dense"


def config(**fields: Any) -> SparsityConfig:
    return SparsityConfig(calibration=ROWS, num_samples=len(ROWS), batch_size=2, **{"metric": "wanda", **fields})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def in_memory(folder: Path, given: SparsityConfig) -> dict[str, torch.Tensor]:
    """What the same processes make of the model in memory."""

    def work(rank: int) -> Any:
        model = llama(4)
        prune_(model, given)
        return {name: value.numpy() for name, value in model.state_dict().items()}

    found = many(work, folder)
    assert not [value for value in found.values() if isinstance(value, Failed)], found
    return {name: torch.from_numpy(value) for name, value in found[0].items()}


def streamed(dense: Path, destination: Path, given: SparsityConfig, dies_after: int | None = None) -> dict[int, Any]:
    """How each of two processes ends; the second one may die when it has finished so many blocks."""

    def work(rank: int) -> Any:
        if rank == 1 and dies_after is not None:
            own, count = Session.finished, 0

            def finished(self: Session, *args: Any) -> None:
                nonlocal count
                own(self, *args)
                count += 1
                if count == dies_after:
                    die()

            Session.finished = finished  # type: ignore[method-assign]
        return prune_checkpoint(dense, destination, given).processes

    return many(work, dense.parent / "groups")


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_the_result_is_that_of_the_same_processes_in_memory(dense: Path, tmp_path: Path) -> None:
    given = config()
    assert streamed(dense, tmp_path / "sparse", given) == {0: 2, 1: 2}
    assert_same(weights(tmp_path / "sparse"), in_memory(tmp_path / "groups", given))
    assert not work_folder(tmp_path / "sparse").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"update": ("dense_stream", "admm"), "permute": True},
        {"pattern": "unstructured", "sparsity": 0.5, "allocation": "owl"},
        {"pattern": "unstructured", "sparsity": 0.5, "allocation": "search"},
    ],
    ids=["two streams, permuted", "owl", "search"],
)
def test_other_recipes(fields: dict[str, Any], dense: Path, tmp_path: Path) -> None:
    given = config(**fields)
    assert streamed(dense, tmp_path / "sparse", given) == {0: 2, 1: 2}
    assert_same(weights(tmp_path / "sparse"), in_memory(tmp_path / "groups", given))


@pytest.mark.parametrize("dies_after", [2])
def test_a_process_that_is_lost_ends_the_run_and_the_next_one_goes_on(
    dies_after: int, dense: Path, tmp_path: Path
) -> None:
    given = config()
    found = streamed(dense, tmp_path / "sparse", given, dies_after)
    assert set(found) == {0}
    assert isinstance(found[0], Failed)
    assert "goes on" in found[0].message
    assert not (tmp_path / "sparse").exists()
    journal = (work_folder(tmp_path / "sparse") / "journal.jsonl").read_text()
    assert journal.count('"kind":"block"') >= dies_after
    assert streamed(dense, tmp_path / "sparse", given) == {0: 2, 1: 2}
    assert_same(weights(tmp_path / "sparse"), in_memory(tmp_path / "groups", given))


def test_the_first_process_tells_of_the_result(dense: Path, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    prune_command.add(parser)
    words = [str(dense), str(tmp_path / "sparse"), "--metric", "magnitude", "--update", "none", "--stream"]
    arguments = parser.parse_args(words, argparse.Namespace(json=True))

    def work(rank: int) -> Any:
        told = io.StringIO()
        with redirect_stdout(told):
            prune_command.run(arguments)
        return told.getvalue()

    found = many(work, tmp_path / "groups")
    assert json.loads(found[0])["destination"] == str(tmp_path / "sparse")
    assert found[1] == ""


def test_an_error_of_the_one_that_writes_ends_all(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "sparse").mkdir()
    (tmp_path / "sparse" / "mine.txt").write_text("mine")
    found = streamed(dense, tmp_path / "sparse", config())
    assert {(value.kind, "not empty" in value.message) for value in found.values()} == {("CheckpointError", True)}
    assert (tmp_path / "sparse" / "mine.txt").read_text() == "mine"
    assert not work_folder(tmp_path / "sparse").exists()
