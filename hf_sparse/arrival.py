"""What is loaded from the Hub is what the Hub has: damage on the way is told as such, and does not stay in the cache."""

import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers.utils import cached_file

from hf_sparse.after_import import forget, when_imported
from hf_sparse.checkpoint import CONFIG_KEY
from hf_sparse.downloads import check_downloads
from hf_sparse.wraps import Wraps

_HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
_PEFT = "peft.peft_model"
_TRANSFORMERS = "transformers.integrations.peft"
_wraps = Wraps()


def hub_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments of from_pretrained that say where on the Hub and in the cache a file lies."""
    return {name: given[name] for name in _HUB_ARGUMENTS if given.get(name) is not None}


def find(path: Any, name: str, given: Mapping[str, Any], commit: str | None = None, **more: Any) -> Path | None:
    """A file of a folder or repository, None where there is none; of a commit, if one is named, as a branch may have moved since."""
    arguments = hub_arguments(given) | ({"revision": commit} if commit else {}) | more
    found = cached_file(
        str(path), name, **arguments,
        _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    return Path(found) if found else None


def check(path: Any, given: Mapping[str, Any], commit: str | None = None) -> None:
    """Refuse files of a sparse model that did not arrive as the Hub has them; raises CheckpointError."""
    config = find(path, "config.json", given, commit, local_files_only=True)
    if config is not None and f'"{CONFIG_KEY}"'.encode() in config.read_bytes():
        check_downloads(config.parent)


@contextmanager
def damage_told(path: Any, given: Mapping[str, Any]) -> Iterator[None]:
    """Where loading fails for a damaged file, the error says that, instead of what follows from it."""
    try:
        yield
    except Exception:
        if isinstance(path, str | os.PathLike):
            with suppress(OSError):
                check(path, given)
        raise


# ---------------------------------------------------------------------------------------------------- adapters


def install() -> None:
    """Let adapters that are loaded onto a sparse model be checked too; PEFT is not imported for it."""
    _wraps.enabled = True
    for name in (_PEFT, _TRANSFORMERS):
        when_imported(name, _wrap)


def uninstall() -> None:
    """Give PEFT and Transformers their own methods back."""
    for name in (_PEFT, _TRANSFORMERS):
        forget(name)
    _wraps.take_out()


def _wrap(module: ModuleType) -> None:
    owner = getattr(module, "PeftModel" if module.__name__ == _PEFT else "PeftAdapterMixin", None)
    _wraps.put(owner, "load_adapter", _checking)


def _checking(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _wraps.enabled or not isinstance(getattr(getattr(self, "config", None), CONFIG_KEY, None), dict):
            return original(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments
        given = {**given, **(given.get("kwargs") or {}), **(given.get("adapter_kwargs") or {})}
        try:
            return original(self, *args, **kwargs)
        finally:  # whatever comes of it: an error may follow from the damage, and a wrong adapter without one too
            _check_adapter(given.get("model_id") or given.get("peft_model_id"), given)

    return load_adapter


def _check_adapter(path: Any, given: Mapping[str, Any]) -> None:
    if isinstance(path, str | os.PathLike):
        config = find(path, "adapter_config.json", given, local_files_only=True)
        if config is not None:
            check_downloads(config.parent)
