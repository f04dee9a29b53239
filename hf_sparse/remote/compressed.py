"""What headers tell of compressed tensors, whose shapes stand among the first values of their files."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch

from hf_sparse.errors import CheckpointError
from hf_sparse.remote.headers import Tensor
from hf_sparse.storage import plain_tensors
from hf_sparse.storage.bitmask import MOST_DIMENSIONS, checked_shape, damaged
from hf_sparse.storage.names import BITMASK, SHAPE, VALUES
from hf_sparse.text import one_line

_FURTHEST = 2**25  # bytes: safetensors puts the widest numbers first, so shapes lie right behind the header


def joined(place: Any, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under their plain names; of each file with compressed ones, the beginning is read once more.

    Raises: CheckpointError for parts that do not belong together.
    """
    shapes = [tensor for name, tensor in stored.items() if name.endswith(SHAPE)]
    ends: dict[str, int] = {}
    for shape in shapes:
        ends[shape.file] = max(ends.get(shape.file, 0), min(_FURTHEST, shape.offset + 8 * MOST_DIMENSIONS))

    @cache
    def start(file: str) -> bytes:
        return bytes(place.head(file, ends[file]))

    def join(name: str, parts: Mapping[str, Tensor]) -> Tensor:
        shape, bitmask, values = parts[SHAPE], parts[BITMASK], parts[VALUES]
        if shape.dtype != "I64" or len(shape.shape) != 1 or shape.size > MOST_DIMENSIONS:
            raise damaged(
                name, f"its shape is stored as {shape.dtype} {list(shape.shape)}, not as a short row of int64"
            )
        if bitmask.dtype != "U8" or len(bitmask.shape) != 1 or len(values.shape) != 1:
            raise damaged(name, "its bitmask or its values are no rows")
        told = start(shape.file)[shape.offset : shape.offset + 8 * shape.size]
        if len(told) < 8 * shape.size:
            raise CheckpointError(
                f"the shape of {one_line(name, 120)!r} lies far behind the header; save the model again."
            )
        sides = checked_shape(name, torch.from_numpy(np.frombuffer(told, dtype="<i8").copy()), bitmask.size)
        return Tensor(sides, values.dtype, values.file, values.offset, values.size)

    return plain_tensors(stored, join)
