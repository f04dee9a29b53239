"""Prunes a model in place: the order of the steps, nothing else."""

import platform
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from hf_sparse import checkpoint
from hf_sparse.blocks import Block
from hf_sparse.calibrate import ERROR_SAMPLE, Recorder, Survey, forward, make_batches, read_calibration, ready, survey
from hf_sparse.config import SparsityConfig
from hf_sparse.data import Batch, Samples
from hf_sparse.errors import CalibrationError, HfSparseError, ModelError, PruningInterrupted
from hf_sparse.families import Inventory, find_sites
from hf_sparse.forwards import Call, main_tensor, walk
from hf_sparse.metrics import Inputs
from hf_sparse.observe import operand_of
from hf_sparse.patterns import Pattern
from hf_sparse.plan import SitePlan, needs, plan_site, select, shares
from hf_sparse.registry import METRICS, UPDATES
from hf_sparse.report import BlockReport, Report, SiteReport
from hf_sparse.sites import Site, read, write_

_VERSIONS = ("hf_sparse", "torch", "transformers", "peft", "accelerate", "datasets", "huggingface_hub", "safetensors")


@dataclass
class _Run:
    """What the steps hand on to each other during one call of `prune_`."""

    model: nn.Module
    config: SparsityConfig
    inventory: Inventory
    chosen: dict[int, list[Site]]
    shares: dict[str, float]
    pattern: Pattern
    survey: Survey = field(default_factory=Survey)
    notes: list[str] = field(default_factory=list)
    done: dict[int, BlockReport] = field(default_factory=dict)
    changed: list[int] = field(default_factory=list)  # blocks whose weights were touched
    batch_size: int | None = None

    def plans(self, block: Block) -> list[SitePlan]:
        feeds = self.survey.feeds.get(block.index, [])
        return [plan_site(site, self.config, feeds, self.shares[site.name], self.survey.unresolved) for site in self.chosen.get(block.index, [])]


def prune_(model: nn.Module, config: SparsityConfig | Mapping[str, Any] | str | Path, tokenizer: Any = None, *, tokenizer_options: Mapping[str, Any] | None = None) -> Report:
    """Prune a model in place and return the report; the model then knows that it is sparse and saves that with it.

    `config` may be an object, a dict or the path of a JSON or YAML file. `tokenizer` turns calibration text into tokens; without
    one it is loaded from the model's own path, with `tokenizer_options` (revision, token, ...). Blocks are pruned one after the other, each on inputs that the already pruned ones
    produced (block-sequential, arXiv 2306.11695, section 4.1).

    Raises: ConfigError, ModelError and CalibrationError before anything is changed; PruningInterrupted, which names the blocks
    already pruned, if a later step fails.
    """
    start = time.monotonic()
    config = SparsityConfig.of(config)
    outer, model = model, checkpoint.unwrap(model)
    checkpoint.check_prunable(model)
    inventory = find_sites(model)
    chosen, left = select(inventory, config)
    run = _Run(model, config, inventory, chosen, shares(inventory, chosen, config), Pattern.parse(config.pattern))
    run.notes += _scan(run)
    samples = _samples(run, tokenizer, tokenizer_options)
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
                    raise ModelError(f"{site.name} holds NaN or infinite weights; nothing was changed. Repair the checkpoint first.")
                zeros += weight.numel() - int(torch.count_nonzero(weight))
                total += weight.numel()
    return [f"the model was sparse before: {100 * zeros / total:.2f} % zeros in the targeted sites"] if zeros > 0.01 * total else []


def _samples(run: _Run, tokenizer: Any, tokenizer_options: Mapping[str, Any] | None) -> Samples | None:
    config = run.config
    entry = METRICS[config.metric]
    if config.calibration is None:
        if entry.needs or entry.consumer_needs:
            raise CalibrationError(
                f"metric {entry.name!r} looks at activations and needs calibration=... (texts, token ids, a data set or a path); "
                'or use metric="magnitude", which needs none.'
            )
        return None
    return read_calibration(run.model, config, tokenizer, tokenizer_options)


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
                sites = _prune_block(run, block, None)
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
                    sites = _prune_block(run, block, recorder)
                    block.commit()
                    del recorders[index]
                    error = _sparse_pass(run, calls, dense)
                    _finish(run, block, sites, error, time.monotonic() - start)
                    bar.update()
            del dense, calls
            if len(run.done) == len(run.chosen):
                break
    # Only a metric that needs no data gets here with blocks that the data never ran.
    if never_run := [block for block in run.inventory.blocks if block.index in run.chosen and block.index not in run.done]:
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


# ---------------------------------------------------------------------------------------------------- one block's sites


def _prune_block(run: _Run, block: Block, recorder: Recorder | None) -> list[SiteReport]:
    run.changed.append(block.index)
    # Statistics of the dense block serve all its sites, so nothing here looks at what another site has become.
    return [_prune_site(run, block, plan, recorder) for plan in run.plans(block)]


def _consumer(plan: SitePlan, recorder: Recorder, sites: Mapping[str, Site]) -> dict[str, torch.Tensor]:
    """The consumer's norm brought to the site's rows; a row that several columns read counts with all of them."""
    if plan.feed is None:
        return {}
    values = recorder.own(sites[plan.feed.consumer])
    rows = torch.tensor(plan.feed.rows, device=next(iter(values.values())).device) if values else torch.empty(0)
    fed = rows >= 0
    one_to_one = bool(fed.all()) and len(rows) == plan.site.shape[0] and len(rows.unique()) == len(rows)
    found = {}
    for name, value in values.items():
        target = value.new_zeros(plan.site.shape[0])
        found[name] = target.index_copy(0, rows, value) if one_to_one else target.index_add(0, rows[fed], value[fed] ** 2).sqrt()
    return found


def _measured(plan: SitePlan, recorder: Recorder | None, sites: Mapping[str, Site]) -> tuple[SitePlan, Inputs]:
    """What the metric gets to see; a site that nothing was measured for is pruned by magnitude, and the plan says so."""
    if recorder is None:
        return plan, Inputs()
    own, consumer = recorder.own(plan.site), _consumer(plan, recorder, sites)
    if plan.metric.needs <= set(own) and plan.metric.consumer_needs <= set(consumer):
        return plan, Inputs(own, consumer)
    why = "no calibration token reached this expert" if plan.site.expert is not None else "its input was not seen during calibration"
    note = f"magnitude instead of {plan.metric.name}: {why}"
    return SitePlan(plan.site, METRICS["magnitude"], plan.axis, plan.sparsity, None, note), Inputs()


def _prune_site(run: _Run, block: Block, plan: SitePlan, recorder: Recorder | None) -> SiteReport:
    sites = {site.name: site for site in run.inventory.sites[block.index]}
    plan, inputs = _measured(plan, recorder, sites)
    site, config = plan.site, run.config
    stored = read(run.model, site)
    weight = stored.float()
    inputs = Inputs(inputs.own, inputs.consumer, config.options_of(plan.metric.name))
    scores: torch.Tensor = plan.metric.function(weight, inputs)  # type: ignore[assignment]
    mask = run.pattern.mask(scores, plan.sparsity, plan.axis, config.options_of("unstructured")["rounding"])
    for name in config.update:
        weight, mask = UPDATES[name].function(weight, scores, mask, inputs.own, run.pattern, plan.sparsity, plan.axis)  # type: ignore[misc]
    # Adding zero turns -0.0 into 0.0, so that one rule, weight != 0, tells what is kept.
    new = torch.where(mask, weight, 0).to(stored.dtype) + 0.0
    error = _site_error(stored, new, recorder.sample(site) if recorder else None)
    write_(run.model, site, new)
    zeros = new.numel() - int(torch.count_nonzero(new))
    extra = zeros - (mask.numel() - int(mask.sum()))
    notes = [plan.note] if plan.note else []
    if extra:
        notes.append(f"{extra} kept weights are zero and count as dropped")
    return SiteReport(
        name=site.name, block=block.index, role=site.role, shape=site.shape, pattern=str(run.pattern), axis=plan.axis,
        metric=plan.metric.name, zeros=zeros, sparsity=zeros / site.size, output_error=error,
        tokens=recorder.tokens(site) if recorder else None, note="; ".join(notes),
    )  # fmt: skip


def _site_error(dense: torch.Tensor, sparse: torch.Tensor, sample: torch.Tensor | None) -> float | None:
    if sample is None:
        return None
    sample = sample.to(dense.dtype)
    before = torch.linalg.vector_norm(sample @ dense.T, dtype=torch.float32)
    return float(torch.linalg.vector_norm(sample @ (dense - sparse).T, dtype=torch.float32) / before) if before else None


# ---------------------------------------------------------------------------------------------------- the report


def _finish(run: _Run, block: Block, sites: list[SiteReport], error: float | None, seconds: float) -> None:
    run.done[block.index] = BlockReport(
        index=block.index, name=block.name, stack=block.stack, zeros=sum(site.zeros for site in sites),
        size=sum(site.size for site in run.chosen[block.index]), all_matrices=checkpoint.matrix_weights(block.module),
        output_error=error, seconds=seconds, sites=sites,
    )  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of everything that a result depends on."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _peak_memory() -> int | None:
    try:
        import resource
    except ImportError:  # Windows has no such count
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


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
        versions=versions(), seconds=seconds, peak_memory_bytes=_peak_memory(),
    )  # fmt: skip
