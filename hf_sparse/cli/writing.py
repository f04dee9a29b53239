"""A destination folder that is complete or absent: written beside, synced, renamed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_sparse.errors import CheckpointError


def check_destination(destination: Path, overwrite: bool) -> None:
    """Refuse a file or a non-empty folder; call it before the work, which may take hours."""
    if destination.exists() and not destination.is_dir():
        raise CheckpointError(f"the destination {str(destination)!r} is a file; give a folder.")
    if destination.is_dir() and any(destination.iterdir()) and not overwrite:
        raise CheckpointError(
            f"the destination {str(destination)!r} is not empty; give another folder, or --overwrite to replace it."
        )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some systems cannot sync folders
        if path.is_file():
            raise
    finally:
        os.close(handle)


@contextmanager
def complete_folder(destination: Path, overwrite: bool = False) -> Iterator[Path]:
    """A fresh folder beside the destination; it takes the destination's name when the block ends without an error.

    An old destination stays untouched until then, and comes back should the last rename fail.
    """
    check_destination(destination, overwrite)
    destination.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{destination.name}.partial-", dir=destination.parent))
    try:
        yield fresh
        fresh.chmod(0o777 & ~_umask())
        for path in sorted(fresh.rglob("*")):
            if path.is_file():
                _sync(path)
        _sync(fresh)
        old = fresh.with_name(fresh.name + "-old")
        if destination.exists():
            destination.rename(old)
        try:
            fresh.rename(destination)
        except OSError:
            if old.exists():
                old.rename(destination)
            raise
        _sync(destination.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
