"""One tensor, compressed: its non-zero values in row-major order, and one bit for each element that says where they stand."""

import math
from typing import NamedTuple

import torch

from hf_sparse.errors import CheckpointError, KernelError
from hf_sparse.native import gather_bits, spread_bits
from hf_sparse.text import one_line

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_OVERHEAD = 256  # bytes that two more entries take in the header of a safetensors file
MOST_DIMENSIONS = 16


class Parts(NamedTuple):
    """The bits of an element are a little-endian row: element i is bit i % 8 of byte i // 8. A bit stands for every element whose
    bits are not all zero, so also for a negative zero, and what comes back is equal bit for bit."""

    values: torch.Tensor  # (non-zeros), in the dtype of the tensor
    bitmask: torch.Tensor  # uint8 (ceil(elements / 8)); what is left over of the last byte is zero
    shape: torch.Tensor  # int64 (dimensions)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self)


def compress(tensor: torch.Tensor) -> Parts | None:
    """The parts of a tensor on any device, on the CPU; None where they would not be smaller than the tensor itself."""
    size = tensor.numel()
    if not _is_number(tensor.dtype) or size * tensor.element_size() <= _bytes(0, tensor):
        return None
    row = tensor.detach().cpu().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    if size * tensor.element_size() <= _bytes(int(torch.count_nonzero(row)), tensor):
        return None
    values, bitmask = gather_bits(row)
    return Parts(values.view(tensor.dtype), bitmask, torch.tensor(tensor.shape))


def _is_number(dtype: torch.dtype) -> bool:
    return dtype != torch.bool and not dtype.is_complex and dtype.itemsize in _INTEGERS


def _bytes(kept: int, tensor: torch.Tensor) -> int:
    return kept * tensor.element_size() + math.ceil(tensor.numel() / 8) + 8 * tensor.dim() + _OVERHEAD


def checked_shape(name: str, shape: torch.Tensor, bytes_of_bits: int) -> tuple[int, ...]:
    """The shape that a tensor of int64 tells, after a look at whether the bitmask is one of it; raises CheckpointError."""
    sides = tuple(shape.tolist()) if shape.dim() == 1 and len(shape) <= MOST_DIMENSIONS else ()
    elements = math.prod(sides)
    if not sides or min(sides) < 0 or math.ceil(elements / 8) != bytes_of_bits:
        told = " x ".join(map(str, sides)) or "none that can be read"
        raise damaged(name, f"its shape is {told}, which does not fit a bitmask of {bytes_of_bits} bytes")
    return sides


def decompress(name: str, parts: Parts) -> torch.Tensor:
    """The tensor, on the CPU, equal bit for bit to the one that was compressed.

    Everything about the parts is checked before memory is taken for it, which is at most 64 times that of the bitmask.

    Raises: CheckpointError with the tensor's name, where the parts do not belong together.
    """
    check_kinds(name, parts)
    shape = checked_shape(name, parts.shape, parts.bitmask.numel())
    kind = _INTEGERS[parts.values.element_size()]
    try:
        row = spread_bits(parts.values.view(kind), parts.bitmask, math.prod(shape))
    except KernelError as error:
        raise damaged(name, str(error)) from None
    return row.view(parts.values.dtype).view(shape)


def check_kinds(name: str, parts: Parts) -> None:
    values, bitmask, shape = parts
    if values.dim() != 1 or not _is_number(values.dtype):
        raise damaged(name, f"its values are {values.dtype} with shape {tuple(values.shape)}, not a row of numbers")
    if bitmask.dim() != 1 or bitmask.dtype != torch.uint8:
        raise damaged(name, f"its bitmask is {bitmask.dtype} with shape {tuple(bitmask.shape)}, not a row of bytes")
    if shape.dtype != torch.int64:
        raise damaged(name, f"its shape is stored as {shape.dtype}, not as int64")


def damaged(name: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"the compressed tensor {one_line(name, 120)!r} is damaged: {why.rstrip('.')}. Download or save the model again."
    )
