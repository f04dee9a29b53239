"""Does something to a module as soon as it is imported, without importing it."""

import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Action = Callable[[ModuleType], None]
_LOCK = threading.RLock()


class _AfterImport(MetaPathFinder):
    """Finds modules as all others would, and calls an action once the module has run."""

    def __init__(self) -> None:
        self.waiting: dict[str, Action] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            self._follow(fullname, spec.loader)
        return spec

    def _follow(self, name: str, loader: Any) -> None:
        original = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            original(module)
            del loader.exec_module
            with _LOCK:
                action = self.waiting.get(name)
                forget(name)
                if action is not None:
                    action(module)

        with suppress(AttributeError):  # a loader that takes no attributes: no import may fail for the sake of ours
            loader.exec_module = exec_module


_finder = _AfterImport()


def when_imported(name: str, action: Action) -> None:
    """Call `action(module)` now if the module is there, else right after its first import; a later call takes the place of this one."""
    with _LOCK:
        module = sys.modules.get(name)
        if module is not None:
            action(module)
            return
        _finder.waiting[name] = action
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)


def forget(name: str) -> None:
    """Take back what waits for a module."""
    with _LOCK:
        _finder.waiting.pop(name, None)
        if not _finder.waiting and _finder in sys.meta_path:
            sys.meta_path.remove(_finder)
