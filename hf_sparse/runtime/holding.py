"""Lets modules hold their weights in sparse forms, and gives them the dense ones back."""

from collections.abc import Iterator

from torch import nn

from hf_sparse.errors import KernelError, ModelError
from hf_sparse.runtime.experts import sparse_experts, why_not_experts
from hf_sparse.runtime.forms import Form
from hf_sparse.runtime.lazy import LazyWeight
from hf_sparse.runtime.modules import CLASSES, SparseModule, buffers_of, hold_form, original_of
from hf_sparse.runtime.operators import WAY_BACK


def why_not_module(module: nn.Module, name: str = "weight") -> str:
    """Why a parameter of a module cannot take a sparse form; empty where it can."""
    if type(module) not in CLASSES and (why := why_not_experts(module)):
        return why
    if not isinstance(module._parameters.get(name), nn.Parameter):
        return "its weight is computed by something else (a parametrization)"
    if "forward" in module.__dict__:
        return "its forward is replaced (accelerate does so to move weights); load the model without device_map"
    return ""


def hold_(module: nn.Module, form: Form, name: str = "weight", rounds: bool = False) -> None:
    """Lets a Linear or Conv1D, or a module of experts, hold a parameter in a sparse form; the dense weight is let go.

    `rounds`: float32 weights that are loaded later may be rounded to bfloat16.

    Raises: KernelError where the class is another one or the shape does not fit.
    """
    reason = why_not_module(module, name)
    if reason:
        raise KernelError(f"This module cannot hold its weight in a sparse form: {reason}.")
    weight = module._parameters[name]
    kind = CLASSES.get(type(module)) or sparse_experts(original_of(module))
    transposed = kind.transposed or bool(getattr(module, "is_transposed", False))
    shape = (*form.shape[:-2], form.shape[-1], form.shape[-2]) if transposed else form.shape
    if weight is None or tuple(weight.shape) != shape:
        raise KernelError(
            f"A form of a weight {shape} cannot stand for one of {None if weight is None else tuple(weight.shape)}."
        )
    if not isinstance(module, SparseModule):
        module._order = tuple(module._parameters)  # type: ignore[assignment]
        module.__class__ = kind
        module._held = {}  # type: ignore[assignment]
        module.transposed = transposed  # type: ignore[assignment]
    del module._parameters[name]
    module._dtype, module._trains = weight.dtype, weight.requires_grad  # type: ignore[assignment]
    module._rounds = rounds  # type: ignore[assignment]
    hold_form(module, name, form)  # type: ignore[arg-type]


def release_(module: SparseModule) -> None:
    """Gives a module its dense weights and its class back."""
    for name in buffers_of(module):
        del module._buffers[name]
        module._non_persistent_buffers_set.discard(name)
    held, order, dtype, trains, transposed = (
        module._held,
        module._order,
        module._dtype,
        module._trains,
        module.transposed,
    )
    for name in ("_held", "_order", "_dtype", "_trains", "_rounds", "transposed"):
        del module.__dict__[name]
    module.__class__ = original_of(module)  # type: ignore[assignment]
    while held:
        name, form = held.popitem()
        weight = LazyWeight(form, dtype, transposed).dense()
        del form
        module.register_parameter(name, nn.Parameter(weight, requires_grad=trains))
    others = dict(module._parameters)
    module._parameters.clear()  # in the order of before, by which optimizers number them
    module._parameters.update({name: others.pop(name) for name in order if name in others} | others)


def sparse_modules(model: nn.Module) -> Iterator[tuple[str, SparseModule]]:
    """The modules of a model that hold a sparse form, by name, each once."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SparseModule))


def refuse_sparse(model: nn.Module, doing: str) -> None:
    """Raises ModelError where a model runs on sparse kernels; `doing` says what cannot be done with it."""
    name = next((name for name, _ in sparse_modules(model)), None)
    if name is not None:
        raise ModelError(f"{name} holds its weight for sparse kernels, so the model cannot {doing}; {WAY_BACK}.")
