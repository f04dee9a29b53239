"""The forms in which a matrix can be held instead of dense, each with its product and its way back."""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from hf_sparse.errors import KernelError
from hf_sparse.native import Arranged, Packed, dense_matmul, matmul, pack
from hf_sparse.native.layout import STRIPE_ROWS
from hf_sparse.native.products import DTYPES
from hf_sparse.runtime.operators import packed_dense, packed_linear


class Form(Protocol):
    """A matrix (out, in) that multiplies, or one for each expert."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]: ...  # that inputs may have, the most exact one last

    @property
    def nbytes(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """What takes the memory, by names for buffers."""
        ...

    def unpack(self) -> torch.Tensor:
        """The dense matrix (out, in) in the dtype that its values have."""
        ...

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x times the transposed matrix, plus the bias, in x's dtype."""
        ...

    def traced_product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The same as an operator that torch.compile can place in a graph."""
        ...

    def traced_unpack(self) -> torch.Tensor:
        """`unpack` as such an operator."""
        ...


@dataclass(frozen=True, eq=False)
class PackedForm:
    """Zeros left out, multiplied by the native kernels on the CPU.

    From `expands_from` tokens on, where that measured faster, each product makes the matrix dense and is torch's own.
    """

    packed: Packed
    expands_from: int | None = None
    name = "packed"
    dtypes = DTYPES

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    @property
    def device(self) -> torch.device:
        return self.packed.values.device

    def packed_again(self, matrix: torch.Tensor) -> "PackedForm":
        """The form of another bfloat16 matrix (out, in), multiplied in the same way."""
        return replace(self, packed=pack(matrix))

    def tensors(self) -> dict[str, torch.Tensor]:
        packed = self.packed
        return {"packed_masks": packed.masks, "packed_offsets": packed.offsets, "packed_values": packed.values}

    def unpack(self) -> torch.Tensor:
        return self.packed.unpack()

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        packed = self.packed
        if self.expands_from is None or x.numel() < self.expands_from * packed.shape[1]:
            return matmul(x, packed, bias)
        return F.linear(x, packed.unpack().to(x.dtype), bias)

    # A graph holds for any number of tokens, so there the kernels multiply all of them.
    def traced_product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        packed = self.packed
        return packed_linear(x, packed.masks, packed.offsets, packed.values, bias, *packed.shape)

    def traced_unpack(self) -> torch.Tensor:
        packed = self.packed
        return packed_dense(packed.masks, packed.offsets, packed.values, *packed.shape)


@dataclass(frozen=True, eq=False)
class StackedForm:
    """The matrices of a block's experts, each packed for itself; a model multiplies with one of them at a time."""

    forms: tuple[Any, ...]  # PackedForm, or ArrangedForm for comparison
    name = "packed"
    dtypes = DTYPES

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.forms), *self.forms[0].shape

    @property
    def nbytes(self) -> int:
        return sum(form.nbytes for form in self.forms)

    @property
    def device(self) -> torch.device:
        return self.forms[0].device

    def packed_again(self, matrices: torch.Tensor) -> "StackedForm":
        return StackedForm(tuple(form.packed_again(matrix) for form, matrix in zip(self.forms, matrices)))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"{expert}_{name}": tensor
            for expert, form in enumerate(self.forms)
            for name, tensor in form.tensors().items()
        }

    def unpack(self) -> torch.Tensor:
        dense = torch.empty(self.shape, dtype=torch.bfloat16, device="cpu")
        for expert, form in enumerate(self.forms):
            dense[expert] = form.unpack()
        return dense

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        raise KernelError("All experts at once cannot be multiplied with; take one of them.")

    traced_product = product

    def traced_unpack(self) -> torch.Tensor:
        return torch.stack([form.traced_unpack() for form in self.forms])


@dataclass(frozen=True, eq=False)
class ArrangedForm:
    """All weights in the order of the kernels: the dense control that tells what sparsity itself gains."""

    arranged: Arranged
    name = "arranged"
    dtypes = DTYPES

    @property
    def shape(self) -> tuple[int, int]:
        return self.arranged.shape

    @property
    def nbytes(self) -> int:
        return self.arranged.values.nbytes

    @property
    def device(self) -> torch.device:
        return self.arranged.values.device

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"arranged_values": self.arranged.values}

    def unpack(self) -> torch.Tensor:
        values, (rows, columns) = self.arranged.values, self.arranged.shape
        stripes, pairs, _ = values.shape
        matrix = values.view(stripes, pairs, STRIPE_ROWS, 2).transpose(1, 2).reshape(stripes * STRIPE_ROWS, pairs * 2)
        return matrix[:rows, :columns].clone()

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return dense_matmul(x, self.arranged, bias)

    # Never compiled: it is there for measurements.
    traced_product = product
    traced_unpack = unpack


def cuts_gradients(form: Form, x: torch.Tensor, bias: torch.Tensor | None, message: str) -> torch.Tensor:
    """The product where the input or the bias wants a gradient: right, but asking for the gradient is refused."""
    return _NoGradient.apply(x, form, bias, message)


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: torch.Tensor, form: Form, bias: torch.Tensor | None, message: str) -> torch.Tensor:
        context.message = message
        return form.product(x.detach(), None if bias is None else bias.detach())

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> Any:
        raise KernelError(context.message)
