"""The journal of a pruning from disk to disk: what is done, entry by entry, each checked when it is read again."""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_sparse.errors import CheckpointError
from hf_sparse.recovery import fits, writable
from hf_sparse.report import block_report, misfits

_LARGEST = 2**30  # bytes of a journal; orders of channels are most of it
_INDEX = re.compile(r"[0-9]{1,9}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Journal:
    """Lines of JSON, each on the disk before what follows from it; a last line that is not whole was never written.

    Without a file it is that of another process, which writes it: `entries` are what stands there when this one begins.
    """

    def __init__(self, file: Path | None, entries: Sequence[dict[str, Any]] = ()) -> None:
        self.entries: list[dict[str, Any]] = list(entries)
        self._handle: int | None = None
        self._file = file
        if file is not None:
            self._open(file)

    def _open(self, file: Path) -> None:
        whole = 0
        if file.exists():
            if file.stat().st_size > _LARGEST:
                raise self.damaged("it is larger than any that this version writes")
            content = file.read_bytes()
            whole = content.rfind(b"\n") + 1
            for line in content[:whole].splitlines():
                try:
                    entry = json.loads(line)
                except (ValueError, RecursionError):
                    raise self.damaged("a line of it is no JSON") from None
                if not isinstance(entry, dict) or entry.get("kind") not in list(_KINDS):
                    raise self.damaged("a line of it tells of nothing that is known")
                if not _is_whole(entry):
                    raise self.damaged(f"an entry of the kind {entry['kind']} does not hold what such ones do")
                self.entries.append(entry)
            if self.entries and self.entries[0]["kind"] != "start":
                raise self.damaged("it does not tell what was begun")
        self._handle = os.open(file, os.O_WRONLY | os.O_CREAT, 0o666)
        os.ftruncate(self._handle, whole)
        os.lseek(self._handle, 0, os.SEEK_END)

    def damaged(self, why: str) -> CheckpointError:
        """The error for entries that cannot be gone on from."""
        which = "the journal of the interrupted run" if self._file is None else f"the journal {str(self._file)!r}"
        return CheckpointError(f"{which} is damaged: {why}. Start over with restart=True (--restart).")

    def last(self, kind: str) -> dict[str, Any] | None:
        """The newest entry of a kind."""
        return next((entry for entry in reversed(self.entries) if entry["kind"] == kind), None)

    def add(self, kind: str, values: Mapping[str, Any]) -> None:
        """Write an entry; it is on the disk when this returns."""
        entry = {"kind": kind, **values}
        if self._handle is None:
            self.entries.append(entry)
            return
        line = memoryview((json.dumps(entry, separators=(",", ":")) + "\n").encode("utf-8"))
        while line:
            line = line[os.write(self._handle, line) :]
        os.fsync(self._handle)
        self.entries.append(entry)

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)


# ---------------------------------------------------------------------------------------------------- what an entry may hold


def _is_whole(entry: Mapping[str, Any]) -> bool:
    """Whether an entry holds what those of its kind do; of what is only compared with what is so now, everything does."""
    try:
        return _is_number(entry.get("seconds", 0)) and _KINDS[entry["kind"]](entry)
    except (KeyError, TypeError, AttributeError, RecursionError):
        return False


def _is_number(value: object) -> bool:
    """Whether it is a number, be it not finite."""
    return isinstance(value, float) or fits(value, int)


def _is_measured(entry: Mapping[str, Any]) -> bool:
    values = entry["values"]
    return fits(entry["notes"], list[str]) and all(_INDEX.fullmatch(key) and _is_number(values[key]) for key in values)


def _is_begin(entry: Mapping[str, Any]) -> bool:
    orders, size = entry["orders"], entry["batch_size"]
    return (
        fits(entry["notes"], list[str])
        and (size is None or (fits(size, int) and size > 0))
        and fits(orders, dict[str, list[int]])
        and all(sorted(order) == list(range(len(order))) for order in orders.values())
        and fits(entry["places"], dict[str, list[str]])
        and fits(entry["aside"], dict[str, str])
        and all(_is_name(file) for file in entry["aside"].values())
    )


def _is_name(file: str) -> bool:
    """Whether it names a file of weights inside a folder."""
    return Path(file).name == file and file.endswith(".safetensors") and "\0" not in file


def _is_block(entry: Mapping[str, Any]) -> bool:
    return fits(entry["notes"], list[str]) and not any(misfits(block_report(writable(entry["report"]))))


_KINDS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "start": lambda entry: True,
    "calibration": lambda entry: True,
    "measured": _is_measured,
    "score": lambda entry: isinstance(entry["shares"], str) and _is_number(entry["score"]),
    "begin": _is_begin,
    "block": _is_block,
    "complete": lambda entry: _DIGEST.fullmatch(entry["report"]) is not None,
}
