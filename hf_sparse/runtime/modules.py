"""Modules that hold weights in a sparse form, made by changing a module's class in place: Linear, Conv1D, and what others build on."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_sparse.errors import KernelError
from hf_sparse.runtime.forms import Form, PackedForm, StackedForm
from hf_sparse.runtime.lazy import REFUSAL, LazyWeight
from hf_sparse.runtime.multiply import multiply
from hf_sparse.runtime.operators import NO_GRADIENT, WAY_BACK
from hf_sparse.runtime.row_forms import RowsForm
from hf_sparse.runtime.sources import is_bfloat16

_stays_lazy = ContextVar("hf_sparse_stays_lazy", default=False)


@contextmanager
def lazy_weights() -> Iterator[None]:
    """Inside, `state_dict` gives a `LazyWeight` for what is held in a sparse form, instead of making all of them dense at once."""
    token = _stays_lazy.set(True)
    try:
        yield
    finally:
        _stays_lazy.reset(token)


class SparseModule(nn.Module):
    """Stands before the original class, whose name, hooks, attributes and other parameters the module keeps."""

    original: type[nn.Module] = nn.Module
    transposed: bool = False  # weights are stored as (in, out)
    _held: dict[str, Form]  # by the name of the parameter that is held
    _order: tuple[str, ...]  # of all parameters, as it was
    _dtype: torch.dtype  # of the dense weights
    _trains: bool  # whether the dense weights required a gradient
    _rounds: bool  # whether weights that are loaded may be rounded to bfloat16

    def _lazy(self, name: str) -> torch.Tensor:
        """The dense weight for whoever reads it; reading its shape, dtype and device costs little."""
        if torch.compiler.is_compiling():  # where nothing but its dtype is used, the graph drops it
            matrix = self._held[name].traced_unpack().to(self._dtype)
            return matrix.mT if self.transposed else matrix
        return LazyWeight(self._held[name], self._dtype, self.transposed)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_held", ()):
            raise KernelError(REFUSAL)
        super().__setattr__(name, value)

    def register_parameter(self, name: str, parameter: nn.Parameter | None) -> None:
        if name in self._held:
            raise KernelError(REFUSAL)
        super().register_parameter(name, parameter)

    def requires_grad_(self, requires_grad: bool = True) -> "SparseModule":
        """Remembered for the weights as well, for when they are dense again."""
        self._trains = requires_grad
        return super().requires_grad_(requires_grad)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, form in self._held.items():  # plain weights with zeros, under their old names
            weight = LazyWeight(form, self._dtype, self.transposed)
            destination[prefix + name] = weight if _stays_lazy.get() else weight.dense()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        _, strict, missing, _, errors = rest
        for name in self._held:
            key = prefix + name
            weight = state_dict.get(key)
            if weight is None:
                missing += [key] if strict else []
            elif error := self._load(name, key, weight):
                errors.append(error)
        held = {prefix + name for name in self._held}
        super()._load_from_state_dict(
            {key: value for key, value in state_dict.items() if key not in held}, prefix, *rest
        )

    def _load(self, name: str, key: str, weight: torch.Tensor) -> str:
        """Packs a weight that is loaded; why that cannot be, or nothing."""
        form, here = self._held[name], self._lazy(name)
        if weight.shape != here.shape:
            return f"size mismatch for {key}: {tuple(weight.shape)} given, {tuple(here.shape)} is here."
        if not isinstance(form, PackedForm | StackedForm | RowsForm):
            return f"{key} cannot be loaded into a {type(form).__name__}; {WAY_BACK}."
        weight = (weight.dense() if isinstance(weight, LazyWeight) else weight).detach().to(self._dtype)
        if not (self._rounds or is_bfloat16(weight)):
            return f"{key} would be rounded to bfloat16, which round_weights=True was not given for; {WAY_BACK}."
        hold_form(self, name, form.packed_again((weight.mT if self.transposed else weight).to("cpu", torch.bfloat16)))
        return ""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Only other parameters move; the sparse forms stay as they are, where the move allows that."""
        self._dtype = moved_dtype(self, fn)
        buffers = {name: self._buffers.pop(name) for name in buffers_of(self)}
        try:
            return super()._apply(fn, recurse)
        finally:
            self._buffers.update(buffers)

    def extra_repr(self) -> str:
        kinds = ", ".join(f"{name}: {type(form).__name__}" for name, form in self._held.items())
        return f"{super().extra_repr()}, {kinds}".removeprefix(", ")


class SparseProduct(SparseModule):
    """A module that is one product with its `weight`."""

    @property
    def weight(self) -> torch.Tensor:
        return self._lazy("weight")

    @weight.setter
    def weight(self, value: object) -> None:
        raise KernelError(REFUSAL)

    @property
    def _form(self) -> Form:
        return self._held["weight"]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.training and torch.is_grad_enabled():
            raise KernelError(NO_GRADIENT)
        return multiply(self._held["weight"], self._dtype, input, self.bias)  # type: ignore[arg-type]


class SparseLinear(SparseProduct, nn.Linear):
    original = nn.Linear


class SparseConv1D(SparseProduct, Conv1D):
    original = Conv1D
    transposed = True


CLASSES: dict[type, type[SparseProduct]] = {nn.Linear: SparseLinear, Conv1D: SparseConv1D}


def buffers_of(module: SparseModule) -> list[str]:
    """The names of the buffers that hold a module's forms."""
    return [f"{name}_{part}" for name, form in module._held.items() for part in form.tensors()]


def moved_dtype(module: SparseModule, fn: Any) -> torch.dtype:
    """What dtype a move gives to weights that are held in a sparse form; most moves are refused.

    Raises: KernelError for another device, or a dtype that the kernels do not multiply.
    """
    form = next(iter(module._held.values()))
    moved = fn(torch.empty(1, dtype=module._dtype, device=form.device))
    if moved.device != form.device or moved.dtype not in form.dtypes:
        allowed = " or ".join(map(str, form.dtypes))
        raise KernelError(
            f"A model with sparse kernels cannot become {moved.dtype} on {moved.device}: they multiply {allowed} on the device "
            f"where they were made, {form.device}. {WAY_BACK}; convert or move it then."
        )
    return moved.dtype


def hold_form(module: SparseModule, name: str, form: Form) -> None:
    """Gives one of the weights of a sparse module another form."""
    for part in module._held[name].tensors() if name in module._held else ():
        del module._buffers[f"{name}_{part}"]
        module._non_persistent_buffers_set.discard(f"{name}_{part}")
    for part, tensor in form.tensors().items():
        module.register_buffer(f"{name}_{part}", tensor, persistent=False)
    module._held[name] = form


def original_of(module: nn.Module) -> type[nn.Module]:
    return module.original if isinstance(module, SparseModule) else type(module)
