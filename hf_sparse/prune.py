"""Prunes a model in place: the order of the steps, nothing else."""

import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from hf_sparse import checkpoint, environment
from hf_sparse.apply import BlockPlan, prune_block
from hf_sparse.blocks import Block
from hf_sparse.calibrate import Survey, forward, make_batches, read_calibration, ready, survey
from hf_sparse.config import SparsityConfig
from hf_sparse.data import Batch, Samples
from hf_sparse.errors import CalibrationError, HfSparseError, ModelError, PruningInterrupted
from hf_sparse.families import Inventory, find_sites
from hf_sparse.forwards import Call, main_tensor, walk
from hf_sparse.observe import operand_of
from hf_sparse.plan import SitePlan, needs, plan_site, select, shares
from hf_sparse.record import ERROR_SAMPLE, Recorder
from hf_sparse.registry import METRICS
from hf_sparse.report import BlockReport, Report, SiteReport
from hf_sparse.sites import Site, read


@dataclass
class _Run:
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

    def plan(self, block: Block) -> BlockPlan:
        sites = {site.name: site for site in self.inventory.sites[block.index]}
        return BlockPlan(block, self.plans(block), sites)

    def prune(self, block: Block, recorder: Recorder | None) -> list[SiteReport]:
        self.changed.append(block.index)
        return prune_block(self.model, self.config, self.plan(block), recorder)

    def plans(self, block: Block) -> list[SitePlan]:
        feeds = self.survey.feeds.get(block.index, [])
        return [
            plan_site(site, self.config, feeds, self.shares[site.name], self.survey.unresolved)
            for site in self.chosen.get(block.index, [])
        ]


def prune_(
    model: nn.Module,
    config: SparsityConfig | Mapping[str, Any] | str | Path,
    tokenizer: Any = None,
    *,
    tokenizer_options: Mapping[str, Any] | None = None,
) -> Report:
    """Prune a model in place and return the report; the model then knows that it is sparse and saves that with it.

    `config` may be an object, a dict or the path of a JSON or YAML file. `tokenizer` turns calibration text into tokens;
    without one it is loaded from the model's own path, with `tokenizer_options` (revision, token, ...). Blocks are pruned
    one after the other, each on inputs that the already pruned ones produced (arXiv 2306.11695, section 3).

    Raises: ConfigError, ModelError and CalibrationError before anything is changed; PruningInterrupted, which names the blocks
    already pruned, if a later step fails.
    """
    start = time.monotonic()
    config = SparsityConfig.of(config)
    config.check_calibration()
    outer, model = model, checkpoint.unwrap(model)
    checkpoint.check_prunable(model)
    inventory = find_sites(model)
    chosen, left = select(inventory, config)
    run = _Run(model, config, inventory, chosen, shares(inventory, chosen, config))
    run.notes += _scan(run)
    given = config.calibration is not None
    samples = read_calibration(model, config, tokenizer, tokenizer_options) if given else None
    with ready(model):
        _attempt(run, samples)
    report = _report(run, samples, left, time.monotonic() - start)
    checkpoint.attach(model, report)
    if outer is not model:
        checkpoint.attach_report(outer, report)
    return report


# ---------------------------------------------------------------------------------------------------- before anything changes


def _scan(run: _Run) -> list[str]:
    """Refuse weights that are not finite; say so where the model is sparse already."""
    zeros = total = 0
    for block in run.inventory.blocks:
        if block.index not in run.chosen:
            continue
        with block.loaded():
            for site in run.chosen[block.index]:
                weight = read(run.model, site)
                if not bool(torch.isfinite(weight).all()):
                    raise ModelError(
                        f"{site.name} holds NaN or infinite weights; nothing was changed. Repair the checkpoint first."
                    )
                zeros += weight.numel() - int(torch.count_nonzero(weight))
                total += weight.numel()
    if zeros <= 0.01 * total:
        return []
    return [f"the model was sparse before: {100 * zeros / total:.2f} % zeros in the targeted sites"]


def _look_around(run: _Run, samples: Samples) -> None:
    """One short dense pass: which blocks run, and what feeds what."""
    entry = METRICS[run.config.metric]
    run.survey = survey(run.model, run.inventory, samples.rows, bool(entry.consumer_needs))
    unreached = [run.inventory.blocks[index] for index in run.chosen if index not in run.survey.calls]
    if unreached and (entry.needs or entry.consumer_needs):
        stacks = sorted({block.stack for block in unreached})
        raise CalibrationError(
            f"the calibration data never run {len(unreached)} of the blocks to prune (in {', '.join(stacks)}); give data that do "
            f"(images for a vision tower, say), or leave them out with exclude={tuple(stack + '.*' for stack in stacks)!r}."
        )
    plans = [plan for block in run.inventory.blocks for plan in run.plans(block)]
    if any("ranks them as magnitude" in plan.note for plan in plans):
        message = (
            f'axis="input" makes {entry.name} equal to magnitude on gate and up with N:M groups, as all weights of a group belong to one '
            'neuron; axis="auto" gives the published groups along the output axis.'
        )
        warnings.warn(message, stacklevel=5)
        run.notes.append(message)


# ---------------------------------------------------------------------------------------------------- block by block


def _attempt(run: _Run, samples: Samples | None) -> None:
    """Prune all blocks; while nothing is changed yet, running out of memory halves the batch."""
    size: int | str = run.config.batch_size
    while True:
        try:
            if samples is None:
                _without_data(run, [block for block in run.inventory.blocks if block.index in run.chosen])
            else:
                _look_around(run, samples)
                batches, run.batch_size = make_batches(samples.rows, size)
                _with_data(run, batches)
            return
        except (torch.OutOfMemoryError, RuntimeError) as error:
            out_of_memory = isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)
            if out_of_memory and not run.changed and (run.batch_size or 1) > 1:
                size = run.batch_size = (run.batch_size or 2) // 2
                run.notes.append(f"memory ran out; the batch size was halved to {size}")
                continue
            if run.changed:
                raise _interrupted(run, error) from error
            raise
        except HfSparseError as error:
            if run.changed:
                raise _interrupted(run, error) from error
            raise


def _interrupted(run: _Run, error: Exception) -> PruningInterrupted:
    return PruningInterrupted(
        f"pruning stopped after blocks {run.changed} were changed ({type(error).__name__}: {error}); the model is partly pruned and "
        "carries no claim of sparsity. Load it again before you go on.",
        list(run.changed),
    )


def _progress(run: _Run) -> Any:
    return transformers_logging.tqdm(total=len(run.chosen), desc="Pruning", unit="block")


def _without_data(run: _Run, blocks: Sequence[Block]) -> None:
    with _progress(run) as bar:
        for block in blocks:
            start = time.monotonic()
            with block.loaded(run.config.device):
                sites = run.prune(block, None)
                block.commit()
            _finish(run, block, sites, None, time.monotonic() - start)
            bar.update()


def _with_data(run: _Run, batches: list[Batch]) -> None:
    recorders: dict[int, Recorder] = {}
    calls_so_far: dict[int, int] = {}
    passes = [forward(run.model, batch.values) for batch in batches]
    with _progress(run) as bar, closing(walk(run.inventory.blocks, passes)) as turns:
        for calls in turns:
            block = calls[0].block
            index = block.index
            if index not in run.chosen or index in run.done:
                _run_only(run, block, calls)
                continue
            # A block that runs several times a pass (ALBERT) is pruned at its last run, with the statistics of all.
            calls_so_far[index] = calls_so_far.get(index, 0) + 1
            is_last = calls_so_far[index] >= run.survey.calls.get(index, 1)
            start = time.monotonic()
            with block.loaded(run.config.device):
                recorder = recorders.setdefault(index, _recorder(run, block, len(batches)))
                dense = [_dense_pass(run, block, call, recorder, batches[call.batch]) for call in calls]
                if is_last:
                    sites = run.prune(block, recorder)
                    block.commit()
                    del recorders[index]
                    error = _sparse_pass(run, calls, dense)
                    _finish(run, block, sites, error, time.monotonic() - start)
                    bar.update()
            del dense, calls
            if len(run.done) == len(run.chosen):
                break
    # Only a metric that needs no data gets here with blocks that the data never ran.
    if never_run := [
        block for block in run.inventory.blocks if block.index in run.chosen and block.index not in run.done
    ]:
        _without_data(run, never_run)


def _recorder(run: _Run, block: Block, batches: int) -> Recorder:
    sites = run.inventory.sites[block.index]
    wanted = needs(run.plans(block), {site.name: site for site in sites})
    return Recorder(sites, wanted, -(-ERROR_SAMPLE // batches))


def _run_only(run: _Run, block: Block, calls: list[Call]) -> None:
    with block.loaded(run.config.device):
        for call in calls:
            call.output = call(run.config.device)


def _dense_pass(run: _Run, block: Block, call: Call, recorder: Recorder, batch: Batch) -> torch.Tensor | None:
    """Run one call with the recorder listening; the output stands until the sparse pass replaces it."""
    with recorder.observe(run.model, run.inventory.sites[block.index]):
        call.output = call(run.config.device)
    recorder.end_call(batch, {operand_of(site): site.name for site in run.inventory.sites[block.index]})
    return main_tensor(call.output)


def _sparse_pass(run: _Run, calls: list[Call], dense: list[torch.Tensor | None]) -> float | None:
    """Run all calls again; returns ||sparse - dense|| / ||dense|| of the hidden states over all tokens."""
    difference = total = 0.0
    for position, call in enumerate(calls):
        before, dense[position] = dense[position], None
        call.output = None
        call.output = call(run.config.device)
        after = main_tensor(call.output)
        if before is None or after is None:
            return None
        difference += float(torch.linalg.vector_norm(after - before, dtype=torch.float32)) ** 2
        total += float(torch.linalg.vector_norm(before, dtype=torch.float32)) ** 2
    return (difference / total) ** 0.5 if total else None


# ---------------------------------------------------------------------------------------------------- the report


def _finish(run: _Run, block: Block, sites: list[SiteReport], error: float | None, seconds: float) -> None:
    run.done[block.index] = BlockReport(
        index=block.index, name=block.name, stack=block.stack, zeros=sum(site.zeros for site in sites),
        size=sum(site.size for site in run.chosen[block.index]), all_matrices=checkpoint.matrix_weights(block.module),
        output_error=error, seconds=seconds, sites=sites,
    )  # fmt: skip


def _report(run: _Run, samples: Samples | None, left: dict[str, str], seconds: float) -> Report:
    blocks = [run.done[index] for index in sorted(run.done)]
    reasons: dict[str, int] = {}
    for site in (site for block in blocks for site in block.sites if site.note):
        reasons[site.note] = reasons.get(site.note, 0) + 1
    calibration = None
    if samples is not None:
        calibration = {
            "source": samples.source, "fingerprint": samples.fingerprint, "samples": len(samples.rows), "tokens": samples.tokens,
            "batch_size": run.batch_size,
        }  # fmt: skip
    config = getattr(run.model, "config", None)
    return Report(
        config=run.config.to_dict(), model=getattr(config, "name_or_path", "") or "", model_class=type(run.model).__name__,
        parameters=sum(p.numel() for p in run.model.parameters()), blocks=blocks, left_out={**run.inventory.left_out, **left},
        notes=[*run.notes, *(f"{count} sites: {note}" for note, count in reasons.items())], calibration=calibration,
        versions=environment.versions(), seconds=seconds, peak_memory_bytes=environment.peak_memory(),
    )  # fmt: skip
