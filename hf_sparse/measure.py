"""Looks at the dense blocks before anything is pruned, for allocations that choose by what they see there."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing

from transformers.utils import logging as transformers_logging

from hf_sparse import ranks
from hf_sparse.allot import measure, measured_by, shares
from hf_sparse.blocks import Block
from hf_sparse.blockwise import Run
from hf_sparse.calibrate import forward
from hf_sparse.data import Batch
from hf_sparse.errors import CalibrationError
from hf_sparse.forwards import walk
from hf_sparse.in_step import in_step, own_batches
from hf_sparse.observe import operand_of
from hf_sparse.record import Recorder
from hf_sparse.sites import Site, read


def allot_(run: Run, batches: Sequence[Batch]) -> None:
    """Settle the shares of a run whose allocation looks at the dense model: one pass over all blocks, then the allocation.

    Raises: CalibrationError where nothing was measured for a block.
    """
    entry = measured_by(run.config)
    if entry is None or run.measured:
        return
    measured = {int(index): value for index, value in ranks.from_first(list(_measured(run, batches).items()))}
    for index in run.chosen:
        if index not in measured:
            name = run.inventory.blocks[index].name
            raise CalibrationError(
                f"no input of {name} was seen on calibration data, so allocation {entry.name!r} has nothing to go by; give "
                f"data that run it, or leave it out with exclude=({name + '.*'!r},)."
            )
    run.measured = measured
    run.shares = shares(run.inventory, run.chosen, run.config, measured)
    ranked = sorted(measured, key=lambda index: measured[index])
    low, high = (f"{measured[i]:.4g} ({run.inventory.blocks[i].name})" for i in (ranked[0], ranked[-1]))
    run.notes.append(f"allocation {entry.name} measured the dense blocks: from {low} to {high}")


def _measured(run: Run, batches: Sequence[Batch]) -> dict[int, float]:
    """What the allocation measures of each block to be pruned; a block that runs several times counts all its runs."""
    entry = measured_by(run.config)
    found: dict[int, float] = {}
    for block, recorder in dense_recorders(run, batches, run.chosen, entry.needs if entry else frozenset()):
        if block.index in run.chosen:
            found |= _closed(run, block, recorder)
    return found


def dense_recorders(
    run: Run, batches: Sequence[Batch], sites: Mapping[int, Sequence[Site]], statistics: Collection[str]
) -> Iterator[tuple[Block, Recorder]]:
    """One pass over the dense model: each loaded block after its last run, with `statistics` of what entered its `sites`."""
    recorders: dict[int, Recorder] = {}
    left = {index: run.survey.expected(index, batches) for index in run.chosen}
    mine = [batches[position] for position in own_batches(batches)]
    passes = [forward(run.model, batch.values) for batch in mine]
    with (
        transformers_logging.tqdm(total=len(left), desc="Measuring", unit="block", disable=not ranks.is_first()) as bar,
        closing(walk(run.inventory.blocks, passes, run.survey.order())) as turns,
    ):
        for block, calls, everywhere in in_step(turns, run.inventory.blocks, run.survey.order()):
            own = sites.get(block.index, [])
            needs = {operand_of(site): set(statistics) for site in own}
            recorder = recorders.setdefault(block.index, Recorder(own, needs, 1))
            with block.loaded(run.config.device):
                for call in calls:
                    with recorder.listening(run.model, own, mine[call.batch]):
                        call.output = call(run.config.device)
                left[block.index] = left.get(block.index, 0) - everywhere
                if left[block.index] <= 0:
                    recorders[block.index].share(next(block.module.parameters()).device)
                    yield block, recorders.pop(block.index)
                    bar.update(int(block.index in run.chosen))
            del calls
            if all(count <= 0 for count in left.values()):
                break


def _closed(run: Run, block: Block, recorder: Recorder) -> dict[int, float]:
    """The block's figure over the sites that saw any input; empty where none did."""
    seen = [
        (read(run.model, site), inputs)
        for site in run.chosen[block.index]
        if (inputs := recorder.own(site)) and all(bool(value.any()) for value in inputs.values())
    ]
    return {block.index: measure(run.config, seen)} if seen else {}
