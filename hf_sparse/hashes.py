"""SHA-256 of the files that make up a saved model; the Hub names large files by the same."""

import hashlib
import re
from pathlib import Path

from hf_sparse.errors import CheckpointError

# Weights, the index of their shards (of a variant too, such as model.safetensors.index.fp16.json) and the config. What an
# interrupted save has put aside starts with a dot.
_OF_A_MODEL = re.compile(r"[^.].*\.safetensors(\.index(\.[\w-]+)?\.json)?|config\.json", re.DOTALL)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LONGEST_NAME = 255  # letters; file systems allow no more bytes


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, 64 lower-case hexadecimal digits; raises CheckpointError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror}.") from error


def git_hash_of(path: str | Path) -> str:
    """The name that git gives to a file's content, 40 hexadecimal digits; not for secrecy. The file is read as a whole."""
    content = Path(path).read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def model_files(folder: str | Path) -> list[Path]:
    """The files in a folder that hold a saved model, sorted by name: weights, the index of their shards and config.json.

    Raises: CheckpointError where the folder cannot be read.
    """
    try:
        found = sorted(Path(folder).iterdir(), key=lambda path: path.name)
    except OSError as error:
        raise CheckpointError(f"cannot read the folder {str(folder)!r}: {error.strerror}.") from error
    return [path for path in found if _OF_A_MODEL.fullmatch(path.name) and path.is_file()]


def hashes_of(folder: str | Path) -> dict[str, str]:
    """Name -> SHA-256 of the files of `model_files`; raises CheckpointError where one cannot be read."""
    return {path.name: sha256_of(path) for path in model_files(folder)}


def misfit(name: str, digest: str) -> str | None:
    """What is wrong with a name and a SHA-256 that were read somewhere; None where nothing is."""
    if not 0 < len(name) <= _LONGEST_NAME or name in (".", "..") or re.search(r"[/\\\x00]", name):
        return f"{name[:80]!r} is no name of a file"
    return None if _DIGEST.fullmatch(digest) else f"{digest[:80]!r} is no SHA-256 in lower-case hexadecimal digits"
