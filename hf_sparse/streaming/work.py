"""The folder in which a pruning from disk to disk works: locked, with a journal from which it goes on."""

import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_sparse import ranks
from hf_sparse.errors import CheckpointError
from hf_sparse.recovery import writable
from hf_sparse.streaming.journal import Journal

FORMAT = 1


class Work:
    """The folder beside the destination; no other run works in it as long as this one is open.

    Of several processes of one run the first writes there, and the others read; all of them open it.
    """

    def __init__(self, destination: Path, restart: bool) -> None:
        self.destination = destination
        self.writes = ranks.is_first()
        self.path = work_folder(destination)
        self.model, self.compressed = self.path / "model", self.path / "compressed"
        self.aside, self.old = self.path / "aside", self.path / "old"
        self._lock: int | None = None
        try:
            if self.writes:
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = _locked(self.path / "lock", destination)
                if restart:
                    self.empty()
                self.journal = Journal(self.path / "journal.jsonl")
            entries = ranks.from_first(self.journal.entries if self.writes else [])
            if not self.writes:
                self.journal = Journal(None, entries)
            if not self.path.is_dir():
                raise CheckpointError(
                    f"process {ranks.rank()} does not see {str(self.path)!r}, in which the first one works; give a destination on a disk that "
                    "all machines share."
                )
        except BaseException:
            self._unlock()
            raise

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

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
        if not self.writes:
            return
        for path in (self.model, self.compressed, self.aside):
            shutil.rmtree(path, ignore_errors=True)

    def keep_only(self, names: Collection[str]) -> None:
        """Of what is going to be the result, keep the weights: what stands beside them may be the half of an earlier attempt."""
        if not self.writes:
            return
        shutil.rmtree(self.compressed, ignore_errors=True)
        self.compressed.mkdir()
        for path in self.model.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in names:
                path.unlink()

    def remove(self) -> None:
        """Nothing is left to do."""
        if self.writes:
            shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        self.journal.close()
        self._unlock()


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
            key = next(key for key in [*found, *was] if was.get(key, was) != found.get(key, found))
            name, was, found = f"{name}: {key}", was.get(key), found.get(key)
        raise CheckpointError(
            f"an interrupted run to {str(destination)!r} was begun with other settings: {name} was {was!r:.200}, now it is {found!r:.200}. "
            "Give what was given then, or start over with restart=True (--restart)."
        )
