"""Looks at the dense blocks before anything is pruned, for allocations that choose by what they see there."""

from collections.abc import Sequence
from contextlib import closing

from transformers.utils import logging as transformers_logging

from hf_sparse.allot import measure, measured_by, shares
from hf_sparse.blocks import Block
from hf_sparse.blockwise import Run
from hf_sparse.calibrate import forward
from hf_sparse.data import Batch
from hf_sparse.errors import CalibrationError
from hf_sparse.forwards import Call, walk
from hf_sparse.observe import operand_of
from hf_sparse.record import Recorder
from hf_sparse.sites import read


def allot_(run: Run, batches: Sequence[Batch]) -> None:
    """Settle the shares of a run whose allocation looks at the dense model: one pass over all blocks, then the allocation.

    Raises: CalibrationError where nothing was measured for a block.
    """
    entry = measured_by(run.config)
    if entry is None or run.measured:
        return
    measured = _measured(run, batches)
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
    recorders: dict[int, Recorder] = {}
    found: dict[int, float] = {}
    left = {index: run.survey.expected(index, batches) for index in run.chosen}
    passes = [forward(run.model, batch.values) for batch in batches]
    with (
        transformers_logging.tqdm(total=len(left), desc="Measuring", unit="block") as bar,
        closing(walk(run.inventory.blocks, passes, run.survey.order())) as turns,
    ):
        for calls in turns:
            block = calls[0].block
            with block.loaded(run.config.device):
                _run(run, block, calls, recorders, batches)
                left[block.index] = left.get(block.index, 0) - len(calls)
                if block.index in run.chosen and left[block.index] <= 0:
                    found |= _closed(run, block, recorders.pop(block.index))
                    bar.update()
            del calls
            if len(found) == len(run.chosen):
                break
    return found


def _run(run: Run, block: Block, calls: list[Call], recorders: dict[int, Recorder], batches: Sequence[Batch]) -> None:
    sites = run.chosen.get(block.index, [])
    entry = measured_by(run.config)
    needs = {operand_of(site): set(entry.needs) for site in sites} if entry else {}
    recorder = recorders.setdefault(block.index, Recorder(sites, needs, sample_each=1))
    for call in calls:
        with recorder.listening(run.model, sites, batches[call.batch]):
            call.output = call(run.config.device)


def _closed(run: Run, block: Block, recorder: Recorder) -> dict[int, float]:
    """The block's figure over the sites that saw any input; empty where none did."""
    seen = [
        (read(run.model, site), inputs)
        for site in run.chosen[block.index]
        if (inputs := recorder.own(site)) and all(bool(value.any()) for value in inputs.values())
    ]
    return {block.index: measure(run.config, seen)} if seen else {}
