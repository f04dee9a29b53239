"""A destination folder that is complete or absent: written beside, synced, renamed."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hf_sparse.errors import CheckpointError
from hf_sparse.replace import sync


def check_destination(destination: Path, overwrite: bool, sources: Sequence[str | Path] = ()) -> None:
    """Refuse a destination that cannot be written or would take something else with it; call it before hours of work.

    `sources` are names that may be paths; a folder that holds one of them is never replaced.

    Raises: CheckpointError.
    """
    place = _folder_to_be(destination)
    if place.is_dir() and any(place.iterdir()):
        if not overwrite:
            raise CheckpointError(
                f"the destination {str(destination)!r} is not empty; give another folder, or --overwrite to replace it."
            )
        if not (place / "config.json").is_file():
            raise CheckpointError(
                f"the destination {str(destination)!r} holds no model (no config.json), so it is not replaced; give another folder."
            )
    check_place(destination, sources)


def check_place(destination: Path, sources: Sequence[str | Path] = ()) -> None:
    """What `check_destination` refuses whatever the destination may hold by now.

    Raises: CheckpointError.
    """
    place = _folder_to_be(destination)
    for source in (*sources, "."):
        inside = Path(source).exists() and place.resolve() in Path(source).resolve().parents
        if inside or (source == "." and Path.cwd() == place.resolve()):
            raise CheckpointError(
                f"the destination {str(destination)!r} holds {str(source)!r}, which would be lost; give another folder."
            )
    parent = next(folder for folder in place.parents if folder.exists() or folder.is_symlink())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CheckpointError(
            f"the destination {str(destination)!r} cannot be made in {str(parent)!r}; give another folder."
        )


def _folder_to_be(destination: Path) -> Path:
    place = destination.absolute()
    if place.is_symlink():
        raise CheckpointError(f"the destination {str(destination)!r} is a link; name the folder that it leads to.")
    if place.exists() and not place.is_dir():
        raise CheckpointError(f"the destination {str(destination)!r} is a file; give a folder.")
    return place


def check_apart(destination: Path, source: Path) -> None:
    """Refuse a destination that is the source, or lies in it; raises CheckpointError."""
    place, read = destination.absolute().resolve(), source.resolve()
    if place == read or read in place.parents:
        raise CheckpointError(
            f"the destination {str(destination)!r} lies in {str(source)!r}, which is read and never written to; give another folder."
        )


@contextmanager
def complete_folder(destination: Path, overwrite: bool = False) -> Iterator[Path]:
    """A fresh folder beside the destination; it takes the destination's name when the block ends without an error.

    An old destination stays untouched until then, and comes back should the last rename fail.
    """
    check_destination(destination, overwrite)
    destination = destination.absolute()
    destination.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{destination.name}.partial-", dir=destination.parent))
    try:
        yield fresh
        fresh.chmod(0o777 & ~_umask())
        # Should the process die before the last rename, what is left beside the destination does not load as a model.
        hidden, config = fresh / ".config.json.partial", fresh / "config.json"
        if config.exists():
            config.rename(hidden)
        sync_all(fresh)
        old = fresh.with_name(fresh.name + "-old")
        if destination.exists():
            destination.rename(old)
        try:
            fresh.rename(destination)
            if (destination / hidden.name).exists():
                (destination / hidden.name).rename(destination / "config.json")
        except OSError:
            if old.exists():
                old.rename(destination)
            raise
        sync(destination.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def sync_all(folder: Path) -> None:
    """All files of a folder stay, whatever happens to the machine."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            sync(path)
    sync(folder)


def put_in_place(fresh: Path, destination: Path, old: Path) -> None:
    """Give a complete folder the name of its destination; one that is there goes to `old` before, and comes back if that fails.

    Each step is a rename, so whoever is killed in between can call it again.
    """
    fresh.chmod(0o777 & ~_umask())
    sync_all(fresh)
    destination.parent.mkdir(parents=True, exist_ok=True)
    if destination.is_dir() and any(destination.iterdir()):
        shutil.rmtree(old, ignore_errors=True)  # where somebody has filled the place between two calls
        destination.rename(old)
    try:
        fresh.rename(destination)  # in the place of an empty one, too
    except OSError:
        if old.exists():
            old.rename(destination)
        raise
    sync(destination.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
