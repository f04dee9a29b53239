"""Goes through the blocks: run and measure, prune, run again, hand on."""

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from hf_sparse.apply import BlockPlan, prune_block
from hf_sparse.blocks import Block
from hf_sparse.calibrate import TOKEN_BUDGET, Survey, forward
from hf_sparse.config import SparsityConfig
from hf_sparse.data import Batch
from hf_sparse.errors import CalibrationError
from hf_sparse.families import Inventory
from hf_sparse.forwards import Call, main_tensor, norm, run_again, walk
from hf_sparse.plan import SitePlan, needs, plan_site
from hf_sparse.reconstruct import reconstruct_
from hf_sparse.record import ERROR_SAMPLE, Recorder
from hf_sparse.registry import METRICS, UPDATES
from hf_sparse.report import BlockReport, SiteReport
from hf_sparse.sites import Site, count_zeros, read
from hf_sparse.streams import TwoStreams


class Diary(Protocol):
    """Writes down what a run has done, so that one that breaks off can be gone on with."""

    batch_size: int | None  # of the run that broke off

    def begin(self, run: "Run", orders: Mapping[str, list[int]], places: Mapping[str, list[str]]) -> None:
        """All is looked at and channels are in order; puts into the run what an earlier one has done. Next is the first block."""

    def finished(self, run: "Run", report: BlockReport) -> None:
        """A block is pruned and committed."""

    def score(self, shares: Mapping[str, float]) -> float | None:
        """How a trial of these shares went in the run that broke off."""

    def scored(self, shares: Mapping[str, float], score: float) -> None:
        """A trial is over."""


@dataclass
class Run:
    """What the steps hand on to each other during one call of `prune_`."""

    model: nn.Module
    config: SparsityConfig
    inventory: Inventory
    chosen: dict[int, list[Site]]
    shares: dict[str, float]
    survey: Survey = field(default_factory=Survey)
    notes: list[str] = field(default_factory=list)
    done: dict[int, BlockReport] = field(default_factory=dict)
    changed: list[int] = field(default_factory=list)  # blocks whose weights were touched
    batch_size: int | None = None
    measured: dict[int, float] = field(default_factory=dict)  # what the allocation saw in the dense blocks, by index
    diary: Diary | None = None

    @property
    def two_streams(self) -> bool:
        """Whether an update asks for the dense model's activations beside the pruned one's."""
        return any(UPDATES[name].traits.get("second_stream") for name in self.config.update)

    @property
    def looks_at_data(self) -> bool:
        """Whether metric or updates need a block to have been run on calibration data."""
        metric = METRICS[self.config.metric]
        updates = [UPDATES[name] for name in self.config.update]
        return bool(
            metric.needs or metric.consumer_needs or any(u.needs or u.traits.get("runs_blocks") for u in updates)
        )

    @property
    def token_budget(self) -> int:
        """Tokens in a batch of size "auto"; training takes one step a batch, so there they are small."""
        if "reconstruct" in self.config.update:
            return int(self.config.options_of("reconstruct")["batch_tokens"])
        return TOKEN_BUDGET

    def mark(self, block: Block) -> None:
        """Note that a block's weights are about to change."""
        if block.index not in self.changed:
            self.changed.append(block.index)

    def prune(self, block: Block, recorder: Recorder | None) -> list[SiteReport]:
        self.mark(block)
        sites = {site.name: site for site in self.inventory.sites[block.index]}
        return prune_block(self.model, self.config, BlockPlan(block, self.plans(block), sites, recorder))

    def plans(self, block: Block) -> list[SitePlan]:
        feeds = self.survey.feeds.get(block.index, [])
        return [
            plan_site(site, self.config, feeds, self.shares[site.name], self.survey.unresolved)
            for site in self.chosen.get(block.index, [])
        ]


def _progress(run: Run) -> Any:
    return transformers_logging.tqdm(total=len(run.chosen), initial=len(run.done), desc="Pruning", unit="block")


def without_data(run: Run, blocks: Sequence[Block]) -> None:
    """Prune blocks by what their weights alone tell."""
    with _progress(run) as bar:
        for block in (block for block in blocks if block.index not in run.done):
            start = time.monotonic()
            with block.loaded(run.config.device):
                sites = run.prune(block, None)
                block.commit()
            _finish(run, block, sites, None, time.monotonic() - start)
            bar.update()


def with_data(run: Run, batches: list[Batch]) -> None:
    """Block by block: run all batches dense and measure, prune, run them again; the next block gets what comes out.

    With two streams every batch has a second pass, in which all blocks stay dense.
    """
    recorders: dict[int, Recorder] = {}
    earlier = set(run.done)
    if len(earlier) == len(run.chosen):
        return
    calls_left = {index: run.survey.expected(index, batches) for index in run.chosen}
    passes = [forward(run.model, batch.values) for batch in batches] * (2 if run.two_streams else 1)
    with _progress(run) as bar, closing(walk(run.inventory.blocks, passes, run.survey.order())) as turns:
        for calls in turns:
            block = calls[0].block
            index = block.index
            if index not in run.chosen or index in run.done:
                dense = len(batches) if index in earlier and run.two_streams else None
                _run_only(run, block, calls, dense)
                continue
            start = time.monotonic()
            calls_left[index] -= len(calls) // (2 if run.two_streams else 1)
            with block.loaded(run.config.device):
                recorder = recorders.setdefault(index, _recorder(run, block, len(batches)))
                prune = _in_two_streams if run.two_streams else _in_one_stream
                # A block that runs several times a pass (ALBERT) is pruned at its last run, with the statistics of all.
                pruned = prune(run, block, calls, recorder, batches, calls_left[index] <= 0)
                if pruned is not None:
                    del recorders[index], recorder  # Gram matrices are large
                    block.commit()
                    _finish(run, block, *pruned, time.monotonic() - start)
                    bar.update()
            del calls
            if len(run.done) == len(run.chosen):
                break
    left = [block for block in run.inventory.blocks if block.index in run.chosen and block.index not in run.done]
    if left and run.looks_at_data:
        raise CalibrationError(
            f"{left[0].name} ran less often than on a sample before, so how often it runs depends on the data; "
            f"that cannot be calibrated. Leave it out with exclude=({left[0].name + '.*'!r},)."
        )
    if left:  # a metric that looks at no data prunes them all the same
        without_data(run, left)


Pruned = tuple[list[SiteReport], float | None]


def _in_one_stream(
    run: Run, block: Block, calls: list[Call], recorder: Recorder, batches: list[Batch], last: bool
) -> Pruned | None:
    """Measure dense, prune, run again; None where the block has more runs to come in this pass, which leaves it dense."""
    dense = [_dense_pass(run, block, call, recorder, batches[call.batch]) for call in calls]
    if not last:
        return None
    sites = run.prune(block, recorder)
    return sites, _sparse_pass(run, calls, dense)


def _in_two_streams(
    run: Run, block: Block, calls: list[Call], recorder: Recorder, batches: list[Batch], last: bool
) -> Pruned:
    """Prune a block with both streams; the error is that of the pruned model's hidden states against the dense model's."""
    if not last or block.index not in run.survey.wirings:
        raise CalibrationError(
            f"{block.name} does not run once in each pass of the model, so it cannot be compared with the dense model; use an update "
            f'without the dense stream, such as "admm", or leave it out with exclude=({block.name + ".*"!r},).'
        )
    sparse = [call for call in calls if call.batch < len(batches)]
    dense = [call for call in calls if call.batch >= len(batches)]
    plans, sites = run.plans(block), run.inventory.sites[block.index]
    ahead = None
    if any(plan.feed is not None for plan in plans):  # what a site feeds is not reached yet when the site is pruned
        ahead = _recorder(run, block, len(batches), updates=())
        for call in sparse:
            _dense_pass(run, block, call, ahead, batches[call.batch])
            call.output = None
    wiring = run.survey.wirings[block.index]
    streams = TwoStreams(run.model, run.config, block, sites, plans, wiring, recorder, ahead, lambda: run.mark(block))
    reports = streams.prune(sparse, dense, batches)
    if "reconstruct" in run.config.update:
        reports = _reconstruct(run, block, sparse, dense, reports)
    error = _Error()
    for one, other in zip(sparse, dense, strict=True):
        error.add(main_tensor(other.output), main_tensor(one.output))
    return reports, error.value


class _Error:
    """||sparse - dense|| / ||dense|| of hidden states, added up over calls."""

    def __init__(self) -> None:
        self._difference = self._total = 0.0

    def add(self, dense: torch.Tensor | None, sparse: torch.Tensor | None) -> None:
        # A block without hidden states among its outputs has no error to tell.
        if dense is not None and sparse is not None and dense.shape == sparse.shape:
            self._difference += norm(sparse - dense) ** 2
            self._total += norm(dense) ** 2

    @property
    def value(self) -> float | None:
        return (self._difference / self._total) ** 0.5 if self._total else None


def _reconstruct(
    run: Run, block: Block, sparse: list[Call], dense: list[Call], reports: list[SiteReport]
) -> list[SiteReport]:
    """Train the pruned block towards the dense stream, run it again, and count its zeros again."""
    targets = [main_tensor(call.output) for call in dense]
    pairs = [(call, target) for call, target in zip(sparse, targets, strict=True) if target is not None]
    pruned = [plan.site for plan in run.plans(block) if not plan.dense]
    if pairs and pruned:
        run.mark(block)
        calls, wanted = [call for call, _ in pairs], [target for _, target in pairs]
        options = run.config.options_of("reconstruct")
        note = reconstruct_(run.model, block, pruned, calls, wanted, options, run.config.device, run.config.seed)
        if note:
            run.notes.append(f"{block.name}: {note}")
    for call in sparse:
        call.output = None
        call.output = call(run.config.device)
    zeros = {site.name: count_zeros(read(run.model, site)) for site in run.chosen[block.index]}
    # What a site gives now is no longer meant to be what it gave alone, so its own error would mislead.
    return [
        replace(
            report,
            zeros=zeros[report.name],
            sparsity=zeros[report.name] / (report.shape[0] * report.shape[1]),
            output_error=None,
        )
        for report in reports
    ]


def _recorder(run: Run, block: Block, batches: int, updates: Sequence[str] | None = None) -> Recorder:
    sites = run.inventory.sites[block.index]
    updates = run.config.update if updates is None else updates
    wanted = needs(run.plans(block), {site.name: site for site in sites}, updates)
    return Recorder(sites, wanted, -(-ERROR_SAMPLE // batches))


def _run_only(run: Run, block: Block, calls: list[Call], dense: int | None = None) -> None:
    """Run calls with the block as it is now; those of batches from `dense` on with the weights that it had before pruning."""
    for as_found in (False, True):
        turn = [call for call in calls if (dense is not None and call.batch >= dense) == as_found]
        if turn:
            with block.loaded(run.config.device, as_found):
                for call in turn:
                    call.output = call(run.config.device)


def _dense_pass(run: Run, block: Block, call: Call, recorder: Recorder, batch: Batch) -> torch.Tensor | None:
    """Run one call with the recorder listening; the output stands until the sparse pass replaces it."""
    with recorder.listening(run.model, run.inventory.sites[block.index], batch):
        call.output = run_again(call, run.config.device)
    return main_tensor(call.output)


def _sparse_pass(run: Run, calls: list[Call], dense: list[torch.Tensor | None]) -> float | None:
    """Run all calls again; returns the error of the hidden states over all tokens."""
    error = _Error()
    for position, call in enumerate(calls):
        before, dense[position] = dense[position], None
        call.output = None
        call.output = call(run.config.device)
        error.add(before, main_tensor(call.output))
    return error.value


def _finish(run: Run, block: Block, sites: list[SiteReport], error: float | None, seconds: float) -> None:
    report = run.done[block.index] = BlockReport(
        index=block.index, name=block.name, stack=block.stack, zeros=sum(site.zeros for site in sites),
        size=sum(site.size for site in run.chosen[block.index]), all_matrices=0,
        output_error=error, seconds=seconds, sites=sites,
    )  # fmt: skip
    if run.diary is not None:
        run.diary.finished(run, report)
