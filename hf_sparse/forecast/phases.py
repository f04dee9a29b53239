"""Puts the formulas together in the order in which a run works: phases with their time, memory and disk."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hf_sparse import cost
from hf_sparse.config import SparsityConfig
from hf_sparse.cost import BlockShape, Data, Memory, Rates, Recipe, Work
from hf_sparse.registry import UPDATES
from hf_sparse.shapes import ModelShape, dense_passes, recipe_of

_SURVEY = 64  # tokens
_TRIAL = 4096  # tokens of a trial, and for a Gram matrix four for each input
_TRIALS = {"atp": (5, 11)}  # of a ramp: the fewest and the most
_REAL = 3  # prunings on all samples at the end of a search, at most


@dataclass(frozen=True)
class Phase:
    """One part of a run; None stands for what is not foretold, and the note says why."""

    name: str
    seconds: float | None
    memory: int = 0  # private bytes at its peak, beside what the process has from the start
    mapped: int = 0  # pages of files that are mapped, which the system can take away
    disk: int = 0  # bytes that it adds on the disk
    note: str = ""


@dataclass(frozen=True)
class Job:
    """What the phases are foretold from."""

    shape: ModelShape
    config: SparsityConfig
    data: Data | None  # None: nothing is calibrated
    rates: Rates
    solvers: Mapping[str, float]
    stream: bool
    ranks: int
    hidden_memory: int
    files: int  # bytes of the weights as they will be written
    mapped: int  # bytes of files that loading maps
    compress: bool
    sparsity: float

    @property
    def recipe(self) -> Recipe:
        return recipe_of(self.config)

    @property
    def weights(self) -> int:
        """Private bytes of weights while blocks are pruned: with `stream` one block and what is outside of the blocks; else all that are
        written to, or that loading made anew.
        """
        shape, size = self.shape, self.shape.itemsize
        if self.stream:
            head = 0 if self.config.permute else shape.head
            largest = max((block.parameters for block in shape.blocks), default=0)
            return (shape.outside - head + largest) * size + 2 * _largest_site(shape) * size
        return (shape.weights_pruned if self.mapped else shape.parameters) * size

    def time(self, work: Work) -> float | None:
        return None if self.unknown else work.seconds(self.rates)

    @property
    def unknown(self) -> str:
        """Why no time is foretold."""
        if self.config.device is not None:
            return f"the work is done on {self.config.device}, which is not measured"
        return self.shape.strange if self.data is not None else ""


def _largest_site(shape: ModelShape) -> int:
    return max((max(one.pruned, default=0) * one.columns for block in shape.blocks for one in block.inputs), default=0)


def phases(job: Job) -> list[Phase]:
    """All phases of a run, in order."""
    return [_load(job), *_before(job), *_blocks(job), _write(job)]


def peak(job: Job) -> Memory:
    """What the block holds that takes the most."""
    data = job.data or Data(0, 1, 1)
    found = [cost.memory(block, job.recipe, data, job.shape.itemsize, job.ranks) for block in job.shape.blocks]
    return max(found, key=lambda one: one.total)


def _in_memory(job: Job) -> tuple[int, int, int]:
    """Batches of one process, how many of them have their hidden states in memory, and the bytes of those of one batch.

    What goes into a block and what comes out may take half of the limit each; a batch is in memory or in a file as a whole.
    """
    data = job.data
    if data is None:
        return 0, 0, 1
    batches = (2 if job.recipe.two_streams else 1) * _own(job, data).batches
    size = max(1, data.batch * data.length * job.shape.hidden * job.shape.itemsize)
    return batches, min(batches, job.hidden_memory // 2 // size) if job.stream else batches, size


def spilled(job: Job) -> int:
    """Bytes of hidden states in files at a time, of all processes: of all batches that are not in memory what goes in and what comes out,
    and of two what came out dense and pruned.
    """
    batches, kept, size = _in_memory(job)
    return 2 * (batches - kept + 1) * size * job.ranks if kept < batches else 0


def private_peak(job: Job) -> int:
    """Private bytes beside what the process has from the start."""
    top = peak(job)
    batches, kept, size = _in_memory(job)
    hidden = top.hidden if kept == batches else 2 * kept * size
    return job.weights + top.total - top.hidden + hidden + cost.HOLES


# ---------------------------------------------------------------------------------------------------- one after the other


def _load(job: Job) -> Phase:
    shape, size = job.shape, job.shape.itemsize
    inside = sum(block.parameters for block in shape.blocks)
    work = Work(read=shape.parameters * size, scanned=inside + shape.weights_pruned)
    if job.data is not None:
        short = Data(1, min(_SURVEY, job.data.length), 1)
        for block in shape.blocks:
            work += cost.forward(block, short, size) * 3  # with a probe in both directions
        work += Work(read=inside * size if job.stream else 0)
    memory = job.weights if job.stream else 0 if job.mapped else shape.parameters * size
    return Phase("load, scan, survey", job.time(work), memory, job.mapped, note=job.unknown)


def _pass(job: Job, data: Data, statistics: frozenset[str]) -> Work:
    """One pass over all dense blocks."""
    total = Work()
    for block in job.shape.blocks:
        total += cost.forward(block, _own(job, data), job.shape.itemsize)
        total += cost.statistics(block, _own(job, data), statistics, job.ranks)
    return total + _read(job)


def _read(job: Job) -> Work:
    return Work(read=sum(block.parameters for block in job.shape.blocks) * job.shape.itemsize if job.stream else 0)


def _own(job: Job, data: Data) -> Data:
    return replace(data, samples=-(-data.samples // job.ranks))


def _before(job: Job) -> list[Phase]:
    """What an allocation, a permutation or a search does before the blocks are pruned."""
    found: list[Phase] = []
    if job.data is None:
        return found
    measures = dense_passes(job.config)
    if measures:
        work = _pass(job, job.data, measures) + Work(moved=16 * job.shape.weights_pruned)
        found.append(_phase(job, f"dense pass for allocation {job.config.allocation}", work))
    if job.config.permute:
        found.append(_phase(job, "dense pass for the permutation", _pass(job, job.data, frozenset({"norm"}))))
        found.append(Phase("permutation", None, note="how long the search for an order takes depends on the weights"))
    if job.config.searches:
        found.append(_search(job))
    return found


def _phase(job: Job, name: str, work: Work, note: str = "") -> Phase:
    return Phase(name, job.time(work), private_peak(job), job.mapped + spilled(job), note=note or job.unknown)


def _search(job: Job) -> Phase:
    """Trials, each a pruning on few tokens and a score on what is held out; then up to two prunings on all samples beside the one to stay."""
    data = job.data or Data(1, 1, 1)
    name = str(job.config.allocation)
    options = job.config.options_of(name)
    held = max(1, round(data.samples * float(options["held_out"])))
    widest = max(one.columns for block in job.shape.blocks for one in block.inputs)
    due = max(_TRIAL, 4 * widest if "gram" in job.recipe.statistics else 0)
    few = replace(data, samples=min(max(1, data.samples - held), -(-due // data.length)))
    _, most = _TRIALS["atp"]
    if name == "search":
        most += int(options["rounds"]) * (2 * len(job.shape.blocks) + 1)
    work = Work()
    trial, scoring = _pruning(job, few), replace(data, samples=held)
    once = _pass(job, scoring, frozenset())
    head = Work(product=2 * scoring.tokens * job.shape.vocabulary * job.shape.hidden)
    if trial is not None:
        real = _pruning(job, replace(data, samples=max(1, data.samples - held))) or Work()
        work = (trial + once + head) * most + (real + once + head) * (_REAL - 1)
    note = f"at most {most} trials and {_REAL - 1} more prunings on all samples; often half of that"
    seconds = None if trial is None else job.time(work)
    return Phase("search", seconds, private_peak(job) + _snapshot(job), job.mapped, note=job.unknown or note)


def _snapshot(job: Job) -> int:
    """A search keeps a copy of the dense blocks; streamed ones are on the disk."""
    return 0 if job.stream else sum(block.parameters for block in job.shape.blocks) * job.shape.itemsize


def _pruning(job: Job, data: Data) -> Work | None:
    """All blocks once, on `data`; None where an update tells no cost."""
    total = Work()
    for part in _parts(job, data).values():
        if part is None:
            return None
        total += part
    return total


def _parts(job: Job, data: Data) -> dict[str, Work | None]:
    """The four parts of calibrating and pruning block by block."""
    passes, statistics, masks = Work(), Work(), Work()
    updates: Work | None = Work()
    for block in job.shape.blocks:
        passes += _passes(job, block, data)
        statistics += cost.statistics(block, _own(job, data), job.recipe.statistics, job.ranks)
        share = cost.critical(block, job.ranks)
        masks += cost.masks(block, job.recipe) * share
        solved = cost.solves(block, job.recipe)
        if solved is None or updates is None:
            updates = None
            continue
        for name, work in solved.items():
            updates += work * (job.solvers.get(name, 1.0) * share)
        if "reconstruct" in job.recipe.updates:
            steps = int(job.recipe.options_of("reconstruct")["steps"])
            updates += cost.training(block, _own(job, data), steps)
    again = 2 if job.stream else 0  # a block is read to be pruned, and compared with what it was when it is written
    return {
        "forward passes": passes + _read(job) * again,
        "statistics": statistics,
        "scores and masks": masks,
        "updates": updates,
    }


def _passes(job: Job, block: BlockShape, data: Data) -> Work:
    """Each block runs dense and runs again pruned; with two streams each stream runs once, and once more where a metric looks ahead."""
    once = cost.forward(block, _own(job, data), job.shape.itemsize)
    if not block.weights_pruned:
        return once
    ahead = job.recipe.two_streams and "dass" in job.recipe.metrics
    experts = job.recipe.two_streams and any(one.reached < 1 for one in block.inputs)
    return once * (2 + ahead + experts)


def _blocks(job: Job) -> list[Phase]:
    if job.data is None:
        masks = sum((cost.masks(block, job.recipe) for block in job.shape.blocks), Work()) + _read(job)
        return [_phase(job, "scores and masks", masks)]
    unknown = [
        name
        for name in job.config.update
        if "cost" not in UPDATES[name].traits and not UPDATES[name].traits.get("runs_blocks")
    ]
    note = "as many iterations as on random weights are assumed" if "admm" in job.config.update else ""
    notes = {"updates": f"update {unknown[0]!r} tells no cost" if unknown else note}
    found = []
    for name, work in _parts(job, job.data).items():
        phase = _phase(job, name, work or Work(), notes.get(name, ""))
        found.append(replace(phase, seconds=None) if work is None else phase)
    return found


def _write(job: Job) -> Phase:
    shape, size = job.shape, job.shape.itemsize
    compressed = cost.bitmask_bytes(
        shape.parameters, size, job.sparsity * shape.weights_pruned / max(1, shape.parameters)
    )
    work, disk = Work(written=job.files), job.files
    if job.compress:
        packed = Work(written=compressed, read=job.files, moved=8 * job.files)
        work, disk = (work + packed, job.files + compressed) if job.stream else (packed, compressed)
    memory = job.weights if job.stream else (shape.weights_pruned if job.mapped else shape.parameters) * size
    shard = min(10**9, compressed) + shape.largest * (size + 2) if job.compress else shape.largest * size
    return Phase("write", work.seconds(job.rates), memory + shard, 0 if job.stream else job.mapped, disk)
