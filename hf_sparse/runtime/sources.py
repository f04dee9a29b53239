"""Where a matrix comes from that may be packed: a weight in memory, or the parts of a compressed checkpoint."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from hf_sparse.errors import KernelError
from hf_sparse.native import pack, pack_stored
from hf_sparse.runtime.forms import PackedForm, StackedForm
from hf_sparse.sites import count_zeros


class Source(Protocol):
    """A stored weight, (in, out) where it is `transposed`; its dtype is the one that it has, or will have, in the model."""

    @property
    def transposed(self) -> bool: ...

    @property
    def shape(self) -> tuple[int, ...]: ...  # as stored

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def zeros(self) -> float | None: ...  # share of the weights; None where they are not here

    def matrix(self) -> torch.Tensor:
        """The dense matrix (out, in), or that of each expert (experts, out, in)."""
        ...

    def is_bfloat16(self) -> bool:
        """Whether rounding to bfloat16 changes no weight."""
        ...

    def packed(self, expands_from: int | None = None) -> PackedForm | StackedForm: ...


def matrix_shape(source: Source) -> tuple[int, ...]:
    """(out, in), or (experts, out, in)."""
    *first, rows, columns = source.shape
    return (*first, columns, rows) if source.transposed else source.shape


def sample(source: Source) -> torch.Tensor:
    """One matrix (out, in) to measure with."""
    matrix = source.matrix()
    return matrix if matrix.dim() == 2 else matrix[0]


def packed_form(matrix: torch.Tensor, expands_from: int | None) -> PackedForm | StackedForm:
    if matrix.dim() == 2:
        return PackedForm(pack(matrix.bfloat16()), expands_from)
    return StackedForm(tuple(PackedForm(pack(one.bfloat16()), expands_from) for one in matrix))


def dense_bytes(source: Source) -> int:
    return source.dtype.itemsize * torch.Size(source.shape).numel()


def is_bfloat16(weight: torch.Tensor) -> bool:
    """Whether rounding to bfloat16 changes no weight; a NaN stays one."""
    rounded = weight.to(torch.bfloat16).to(weight.dtype)
    return bool(((rounded == weight) | weight.isnan()).all())


@dataclass(frozen=True)
class InMemory:
    weight: torch.Tensor
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @cached_property
    def zeros(self) -> float | None:
        return None if self.device.type == "meta" else count_zeros(self.weight) / max(1, self.weight.numel())

    def matrix(self) -> torch.Tensor:
        return self.weight.mT if self.transposed else self.weight

    def is_bfloat16(self) -> bool:
        return is_bfloat16(self.weight)

    def packed(self, expands_from: int | None = None) -> PackedForm | StackedForm:
        return packed_form(self.matrix(), expands_from)


@dataclass(frozen=True)
class InCheckpoint:
    """The dense weight never is in memory, but where it has to be turned or measured."""

    stored: Any  # a storage.StoredTensor
    dtype: torch.dtype
    transposed: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stored.shape)

    @property
    def zeros(self) -> float:
        size = torch.Size(self.shape).numel()
        return 1 - self.stored.non_zeros / max(1, size)

    def matrix(self) -> torch.Tensor:
        dense = self.stored[...].to(self.dtype)
        return dense.mT if self.transposed else dense

    def is_bfloat16(self) -> bool:
        return is_bfloat16(self.stored.parts().values.to(self.dtype))

    def packed(self, expands_from: int | None = None) -> PackedForm | StackedForm:
        if self.transposed or len(self.shape) > 2:
            return packed_form(self.matrix(), expands_from)
        values, bitmask, _ = self.stored.parts()
        try:
            packed = pack_stored(values.to(self.dtype).bfloat16(), bitmask, self.shape)
        except KernelError as error:
            raise self.stored.damaged(str(error)) from None
        return PackedForm(packed, expands_from)
