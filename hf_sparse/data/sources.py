"""Where data come from: objects in memory, files, the standard library or the Hub, each as a row of items."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

from hf_sparse import stdlib_text
from hf_sparse.data.rows import Stream, is_whole, tensor_of
from hf_sparse.data.text import chat_of
from hf_sparse.errors import CalibrationError

# A Hub data set: `name` or `user/name`, then perhaps `:subset` and `:split`.
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:.*)?")
_LONGEST_NAME = 500


def open_source(source: Any) -> tuple[str, Iterator[Any]]:
    """What to call a source in messages and reports, and its items: texts, chats, token rows, dicts or one long row."""
    if source is None:
        raise CalibrationError("no data given.")
    if isinstance(source, str | Path):
        return _open_named(str(source))
    if isinstance(source, torch.Tensor | numpy.ndarray):
        return _open_array(source)
    kind = type(source).__name__
    if isinstance(source, Mapping):
        return "a dict of tensors", iter([source])
    if isinstance(source, list | tuple) and source and all(isinstance(item, int | numpy.integer) for item in source):
        return _open_array(torch.tensor(source))
    size = _size(source)
    name = kind if size is None else f"{kind} of {size}"
    if chat_of(source):
        return name, iter([source])
    if isinstance(source, Iterable):
        return name, iter(source)
    if size is not None and hasattr(source, "__getitem__"):  # a torch Dataset
        return name, (source[index] for index in range(size))
    raise CalibrationError(
        f"data cannot be a {kind}; give texts, chats, tensors, dicts, a DataLoader, a Dataset or a path."
    )


def _size(source: Any) -> int | None:
    try:
        return len(source)
    except TypeError:  # a DataLoader has a length only if its data set has one
        return None


def _open_array(source: Any) -> tuple[str, Iterator[Any]]:
    rows = tensor_of(source, "the data")
    if rows.ndim not in (1, 2) or not is_whole(rows):
        raise CalibrationError(
            f"a tensor of shape {tuple(rows.shape)} and type {rows.dtype} is no (samples, tokens) of whole numbers."
        )
    return f"a tensor of {tuple(rows.shape)} token ids", iter([Stream(rows.long()) if rows.ndim == 1 else rows])


def _open_named(name: str) -> tuple[str, Iterator[Any]]:
    if name.startswith("stdlib:"):
        return name, iter(stdlib_text.texts(name.removeprefix("stdlib:")))
    if "\n" in name or "\0" in name or len(name) > _LONGEST_NAME:
        raise CalibrationError(f"{name[:40]!r}... is a text, not a path or a Hub id; give texts in a list: [text].")
    path = Path(name)
    suffix = path.suffix.lower()
    if suffix in (".txt", ".jsonl", ".npy") and not path.is_file():
        raise CalibrationError(f"the file {name!r} does not exist.")
    if suffix == ".txt":
        return path.name, iter([_read_text(path)])
    if suffix == ".jsonl":
        return path.name, _json_lines(path)
    if suffix == ".npy":
        return path.name, _open_array(_read_array(path))[1]
    if path.exists():
        raise CalibrationError(f"{name!r} is not a .txt, .jsonl or .npy file.")
    return name, _hub_items(name)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path.name} cannot be read as UTF-8 text ({error}).") from error


def _read_array(path: Path) -> Any:
    try:
        rows = numpy.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise CalibrationError(f"{path.name} is no plain array of token ids ({error}).") from error
    if not isinstance(rows, numpy.ndarray):
        raise CalibrationError(
            f"{path.name} is no plain array of token ids but an archive; save one array with numpy.save."
        )
    return rows


def _json_lines(path: Path) -> Iterator[Any]:
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CalibrationError(f"{path.name}, line {number}: not valid JSON ({error}).") from error


def _hub_items(name: str) -> Iterator[Any]:
    """A Hub data set `user/name`, `user/name:subset` or `user/name:subset:split`, streamed."""
    wanted = "give a .txt, .jsonl or .npy path, or a Hub id as user/name:subset:split."
    if not _HUB_ID.fullmatch(name):
        raise CalibrationError(f"{name!r} is neither a file nor the id of a data set; {wanted} Texts go into a list.")
    from datasets import load_dataset  # heavy, and only needed here

    identifier, _, rest = name.partition(":")
    subset, _, split = rest.partition(":")
    try:
        yield from load_dataset(identifier, subset or None, split=split or "train", streaming=True)
    except Exception as error:  # whatever the library or the network raises, the user needs one sentence
        why = (str(error).splitlines() or [""])[0]
        raise CalibrationError(
            f"{name!r} is neither a file nor a data set that could be read ({type(error).__name__}: {why}); {wanted}"
        ) from error
