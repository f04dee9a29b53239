"""What pruning costs, as formulas: work and memory from shapes, tokens and method. Nothing is measured and no model is seen here.

Work is counted in units that a machine does at a rate of its own (`Work`); a machine is told by the seconds that one of each takes
(`Rates`). Time is their product, and works the same with rates that were measured here, fitted, or taken from a data sheet.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from hf_sparse.registry import METRICS, UPDATES

STRIPES = (
    8  # a Gram matrix's product is made of that many stripes above the diagonal: (1 + 1 / STRIPES) / 2 of the whole
)
HOLES = (
    3 * 2**25
)  # bytes that a CPU's allocator keeps of freed tensors below the size (32 MiB) from which it gives them back at once
WIDE, EXACT = 4, 8  # bytes of a number in fp32 and fp64


@dataclass(frozen=True)
class Work:
    """Counts of what is done; every count is a plain sum over what is done one after the other."""

    product: float = 0.0  # FLOPs of matrix products in the model's number format
    attention: float = 0.0  # FLOPs of scores and mixing in the model's number format
    wide: float = 0.0  # FLOPs of matrix products in fp32: Gram matrices, solvers
    exact: float = 0.0  # FLOPs in fp64: factorisations and what is solved with them
    moved: float = 0.0  # bytes read and written by element-wise passes over tensors
    observed: float = 0.0  # numbers that statistics of single features look at
    weighed: float = 0.0  # weights that are scored, chosen among, checked and written into the model
    scanned: float = 0.0  # weights that are looked at for NaN and zeros
    calls: float = 0.0  # operations so small that only their number counts
    read: float = 0.0  # bytes from files
    written: float = 0.0  # bytes into files
    exchanged: float = 0.0  # bytes that a process sends to the others

    def __add__(self, other: "Work") -> "Work":
        return Work(**{name.name: getattr(self, name.name) + getattr(other, name.name) for name in fields(Work)})

    def __mul__(self, times: float) -> "Work":
        return Work(**{name.name: getattr(self, name.name) * times for name in fields(Work)})

    def seconds(self, rates: "Rates") -> float:
        """How long it takes where one unit after the other is done."""
        return sum(getattr(self, name.name) * getattr(rates, name.name) for name in fields(Work))


@dataclass(frozen=True)
class Rates(Work):
    """Seconds for one unit of each kind of work."""

    @classmethod
    def per_second(cls, **speeds: float) -> Self:
        """From units a second, as data sheets have them."""
        return cls(**{name: 1 / speed for name, speed in speeds.items()})


# ---------------------------------------------------------------------------------------------------- shapes


@dataclass(frozen=True)
class InputShape:
    """An input with the sites that read it; `copies` of them are alike (experts), and each sees the share `reached` of the tokens."""

    columns: int  # features of the input
    rows: int  # of all sites together
    pruned: tuple[int, ...] = ()  # rows of each site that is pruned
    reached: float = 1.0
    copies: int = 1

    @property
    def weights(self) -> int:
        """Of all sites and copies."""
        return self.rows * self.columns * self.copies

    @property
    def weights_pruned(self) -> int:
        return sum(self.pruned) * self.columns * self.copies


@dataclass(frozen=True)
class BlockShape:
    """One block."""

    parameters: int
    inputs: tuple[InputShape, ...]
    hidden: int  # features of the hidden states between blocks
    attention: int = 0  # heads * features of a head

    @property
    def weights_pruned(self) -> int:
        return sum(one.weights_pruned for one in self.inputs)

    @property
    def active(self) -> float:
        """Weights that one token is multiplied with."""
        return sum(one.weights * one.reached for one in self.inputs)


@dataclass(frozen=True)
class Recipe:
    """What decides about cost in a configuration."""

    metrics: tuple[str, ...]
    statistics: frozenset[str]
    updates: tuple[str, ...] = ("none",)
    options: Mapping[str, Mapping[str, Any]] | None = None
    grouped: bool = False  # N:M
    own_choice: bool = False  # the first update chooses the mask without scores
    two_streams: bool = False

    def options_of(self, name: str) -> Mapping[str, Any]:
        return (self.options or {}).get(name, {})


@dataclass(frozen=True)
class Data:
    """Calibration tokens: `samples` of `length`, run in batches of `batch` samples."""

    samples: int
    length: int
    batch: int

    @property
    def tokens(self) -> int:
        return self.samples * self.length

    @property
    def batches(self) -> int:
        return -(-self.samples // self.batch)


# ---------------------------------------------------------------------------------------------------- work


def forward(block: BlockShape, data: Data, itemsize: int) -> Work:
    """One pass of all tokens: 2 FLOPs a token and weight, attention over half of the positions (what comes before), element-wise passes.

    The element-wise part counts eight passes over the hidden states and three over what each product reads and gives.
    """
    tokens = data.tokens
    touched = 8 * block.hidden + 3 * sum((one.columns + one.rows) * one.reached * one.copies for one in block.inputs)
    return Work(
        product=2 * tokens * block.active,
        attention=2 * tokens * data.length * block.attention,
        moved=itemsize * tokens * touched,
        calls=data.batches * (20 + 6 * sum(one.copies for one in block.inputs)),
    )


def statistics(block: BlockShape, data: Data, names: Collection[str], ranks: int = 1) -> Work:
    """What is measured of the inputs of sites that are pruned: in * tokens numbers, and (1 + 1/8) * tokens * in^2 FLOPs for a Gram matrix.

    A Gram matrix is besides summed in fp64 once for each batch. With several processes each sends what it has measured, as a ring
    does: twice the size of the statistics, but for the own share.
    """
    total = Work()
    for one in (one for one in block.inputs if one.pruned):
        seen = data.tokens * one.reached * one.columns
        if set(names) - {"gram"}:
            total += Work(observed=seen * one.copies, exchanged=EXACT * one.columns * one.copies)
        if "gram" in names:
            square = one.columns**2 * one.copies
            part = (1 + 1 / STRIPES) / 2
            total += Work(
                wide=2 * part * seen * one.columns * one.copies,
                moved=part * square * (2 * EXACT + 3 * EXACT + WIDE) * max(1.0, data.batches * min(1.0, one.reached * data.batch)),
                calls=2 * STRIPES * data.batches * one.copies, exchanged=EXACT * square,
            )  # fmt: skip
    return total + Work(exchanged=total.exchanged * (2 * (ranks - 1) / ranks - 1))


def masks(block: BlockShape, recipe: Recipe) -> Work:
    """Scores and masks, the errors of the sites' outputs, counting and writing: so much for each weight."""
    work = Work(weighed=block.weights_pruned, calls=60 * sum(len(one.pruned) * one.copies for one in block.inputs))
    if recipe.own_choice:
        return work
    for name in recipe.metrics:
        law: Any = METRICS[name].traits.get("cost")
        if law is not None:
            work += sum((law(one.columns) * (len(one.pruned) * one.copies) for one in block.inputs), Work())
    return work


def solves(block: BlockShape, recipe: Recipe) -> dict[str, Work] | None:
    """Update -> what it does in the block, by the law of its registration; None where one has none."""
    found: dict[str, Work] = {}
    for name in recipe.updates:
        law: Any = UPDATES[name].traits.get("cost")
        if UPDATES[name].traits.get("runs_blocks"):
            continue
        if law is None:
            return None
        pruned = [one for one in block.inputs if one.pruned]
        options = {**UPDATES[name].options, **recipe.options_of(name)}
        found[name] = sum((law(sum(one.pruned), one.columns, options) * one.copies for one in pruned), Work())
    return found


def critical(block: BlockShape, ranks: int) -> float:
    """The share of a block's solves that the busiest of several processes has: inputs are dealt out whole, so never less than the largest."""
    weights = [float(one.weights_pruned) / one.copies for one in block.inputs for _ in range(one.copies) if one.pruned]
    total = sum(weights)
    loads = [0.0] * max(1, min(ranks, len(weights)))
    for weight in sorted(weights, reverse=True):  # each to the least busy, the largest first
        loads[loads.index(min(loads))] += weight
    return max(loads) / total if total else 1.0


def training(block: BlockShape, data: Data, steps: int) -> Work:
    """Local reconstruction: each step three forward passes' worth over one batch in fp32, and Adam's passes over all parameters.

    Before and behind it the calls that are kept for checking (one in eight) are run, and behind it all of them.
    """
    batch = Data(data.batch, data.length, data.batch)
    once = forward(block, batch, WIDE)
    checked = max(1, data.batches // 8) if data.batches >= 4 else data.batches
    passes = once * (3 * steps + 2 * checked + data.batches)
    wide = Work(wide=passes.product + passes.attention, moved=passes.moved, calls=passes.calls)
    return wide + Work(moved=steps * block.parameters * WIDE * 14, calls=steps * 30 * len(block.inputs))


# ---------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of one block, one entry for each kind; they are there at the same time."""

    hidden: int  # inputs and outputs of the block for all tokens
    statistics: int
    work: int  # of what is not needed at the same time, the largest: one batch through the block, or one solve
    stopped: int = 0  # what batches hold that are stopped within the block, with two streams

    @property
    def total(self) -> int:
        return self.hidden + self.statistics + self.work + self.stopped


def memory(block: BlockShape, recipe: Recipe, data: Data, itemsize: int, ranks: int = 1) -> Memory:
    """What a process holds above the weights while it calibrates and prunes one block."""
    own = Data(-(-data.samples // ranks), data.length, data.batch)
    streams = 2 if recipe.two_streams else 1
    inputs = [one for one in block.inputs if one.pruned]
    widest = max((one.columns for one in block.inputs), default=0)
    gram = EXACT if "gram" in recipe.statistics else 0
    stats = sum(one.copies * (EXACT * one.columns + gram * one.columns**2) for one in inputs)
    solving = max((_solving(one, recipe) for one in inputs), default=0)
    running = (
        own.batch
        * own.length
        * itemsize
        * (4 * block.hidden + 2 * max((one.rows + one.columns for one in block.inputs), default=0))
    )
    stopped = streams * own.tokens * itemsize * (widest + block.hidden) if recipe.two_streams else 0
    if "reconstruct" in recipe.updates:
        trained = block.parameters * WIDE * 5 + running * len(block.inputs)
        solving = max(solving, trained)
    hidden = 2 * streams * own.tokens * block.hidden * itemsize
    return Memory(hidden, stats, max(running, solving), stopped)


def _solving(one: InputShape, recipe: Recipe) -> int:
    """Bytes while the sites of one input are solved together, or the largest alone where there is no update."""
    alone = recipe.updates == ("none",)
    weights = one.columns * (max(one.pruned) if alone else sum(one.pruned))
    sorting = (
        12 if recipe.grouped else 26
    )  # scores with ranks and mask; with the sorted values and their places (int64)
    total = sorting * weights
    if "gram" in recipe.statistics:
        total = (
            max(total, 5 * WIDE * weights) + 5 * EXACT * one.columns**2
        )  # the matrix, a damped copy and three factors
    return total


def bitmask_bytes(values: int, itemsize: int, sparsity: float) -> int:
    """Bytes of a compressed tensor: what is kept, and one bit for each value."""
    return math.ceil(values * (1 - sparsity)) * itemsize + -(-values // 8)
