"""Prunes a model in place: the order of the steps, nothing else."""

import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_sparse import checkpoint, contextual, ranks
from hf_sparse.allot import measured_by, shares
from hf_sparse.blockwise import Run, with_data, without_data
from hf_sparse.calibrate import make_batches, ready, survey
from hf_sparse.config import SparsityConfig
from hf_sparse.data import Samples, tokens_of
from hf_sparse.division import checksum
from hf_sparse.early import check_run
from hf_sparse.errors import CalibrationError, ConfigError, HfSparseError, ModelError, PruningInterrupted
from hf_sparse.families import Inventory, find_sites
from hf_sparse.permute import Permutations, check_permutable
from hf_sparse.plan import select
from hf_sparse.prune_report import add_earlier_, block_reports, make_report
from hf_sparse.registry import METRICS, UPDATES
from hf_sparse.report import Report
from hf_sparse.search import held_back, search_
from hf_sparse.shared import Shared
from hf_sparse.sites import count_zeros, plain_name, read

_LOCK = threading.Lock()
_BUSY: set[int] = set()  # models that some thread prunes now
_ITEMS_KEPT = 4096  # hashes of calibration texts in a report


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
    one after the other, each on inputs that the already pruned ones produced (arXiv 2306.11695, section 3). Where a group of
    processes is initialised (`torch.distributed`), all of them call this and share the work, see docs/processes.md.

    Raises: ConfigError, ModelError and CalibrationError before anything is changed; PruningInterrupted, which names the blocks
    already pruned, if a later step fails; ProcessLost where another process is gone before anything was changed.
    """
    return prune_sharing_(model, config, Shared(tokenizer, tokenizer_options))


def prune_sharing_(model: nn.Module, config: Any, shared: Shared) -> Report:
    """`prune_` with what earlier prunings of the same dense model have left in `shared`."""
    start = time.monotonic()
    with ranks.together():
        config = SparsityConfig.of(config)
        config.check_calibration()
        inner = checkpoint.unwrap(model)
        if config.permute and isinstance(inner, nn.Module):
            check_permutable(model, inner)
        model = inner
        checkpoint.check_prunable(model)
        with _alone(model):
            return _prune(model, config, shared, start)


@contextmanager
def _alone(model: nn.Module) -> Iterator[None]:
    """Two prunings of one model at a time would undo each other."""
    with _LOCK:
        if id(model) in _BUSY:
            raise ModelError("this model is being pruned by another thread; wait until that is done.")
        _BUSY.add(id(model))
    try:
        yield
    finally:
        _BUSY.discard(id(model))


def _prune(model: nn.Module, config: SparsityConfig, shared: Shared, start: float) -> Report:
    if config.device is not None:
        check_device(config.device)
        if any(hasattr(module, "_hf_hook") for module in model.modules()):
            raise ConfigError(
                "device=... cannot be used with a model that device_map placed; leave one of the two out."
            )
    inventory = find_sites(model)
    _check_alike(model, inventory, config)
    chosen, left = select(inventory, config)
    run = Run(model, config, inventory, chosen, shares(inventory, chosen, config), diary=shared.diary)
    run.batch_size = None if run.diary is None else run.diary.batch_size
    run.notes += _scan(run)
    samples = None if config.calibration is None else shared.samples(model, config)
    ranks.agree("calibration samples, told by their fingerprint", samples.fingerprint if samples else None)
    if samples is not None:
        check_run(model, inventory, chosen, config, -(-samples.tokens // ranks.count()))
    permutations = Permutations()
    with ready(model):
        if ranks.count() > 1:  # a model that draws random numbers draws the same ones on all processes
            torch.manual_seed(config.seed)
        _attempt(run, samples, permutations, shared)
    report = _report(run, samples, left, time.monotonic() - start)
    report.permutations, report.permuted = permutations.orders, permutations.places
    checkpoint.attach(model, report)
    contextual.tell_of_stale(model)
    return report


# ---------------------------------------------------------------------------------------------------- before anything changes


def _check_alike(model: nn.Module, inventory: Inventory, config: SparsityConfig) -> None:
    """Raises ModelError where processes that shall prune together were not given the same."""
    if ranks.count() == 1:
        return
    plain = {name: value for name, value in config.to_dict().items() if name not in ("calibration", "device")}
    ranks.agree("configuration", plain)
    ranks.agree("model", [type(model).__name__, sum(parameter.numel() for parameter in model.parameters())])
    sums = []
    for block in inventory.blocks:
        with block.loaded():
            sums.append(checksum(block.module))
    ranks.agree("weights", [*sums, checksum(model)])


def check_device(device: str) -> None:
    """Raises ConfigError for a device that cannot compute here."""
    if device.startswith("meta"):
        raise ConfigError('device="meta" computes nothing; give an accelerator such as "cuda:0", or leave it out.')
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"device={device!r} cannot be used here ({_first_line(error)}); leave it out to compute where the model is."
        ) from error


def _scan(run: Run) -> list[str]:
    """Refuse weights that are not finite, anywhere in the blocks; say so where the model is sparse already."""
    zeros = total = 0
    for block in run.inventory.blocks:
        with block.loaded():
            for name, parameter in block.module.named_parameters():
                if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
                    raise ModelError(
                        f"{plain_name(f'{block.name}.{name}')} holds NaN or infinite weights; nothing was changed. "
                        "Repair the checkpoint first."
                    )
            for site in run.chosen.get(block.index, []):
                weight = read(run.model, site)
                zeros += count_zeros(weight)
                total += weight.numel()
    if zeros <= 0.01 * total:
        return []
    return [f"the model was sparse before: {100 * zeros / total:.2f} % zeros in the targeted sites"]


def _look_around(run: Run, samples: Samples, shared: Shared) -> None:
    """One short dense pass: which blocks run, and what feeds what."""
    entry = METRICS[run.config.metric]
    try:
        run.survey = shared.survey(run, samples, bool(entry.consumer_needs) or run.config.permute)
    except (HfSparseError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the model's code says about data that it cannot take
        raise CalibrationError(
            f"the model does not take these calibration samples, whose keys are {sorted(samples.rows[0])}: "
            f"{type(error).__name__}: {_first_line(error)}"
        ) from error
    unreached = [run.inventory.blocks[index] for index in run.chosen if index not in run.survey.reached]
    if unreached and (run.looks_at_data or measured_by(run.config)):
        stacks = sorted({block.stack for block in unreached})
        raise CalibrationError(
            f"the calibration data never run {len(unreached)} of the blocks to prune (in {', '.join(stacks)}); give data that do "
            f"(images for a vision tower, say), or leave them out with exclude={tuple(stack + '.*' for stack in stacks)!r}."
        )
    _check_updates(run, samples)
    plans = [plan for block in run.inventory.blocks for plan in run.plans(block)]
    if any("ranks them as magnitude" in plan.note for plan in plans):
        message = (
            f'axis="input" makes {entry.name} equal to magnitude on gate and up with N:M groups, as all weights of a group belong to one '
            'neuron; axis="auto" gives the published groups along the output axis.'
        )
        warnings.warn(message, stacklevel=6)
        run.notes.append(message)


def _check_updates(run: Run, samples: Samples) -> None:
    """Refuse blocks that two streams cannot prune, and warn where there are too few tokens for a Gram matrix."""
    again = [index for index in run.chosen if any(calls.count(index) > 1 for calls in run.survey.calls.values())]
    if run.two_streams and again:
        raise ConfigError(
            f"{run.inventory.blocks[again[0]].name} runs several times in one pass of the model; update={run.config.update!r} compares "
            'each block with the dense model once. Use an update without the dense stream, such as "admm".'
        )
    if run.two_streams:
        run.notes.append("output errors are those of the pruned model's hidden states against the dense model's")
    widest = max(site.shape[1] for sites in run.chosen.values() for site in sites)
    if samples.tokens < widest and any("gram" in UPDATES[name].needs for name in run.config.update):
        message = (
            f"{samples.tokens} calibration tokens cannot determine a Gram matrix of {widest} inputs; the update goes on with damping, but "
            "more tokens (num_samples, sequence_length) would make it better."
        )
        warnings.warn(message, stacklevel=7)
        run.notes.append(message)


# ---------------------------------------------------------------------------------------------------- block by block


def _attempt(run: Run, samples: Samples | None, permutations: Permutations, shared: Shared) -> None:
    """Prune all blocks; while nothing is changed yet, running out of memory halves the batch."""
    size: int | str = run.batch_size or run.config.batch_size
    try:
        if samples is None:
            shared.permute_(run, [], [], permutations)
            _begin(run, permutations)
            without_data(run, [block for block in run.inventory.blocks if block.index in run.chosen])
            return
        _look_around(run, samples, shared)
        while True:
            rows, held_out = held_back(run, samples.rows)
            batches, run.batch_size = make_batches(rows, size, run.token_budget)
            try:
                with ranks.together():  # so that all processes end up here with the error of one
                    shared.allot_(run, samples, batches)
                    shared.permute_(run, samples.rows, batches, permutations)
                    ranks.agree("orders of channels", permutations.orders)
                    if (permutations.done or permutations.resumed) and run.two_streams:
                        # what enters a block's output is known channel by channel
                        wirings = survey(run.model, run.inventory, samples.rows, False, run.config.device, True).wirings
                        run.survey = replace(run.survey, wirings=wirings)
                    _begin(run, permutations)
                    if held_out:
                        search_(run, rows, held_out)
                    else:
                        with_data(run, batches)
                return
            except (MemoryError, RuntimeError) as error:
                largest = max(len(batch.numbers) for batch in batches)
                if run.changed or largest == 1 or not _out_of_memory(error):
                    raise
                size = largest // 2
                run.notes.append(f"memory ran out; the batch size was halved to {size}")
    except BaseException as error:
        if not run.changed:
            permutations.undo_(run)
            raise
        # What an earlier pruning claimed is no longer true either.
        checkpoint.detach(run.model)
        if not isinstance(error, Exception):
            raise  # Ctrl-C and the like
        raise PruningInterrupted(
            f"pruning stopped after blocks {run.changed} were changed ({type(error).__name__}: {_first_line(error)}); the model "
            "is partly pruned and carries no claim of sparsity. Load it again before you go on.",
            list(run.changed),
        ) from error


def _begin(run: Run, permutations: Permutations) -> None:
    if run.diary is not None:
        run.diary.begin(run, permutations.orders, permutations.places)


def _out_of_memory(error: Exception) -> bool:
    words = ("not enough memory", "can't allocate memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


# ---------------------------------------------------------------------------------------------------- the report


def _report(run: Run, samples: Samples | None, left: dict[str, str], seconds: float) -> Report:
    blocks = block_reports(run.inventory, run.done, run.measured)
    now = {site.name for sites in run.chosen.values() for site in sites}
    earlier = checkpoint.report(run.model)
    kept = add_earlier_(blocks, run.inventory, earlier, now, lambda site: count_zeros(read(run.model, site)))
    if kept:
        run.notes.append(f"{kept} sites were pruned before and left as they are now")
    calibration = None
    if samples is not None:
        calibration = {
            "source": samples.source, "fingerprint": samples.fingerprint, "samples": len(samples.rows), "tokens": samples.tokens,
            "longest": max(tokens_of(row) for row in samples.rows), "batch_size": run.batch_size, "items": list(samples.items[:_ITEMS_KEPT]),
        }  # fmt: skip
    left_out = {**run.inventory.left_out, **left}
    report = make_report(run.model, run.config, blocks, left_out, run.notes, calibration, seconds)
    report.processes = ranks.count()
    return report
