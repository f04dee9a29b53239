"""Trains the kept weights of one pruned block so that it gives the dense model's hidden states again; masks stay as they are.

Local reconstruction (arXiv 2510.14444): inputs come from the pruned model, targets from the dense one, so the block also makes good
what the blocks before it have lost. Memory: one block in fp32 with a copy, gradients and two moments, and
one batch through it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from hf_sparse import ranks
from hf_sparse.blocks import Block
from hf_sparse.forwards import Call, full_precision, main_tensor, moved
from hf_sparse.sites import Site, parameter_of, view

_FOR_ZEROS = 0.01  # stands for the size of a bias that is all zeros
_FEWEST, _CHECKED = 4, 8  # from four calls on one in eight, and at least one, is kept for checking
Pair = tuple[Call, torch.Tensor]  # a call, and what shall come of it
_SMALL = 1e-3  # of the mean square of all tokens; what is smaller counts as this


def reconstruct_(
    model: nn.Module, block: Block, pruned: Sequence[Site], pairs: Sequence[Pair | None],
    options: Mapping[str, Any], device: str | None, seed: int,
) -> str:  # fmt: skip
    """Train a loaded block in place; returns what went wrong, nothing if it helped.

    `pairs` are calls with what the dense model gives; None stands for one of another process, whose gradients then come from there.
    So many processes take the steps of one, no faster than one.

    Some of the calls are not trained on: on them it is seen whether training helped, or only learned the samples by heart. A run
    that diverges or does not help leaves the block as it was.
    """
    train, check = _split(len(pairs))
    masks = _masks(model, pruned)
    trained = _trained(block.module, masks)
    # A gradient has its parameter's dtype, so the caller's are put aside before that is changed.
    with full_precision(), _only_trained(block.module, trained), _in_single_precision(block.module):
        backup = [parameter.detach().clone() for parameter in trained]
        before = _loss(block, pairs, check, device)
        finite = _train(block, trained, masks, pairs, train, options, device, seed)
        for parameter in trained:
            parameter.grad = None
        after = _loss(block, pairs, check, device) if finite else math.nan
        if after < before:
            return ""
        for parameter, old in zip(trained, backup, strict=True):
            parameter.data.copy_(old)
    why = "did not lower the error" if math.isfinite(after) else "gave no finite loss"
    return f"reconstruction {why}; the block was put back as it was before"


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


@contextmanager
def _only_trained(module: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients for what is trained and for nothing else; the caller's gradients and flags come back."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in module.parameters()]
    wanted = {id(parameter) for parameter in trained}
    try:
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, flag, gradient in before:
            parameter.requires_grad_(flag)
            parameter.grad = gradient


def _masks(model: nn.Module, pruned: Sequence[Site]) -> dict[int, torch.Tensor]:
    """Parameter id -> True where it may change: on the kept weights of pruned sites, and nowhere else in the same tensor."""
    masks: dict[int, torch.Tensor] = {}
    for site in pruned:
        parameter = parameter_of(model, site)
        mask = masks.setdefault(id(parameter), torch.zeros_like(parameter, dtype=torch.bool))
        own = view(mask, site)
        own.copy_(view(parameter.detach(), site) != 0)
    return masks


def _trained(module: nn.Module, masks: Mapping[int, torch.Tensor]) -> list[nn.Parameter]:
    """The pruned sites' parameters where anything is left of them, and the norms and biases of the block."""
    found = []
    for name, parameter in module.named_parameters():
        mask = masks.get(id(parameter))
        vector = parameter.ndim == 1 and "lora_" not in name  # an adapter's are not the model's
        if parameter.is_floating_point() and (bool(mask.any()) if mask is not None else vector):
            found.append(parameter)
    return found


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


def _loss(block: Block, pairs: Sequence[Pair | None], which: list[int], device: str | None) -> float:
    chosen = [pairs[index] for index in which]
    losses = ranks.summed(*(float(_error(_run(block, pair[0], device), pair[1])) if pair else 0.0 for pair in chosen))
    return sum(losses) / len(losses) if losses else math.nan


def _train(
    block: Block, trained: list[nn.Parameter], masks: dict[int, torch.Tensor], pairs: Sequence[Pair | None],
    which: list[int], options: Mapping[str, Any], device: str | None, seed: int,
) -> bool:  # fmt: skip
    """Adam with a cosine to zero; False as soon as a loss is not finite."""
    steps, rate = int(options["steps"]), float(options["learning_rate"])
    groups = [{"params": [p], "lr": rate * _scale(p, masks)} for p in trained]
    optimizer = torch.optim.Adam(groups, lr=rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    order = [which[position] for position in _order(len(which), steps, seed)]
    with torch.enable_grad():
        for number in order:
            optimizer.zero_grad()
            if not _gradients(block, pairs[number], trained, device):
                return False
            for parameter in trained:
                if parameter.grad is not None and id(parameter) in masks:
                    parameter.grad.mul_(masks[id(parameter)])
            optimizer.step()
            schedule.step()
    return True


def _gradients(block: Block, pair: Pair | None, trained: list[nn.Parameter], device: str | None) -> bool:
    """Give the parameters their gradients for one call, on all processes; whether its loss is finite."""
    loss = _error(_run(block, pair[0], device), pair[1]) if pair else torch.zeros(())
    if pair and bool(torch.isfinite(loss)):
        loss.backward()
    # Experts that no token reached have no gradient, which is not the same to Adam as one of zeros.
    told, *reached = ranks.summed(float(loss.detach()), *(float(parameter.grad is not None) for parameter in trained))
    if not math.isfinite(told) or ranks.count() == 1:
        return math.isfinite(told)
    found = [parameter for parameter, number in zip(trained, reached, strict=True) if number]
    for parameter in found:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    ranks.sum_(*(parameter.grad for parameter in found if parameter.grad is not None))
    return True


def _scale(parameter: nn.Parameter, masks: dict[int, torch.Tensor]) -> float:
    """Root mean square of what may change, so that one learning rate suits weights of any size."""
    values = parameter.detach()[masks[id(parameter)]] if id(parameter) in masks else parameter.detach()
    return float(values.square().mean().sqrt()) or _FOR_ZEROS


def _order(number: int, steps: int, seed: int) -> list[int]:
    """Which batch each step takes: every batch once an epoch, in another order each time."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps:
        order += torch.randperm(number, generator=generator).tolist()
    return order[:steps]
