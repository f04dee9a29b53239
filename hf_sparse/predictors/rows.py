"""The chosen units of the tokens at hand as rows of weights, and products of Linear modules that read those rows only."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from hf_sparse.native import available
from hf_sparse.native.gather import gather_dots, gather_sums
from hf_sparse.native.packed import new


class Rows(NamedTuple):
    """Indices of the chosen units, in ascending order, as many for each token."""

    indices: torch.Tensor  # (tokens, count), int64
    real: (
        torch.Tensor | None
    )  # (tokens, count), False where a token has fewer than another; None where all have as many


def rows_of_mask(mask: torch.Tensor) -> Rows:
    """The places at which a mask (tokens, units) is True."""
    if len(mask) == 1:
        return Rows(mask[0].nonzero().view(1, -1), None)
    counts = mask.sum(-1)
    most = int(counts.max())
    if int(counts.min()) == most:
        return Rows(mask.nonzero()[:, 1].reshape(len(mask), most), None)
    indices = (~mask).to(torch.uint8).argsort(stable=True, dim=-1)[:, :most].contiguous()
    return Rows(indices, mask.gather(1, indices))


def in_runs(rows: Rows, size: int) -> Rows:
    """Units of `size` neighbouring channels each, as their channels."""
    channels = (rows.indices.unsqueeze(-1) * size + torch.arange(size)).flatten(1)
    return Rows(channels, None if rows.real is None else rows.real.repeat_interleave(size, -1))


def dots(module: nn.Linear, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Outputs of a Linear for the rows (tokens, count) of its weight: (..., count)."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    return gather_dots(flat, module.weight, rows, module.bias).view(*x.shape[:-1], rows.shape[1])


def sums(module: nn.Linear, x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """The product of a Linear whose weight is `transposed` with inputs of which only the columns in `rows` are given (..., count)."""
    flat = x.reshape(len(rows.indices), -1).contiguous()
    if rows.real is not None:
        flat = flat.masked_fill(~rows.real, 0)
    out = gather_sums(flat, module.weight.t(), rows.indices, module.bias)
    return out.view(*x.shape[:-1], out.shape[1])


@contextmanager
def transposed(weight: torch.Tensor) -> Iterator[None]:
    """Inside, a weight (out, in) lies in memory column after column; its shape and values stay, and it is put back."""
    columns = new(weight.numel(), weight.dtype, available()).view(weight.shape[1], weight.shape[0])
    weight.data = columns.copy_(weight.data.t()).t()
    del columns  # the weight is the only one to hold it
    try:
        yield
    finally:
        weight.data = weight.data.contiguous()
