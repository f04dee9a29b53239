"""Wraps methods of other people's classes, and gives them back."""

import threading
from collections.abc import Callable
from typing import Any

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


class Wraps:
    """The methods that one hook has wrapped: what was there before and what we put there."""

    def __init__(self) -> None:
        self.enabled = False  # whether the wrappers do anything but pass calls on
        self._installed: dict[tuple[type, str], tuple[Any, Any]] = {}
        self._lock = threading.RLock()

    def put(self, owner: Any, name: str, wrap: Wrap) -> None:
        """Wrap a method that a class itself defines; where it is wrapped already, or the class has none, nothing changes."""
        with self._lock:
            original = getattr(owner, "__dict__", {}).get(name)
            if original is None or (owner, name) in self._installed:
                return
            kind = next((kind for kind in (classmethod, staticmethod) if isinstance(original, kind)), None)
            ours = wrap(original) if kind is None else kind(wrap(original.__func__))
            self._installed[owner, name] = (original, ours)
            setattr(owner, name, ours)

    def take_out(self) -> None:
        """Give the classes their own methods back.

        Where another library has wrapped one since, its wrapper stays in place, and ours inside it only passes calls on.
        """
        with self._lock:
            for (owner, name), (original, ours) in list(self._installed.items()):
                if owner.__dict__.get(name) is ours:
                    setattr(owner, name, original)
                    del self._installed[owner, name]
            self.enabled = False
