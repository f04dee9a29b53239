"""What is asked of a model or a part of it and concerns the sparse modules inside, which would hear of it too late or not at all."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from hf_sparse.runtime.holding import sparse_modules
from hf_sparse.runtime.modules import moved_dtype


def guard_(model: nn.Module) -> None:
    """Looks first at what all sparse modules say, at whichever module above them a move or `requires_grad_` is asked."""
    for module in _ancestors(model):
        for name, checked in _GUARDS.items():
            module.__dict__.setdefault(
                name, partial(checked, module)
            )  # which can be copied and pickled, unlike a method


def unguard_(model: nn.Module) -> None:
    for module in model.modules():
        for name, checked in _GUARDS.items():
            if getattr(module.__dict__.get(name), "func", None) is checked:
                del module.__dict__[name]


def _ancestors(model: nn.Module) -> list[nn.Module]:
    """The modules that have sparse ones inside."""
    paths = set()
    for path, _ in sparse_modules(model):
        parts = path.split(".") if path else []
        paths |= {".".join(parts[:count]) for count in range(len(parts))}
    return [model.get_submodule(path) for path in paths]


def _checked_apply(model: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """A move that some matrices refuse fails before it has moved the others."""
    for _, module in sparse_modules(model):
        moved_dtype(module, fn)
    return type(model)._apply(model, fn, recurse)


def _remembered_requires_grad(model: nn.Module, requires_grad: bool = True) -> nn.Module:
    """A weight that is not dense is no parameter now, but will be one again."""
    for _, module in sparse_modules(model):
        module._trains = requires_grad
    return type(model).requires_grad_(model, requires_grad)


_GUARDS: dict[str, Callable[..., nn.Module]] = {"_apply": _checked_apply, "requires_grad_": _remembered_requires_grad}
