"""Sees every matrix product with a site's weight while a block runs, whatever code of the model makes it.

A torch function mode looks at the operands of linear, addmm, matmul and bmm and recognises weights by where they lie in memory.
So a Linear, a Conv1D, one expert's slice of a 3-D parameter and a bare parameter in foreign code are all observed alike, and no
module of the model has to be known by name or replaced.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hf_sparse.sites import Site, parameter_of


class Operand(NamedTuple):
    """A stored weight as it takes part in a product: a parameter, or one expert's slice of it."""

    module: str
    parameter: str
    expert: int | None


def operand_of(site: Site) -> Operand:
    """The operand that the site is (a part of the rows of)."""
    return Operand(site.module, site.parameter, site.expert)


# (operand, input with the contraction dimension last, product) -> what the model shall go on with instead, or None
Seen = Callable[[Operand, torch.Tensor, torch.Tensor], torch.Tensor | None]
Before = Callable[[Operand, torch.Tensor], None]

_EXPERTS = "_experts_implementation_internal"  # the public attribute would set the configs inside too
_LINEAR = {torch.nn.functional.linear, torch._C._nn.linear}  # type: ignore[attr-defined]
_NAMES = ("matmul", "mm", "bmm", "__matmul__")
_PRODUCTS = {getattr(owner, name) for owner in (torch, torch.Tensor) for name in _NAMES if hasattr(owner, name)}
_ADDED = {torch.addmm, torch.Tensor.addmm, torch.baddbmm, torch.Tensor.baddbmm}


class _Stored(NamedTuple):
    start: int
    end: int
    module: str
    parameter: str
    expert_bytes: int | None  # bytes from one expert to the next, or None for a matrix
    experts: int


@contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """Let every expert make its own products meanwhile: grouped kernels would hide them from the observer."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), _EXPERTS)}
    before = {key: getattr(config, _EXPERTS) for key, config in configs.items()}
    try:
        for config in configs.values():
            setattr(config, _EXPERTS, "eager")
        yield
    finally:
        for key, config in configs.items():
            setattr(config, _EXPERTS, before[key])


class Observer(TorchFunctionMode):
    """Context manager; inside it `seen` is called for every product of the block with one of the sites' weights.

    `before` is called with its input just before a product with a matrix (not a stack of experts) is made.
    """

    def __init__(self, model: nn.Module, sites: Iterable[Site], seen: Seen, before: Before | None = None) -> None:
        super().__init__()
        self._seen, self._before = seen, before
        found: dict[int, _Stored] = {}
        for site in sites:
            weight = parameter_of(model, site)
            experts = site.stacked or (weight.shape[0] if site.expert is not None else 1)
            rows_each = weight.shape[0] // experts
            bytes_each = rows_each * weight.stride(0) * weight.element_size() if site.expert is not None else None
            end = weight.data_ptr() + weight.numel() * weight.element_size()
            found[weight.data_ptr()] = _Stored(weight.data_ptr(), end, site.module, site.parameter, bytes_each, experts)
        self._stored = [found[start] for start in sorted(found)]
        self._starts = [stored.start for stored in self._stored]

    def _find(self, tensor: object) -> _Stored | None:
        if not isinstance(tensor, torch.Tensor) or tensor.ndim < 2:
            return None
        address = tensor.data_ptr()
        at = bisect_right(self._starts, address) - 1
        return self._stored[at] if at >= 0 and address < self._stored[at].end else None

    def _report(self, stored: _Stored, weight: torch.Tensor, x: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
        if stored.expert_bytes is None:
            changed = self._seen(Operand(stored.module, stored.parameter, None), x, product)
            return product if changed is None else changed
        if weight.ndim == 2:
            expert = (weight.data_ptr() - stored.start) // stored.expert_bytes
            changed = self._seen(Operand(stored.module, stored.parameter, expert), x, product)
            return product if changed is None else changed
        x = x.expand(*product.shape[:-1], x.shape[-1])  # every expert may be given the same tokens
        first = (weight.data_ptr() - stored.start) // stored.expert_bytes
        for index in range(
            min(stored.experts - first, len(x))
        ):  # all experts, or a run of them, in one batched product
            changed = self._seen(Operand(stored.module, stored.parameter, first + index), x[index], product[index])
            if changed is not None:
                product = product.index_copy(0, torch.tensor([index], device=product.device), changed[None])
        return product

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        factors = _factors(func, args, kwargs or {})
        if factors is None:
            return func(*args, **(kwargs or {}))
        x, weight = factors
        stored = self._find(weight)
        # otherwise the weight may stand on the left: tokens are the columns of the other side
        left = self._find(x) if stored is None and func not in _LINEAR else None
        found = stored or left
        if self._before is not None and found is not None and found.expert_bytes is None:
            self._before(Operand(found.module, found.parameter, None), x if stored else weight.mT)
        result = func(*args, **(kwargs or {}))
        if stored is not None:
            return self._report(stored, weight, x, result)
        if left is not None:
            return self._report(left, x, weight.mT, result.mT).mT
        return result


def _factors(func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any] | None:
    """The two factors of a product, the input first as the call names them; None for any other function."""
    if func in _LINEAR:
        return args[0] if args else named["input"], args[1] if len(args) > 1 else named["weight"]
    if func in _PRODUCTS and len(args) == 2:
        return args[0], args[1]
    if func in _ADDED and len(args) >= 3:
        return args[1], args[2]
    return None
