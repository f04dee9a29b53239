"""A text that is always at hand: the sources of Python's own standard library, split by file."""

import hashlib
import sysconfig
from pathlib import Path
from typing import Literal, get_args

from hf_sparse.errors import CalibrationError, unknown

Split = Literal["training", "calibration", "development", "evaluation"]

# Generated tables and near-identical codec files say nothing about a model of source code.
_LEFT_OUT = {"site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}
_BUILD_FOLDER = "config-"  # config-3.11-x86_64-linux-gnu: how this very Python was built
# Tests are trained on where they are installed, but many distributions leave them out: no other split uses them.
_TESTS = {"test", "tests", "idle_test"}


def stdlib_folder() -> Path:
    """The folder that holds the standard library's sources; refuses where they are zipped away or stripped."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    if not (folder / "argparse.py").is_file():
        raise CalibrationError(
            f"the embedded text is the source of Python's standard library, but {folder} holds no .py files "
            "(zipped or stripped installation). Run with an ordinary Python, or give your own text."
        )
    return folder


def split_of(name: str) -> Split:
    """Which split a file belongs to, decided by its name alone so that every Python version agrees."""
    if _TESTS & set(name.split("/")):
        return "training"
    bucket = hashlib.sha256(name.encode()).digest()[0] % 16
    return {0: "evaluation", 1: "calibration", 2: "development"}.get(bucket, "training")  # type: ignore[return-value]


def files(split: str) -> list[Path]:
    """The source files of one split, in the order of their names."""
    if split not in get_args(Split):
        raise CalibrationError(unknown("split of the standard library", split, get_args(Split)))
    folder = stdlib_folder()
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    library = [name for name in names if not _LEFT_OUT & set(name.split("/")) and not name.startswith(_BUILD_FOLDER)]
    return [folder / name for name in library if split_of(name) == split]


def texts(split: str) -> list[str]:
    """The files of one split as text; what is not UTF-8 is left out (only tests of encodings are)."""
    found = []
    for path in files(split):
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            found.append(text.replace("\r\n", "\n"))
    return found


def fingerprint(split: str) -> str:
    """First 16 hexadecimal digits of the SHA-256 over the split's texts: equal text, equal fingerprint."""
    digest = hashlib.sha256()
    for text in texts(split):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]
