"""Who shows torch's own warnings: a pointer of the thread that must not outlive what it points to.

While a function of torch runs, the pointer leads to an object on the C stack, and goes back when the function ends. A greenlet that pauses
inside of one (a product that a torch function mode looks at) takes that stack away with it, so whoever goes on has to have the pointer
that was there before. torch has no other way to reach it than these two functions of its library.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch

_GET = "_ZN3c1012WarningUtils19get_warning_handlerEv"
_SET = "_ZN3c1012WarningUtils19set_warning_handlerEPNS_14WarningHandlerE"


@cache
def _functions() -> tuple[Any, Any] | None:
    """None where the library has other names (Windows): then a warning that comes from outside of any function may go astray."""
    for name in ("libc10.so", "libc10.dylib"):
        try:
            library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
            get, set_ = library[_GET], library[_SET]
        except (OSError, AttributeError):
            continue
        get.restype, get.argtypes = ctypes.c_void_p, []
        set_.restype, set_.argtypes = None, [ctypes.c_void_p]
        return get, set_
    return None


def present() -> int | None:
    """The thread's pointer now."""
    found = _functions()
    return None if found is None else found[0]()


def put_back(pointer: int | None) -> None:
    """Make the pointer what `present` gave."""
    found = _functions()
    if found is not None and pointer is not None:
        found[1](pointer)
