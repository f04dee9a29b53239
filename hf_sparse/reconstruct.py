"""Trains the kept weights of one pruned block so that it gives the dense model's hidden states again; masks stay as they are.

Local reconstruction (arXiv 2510.14444): inputs come from the pruned model, targets from the dense one, so the block also makes good
what the blocks before it have lost. Memory: one block in fp32 with two moments, and one batch through it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from hf_sparse.blocks import Block
from hf_sparse.forwards import Call, main_tensor, moved
from hf_sparse.sites import Site, parameter_of, view

_FEWEST, _CHECKED = 4, 8  # from four calls on one in eight, and at least one, is kept for checking
_SMALL = 1e-3  # of the mean square of all tokens; what is smaller counts as this


@dataclass
class Reconstruction:
    """What came of one block: the mean over tokens of the relative squared error, before and after."""

    before: float
    after: float
    note: str = ""


def reconstruct_(
    model: nn.Module, block: Block, pruned: Sequence[Site], calls: Sequence[Call], targets: Sequence[torch.Tensor],
    options: Mapping[str, Any], device: str | None, seed: int,
) -> Reconstruction:  # fmt: skip
    """Train a loaded block in place; a run that diverges or does not help leaves the block as it was.

    Some of the calls are not trained on: on them it is seen whether training helped, or only learned the samples by heart.
    """
    train, check = _split(len(calls))
    with _in_single_precision(block.module):
        masks = _masks(model, pruned)
        trained = _trained(model, block.module, pruned)
        backup = [parameter.detach().clone() for parameter in trained]
        before = _loss(block, calls, targets, check, device)
        finite = _train(block, trained, masks, calls, targets, train, options, device, seed)
        after = _loss(block, calls, targets, check, device) if finite else math.nan
        if not after < before:
            for parameter, old in zip(trained, backup, strict=True):
                parameter.data.copy_(old)
            why = "gave no finite loss" if not math.isfinite(after) else "did not lower the error"
            return Reconstruction(before, before, f"reconstruction {why}; the block was put back as it was before")
    return Reconstruction(before, after)


@contextmanager
def _in_single_precision(module: nn.Module) -> Iterator[None]:
    """The module's parameters and buffers in at least fp32 meanwhile."""
    tensors = [*module.parameters(), *module.buffers()]
    narrow = [(tensor, tensor.dtype) for tensor in tensors if tensor.dtype in (torch.float16, torch.bfloat16)]
    for tensor, _ in narrow:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in narrow:
            tensor.data = tensor.data.to(dtype)


def _masks(model: nn.Module, pruned: Sequence[Site]) -> dict[int, torch.Tensor]:
    """Parameter id -> True where it may change: everywhere but on the zeros of pruned sites."""
    masks: dict[int, torch.Tensor] = {}
    for site in pruned:
        parameter = parameter_of(model, site)
        mask = masks.setdefault(id(parameter), torch.ones_like(parameter, dtype=torch.bool))
        own = view(mask, site)
        own.copy_(view(parameter.detach(), site) != 0)
    return masks


def _trained(model: nn.Module, module: nn.Module, pruned: Sequence[Site]) -> list[nn.Parameter]:
    """The pruned sites' parameters, and the norms and biases of the block."""
    own = {id(parameter_of(model, site)) for site in pruned}
    return [p for p in module.parameters() if p.is_floating_point() and (id(p) in own or p.ndim == 1)]


def _run(block: Block, call: Call, device: str | None) -> torch.Tensor | None:
    def wide(leaf: Any) -> Any:
        half = isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.float16, torch.bfloat16)
        return leaf.float() if half else leaf

    args, kwargs = moved(tree_map(wide, (call.args, call.kwargs)), device)
    return main_tensor(call.run(*args, **kwargs))


def _error(output: torch.Tensor | None, target: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of the squared error relative to the target's square, so that no token with huge values rules."""
    if output is None:
        return torch.zeros(())
    target = target.to(output.device).float()
    squares = target.square().mean(-1)
    return ((output.float() - target).square().mean(-1) / squares.clamp_min(_SMALL * squares.mean())).mean()


def _split(number: int) -> tuple[list[int], list[int]]:
    """Which calls to train on and which to check with: one in eight, at least one; with fewer than four all serve both ends."""
    if number < _FEWEST:
        return list(range(number)), list(range(number))
    step = min(_CHECKED, number)
    check = list(range(step - 1, number, step))
    return [index for index in range(number) if index not in check], check


def _loss(
    block: Block, calls: Sequence[Call], targets: Sequence[torch.Tensor], which: list[int], device: str | None
) -> float:
    losses = [float(_error(_run(block, calls[index], device), targets[index])) for index in which]
    return sum(losses) / len(losses) if losses else math.nan


def _train(
    block: Block, trained: list[nn.Parameter], masks: dict[int, torch.Tensor], calls: Sequence[Call],
    targets: Sequence[torch.Tensor], which: list[int], options: Mapping[str, Any], device: str | None, seed: int,
) -> bool:  # fmt: skip
    """Adam with a cosine to zero; False as soon as a loss is not finite."""
    steps, rate = int(options["steps"]), float(options["learning_rate"])
    wanted = [parameter.requires_grad for parameter in trained]
    groups = [{"params": [p.requires_grad_()], "lr": rate * _scale(p, masks)} for p in trained]
    optimizer = torch.optim.Adam(groups, lr=rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    order = [which[position] for position in _order(len(which), steps, seed)]
    try:
        with torch.enable_grad():
            for number in order:
                loss = _error(_run(block, calls[number], device), targets[number])
                if not bool(torch.isfinite(loss)):
                    return False
                optimizer.zero_grad()
                loss.backward()
                for parameter in trained:
                    if parameter.grad is not None and id(parameter) in masks:
                        parameter.grad.mul_(masks[id(parameter)])
                optimizer.step()
                schedule.step()
    finally:
        for parameter, before in zip(trained, wanted, strict=True):
            parameter.requires_grad_(before)
            parameter.grad = None
    return True


def _scale(parameter: nn.Parameter, masks: dict[int, torch.Tensor]) -> float:
    """Root mean square of what may change, so that one learning rate suits weights of any size."""
    values = parameter.detach()[masks[id(parameter)]] if id(parameter) in masks else parameter.detach()
    return float(values.square().mean().sqrt()) or 1.0


def _order(number: int, steps: int, seed: int) -> list[int]:
    """Which batch each step takes: every batch once an epoch, in another order each time."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps:
        order += torch.randperm(number, generator=generator).tolist()
    return order[:steps]
