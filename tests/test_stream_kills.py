"""Killed at whatever moment, `prune_checkpoint` leaves nothing that loads, and the same call ends as if nothing had been."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import llama, token_rows

from hf_sparse import stream
from hf_sparse.streaming.files import Outputs
from hf_sparse.streaming.journal import Journal
from hf_sparse.streaming.work import work_folder

ROWS = token_rows()
DATA = {"calibration": ROWS, "num_samples": len(ROWS), "update": "none"}
KILLS = 50

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("no_pictures"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is killed that has everything imported already"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


def started(work: Callable[[], object]) -> int:
    """A process that does some work and ends with 0 if that went well; the imports are done."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def finished(work: Callable[[], object]) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(started(work), 0)[1])


def content(folder: Path) -> dict[str, Any]:
    """All files, but for what no two runs have in common: times, and the memory that was taken."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = json.loads(found.pop("hf_sparse_report.json"))
    del found["README.md"], report["seconds"], report["peak_memory_bytes"]
    for block in report["blocks"]:
        del block["seconds"]
    return {**found, "report": report}


RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "two streams, permuted": {"update": ["dense_stream", "admm"], "permute": True},
    "measured": {"pattern": "unstructured", "sparsity": 0.5, "allocation": "owl", "update": "admm"},
}


@pytest.mark.parametrize(
    ("name", "format", "kills"),
    [("plain", None, KILLS), ("two streams, permuted", "bitmask", 10), ("measured", None, 10)],
)
def test_killed_at_random(name: str, format: str | None, kills: int, tmp_path: Path) -> None:
    llama(6).save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    before = {path.name: path.read_bytes() for path in (tmp_path / "dense").iterdir()}

    def pruning(destination: Path) -> Callable[[], object]:
        return lambda: stream.prune_checkpoint(
            tmp_path / "dense", destination, {**DATA, **RECIPES[name]}, sparse_format=format
        )

    assert finished(pruning(tmp_path / "warm")) == 0
    start = time.monotonic()
    assert finished(pruning(tmp_path / "whole")) == 0
    lasts, wanted = time.monotonic() - start, content(tmp_path / "whole")
    chance = random.Random(0)
    interrupted = resumed = 0
    for number in range(kills):
        destination = tmp_path / f"sparse {number}"
        process = started(pruning(destination))
        time.sleep(chance.uniform(0, lasts))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        if destination.exists():  # the whole of it, or nothing
            assert content(destination) == wanted
            continue
        interrupted += 1
        journal = work_folder(destination) / "journal.jsonl"
        resumed += journal.exists() and b'"kind":"block"' in journal.read_bytes()
        assert finished(pruning(destination)) == 0
        assert content(destination) == wanted
        assert not work_folder(destination).exists()
    print(f"{kills} kills, {interrupted} before the end, {resumed} behind the first block", file=sys.stderr)
    assert {path.name: path.read_bytes() for path in (tmp_path / "dense").iterdir()} == before


@pytest.mark.parametrize(
    ("owner", "method"),
    [(Journal, "add"), (Outputs, "write"), (Outputs, "sync"), (os, "replace"), (Path, "rename"), (Path, "unlink")],
)
def test_killed_at_every_step_of_a_kind(owner: Any, method: str, tmp_path: Path) -> None:
    """Right before, at each call in turn; with an old result in the place, which stays or is replaced as a whole."""
    llama().save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    old = {**DATA, "metric": "magnitude", "update": "none"}

    def pruning(config: dict[str, Any], destination: Path) -> Callable[[], object]:
        return lambda: stream.prune_checkpoint(tmp_path / "dense", destination, config, overwrite=True)

    def stopped(after: int, destination: Path) -> None:
        left, own = [after], getattr(owner, method)

        def stop(*given: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return own(*given, **named)

        setattr(owner, method, stop)
        pruning(DATA, destination)()

    assert finished(pruning(old, tmp_path / "old")) == 0
    assert finished(pruning(DATA, tmp_path / "new")) == 0
    before, wanted = content(tmp_path / "old"), content(tmp_path / "new")
    for after in range(1000):
        destination = tmp_path / f"sparse {after}"
        assert finished(pruning(old, destination)) == 0
        code = finished(lambda after=after, destination=destination: stopped(after, destination))  # type: ignore[misc]
        if code == 0:
            break
        if destination.exists():
            assert content(destination) in (before, wanted)
        assert finished(pruning(DATA, destination)) == 0
        assert content(destination) == wanted
        assert not work_folder(destination).exists()
    assert 0 < after < 999


LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]),) * 2)
os.execv(sys.executable, [sys.executable, "-m", "hf_sparse", *sys.argv[2:]])
"""


def test_a_model_that_is_larger_than_the_memory(tmp_path: Path) -> None:
    """670 MB of weights under a limit of 600 MB, of which the libraries take 250."""
    llama(44, hidden_size=512, intermediate_size=2048, num_attention_heads=8).save_pretrained(
        tmp_path / "dense", max_shard_size="200MB"
    )
    np.save(tmp_path / "tokens.npy", ROWS.numpy())
    size = sum(path.stat().st_size for path in (tmp_path / "dense").glob("*.safetensors"))
    assert size > 600e6
    words = ["prune", tmp_path / "dense", tmp_path / "sparse", "--pattern", "2:4", "--metric", "dass", "--update", "none", "--calibration",
             tmp_path / "tokens.npy", "--num-samples", str(len(ROWS)), "--sequence-length", str(ROWS.shape[1])]  # fmt: skip
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    for more, works in (([], False), (["--stream"], True)):
        command = [sys.executable, "-c", LIMITED, "600000000", *map(str, words), *more]
        done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=900)
        assert (done.returncode == 0) == works, done.stderr
        assert (tmp_path / "sparse").exists() == works
