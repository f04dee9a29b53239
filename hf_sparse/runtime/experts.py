"""Modules that hold all experts of a block in 3-D parameters, on sparse forms: each expert that is hit is one product."""

from typing import Any

import torch
from torch import nn

from hf_sparse.errors import KernelError
from hf_sparse.runtime.modules import SparseModule, original_of
from hf_sparse.runtime.operators import NO_GRADIENT


class SparseExperts(SparseModule):
    """Goes the original class's own way through its experts, one after another: grouped products would need dense weights.

    What that multiplies with are `LazyWeight`s, of which each knows its sparse product.
    """

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # how many tokens an expert gets depends on values
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.training and torch.is_grad_enabled():
            raise KernelError(NO_GRADIENT)
        return self.original.forward.__wrapped__(self, *args, **kwargs)  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        return self._lazy(name) if name in self.__dict__.get("_held", ()) else super().__getattr__(name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (self.original,), self.__dict__  # the class itself is made when it is needed


def why_not_experts(module: nn.Module) -> str:
    """Why a module that is no Linear cannot hold weights in a sparse form; empty for experts that Transformers knows as such."""
    if not hasattr(module, "is_transposed") or not hasattr(original_of(module).forward, "__wrapped__"):
        return f"{type(module).__name__} multiplies in its own way"
    return ""


_made: dict[type[nn.Module], type[SparseExperts]] = {}


def sparse_experts(original: type[nn.Module]) -> type[SparseExperts]:
    """The class that a class of experts becomes, made once."""
    if original not in _made:
        _made[original] = type(f"Sparse{original.__name__}", (SparseExperts, original), {"original": original})
    return _made[original]


def _blank(original: type[nn.Module]) -> nn.Module:
    kind = sparse_experts(original)
    return kind.__new__(kind)
