"""How much memory and disk there is, and refusals before work is begun that cannot fit."""

import os
import resource
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hf_sparse.errors import CheckpointError, ConfigError

_STATUS, _SYSTEM = Path("/proc/self/status"), Path("/proc/meminfo")
_GROUPS, _GROUP_OF = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Room:
    """What is left, and what sets the limit."""

    bytes: int
    limit: str


def shown(size: float) -> str:
    """Bytes for people."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size / 1000:.3g} kB"


def memory_left() -> Room | None:
    """What this process can still take; None where the system does not say (it is Linux that does)."""
    return min(_limits(), key=lambda room: room.bytes, default=None)


def process_memory() -> int:
    """Private bytes of this process now; 0 where the system does not say."""
    return _count(_STATUS, "RssAnon") or 0


def disk_left(folder: Path) -> Room:
    """What is left in the file system in which a folder is, or will be."""
    there = existing(folder)
    return Room(shutil.disk_usage(there).free, f"the file system of {str(there)!r}")


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    place = folder.absolute()
    return next(path for path in (place, *place.parents) if path.is_dir())


def check_memory(needed: int, what: str, remedy: str) -> None:
    """Raises ConfigError where less memory is left than is needed for certain; `remedy` says what to do."""
    left = memory_left()
    if left is not None and needed > left.bytes:
        raise ConfigError(
            f"{what} needs {shown(needed)} of memory, and {shown(left.bytes)} are left ({left.limit}); {shown(needed - left.bytes)} are "
            f"missing. {remedy}"
        )


def check_disk(folder: Path, needed: int, what: str, remedy: str) -> None:
    """Raises CheckpointError where the disk has less room than is needed."""
    left = disk_left(folder)
    if needed > left.bytes:
        raise CheckpointError(
            f"{what} needs {shown(needed)} on the disk, and {shown(left.bytes)} are left in {left.limit}; {shown(needed - left.bytes)} are "
            f"missing. {remedy}"
        )


# ---------------------------------------------------------------------------------------------------- what the system says


def _limits() -> Iterator[Room]:
    available = _count(_SYSTEM, "MemAvailable")
    if available is not None:
        yield Room(available + (_count(_SYSTEM, "SwapFree") or 0), "memory and swap of the machine")
    yield from _group_limits()
    for kind, key, name in (
        (resource.RLIMIT_AS, "VmSize", "address space"),
        (resource.RLIMIT_DATA, "VmData", "data"),
    ):
        most, used = resource.getrlimit(kind)[0], _count(_STATUS, key)
        if most != resource.RLIM_INFINITY and used is not None:
            yield Room(max(0, most - used), f"the process's limit for {name}, ulimit")


def _group_limits() -> Iterator[Room]:
    """The limits of control groups, of this process's own and of those above it; pages of files can be given back."""
    for line in _lines(_GROUP_OF):
        _, kinds, path = line.split(":", 2)
        if kinds not in ("", "memory") and "memory" not in kinds.split(","):
            continue
        root = _GROUPS if not kinds else _GROUPS / "memory"
        names = ("memory.max", "memory.current", "inactive_file") if not kinds else (
            "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")  # fmt: skip
        own = root / path.lstrip("/")
        for folder in dict.fromkeys((own, *own.parents, root)):
            if folder != root and root not in folder.parents:
                continue
            most, used = _number(folder / names[0]), _number(folder / names[1])
            if most is not None and used is not None and most < 2**60:  # version 1 has no word for "no limit"
                back = next(
                    (int(line.split()[1]) for line in _lines(folder / "memory.stat") if line.split()[0] == names[2]), 0
                )
                yield Room(max(0, most - used + back), "the control group's limit, as of a container")


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []


def _number(file: Path) -> int | None:
    text = next(iter(_lines(file)), "")
    return int(text) if text.isdecimal() else None


def _count(file: Path, key: str) -> int | None:
    line = next((line for line in _lines(file) if line.startswith(key + ":")), "")
    return int(line.split()[1]) * 1024 if len(line.split()) > 1 else None


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
