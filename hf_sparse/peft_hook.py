"""PEFT's own `merge_and_unload` warns before it fills in the zeros of a sparse base; PEFT is not imported for it."""

import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from hf_sparse.after_import import forget, when_imported
from hf_sparse.errors import HfSparseError

_MODULE = "peft.tuners.tuners_utils"
_LOCK = threading.Lock()
_quiet: ContextVar[bool] = ContextVar("hf_sparse_merges_itself", default=False)
_enabled = False
_installed: tuple[type, Any, Any] | None = None  # the class, its own method, and ours


@contextmanager
def quiet() -> Iterator[None]:
    """Merges in here do not warn: what calls them keeps the zeros."""
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)


def install() -> None:
    """Let plain merges warn, from now on or from when PEFT is imported; installing twice changes nothing."""
    global _enabled
    with _LOCK:
        _enabled = True
    when_imported(_MODULE, _wrap_tuner)


def uninstall() -> None:
    """Give PEFT its own method back; where another library has wrapped it since, ours inside only passes calls on."""
    global _enabled, _installed
    with _LOCK:
        _enabled = False
        forget(_MODULE)
        if _installed is not None:
            tuner, original, ours = _installed
            if tuner.__dict__.get("merge_and_unload") is ours:
                tuner.merge_and_unload = original  # type: ignore[attr-defined]
                _installed = None


def _wrap_tuner(module: ModuleType) -> None:
    """Wrap the one method that all tuners inherit, in versions of PEFT that have it there."""
    global _installed
    tuner: Any = getattr(module, "BaseTuner", None)
    original = getattr(tuner, "__dict__", {}).get("merge_and_unload")
    if original is None or _installed is not None:
        return
    ours = _warning(original)
    _installed = (tuner, original, ours)
    tuner.merge_and_unload = ours


def _warning(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def merge_and_unload(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _enabled and not _quiet.get():
            names = inspect.signature(original).bind(self, *args, **kwargs).arguments.get("adapter_names")
            _warn(self.model, names)
        return original(self, *args, **kwargs)

    return merge_and_unload


def _warn(model: Any, names: list[str] | None) -> None:
    from hf_sparse.adapters.adapted import zeros_at_stake

    try:
        lost = zeros_at_stake(model, names)
    except HfSparseError:
        return  # a model that we know nothing about: none of ours
    if lost:
        warnings.warn(
            f"this merge fills in {lost:,} zeros of a sparse model, because the adapter was trained without its mask. "
            "hf_sparse.merge_and_unload(model) keeps every zero; hf_sparse.mask_lora_(model) before training makes the adapter "
            "one that loses none.",
            stacklevel=3,
        )
