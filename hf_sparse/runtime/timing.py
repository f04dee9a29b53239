"""Times several ways to do the same work, in turns, so that whatever else the machine does falls on all of them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

FEWEST = 5  # rounds, however long one takes, where nothing else is asked for


@dataclass(frozen=True)
class Times:
    """Seconds of one way, sorted."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return self.share(0.5)

    def share(self, part: float) -> float:
        """The time that this part of the rounds stayed below."""
        return self.seconds[min(len(self.seconds) - 1, int(part * len(self.seconds)))]


def clock() -> Callable[[], float]:
    """CPU time where one thread computes, which other people's work does not lengthen; else the time on the wall."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def clock_name() -> str:
    return "CPU time of one thread" if torch.get_num_threads() == 1 else "wall clock"


@torch.no_grad()
def interleaved(
    ways: Mapping[str, Sequence[Callable[[], object]]],
    budget: float,
    most: int = 200,
    least: int = FEWEST,
    synchronise: Callable[[], None] | None = None,
) -> dict[str, Times]:
    """Times each way in turns until `budget` seconds are over, but `least` times; each way is a row of copies, of which the next is taken each time.

    Copies whose sizes together exceed the caches make each round read its weights from memory, as a model does.
    """
    now, start = clock() if synchronise is None else time.perf_counter, time.perf_counter()
    found: dict[str, list[float]] = {name: [] for name in ways}
    turns = -1  # the first round warms up and is not counted
    while turns < least or (turns < most and time.perf_counter() - start < budget):
        for name, copies in ways.items():
            work = copies[turns % len(copies)]
            before = now()
            work()
            if synchronise is not None:
                synchronise()
            if turns >= 0:
                found[name].append(now() - before)
        turns += 1
    return {name: Times(tuple(sorted(seconds))) for name, seconds in found.items()}


def read_bandwidth(size: int = 256 * 2**20, rounds: int = 7) -> float:
    """Bytes that can be read from memory in a second, with torch's number of threads."""
    numbers = torch.ones(size // 8, dtype=torch.int64, device="cpu")
    times = interleaved({"read": [lambda: numbers.sum()]}, 0.0, least=rounds)
    return size / times["read"].median
