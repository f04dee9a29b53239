"""What the attribute `weight` of a module with a sparse form is: a tensor that becomes dense only where its values are asked for."""

from typing import Any

import torch
from torch.utils._pytree import tree_map

from hf_sparse.errors import KernelError
from hf_sparse.runtime.forms import Form
from hf_sparse.runtime.operators import WAY_BACK

REFUSAL = f"These weights are held for sparse kernels and cannot be written; {WAY_BACK}."
# Setting these would be lost on a tensor that is made anew for everyone who asks.
_SETTERS = {getattr(torch.Tensor, name).__set__ for name in ("data", "grad", "requires_grad")}


class LazyWeight(torch.Tensor):
    """Models ask a weight for its dtype before each product (T5 does); that must not make it dense."""

    _form: Form
    _transposed: bool

    @staticmethod
    def __new__(cls, form: Form, dtype: torch.dtype, transposed: bool) -> "LazyWeight":
        shape = form.shape[::-1] if transposed else form.shape
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=form.device)  # type: ignore[attr-defined]
        made._form, made._transposed = form, transposed
        return made

    def __init__(self, form: Form, dtype: torch.dtype, transposed: bool) -> None:
        super().__init__()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyWeight({tuple(self.shape)}, {self.dtype}, {self._form.nbytes} bytes)"

    def dense(self) -> torch.Tensor:
        """The values, as a tensor of their own."""
        matrix = self._form.unpack().to(self.dtype)
        return matrix.T.contiguous() if self._transposed else matrix

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _SETTERS:
            raise KernelError(REFUSAL)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        written = {argument.name for argument in function._schema.arguments if argument.is_write}
        if function is torch.ops.aten.detach.default:  # what `.data` gives: writing into it must be refused as well
            return cls(args[0]._form, args[0].dtype, args[0]._transposed)
        names = [argument.name for argument in function._schema.arguments]
        given = {**dict(zip(names, args)), **(kwargs or {})}
        if any(isinstance(given.get(name), LazyWeight) for name in written):
            raise KernelError(REFUSAL)
        args, kwargs = tree_map(_dense, (args, kwargs or {}))
        return function(*args, **kwargs)


def _dense(value: Any) -> Any:
    return value.dense() if isinstance(value, LazyWeight) else value
