"""Measures how far the process grows while something runs, where the system lets its peak be set back (Linux)."""

import ctypes
import gc
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_SET_PEAK_BACK = "5"  # proc_pid_clear_refs(5): the peak resident size becomes the present one
_SLACK = 2**20  # what reading the two counts itself may take


class Growth:
    """Counts from when it is made; `peak()` is the most bytes by which the process has grown since then."""

    def __init__(self) -> None:
        gc.collect()
        _give_back()
        self._before: int | None = None
        try:
            _CLEAR.write_text(_SET_PEAK_BACK)
            before, peak = _count("VmRSS"), _count("VmHWM")
        except (OSError, ValueError, IndexError):
            return
        if peak <= before + _SLACK:  # some sandboxes take the write and do nothing
            self._before = before

    def peak(self) -> int | None:
        """None where the system has no such count, or does not let it be set back."""
        return None if self._before is None else max(0, _count("VmHWM") - self._before)


def _give_back() -> None:
    """What was freed before goes back to the system; used again unseen, it would be missing from the growth."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):  # not glibc
        return


def _count(key: str) -> int:
    line = next((line for line in _STATUS.read_text().splitlines() if line.startswith(key + ":")), "")
    return int(line.split()[1]) * 1024
