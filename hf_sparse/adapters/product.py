"""The weight and the product of a layer whose adapter changes only what the base weight keeps.

The adapter's update is `scaling * left @ right`, in the layout in which the base weight is stored: left B and right A for a
Linear, their transposes for a Conv1D, one pair per expert for a 3-D parameter. What the base weight drops stays zero.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Sums of weights are formed in the precision in which they are stored, as a merge would, also under autocast."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def for_autocast(x: torch.Tensor) -> torch.Tensor:
    """The input in the dtype in which autocast would multiply it."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x


def low_rank(left: torch.Tensor, right: torch.Tensor, scaling: float) -> torch.Tensor:
    """`scaling * left @ right` (..., rows, columns), in single precision at least: it is added before it is rounded."""
    wide = torch.promote_types(left.dtype, torch.float32)
    with without_autocast(left.device):
        return (left.to(wide) * scaling) @ right.to(wide)


def changed(weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Their sum, in the wider of the two precisions; may reuse the memory of `delta`."""
    wide = torch.promote_types(weight.dtype, delta.dtype)
    return delta.add_(weight) if delta.dtype == wide else weight + delta


class MaskedProduct(torch.autograd.Function):
    """`x @ (weight + mask * scaling * left @ right).T + bias`, as one product; the mask is `weight != 0`.

    Neither the mask nor the sum is kept until the backward pass, which forms them again from the factors: that takes a few
    passes over the weight, while keeping them would take the memory of a second model.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling: float,
        bias: torch.Tensor | None, transposed: bool,
    ) -> torch.Tensor:  # fmt: skip
        """x: (..., in); weight: (out, in), or (in, out) if transposed; left, right: factors in the same layout."""
        ctx.save_for_backward(x, weight, left, right)
        ctx.scaling, ctx.transposed = scaling, transposed
        return F.linear(x, _sum(ctx, x, weight, left, right), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, left and right; of weight and bias only where they are trained."""
        x, weight, left, right = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        of_x = of_weight = of_left = of_right = of_bias = None
        with without_autocast(x.device):
            flat, rows = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
            if wanted[0]:
                of_x = gradient @ _sum(ctx, x, weight, left, right)
            if wanted[1] or wanted[2] or wanted[3]:
                of_weight = rows.T @ flat if ctx.transposed else flat.T @ rows
                of_sum = of_weight.to(torch.promote_types(left.dtype, torch.float32)) * weight.bool()
                of_left = (of_sum @ (right.T.to(of_sum.dtype) * ctx.scaling)).to(left.dtype)
                of_right = ((left.T.to(of_sum.dtype) * ctx.scaling) @ of_sum).to(right.dtype)
            if wanted[5]:
                of_bias = flat.sum(0)
        return of_x, of_weight if wanted[1] else None, of_left, of_right, None, of_bias, None


def _sum(
    ctx: Any, x: torch.Tensor, weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:  # (out, in)
    delta = low_rank(left, right, ctx.scaling).mul_(weight.bool())
    # first to the precision of the weight, as a merge rounds it
    total = changed(weight, delta).to(weight.dtype).to(x.dtype)
    return total.T if ctx.transposed else total
