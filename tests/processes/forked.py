"""Runs a function in several processes of one gloo group, forked from this one so that nothing is imported anew."""

import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import distributed

LONGEST = 120  # seconds


class Failed(NamedTuple):
    """How a process's function failed."""

    kind: str
    message: str


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def many(work: Callable[[int], Any], folder: Path, world: int = 2) -> dict[int, Any]:
    """What `work(rank)` gives in each process, or how it failed; nothing of a process that was killed."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    place = folder / f"group-{len(list(folder.iterdir()))}"
    place.mkdir()
    arguments = [(work, rank, world, place, results) for rank in range(world)]
    started = [context.Process(target=_run, args=one, daemon=True) for one in arguments]
    for process in started:
        process.start()
    found: dict[int, Any] = {}
    end = time.monotonic() + LONGEST
    try:
        while any(process.is_alive() for process in started) and time.monotonic() < end:
            with suppress(queue.Empty):
                found.update([results.get(timeout=0.05)])
        with suppress(queue.Empty):
            while True:
                found.update([results.get(timeout=0.05)])
    finally:
        for process in started:
            process.kill()
            process.join()
    return found


def _run(work: Callable[[int], Any], rank: int, world: int, place: Path, results: Any) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{place / 'store'}", rank=rank, world_size=world)
    try:
        value = work(rank)
    except BaseException as error:
        value = Failed(type(error).__name__, str(error))
    results.put((rank, value))
    results.close()
    results.join_thread()
    distributed.destroy_process_group()
