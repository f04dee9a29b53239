"""The folder in which a pruning from disk to disk works: locked, with a journal from which it goes on."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_sparse.errors import CheckpointError
from hf_sparse.recovery import writable

FORMAT = 1
_LARGEST = 2**30  # bytes of a journal; orders of channels are most of it


class Journal:
    """Lines of JSON, each on the disk before what follows from it; a last line that is not whole was never written."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.entries: list[dict[str, Any]] = []
        whole = 0
        if file.exists():
            if file.stat().st_size > _LARGEST:
                raise self._damaged("it is larger than any that this version writes")
            content = file.read_bytes()
            whole = content.rfind(b"\n") + 1
            for line in content[:whole].splitlines():
                try:
                    entry = json.loads(line)
                except (ValueError, RecursionError):
                    raise self._damaged("a line of it is no JSON") from None
                if not isinstance(entry, dict) or not isinstance(entry.get("kind"), str):
                    raise self._damaged("a line of it tells of nothing that is known")
                self.entries.append(entry)
        self._handle = os.open(file, os.O_WRONLY | os.O_CREAT, 0o666)
        os.ftruncate(self._handle, whole)
        os.lseek(self._handle, 0, os.SEEK_END)

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"the journal {str(self._file)!r} is damaged: {why}. Start over with restart=True (--restart)."
        )

    def last(self, kind: str) -> dict[str, Any] | None:
        """The newest entry of a kind."""
        return next((entry for entry in reversed(self.entries) if entry["kind"] == kind), None)

    def add(self, kind: str, values: Mapping[str, Any]) -> None:
        """Write an entry; it is on the disk when this returns."""
        entry = {"kind": kind, **values}
        line = memoryview((json.dumps(entry, separators=(",", ":")) + "\n").encode("utf-8"))
        while line:
            line = line[os.write(self._handle, line) :]
        os.fsync(self._handle)
        self.entries.append(entry)

    def close(self) -> None:
        os.close(self._handle)


class Work:
    """The folder beside the destination; nobody else works in it as long as this one is open."""

    def __init__(self, destination: Path, restart: bool) -> None:
        self.destination = destination
        self.path = work_folder(destination)
        self.model, self.compressed = self.path / "model", self.path / "compressed"
        self.aside, self.old = self.path / "aside", self.path / "old"
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.path / "lock", destination)
        try:
            if restart:
                self.empty()
            self.journal = Journal(self.path / "journal.jsonl")
        except BaseException:
            os.close(self._lock)
            raise

    def empty(self) -> None:
        """Take out all that an earlier run has left, but for a destination that was set aside."""
        if self.old.exists() and not self.destination.exists():
            self.old.rename(self.destination)
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()

    def empty_but_journal(self) -> None:
        """Take out what stands there without an entry that tells of it."""
        for path in (self.model, self.compressed, self.aside):
            shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        """Nothing is left to do."""
        shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        self.journal.close()
        os.close(self._lock)


def work_folder(destination: Path) -> Path:
    """Where a run to this destination works."""
    place = destination.absolute()
    return place.with_name(f".{place.name}.hf_sparse_stream")


@contextmanager
def working(destination: Path, restart: bool) -> Iterator[Work]:
    """The work folder of a destination, for one run at a time.

    Raises: CheckpointError where another run works there, and for a damaged journal.
    """
    work = Work(destination.absolute(), restart)
    try:
        yield work
    finally:
        work.close()


def _locked(file: Path, destination: Path) -> int:
    """A handle with a lock that ends with the process."""
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(file) and os.path.samestat(os.fstat(handle), os.stat(file)):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise CheckpointError(
                f"another run is writing {str(destination)!r}; wait until it is done, or give another destination."
            ) from None
        except FileNotFoundError:
            pass
        os.close(handle)  # the run that had it has just removed its folder


def check_same(earlier: Mapping[str, Any], now: Mapping[str, Any], destination: Path) -> None:
    """Refuse to go on with what was begun with other settings; raises CheckpointError that names the first difference."""
    now = json.loads(json.dumps(writable(dict(now))))
    for name in [*now, *(key for key in earlier if key not in now and key != "kind")]:
        was, found = earlier.get(name), now.get(name)
        if was == found:
            continue
        if isinstance(was, dict) and isinstance(found, dict):
            key = next(key for key in [*found, *was] if was.get(key) != found.get(key))
            name, was, found = f"{name}: {key}", was.get(key), found.get(key)
        raise CheckpointError(
            f"an interrupted run to {str(destination)!r} was begun with other settings: {name} was {was!r:.200}, now it is {found!r:.200}. "
            "Give what was given then, or start over with restart=True (--restart)."
        )
