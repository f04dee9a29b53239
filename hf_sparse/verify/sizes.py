"""Bounds what files from anyone may ask for: a config is of the size of its weights, a base model of that of the model."""

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks

from hf_sparse.errors import CheckpointError
from hf_sparse.remote import CONFIG, LARGEST_CONFIG, File, Folder, Place, Tensor, read_config, tensors, weight_files
from hf_sparse.schema import read_json
from hf_sparse.storage import is_compressed, is_compressed_weights
from hf_sparse.storage.names import INDEX as COMPRESSED_INDEX
from hf_sparse.storage.names import WEIGHTS as COMPRESSED
from hf_sparse.text import one_line

INDEX = "model.safetensors.index.json"
_WHOLE, _SHARD = "model.safetensors", re.compile(r"model-\d+-of-\d+\.safetensors")
_LARGEST_INDEX = 64 * 2**20  # bytes
_WIDEST = 4  # bytes of a value, in the formats that models are published in
_APART = 1.5  # a base may have a head, or tied weights stored twice, that the pruned model has not
_SLACK = 2**20  # bytes; headers of the files of small models
_ALIKE = 0.5  # share of the values that have to lie in tensors of the same name and shape
# A model has a few tensors beside those of its files: tied ones, each counted whenever it is tied, and what is made anew.
_TIMES, _MORE_TENSORS, _MORE_VALUES = 4, 1000, 2**26
# Keys of a config for numbers of layers.
_COUNTS = re.compile(r"(\w*_)?n?_?layers?|depth|(num|n)_blocks", re.IGNORECASE)
_LABELS, _MOST_LABELS = "num_labels", 10**6


class TooLargeError(CheckpointError):
    """Raised when a config asks for far more than its weights hold."""


# ---------------------------------------------------------------------------------------------------- what is loaded


class _Loaded:
    """A place of which only those weight files are seen that Transformers loads."""

    def __init__(self, place: Place) -> None:
        self.name, self.commit, self._place = place.name, place.commit, place
        self.files: dict[str, File] = {name: place.files[name] for name in loaded_weights(place)}

    def local(self, name: str) -> Path:
        return self._place.local(name)

    def head(self, name: str, size: int) -> bytes:
        return self._place.head(name, size)


def loaded_weights(place: Place) -> list[str]:
    """The one weight file, or the shards; other files beside them hold the same weights in another layout."""
    names = weight_files(place)
    compressed = [name for name in names if is_compressed_weights(name)]
    if compressed and CONFIG in place.files and is_compressed(config := read_config(place)):
        whole = config["quantization_config"]["weights"] == COMPRESSED
        return [COMPRESSED] if whole else [name for name in compressed if name != COMPRESSED]
    return [_WHOLE] if _WHOLE in names else [name for name in names if _SHARD.fullmatch(name)] or names


def headers(place: Place | Path) -> dict[str, Tensor]:
    """Every tensor that Transformers would load, by name; raises CheckpointError as `remote.tensors` does."""
    return tensors(_Loaded(Folder(place.name, place) if isinstance(place, Path) else place))


# ---------------------------------------------------------------------------------------------------- configs


def check_config(folder: Path, stored: Mapping[str, Tensor]) -> None:
    """Raise TooLargeError where config.json tells of more layers than the files have tensors, before any list of them is made."""
    waiting: list[Any] = [read_json(folder / CONFIG, LARGEST_CONFIG, "a model's config")]
    most = {True: len(stored) + _MORE_TENSORS, False: _MOST_LABELS}
    while waiting:
        values = waiting.pop()
        if isinstance(values, dict):
            for key, value in values.items():
                counted = bool(_COUNTS.fullmatch(key)) or key == _LABELS
                if counted and isinstance(value, int) and value > most[key != _LABELS]:
                    raise _too_large(f"{one_line(key, 40)} is {value:.3g}", stored)
        waiting.extend(values.values() if isinstance(values, dict) else values if isinstance(values, list) else ())


@contextmanager
def no_larger_than(stored: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, a model is made of a config; TooLargeError as soon as it has far more tensors or values than the files hold.

    Nothing is counted but what is made without memory, as Transformers makes every model before it loads the weights.
    """
    mine = threading.get_ident()
    left = [_TIMES * len(stored) + _MORE_TENSORS, _TIMES * _values(stored) + _MORE_VALUES]

    def count(_: nn.Module, __: str, tensor: torch.Tensor | None) -> None:
        if tensor is None or not tensor.is_meta or threading.get_ident() != mine:
            return
        left[0] -= 1
        left[1] -= tensor.numel()
        if min(left) < 0:
            raise _too_large("it makes far more weights", stored)

    register = (hooks.register_module_parameter_registration_hook, hooks.register_module_buffer_registration_hook)
    made = [one(count) for one in register]
    try:
        yield
    finally:
        for handle in made:
            handle.remove()


def _too_large(what: str, stored: Mapping[str, Tensor]) -> TooLargeError:
    return TooLargeError(
        f"{CONFIG} is not that of the weights: {what}, and the files hold {_values(stored):,} values in {len(stored)} tensors. "
        "Get both from the same save."
    )


def _values(stored: Mapping[str, Tensor]) -> int:
    return sum(tensor.size for tensor in stored.values())


# ---------------------------------------------------------------------------------------------------- base models


def files_of_base(place: Place) -> list[str]:
    """What of a base model is downloaded: config, weights and their index, none larger than it can need to be."""
    small = {CONFIG: LARGEST_CONFIG, INDEX: _LARGEST_INDEX, COMPRESSED_INDEX: _LARGEST_INDEX}
    for name, most in small.items():
        if name in place.files and place.files[name].size > most:
            raise CheckpointError(f"its {name} has {place.files[name].size} bytes; at most {most} are read.")
    return [*(name for name in small if name in place.files), *loaded_weights(place)]


def unlike(place: Place, own: Mapping[str, Tensor], prefix: str) -> str | None:
    """Why a model is not the dense one of a model with the tensors `own`, as the first bytes of its files tell; None if it may be.

    prefix: what the names of a whole model's tensors begin with and those of its body alone do not.

    Raises: CheckpointError or HubError where the files cannot be looked at.
    """
    theirs = headers(place)
    size, mine = _values(theirs), _values(own)
    if not mine <= size * _APART <= mine * _APART**2:
        return f"it has {size:,} values, and this one {mine:,}"
    stored = sum(place.files[name].size for name in loaded_weights(place))
    if stored > _APART * _WIDEST * mine + _SLACK:
        return f"its files have {stored:,} bytes for {size:,} values"
    shapes = {name.removeprefix(f"{prefix}."): tensor.shape for name, tensor in theirs.items()}
    alike = sum(
        tensor.size for name, tensor in own.items() if shapes.get(name.removeprefix(f"{prefix}.")) == tensor.shape
    )
    if alike < _ALIKE * mine:
        return f"only {alike:,} of {mine:,} values lie in tensors of the same name and shape"
    return None
