"""Reads what others wrote as plain data: JSON of bounded size, depth and length, and nothing else."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_sparse.errors import CheckpointError
from hf_sparse.text import one_line, shown

DEPTH, ITEMS, TEXT = 16, 100_000, 2**16
LARGEST_NUMBER = 1e300  # beyond it sums and products overflow
# Python needs many times the room of "[]" or "a" for a list or a word; only numbers can be as many as a file holds.
_CONTAINERS, _WORDS = 2**20, 2**22


def check_plain(values: object, what: str, *, depth: int = DEPTH, items: int = ITEMS, text: int = TEXT) -> None:
    """Refuse what is more than null, truth values, finite numbers, text, lists and mappings with text as keys.

    Args:
        what: begins the message, such as "the report".
        depth: how many lists and mappings may stand one inside the other.
        items: how many values there may be in all.
        text: how many letters a text or a key may have.

    Raises: CheckpointError that names the place, such as `blocks[3].sites`.
    """
    left = items - 1
    place: list[str | int] = []  # the keys that lead to what is looked at; numbers are places in lists
    levels: list[Iterator[tuple[str | int, Any]]] = [iter([("", values)])]
    while levels:
        for key, value in levels[-1]:
            wrong = _wrong(value, depth - len(levels), text)
            if wrong:
                raise CheckpointError(f"{what}: {_words([*place, key])} {wrong}.")
            if isinstance(value, list | tuple | Mapping) and value:
                left -= len(value)
                if left < 0:
                    raise CheckpointError(f"{what}: it holds more than {items} values.")
                place.append(key)
                levels.append(iter(value.items()) if isinstance(value, Mapping) else _of_list(value))
                break
        else:
            levels.pop()
            del place[-1:]


def _of_list(values: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """What is in a list; of nothing but whole numbers the least and the largest, as orders of channels are most of a report."""
    if set(map(type, values)) == {int}:
        found = {min(values), max(values)}
        return ((values.index(value), value) for value in found)
    return enumerate(values)


def _wrong(value: Any, depth: int, text: int) -> str | None:
    """What is wrong with a value itself, of which `depth` levels may follow; what it holds is looked at later."""
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return None if -LARGEST_NUMBER < value < LARGEST_NUMBER else f"is {shown(value)}, which is no usable number"
    if isinstance(value, str):
        return None if len(value) <= text else f"is longer than {text} letters"
    if isinstance(value, list | tuple | Mapping):
        named = isinstance(value, Mapping)
        if named and not all(isinstance(key, str) and len(key) <= text for key in value):
            return f"has a key that is no text of at most {text} letters"
        return None if depth >= 0 else "is nested too deeply"
    return f"is a {type(value).__name__}, which is no plain data"


def _words(place: list[str | int]) -> str:
    """Where a value stands, as `blocks[3].sites`; the outermost is "it"."""
    words = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in place)
    return one_line(words.lstrip("."), 200) or "it"


def read_json(path: str | Path, most_bytes: int, what: str) -> Any:
    """The value in a JSON file, whose size is looked at before it is read; `what` names it, such as "the report".

    Names that a mapping has twice are refused, as programs differ in which of them they take. Numbers may be infinite or
    NaN, which some configs hold; `check_plain` refuses them.

    Raises: CheckpointError for a file that cannot be read, is too large, or is no JSON.
    """
    file = Path(path)
    try:
        if file.exists() and not file.is_file():  # a pipe would be waited for
            raise CheckpointError(f"{what} {str(file)!r} is no file.")
        size = file.stat().st_size
        if size > most_bytes:
            raise CheckpointError(f"{str(file)!r} is larger than {most_bytes} bytes; that is not {what}.")
        with file.open("rb") as stream:
            data = stream.read(
                size + 1
            )  # memory for as much is taken at once; one that grows meanwhile is cut, and is no JSON
    except OSError as error:
        raise CheckpointError(f"cannot read {what} {str(file)!r}: {error.strerror}.") from error
    return parse_json(data, repr(str(file)))


def parse_json(data: bytes, what: str) -> Any:
    """The value in the bytes of a JSON file; `what` begins the messages. Otherwise as `read_json`."""
    if data.count(b"[") + data.count(b"{") > _CONTAINERS or data.count(b'"') > 2 * _WORDS:
        raise CheckpointError(f"{what} holds more than {_CONTAINERS} lists and mappings, or {_WORDS} words.")
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_mapping)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON: {one_line(error)}.") from error


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    names: set[str] = set()
    for name, _ in pairs:
        if name in names:
            raise ValueError(f"{shown(name)} stands twice in one mapping")
        names.add(name)
    return found
