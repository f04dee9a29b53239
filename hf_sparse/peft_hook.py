"""PEFT's own `merge_and_unload` warns before it fills in the zeros of a sparse base; PEFT is not imported for it."""

import functools
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

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
        module = sys.modules.get(_MODULE)
        if module is not None:
            _wrap_tuner(module)
        elif _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)


def uninstall() -> None:
    """Give PEFT its own method back; where another library has wrapped it since, ours inside only passes calls on."""
    global _enabled, _installed
    with _LOCK:
        _enabled = False
        if _finder in sys.meta_path:
            sys.meta_path.remove(_finder)
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


class _AfterImport(MetaPathFinder):
    """Finds the module as all others would, and wraps the tuner as soon as the module has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: Any) -> None:
        original = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            original(module)
            del loader.exec_module
            with _LOCK:
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                if _enabled:
                    _wrap_tuner(module)

        with suppress(
            AttributeError
        ):  # a loader that takes no attributes: no import may fail for the sake of a warning
            loader.exec_module = exec_module


_finder = _AfterImport()
