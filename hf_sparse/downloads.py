"""Files from the Hub are what the Hub says they are: the client looks at their size alone, so their hashes are compared here, once."""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from huggingface_hub import constants

from hf_sparse.errors import CheckpointError
from hf_sparse.hashes import git_hash_of, sha256_of
from hf_sparse.remote import forget

_SHA256, _GIT = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")


def check_downloads(snapshot: Path) -> None:
    """Compare the model files in a folder of the Hub's cache with the hashes that they are stored under.

    A file is hashed when it is first met, and not again as long as it does not change. Folders elsewhere are left alone.

    Raises: CheckpointError for a damaged file, which is taken out of the cache, so that the next try downloads it again.
    """
    for pointer, blob in _cached(snapshot):
        if _was_checked(blob):
            continue
        found = sha256_of(blob) if _SHA256.fullmatch(blob.name) else git_hash_of(blob)
        if found != blob.name:
            raise CheckpointError(
                f"{pointer.name} did not arrive as the Hub has it, or was changed since; {_removed(pointer)}."
            )
        if _SHA256.fullmatch(blob.name):
            _remember(blob)


def _removed(pointer: Path) -> str:
    """Take a damaged file out of the cache; what to say of that."""
    try:
        forget(pointer)
    except OSError:
        return (
            f"delete {str(pointer.resolve())!r} from the cache, which cannot be written here, and load the model again"
        )
    return "it has been removed from the cache, so load the model again"


def _remember(blob: Path) -> None:
    with suppress(OSError):  # a cache that cannot be written is checked each time
        mark = _mark(blob)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _cached(snapshot: Path) -> Iterator[tuple[Path, Path]]:
    """The links in a snapshot and the files that they lead to, which bear their hash as name."""
    if not snapshot.is_dir():
        return
    for pointer in sorted(snapshot.iterdir()):
        if pointer.suffix in (".safetensors", ".json") and pointer.is_symlink():
            blob = pointer.resolve()
            if blob.is_file() and (_SHA256.fullmatch(blob.name) or _GIT.fullmatch(blob.name)):
                yield pointer, blob


def _mark(blob: Path) -> Path:
    """An empty file whose name says which file was checked."""
    state = blob.stat()
    return Path(constants.HF_HOME) / "hf_sparse" / "checked" / f"{blob.name}-{state.st_size}-{state.st_mtime_ns}"


def _was_checked(blob: Path) -> bool:
    return bool(_SHA256.fullmatch(blob.name)) and _mark(blob).exists()
