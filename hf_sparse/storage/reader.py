"""Reads compressed checkpoints: tensors under their plain names, made dense one at a time when they are asked for."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hf_sparse.errors import CheckpointError
from hf_sparse.storage.bitmask import Parts, check_kinds, checked_shape, damaged, decompress
from hf_sparse.storage.names import BITMASK, SHAPE, SUFFIXES, VALUES
from hf_sparse.text import one_line

_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8")


class StoredTensor:
    """A compressed tensor in an open file, with the methods of safetensors' own slices: indexing it gives the values."""

    def __init__(self, name: str, slices: Mapping[str, Any]) -> None:
        self.name = name
        self._slices = slices
        shape = slices[SHAPE]
        if shape.get_dtype() != "I64" or len(shape.get_shape()) != 1:
            raise damaged(
                name, f"its shape is stored as {shape.get_dtype()} {shape.get_shape()}, not as a row of int64"
            )
        self.shape = checked_shape(name, shape[:], _length(name, slices[BITMASK], "U8"))
        self.non_zeros = _length(name, slices[VALUES])
        if self.get_dtype() not in _DTYPES:
            raise damaged(name, f"its values are {self.get_dtype()}, which no compressed tensor is stored in")

    def parts(self) -> Parts:
        """What is stored, read from the file and each for itself as it should be; raises CheckpointError."""
        parts = Parts(*(self._slices[suffix][:] for suffix in SUFFIXES))
        check_kinds(self.name, parts)
        return parts

    def damaged(self, why: str) -> CheckpointError:
        return damaged(self.name, why)

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return str(self._slices[VALUES].get_dtype())

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Values of the tensor; raises CheckpointError where what is stored does not fit together."""
        return decompress(self.name, self.parts())[index]


def _length(name: str, stored: Any, dtype: str | None = None) -> int:
    shape = stored.get_shape()
    if len(shape) != 1 or dtype not in (None, stored.get_dtype()):
        raise damaged(name, f"a part of it is stored as {stored.get_dtype()} {shape}, where a row should stand")
    return int(shape[0])


@contextmanager
def open_tensors(files: Sequence[str | Path]) -> Iterator[dict[str, Any]]:
    """Plain name -> what gives the tensor, by `[...]`, of compressed or plain safetensors files; nothing is read before.

    Raises: CheckpointError for a file that cannot be opened, a tensor in two files, and parts that do not belong together.
    """
    with ExitStack() as stack:
        slices: dict[str, Any] = {}
        for file in files:
            try:
                opened = stack.enter_context(safe_open(file, framework="pt"))
                found = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118  (no mapping)
            except FileNotFoundError as error:
                raise CheckpointError(
                    f"there is no {one_line(file, 200)}, which config.json says holds the weights."
                ) from error
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{one_line(file, 200)} cannot be read ({error}); was the save interrupted?"
                ) from error
            if twice := slices.keys() & found.keys():
                raise CheckpointError(f"{one_line(min(twice), 120)!r} is in two files; save the model again.")
            slices |= found
        yield plain_tensors(slices, StoredTensor)


def plain_tensors(stored: Mapping[str, Any], join: Any) -> dict[str, Any]:
    """What is under the plain names, given what is under all names of a checkpoint: `join(name, parts by suffix)`, or itself.

    Raises: CheckpointError for a part without the others, and for a tensor that is there plain as well.
    """
    names = [key.removesuffix(BITMASK) for key in stored if key.endswith(BITMASK)]
    parts = {name + suffix: name for name in names for suffix in SUFFIXES}
    if missing := parts.keys() - stored.keys():
        raise CheckpointError(
            f"the weights are not whole: {one_line(min(missing), 120)!r} is missing. Download or save the model again."
        )
    if both := stored.keys() & set(names):
        raise CheckpointError(f"{one_line(min(both), 120)!r} is there both plain and compressed; save the model again.")
    found: dict[str, Any] = {}
    for key, value in stored.items():  # in the order of the files
        if key not in parts:
            found[key] = value
        elif key.endswith(BITMASK):
            name = parts[key]
            found[name] = join(name, {suffix: stored[name + suffix] for suffix in SUFFIXES})
    return found
