"""Products with packed weights against torch's and against our own dense kernel: `python tests/benchmarks/sparse_kernels.py`.

All are bfloat16, in turns in one process, each over as many copies of its weights as no cache holds, in large pages. One thread is
measured by its own CPU time, which leaves out what other processes take; several by the clock, which does not. Every figure is a
median, and the spread beside it the 10th and 90th percentile of the ratio's two sides against one another.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from hf_sparse import environment as surroundings
from hf_sparse import native
from hf_sparse.native.packed import new

SHAPES = ((2048, 8192), (8192, 2048), (4096, 11008))  # (in, out)
TOKENS = (1, 4, 16, 64, 512)
PATTERNS = ("2:4 input", "2:4 output", "unstructured 50 %", "unstructured 70 %")
BYTES = 250 << 20  # of weights in turn: more than the last cache of most machines


def keep(pattern: str, rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """A random mask: the speed depends on the pattern and not on what the weights are."""
    score = torch.rand(rows, columns, generator=generator)
    if pattern.startswith("unstructured"):
        return score > float(pattern.split()[1]) / 100
    groups = score.view(rows, -1, 4) if pattern.endswith("input") else score.view(-1, 4, columns)
    axis = 2 if pattern.endswith("input") else 1
    return (groups.argsort(axis).argsort(axis) < 2).view(rows, columns)


def in_large_pages(weight: torch.Tensor) -> torch.Tensor:
    return new(weight.numel(), weight.dtype, True).view(weight.shape).copy_(weight)


class Weights:
    """The copies of one shape: dense for torch, dense in our order, and packed for each pattern."""

    def __init__(self, columns: int, rows: int, patterns: tuple[str, ...]) -> None:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(rows, columns, generator=generator).bfloat16()
        self.count = max(2, -(-BYTES // weight.nbytes))
        copies = range(self.count)
        self.plain = [in_large_pages(weight) for _ in copies]
        self.arranged = [native.arrange(weight) for _ in copies]
        self.packed = {}
        for pattern in patterns:
            sparse = torch.where(keep(pattern, rows, columns, generator), weight, torch.zeros(()).bfloat16())
            self.packed[pattern] = [native.pack(sparse) for _ in range(2 * self.count)]

    def work(self, x: torch.Tensor) -> dict[str, Callable[[int], torch.Tensor]]:
        """What is measured, each as a function of the turn."""
        tasks: dict[str, Callable[[int], torch.Tensor]] = {
            "torch": lambda turn: F.linear(x, self.plain[turn % len(self.plain)]),
            "dense": lambda turn: native.dense_matmul(x, self.arranged[turn % len(self.arranged)]),
        }
        for pattern, packed in self.packed.items():
            tasks[pattern] = lambda turn, packed=packed: native.matmul(x, packed[turn % len(packed)])  # type: ignore[misc]
        return tasks


def measure(tasks: dict[str, Callable[[int], torch.Tensor]], seconds: float) -> dict[str, list[float]]:
    """Times of every task, in turns, for about so many seconds and at least 5 rounds."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for task in tasks.values():
        task(0)
    start = time.perf_counter()
    turn = 0
    while turn < 5 or time.perf_counter() - start < seconds:
        for name, task in tasks.items():
            before = clock()
            task(turn)
            times[name].append(clock() - before)
        turn += 1
    return times


def ratio(base: list[float], other: list[float]) -> str:
    """How much faster, with the spread of single rounds."""
    rounds = sorted(first / second for first, second in zip(base, other))
    low, high = rounds[len(rounds) // 10], rounds[-1 - len(rounds) // 10]
    return f"{statistics.median(base) / statistics.median(other):.2f} [{low:.2f}..{high:.2f}]"


def table(columns: int, rows: int, tokens: tuple[int, ...], patterns: tuple[str, ...], seconds: float) -> None:
    weights = Weights(columns, rows, patterns)
    for count in tokens:
        x = torch.randn(count, columns).bfloat16()
        times = measure(weights.work(x), seconds)
        milliseconds = statistics.median(times["torch"]) * 1000
        control = statistics.median(times["dense"])
        cells = [
            f"{ratio(times['torch'], times[name])} ({control / statistics.median(times[name]):.2f})"
            for name in patterns
        ]
        line = [f"{columns} x {rows}", str(count), f"{milliseconds:.2f}", ratio(times["torch"], times["dense"]), *cells]
        print(f"| {' | '.join(line)} | {len(times['torch'])} |", flush=True)


def shape(text: str) -> tuple[int, int]:
    columns, rows = text.split("x")
    return int(columns), int(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", type=shape, nargs="+", default=list(SHAPES), help="in x out, such as 2048x8192")
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS), choices=PATTERNS)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--seconds", type=float, default=4.0, help="for each line of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = "CPU time" if arguments.threads == 1 else "wall time"
    print(
        f"Instruction set {native.instruction_set()}, threads {arguments.threads}, {clock}; {surroundings.versions()}"
    )
    print("Times faster than torch [10th..90th percentile of single rounds] (than the dense control).\n")
    head = ["in x out", "tokens", "torch ms", "dense control", *arguments.patterns, "rounds"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for columns, rows in arguments.shapes:
        table(columns, rows, tuple(arguments.tokens), tuple(arguments.patterns), arguments.seconds)


if __name__ == "__main__":
    main()
