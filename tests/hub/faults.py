"""Faults that a test orders from the server: which requests they hit, how often, and what then happens."""

import re
import threading
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Fault:
    """One kind of damage, done to requests of `method` whose path with query has `path` (a regular expression) in it.

    times: how many requests are hit, None for all; after: how many are spared first. What happens, one of:
    status (with headers and text): the answer, in place of carrying the request out.
    cut: the connection closes after so many bytes of a body; of the request's for POST and PUT, of the answer's otherwise.
    reset: as cut, and the connection is torn down (RST) instead of closed.
    lost: the request is carried out and the connection closed without an answer.
    corrupt: the byte at this place of the body is changed (counted from the end if negative), lengths and headers are not.
    wrong_hash: ETag and X-Linked-ETag are those of another file.
    swap: {"repo", "path", "content" (base64)}: somebody commits this file right after the answer.
    """

    method: str
    path: str
    times: int | None = 1
    after: int = 0
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    text: str = "the fault that the test ordered"
    cut: int | None = None
    reset: int | None = None
    lost: bool = False
    corrupt: int | None = None
    wrong_hash: bool = False
    swap: dict[str, str] | None = None

    @property
    def closes_after(self) -> int | None:
        return self.cut if self.reset is None else self.reset


class Faults:
    def __init__(self) -> None:
        self._left: list[Fault] = []
        self._lock = threading.Lock()

    def order(self, values: list[dict[str, Any]]) -> None:
        with self._lock:
            self._left += [Fault(**value) for value in values]

    def clear(self) -> None:
        with self._lock:
            self._left.clear()

    def take(self, method: str, path: str, *kinds: str) -> Fault | None:
        """The first fault of these kinds that hits the request, counted as having happened."""
        with self._lock:
            for fault in self._left:
                if not self._hits(fault, method, path, kinds):
                    continue
                if fault.after > 0:
                    fault.after -= 1
                    continue
                if fault.times is not None:
                    fault.times -= 1
                return fault
        return None

    @staticmethod
    def _hits(fault: Fault, method: str, path: str, kinds: tuple[str, ...]) -> bool:
        wanted = fault.method in (method, "*") and fault.times != 0 and re.search(fault.path, path) is not None
        return wanted and any(getattr(fault, kind) is not None and getattr(fault, kind) is not False for kind in kinds)


def flipped(body: bytes, place: int) -> bytes:
    changed = bytearray(body)
    changed[place] ^= 0x10
    return bytes(changed)
