"""Tells whether a model or a block still computes the same, but for rounding."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from hf_sparse.calibrate import forward
from hf_sparse.data import Sample
from hf_sparse.forwards import Call, norm
from hf_sparse.observe import Observer, Operand, operand_of
from hf_sparse.sites import Site

_ROUNDINGS = 1000  # sums in another order differ by some roundings, and deep models add those up
_MOST = 0.03  # of the output's norm; a thousand roundings of half precision would let everything pass


def tolerance(model: nn.Module) -> float:
    """The share of an output by which it may change."""
    roundings = {torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()}
    single = torch.finfo(torch.float32).eps  # double-precision models compute their norms in it
    return min(_MOST, _ROUNDINGS * max([single, *roundings]))


def answers(model: nn.Module, row: Sample) -> list[torch.Tensor]:
    """What a model answers: its logits; where it has none, everything that it returns."""
    output = forward(model, row)()
    return _tensors(getattr(output, "logits", None)) or _tensors(output)


@contextmanager
def called_modules() -> Iterator[set[int]]:
    """Inside, the set of the ids of all modules that run."""
    called: set[int] = set()
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, _: called.add(id(module)))
    try:
        yield called
    finally:
        handle.remove()


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def block_answers(model: nn.Module, call: Call, device: str | None, consumers: Sequence[Site]) -> list[torch.Tensor]:
    """What a block returns, and before that the products of the sites whose inputs are reordered.

    The products are compared by themselves, as a block may scale them down to almost nothing.
    """
    seen: dict[Operand, list[torch.Tensor]] = {operand_of(site): [] for site in consumers}

    def look(operand: Operand, x: torch.Tensor, product: torch.Tensor) -> None:
        if operand in seen:
            seen[operand].append(product.detach().clone())

    with Observer(model, consumers, look):
        output = call(device)
    return [*(product for products in seen.values() for product in products), *_tensors(output)]


def same(before: list[torch.Tensor], after: list[torch.Tensor], allowed: float) -> bool:
    """Whether all tensors agree to the allowed share of their norm."""
    return len(before) == len(after) > 0 and all(
        one.shape == other.shape and norm(one - other) <= allowed * norm(one)
        for one, other in zip(before, after, strict=True)
    )
