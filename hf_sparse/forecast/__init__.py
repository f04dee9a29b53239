"""Foretells the memory, disk and time that a pruning needs, before anything of the weights is read or anything is written."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_sparse import embedded
from hf_sparse.calibrate import TOKEN_BUDGET
from hf_sparse.config import SparsityConfig
from hf_sparse.cost import Data
from hf_sparse.destination import check_apart, check_destination
from hf_sparse.errors import CheckpointError, ConfigError, unknown
from hf_sparse.forecast.calibration import calibrate
from hf_sparse.forecast.opening import Source, look
from hf_sparse.forecast.phases import Job, Phase, peak, phases, spilled
from hf_sparse.forecast.told import Forecast
from hf_sparse.room import check_disk, check_memory, disk_left, memory_left, process_memory
from hf_sparse.spill import HIDDEN_MEMORY
from hf_sparse.storage import FORMATS
from hf_sparse.stream import hidden_bytes
from hf_sparse.text import one_line, without_secrets

__all__ = ["Forecast", "forecast"]


def forecast(
    source: str | Path,
    config: SparsityConfig | Mapping[str, Any] | str | Path,
    destination: str | Path | None = None,
    *,
    stream: bool = False,
    ranks: int = 1,
    overwrite: bool = False,
    sparse_format: str | None = None,
    hidden_memory: int | str = HIDDEN_MEMORY,
    dtype: str | torch.dtype | None = None,
    refuse: bool = True,
    **options: Any,
) -> Forecast:
    """What pruning a checkpoint will need, phase by phase; about two seconds are spent on measuring this machine.

    Only config.json and the headers of the weight files are read. `num_samples` samples of `sequence_length` tokens are counted, or as
    long as the model allows; where samples are shorter it takes less.

    Args:
        source, config, destination: as `prune_checkpoint` takes them; without a destination the disk is not looked at.
        stream: from disk to disk, as `prune_checkpoint` works; else the model is loaded.
        ranks: processes that share the calibration samples and the sites of each block; each is thought to have cores of its own.
        overwrite, sparse_format, hidden_memory, dtype: as `prune_checkpoint` takes them.
        refuse: raise where it cannot fit; else the forecast's `problems` say so.
        options: revision, token, cache_dir, trust_remote_code, as `from_pretrained` takes them.

    Raises: ConfigError where more memory is needed than there is, CheckpointError where the disk is too small, each with what is missing
        and what to do, and what `prune_checkpoint` raises for a source, configuration or destination that cannot be.
    """
    start = time.perf_counter()
    config = SparsityConfig.of(config)
    config.check_calibration()
    if not isinstance(ranks, int) or ranks < 1:
        raise ConfigError(f"ranks is {ranks!r}; give the number of processes, at least 1.")
    if sparse_format is not None and sparse_format not in FORMATS:
        raise ConfigError(unknown("sparse_format", sparse_format, FORMATS))
    place = None if destination is None else Path(destination)
    if place is not None:
        check_destination(place, overwrite, [str(source)])
    source = str(embedded.model_path()) if str(source) == embedded.NAME else str(source)
    if place is not None and stream and Path(source).is_dir():
        check_apart(place, Path(source))
    found = look(source, config, dtype, options)
    machine = calibrate(found.shape, config, found.dtype, place)
    job = _job(
        found, config, machine.rates, machine.solvers, stream, ranks, hidden_bytes(hidden_memory), sparse_format, dtype
    )
    told = _told(without_secrets(one_line(source)), place, found, job, time.perf_counter() - start)
    if refuse and told.problems:
        raise told.problems[0]
    return told


def _job(
    found: Source, config: SparsityConfig, rates: Any, solvers: Mapping[str, float], stream: bool, ranks: int, hidden: int,
    sparse_format: str | None, dtype: Any,
) -> Job:  # fmt: skip
    files = found.plain_bytes if dtype in (None, "auto") else found.shape.parameters * found.shape.itemsize
    allocation = config.allocation
    sparsity = config.target if isinstance(allocation, str) else config.sparsity or 0.0
    return Job(
        shape=found.shape, config=config, data=data_of(config, found.longest), rates=rates, solvers=solvers, stream=stream, ranks=ranks,
        hidden_memory=hidden, files=files, mapped=0 if stream or found.converted else found.file_bytes, compress=sparse_format == "bitmask",
        sparsity=sparsity,
    )  # fmt: skip


def data_of(config: SparsityConfig, longest: int | None) -> Data | None:
    """The tokens of a configuration, at most; None where it calibrates on nothing."""
    if config.calibration is None:
        return None
    length = min(config.sequence_length, longest or config.sequence_length)
    trains = "reconstruct" in config.update
    budget = int(config.options_of("reconstruct")["batch_tokens"]) if trains else TOKEN_BUDGET
    batch = max(1, budget // length) if config.batch_size == "auto" else int(config.batch_size)
    return Data(config.num_samples, length, min(batch, config.num_samples))


def _told(source: str, place: Path | None, found: Source, job: Job, seconds: float) -> Forecast:
    parts = phases(job)
    if found.download:
        parts.insert(0, Phase("download", None, disk=found.download, note="the network is not measured"))
    disk = {"download": found.download, "hidden states": spilled(job), "destination and work folder": parts[-1].disk}
    if job.stream and job.config.permute:
        disk["dense weights in their new order"] = job.shape.parameters * job.shape.itemsize
    needed, base = max(part.memory for part in parts), process_memory()
    problems: list[Exception] = []
    try:
        check_memory(needed, "pruning", _remedy(job))
    except ConfigError as error:
        problems.append(error)
    try:
        if place is not None:
            more = ", or more --hidden-memory." if disk["hidden states"] else "."
            size = sum(size for name, size in disk.items() if name != "download")
            check_disk(place, size, "pruning", f"Give a destination on another disk{more}")
        if found.download:
            check_disk(found.cache, found.download, "downloading the weights", "Give --cache-dir on another disk.")
    except CheckpointError as error:
        problems.append(error)
    return Forecast(
        model=source, destination=None if place is None else str(place), stream=job.stream, ranks=job.ranks,
        blocks=len(job.shape.blocks), parameters=job.shape.parameters, weights_pruned=job.shape.weights_pruned,
        tokens=0 if job.data is None else job.data.tokens, phases=tuple(parts), process=base, memory=needed, disk=disk,
        memory_left=memory_left(), disk_left=None if place is None else disk_left(place), problems=tuple(problems),
        measuring=seconds, rates=job.rates, solvers=dict(job.solvers), threads=torch.get_num_threads(),
    )  # fmt: skip


def _remedy(job: Job) -> str:
    """What to do where memory is short, by what takes most of it."""
    top, ways = peak(job), []
    if not job.stream:
        ways.append("--stream (prune_checkpoint), which holds one block at a time")
    if top.hidden > top.total // 4 and (not job.stream or job.hidden_memory > top.hidden // 2):
        ways.append("less --hidden-memory" if job.stream else "a smaller num_samples or sequence_length")
    if top.statistics + top.work > top.total // 2 and "gram" in job.recipe.statistics:
        ways.append('a method without Gram matrices, such as metric="wanda" with update="none"')
    if job.stream:
        ways.append("a smaller num_samples")
    return f"Use {', or '.join(ways)}."
