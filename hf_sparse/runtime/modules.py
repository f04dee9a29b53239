"""Linear and Conv1D modules that multiply with a sparse form of their weight, made by changing a module's class in place."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_sparse.errors import KernelError, ModelError
from hf_sparse.native import pack
from hf_sparse.native.products import refuse_tangent
from hf_sparse.runtime.forms import Form, PackedForm, cuts_gradients
from hf_sparse.runtime.lazy import REFUSAL, LazyWeight
from hf_sparse.runtime.operators import NO_GRADIENT, WAY_BACK, is_traced
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
    """Stands before the original class, whose name, hooks, attributes and bias the module keeps."""

    transposed = False  # the weight is stored as (in, out)
    original: type[nn.Module] = nn.Module
    _form: Form
    _dtype: torch.dtype  # of the dense weight
    _trains: bool  # whether the dense weight required a gradient
    _rounds: bool  # whether weights that are loaded may be rounded to bfloat16

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight for whoever reads it; reading its shape, dtype and device costs nothing."""
        if torch.compiler.is_compiling():  # where nothing but its dtype is used, the graph drops it
            matrix = self._form.traced_unpack().to(self._dtype)
            return matrix.T if self.transposed else matrix
        return LazyWeight(self._form, self._dtype, self.transposed)

    @weight.setter
    def weight(self, value: object) -> None:
        raise KernelError(REFUSAL)

    def register_parameter(self, name: str, parameter: nn.Parameter | None) -> None:
        if name == "weight":
            raise KernelError(REFUSAL)
        super().register_parameter(name, parameter)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.training and torch.is_grad_enabled():
            raise KernelError(NO_GRADIENT)
        refuse_tangent(input)
        dtype = result_dtype(self, input)
        dtypes = self._form.dtypes
        inner = dtype if dtype in dtypes else dtypes[-1]  # autocast to float16: rounded once, at the end
        input = input if input.dtype is inner else input.to(inner)
        bias: torch.Tensor | None = self.bias  # type: ignore[assignment]
        bias = bias if bias is None or bias.dtype is inner else bias.to(inner)
        if torch.compiler.is_compiling() or is_traced(input):
            out = self._form.traced_product(input, bias)
        elif torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad)):
            out = cuts_gradients(self._form, input, bias, NO_GRADIENT)
        else:
            out = self._form.product(input, bias)
        return out if out.dtype is dtype else out.to(dtype)

    def requires_grad_(self, requires_grad: bool = True) -> "SparseModule":
        """Remembered for the weight as well, for when it is dense again."""
        self._trains = requires_grad
        return super().requires_grad_(requires_grad)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        weight = LazyWeight(self._form, self._dtype, self.transposed)  # plain weights with zeros, under their old name
        destination[prefix + "weight"] = weight if _stays_lazy.get() else weight.dense()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        _, strict, missing, _, errors = rest
        key = prefix + "weight"
        weight = state_dict.get(key)
        if weight is None:
            missing += [key] if strict else []
        elif tuple(weight.shape) != tuple(self.weight.shape):
            errors.append(f"size mismatch for {key}: {tuple(weight.shape)} given, {tuple(self.weight.shape)} is here.")
        elif not isinstance(self._form, PackedForm):
            errors.append(f"{key} cannot be loaded into a {type(self._form).__name__}; {WAY_BACK}.")
        else:
            weight = (weight.dense() if isinstance(weight, LazyWeight) else weight).detach().to(self._dtype)
            if self._rounds or is_bfloat16(weight):
                hold_form(self, packed_form(self, weight))
            else:
                errors.append(
                    f"{key} would be rounded to bfloat16, which round_weights=True was not given for; {WAY_BACK}."
                )
        others = {name: value for name, value in state_dict.items() if name != key}
        super()._load_from_state_dict(others, prefix, *rest)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Only the bias moves; the sparse form stays as it is, where the move allows that."""
        self._dtype = moved_dtype(self, fn)
        buffers = {name: self._buffers.pop(name) for name in self._form.tensors()}
        try:
            return super()._apply(fn, recurse)
        finally:
            self._buffers.update(buffers)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, form={type(self._form).__name__}".removeprefix(", ")


class SparseLinear(SparseModule, nn.Linear):
    original = nn.Linear


class SparseConv1D(SparseModule, Conv1D):
    original = Conv1D
    transposed = True


CLASSES: dict[type, type[SparseModule]] = {nn.Linear: SparseLinear, Conv1D: SparseConv1D}


def result_dtype(module: SparseModule, x: torch.Tensor) -> torch.dtype:
    """The dtype of a product with this input: the module's own, or what autocast says, as of a dense module.

    Raises: KernelError for an input that a dense module would not multiply either.
    """
    autocast = torch.is_autocast_enabled(x.device.type)
    fits = x.is_floating_point() and x.dtype is not torch.float64 if autocast else x.dtype is module._dtype
    if not fits or x.device != module._form.device:
        raise KernelError(
            f"These sparse weights take inputs in {module._dtype} on {module._form.device}, given is {x.dtype} on {x.device}. "
            f"Convert the input; or {WAY_BACK}."
        )
    return torch.get_autocast_dtype(x.device.type) if autocast else module._dtype


def moved_dtype(module: SparseModule, fn: Any) -> torch.dtype:
    """What dtype a move gives to a weight that is held in a sparse form; most moves are refused.

    Raises: KernelError for another device, or a dtype that the kernels do not multiply.
    """
    moved = fn(torch.empty(1, dtype=module._dtype, device=module._form.device))
    if moved.device != module._form.device or moved.dtype not in module._form.dtypes:
        allowed = " or ".join(map(str, module._form.dtypes))
        raise KernelError(
            f"A model with sparse kernels cannot become {moved.dtype} on {moved.device}: they multiply {allowed} on the device "
            f"where they were made, {module._form.device}. {WAY_BACK}; convert or move it then."
        )
    return moved.dtype


def packed_form(module: SparseModule, weight: torch.Tensor) -> PackedForm:
    matrix = weight.T if module.transposed else weight
    packed = pack(matrix.to("cpu", torch.bfloat16))
    return replace(module._form, packed=packed) if isinstance(module._form, PackedForm) else PackedForm(packed)


def hold_form(module: SparseModule, form: Form) -> None:
    """Gives a sparse module another form."""
    for name, tensor in form.tensors().items():
        module.register_buffer(name, tensor, persistent=False)
    module._form = form


def why_not_module(module: nn.Module) -> str:
    """Why a module cannot take a sparse form; empty where it can."""
    if type(module) not in CLASSES:
        return f"{type(module).__name__} multiplies in its own way"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is computed by something else (a parametrization)"
    if "forward" in module.__dict__:
        return "its forward is replaced (accelerate does so to move weights); load the model without device_map"
    return ""


def hold_(module: nn.Module, form: Form, rounds: bool = False) -> None:
    """Lets a Linear or Conv1D hold its weight in a sparse form; the dense weight is let go.

    `rounds`: float32 weights that are loaded later may be rounded to bfloat16.

    Raises: KernelError where the class is another one or the shape does not fit.
    """
    reason = why_not_module(module)
    if reason:
        raise KernelError(f"This module cannot hold its weight in a sparse form: {reason}.")
    kind, weight = CLASSES[type(module)], module._parameters["weight"]
    shape = tuple(reversed(form.shape)) if kind.transposed else form.shape
    if weight is None or tuple(weight.shape) != shape:
        raise KernelError(
            f"A form of a weight {shape} cannot stand for one of {None if weight is None else tuple(weight.shape)}."
        )
    del module._parameters["weight"]
    module.__class__ = kind
    module._dtype, module._trains = weight.dtype, weight.requires_grad  # type: ignore[assignment]
    module._rounds = rounds  # type: ignore[assignment]
    hold_form(module, form)  # type: ignore[arg-type]


def release_(module: SparseModule) -> None:
    """Gives a module its dense weight and its class back."""
    weight = LazyWeight(module._form, module._dtype, module.transposed).dense()
    trains = module._trains
    for name in module._form.tensors():
        del module._buffers[name]
        module._non_persistent_buffers_set.discard(name)
    for name in ("_form", "_dtype", "_trains", "_rounds"):
        delattr(module, name)
    module.__class__ = module.original  # type: ignore[assignment]
    others = dict(module._parameters)
    module._parameters.clear()  # the weight comes first, as before: optimizers number parameters by their order
    module.register_parameter("weight", nn.Parameter(weight, requires_grad=trains))
    module._parameters.update(others)


def sparse_modules(model: nn.Module) -> Iterator[tuple[str, SparseModule]]:
    """The modules of a model that hold a sparse form, by name, each once."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SparseModule))


def refuse_sparse(model: nn.Module, doing: str) -> None:
    """Raises ModelError where a model runs on sparse kernels; `doing` says what cannot be done with it."""
    name = next((name for name, _ in sparse_modules(model)), None)
    if name is not None:
        raise ModelError(f"{name} holds its weight for sparse kernels, so the model cannot {doing}; {WAY_BACK}.")
