"""What the attribute `weight` of a module with a sparse form is: a tensor that becomes dense only where its values are asked for."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves, tree_map

from hf_sparse.errors import KernelError
from hf_sparse.runtime.forms import Form, StackedForm
from hf_sparse.runtime.multiply import multiply
from hf_sparse.runtime.operators import WAY_BACK

REFUSAL = f"These weights are held for sparse kernels and cannot be written; {WAY_BACK}."
# Setting these would be lost on a tensor that is made anew for everyone who asks.
_SETTERS = {getattr(torch.Tensor, name).__set__ for name in ("data", "grad", "requires_grad")}
# These read memory, which only a dense tensor has.
_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
_READERS = {torch.Tensor.tolist, torch.Tensor.numpy}


@dataclass(frozen=True, eq=False)
class _Shown:
    """Values that are dense already, in the place of a form."""

    values: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def unpack(self) -> torch.Tensor:
        return self.values


class LazyWeight(torch.Tensor):
    """Models ask a weight for its dtype before each product (T5 does); that must not make it dense.

    What shares memory with a dense weight, such as a row or the transpose, would be written to in vain as well: it is a
    `LazyWeight` of its own.
    """

    _form: Form | _Shown
    _transposed: bool

    @staticmethod
    def __new__(cls, form: Form | _Shown, dtype: torch.dtype, transposed: bool) -> "LazyWeight":
        shape = (*form.shape[:-2], form.shape[-1], form.shape[-2]) if transposed else form.shape
        strides = form.values.stride() if isinstance(form, _Shown) else None
        made = torch.Tensor._make_wrapper_subclass(cls, shape, strides, dtype=dtype, device=form.device)  # type: ignore[attr-defined]
        made._form, made._transposed = form, transposed
        return made

    def __init__(self, form: Form | _Shown, dtype: torch.dtype, transposed: bool) -> None:
        super().__init__()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyWeight({tuple(self.shape)}, {self.dtype}, {self._form.nbytes} bytes)"

    def __deepcopy__(self, memo: dict[int, Any]) -> "LazyWeight":
        return LazyWeight(copy.deepcopy(self._form, memo), self.dtype, self._transposed)

    def dense(self) -> torch.Tensor:
        """The values, as a tensor of their own."""
        matrix = self._form.unpack().to(self.dtype)
        return matrix.mT.contiguous() if self._transposed else matrix

    def __dlpack__(self, **options: Any) -> Any:  # type: ignore[override]
        return self.dense().__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.dense().__dlpack_device__()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (product := _sparse_product(function, args, kwargs)) is not None:
            return product
        if function is torch.Tensor.__getitem__ and isinstance(args[0]._form, StackedForm) and _is_number(args[1]):
            return cls(args[0]._form.forms[int(args[1])], args[0].dtype, args[0]._transposed)  # one expert's
        if function in _SETTERS or (function is torch.Tensor.requires_grad_ and (*args, *kwargs.values(), True)[1]):
            raise KernelError(REFUSAL)
        if function in _READERS:
            args = (args[0].dense(), *args[1:])
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if function is torch.ops.aten.detach.default:  # what `.data` gives: writing into it must be refused as well
            return cls(args[0]._form, args[0].dtype, args[0]._transposed)
        given = dict(zip((argument.name for argument in function._schema.arguments), args)) | (kwargs or {})
        written = [given.get(argument.name) for argument in function._schema.arguments if argument.is_write]
        if any(isinstance(leaf, LazyWeight) for leaf in tree_leaves(written)):
            raise KernelError(REFUSAL)
        memory: set[int] = set()

        def dense(value: Any) -> Any:
            if not isinstance(value, LazyWeight):
                return value
            made = value.dense()
            memory.add(made.untyped_storage().data_ptr())
            return made

        def watched(value: Any) -> Any:
            shares = isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in memory
            return cls(_Shown(value), value.dtype, False) if shares else value

        args, kwargs = tree_map(dense, (args, kwargs or {}))
        return tree_map(watched, function(*args, **kwargs))


def _sparse_product(function: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """A product with a weight whose zeros can be left out; None for all else."""
    if function is F.linear:
        given = dict(zip(("input", "weight", "bias"), args)) | kwargs
        if _multiplies(given.get("weight"), False) and not isinstance(given["input"], LazyWeight):
            return multiply(given["weight"]._form, given["weight"].dtype, given["input"], given.get("bias"))
    if function in _PRODUCTS and len(args) == 2 and _multiplies(args[1], True) and not isinstance(args[0], LazyWeight):
        return multiply(args[1]._form, args[1].dtype, args[0])
    return None


def _multiplies(weight: object, transposed: bool) -> bool:
    return (
        isinstance(weight, LazyWeight)
        and weight._transposed is transposed
        and not isinstance(weight._form, _Shown | StackedForm)
    )


def _is_number(index: object) -> bool:
    """Whether an index is one number; experts come as tensors of it."""
    return (isinstance(index, int) and not isinstance(index, bool)) or (
        isinstance(index, torch.Tensor) and index.dim() == 0 and index.dtype in (torch.int64, torch.int32)
    )  # fmt: skip
