"""Values and bits of a compressed checkpoint: spread out into the dense row that they stand for, and gathered from one."""

import numpy as np
import torch

from hf_sparse.errors import KernelError
from hf_sparse.native.addresses import address
from hf_sparse.native.binary import kernels

_WIDTHS = (torch.int8, torch.int16, torch.int32, torch.int64)
_CHUNK = 1 << 25  # elements: a bit takes a byte while it is spread out


def spread_bits(values: torch.Tensor, bitmask: torch.Tensor, size: int) -> torch.Tensor:
    """A row of `size` integers, with the values where the bits are set (lowest bit of a byte first), and zeros elsewhere.

    `values` are integers of any width, on the CPU and contiguous; `bitmask` is uint8 (ceil(size / 8)).

    Raises: KernelError where there are not as many values as bits, or bits beyond the size.
    """
    values, bitmask = values.contiguous(), bitmask.contiguous()
    needed = -(-size // 8)
    if bitmask.dtype != torch.uint8 or bitmask.shape != (needed,) or values.dtype not in _WIDTHS or values.dim() != 1:
        raise KernelError(
            f"{size} elements have a row of {needed} bytes of bits, and integers as values; given are {bitmask.dtype} "
            f"{tuple(bitmask.shape)} and {values.dtype} {tuple(values.shape)}."
        )
    if size % 8 and int(bitmask[-1]) >> (size % 8):
        raise KernelError("The bitmask marks elements beyond the end.")
    marked = int(np.bitwise_count(bitmask.numpy()).sum(dtype=np.int64))
    if marked != values.numel():
        raise KernelError(f"The bitmask marks {marked} elements, but there are {values.numel()} values.")
    row = torch.empty(size, dtype=values.dtype, device="cpu")
    module = kernels()
    if module is None:
        _spread_slowly(values.numpy(), bitmask.numpy(), row.numpy())
    elif size:
        module.spread_bits(address(values), address(bitmask), size, values.element_size(), address(row), values.numel())
    return row


def gather_bits(row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of a row of integers that are not zero, and uint8 (ceil(size / 8)) with a bit for each; the way back of `spread_bits`.

    Raises: KernelError for anything else than a contiguous row of integers on the CPU.
    """
    if row.dtype not in _WIDTHS or row.dim() != 1 or row.device.type != "cpu" or not row.is_contiguous():
        raise KernelError(
            f"A contiguous row of integers on the CPU is gathered; given is {row.dtype} {tuple(row.shape)} on {row.device}."
        )
    kept = row.numpy() != 0
    bits = torch.from_numpy(np.packbits(kept, bitorder="little"))
    module = kernels()
    if module is None:
        return torch.from_numpy(row.numpy()[kept]), bits
    values = torch.empty(int(np.count_nonzero(kept)), dtype=row.dtype, device="cpu")
    module.gather_bits(address(row), address(bits), row.numel(), row.element_size(), address(values), values.numel())
    return values, bits


def _spread_slowly(values: np.ndarray, bitmask: np.ndarray, row: np.ndarray) -> None:
    row[:] = 0
    used = 0
    for start in range(0, len(row), _CHUNK):
        part = row[start : start + _CHUNK]
        kept = np.unpackbits(bitmask[start // 8 : (start + len(part) + 7) // 8], bitorder="little")[: len(part)].view(
            bool
        )
        count = int(np.count_nonzero(kept))
        part[kept] = values[used : used + count]
        used += count
