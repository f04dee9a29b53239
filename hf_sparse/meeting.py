"""Where the processes of one pruning wait for each other: patiently while all are alive, and not at all once one is lost.

A process that works may take hours, so nothing but its silence says that it is lost. In each process a thread tells the others
every second how far its process is, in one small exchange; only when all have arrived do the threads stand back and the processes
themselves exchange data. The time limit of the group therefore bounds silence and transfers, never work.
"""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from hf_sparse.errors import ProcessLost

WORKING, ARRIVED, FAILED, GONE = range(4)
_TICK = 1.0  # seconds between two signs of life


class Meeting:
    """A gloo group of all processes with signs of life; every process has to make one, and use it in the same order."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.rank, self.count = distributed.get_rank(), distributed.get_world_size()
        try:
            self.group: Any = distributed.new_group(backend="gloo", timeout=timedelta(seconds=seconds))
        except (RuntimeError, ValueError) as error:
            hint = ", or prune inside `with hf_sparse.ranks.alone():` what only one of them has"
            raise ProcessLost(self._words("not all processes began to prune", error, hint)) from error
        self._changed = threading.Condition()
        self._state = WORKING
        self._met: list[int] | None = None  # the states of all, while the processes exchange data
        self._ended = False
        self.lost: ProcessLost | None = None
        self._thread = threading.Thread(target=self._signs_of_life, name="hf_sparse ranks", daemon=True)
        self._thread.start()

    def _words(self, what: str, error: Exception, hint: str = "") -> str:
        first = re.sub(r"^(\[\S+:\d+\] )+", "", (str(error).splitlines() or [""])[0])  # a place in the sources of gloo
        first = first.partition(". This is typically")[0]
        return (
            f"{what}: process {self.rank} of {self.count} has lost another one, which was killed, stopped, or silent for "
            f"{self._seconds:g} s ({first}); start all of them again{hint}."
        )

    def _signs_of_life(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._state != WORKING or self._ended, timeout=_TICK)
                if self._ended:
                    return
                state = self._state
            try:
                states = self._exchange(state)
                if GONE in states:
                    raise RuntimeError(f"process {states.index(GONE)} was interrupted")
            except Exception as error:  # of gloo, whose errors have no class of their own
                self._lose(error)
                return
            if WORKING in states:
                continue
            with self._changed:
                self._met = states
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._met is None or self._ended)

    def _exchange(self, state: int) -> list[int]:
        states = torch.zeros(self.count, dtype=torch.int32)
        states[self.rank] = state
        distributed.all_reduce(states, group=self.group)
        return list(states.tolist())

    def _lose(self, error: Exception) -> None:
        with self._changed:
            self.lost = self.lost or ProcessLost(self._words("pruning stopped", error))
            self._ended = True
            self._changed.notify_all()

    @contextmanager
    def arrived(self, state: int = ARRIVED) -> Iterator[list[int]]:
        """Wait for all; inside, the group is free to exchange data, the same on every process. Gives the states of all.

        Raises: ProcessLost.
        """
        with self._changed:
            self._state = state
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._met is not None or self._ended)
            if self.lost is not None:
                raise self.lost
            states = self._met or []
        try:
            yield states
        except RuntimeError as error:  # of gloo: a process was lost while data were on their way
            self._lose(error)
            raise ProcessLost(self._words("pruning stopped", error)) from error
        finally:
            with self._changed:
                self._state, self._met = WORKING, None
                self._changed.notify_all()

    def end(self, orderly: bool) -> None:
        """Leave for good. An orderly end is one that all processes have agreed on; after any other the rest lose this one."""
        if not orderly and self.lost is None:
            with self._changed:
                self._state = GONE
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._ended, timeout=3 * _TICK)
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join(timeout=None if orderly else 3 * _TICK)
        with suppress(RuntimeError, ValueError):
            distributed.destroy_process_group(self.group)
