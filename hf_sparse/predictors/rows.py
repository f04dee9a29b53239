"""The chosen units of the tokens at hand as rows of weights, and products of Linear modules that read those rows only."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from hf_sparse.native import Packed, available, matmul_selected
from hf_sparse.native.gather import gather_dots, gather_sums
from hf_sparse.native.layout import STRIPE_ROWS
from hf_sparse.native.packed import new
from hf_sparse.native.rows import PackedRows
from hf_sparse.runtime import SparseModule
from hf_sparse.runtime.modules import hold_form
from hf_sparse.runtime.row_forms import RowsForm


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


def fill_stripes(rows: torch.Tensor) -> bool:
    """Whether rows are whole stripes of the packed layout, one after another."""
    if len(rows) % STRIPE_ROWS:
        return False
    runs = rows.view(-1, STRIPE_ROWS)
    return bool((runs[:, :1] % STRIPE_ROWS == 0).all() and (runs == runs[:, :1] + torch.arange(STRIPE_ROWS)).all())


def whole(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """What the module gives without predictors."""
    return type(module).forward(module, x)


def is_packed(module: nn.Linear) -> bool:
    return isinstance(module, SparseModule)


def dots(module: nn.Linear, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Outputs of a Linear for the rows (tokens, count) of its weight: (..., count).

    Of a weight on sparse kernels that is not held in rows, the rows `fill_stripes`.
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    weight = _weight(module)
    if isinstance(weight, Packed):
        products = _stripes(flat, weight, rows, module.bias)
    else:
        products = gather_dots(flat, weight, rows, module.bias)
    return products.view(*x.shape[:-1], rows.shape[1])


def _stripes(x: torch.Tensor, packed: Packed, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    stripes = rows[:, ::STRIPE_ROWS] >> 4
    chosen = [None if bias is None else bias[one] for one in rows]
    products = [matmul_selected(x[at : at + 1], packed, stripes[at], chosen[at]) for at in range(len(x))]
    return products[0] if len(products) == 1 else torch.cat(products)


def sums(module: nn.Linear, x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """The product of a Linear with inputs of which only the columns in `rows` are given (..., count).

    Its weight is `transposed`, or `in_rows` so.
    """
    flat = x.reshape(len(rows.indices), -1).contiguous()
    if rows.real is not None:
        flat = flat.masked_fill(~rows.real, 0)
    weight = _weight(module)
    columns = weight if isinstance(weight, PackedRows) else weight.t()  # type: ignore[union-attr]
    out = gather_sums(flat, columns, rows.indices, module.bias)
    return out.view(*x.shape[:-1], out.shape[1])


def _weight(module: nn.Linear) -> torch.Tensor | Packed | PackedRows:
    if not isinstance(module, SparseModule):
        return module.weight
    form = module._held["weight"]
    return form.rows if isinstance(form, RowsForm) else form.packed  # type: ignore[attr-defined]


@contextmanager
def transposed(module: nn.Linear) -> Iterator[None]:
    """Inside, a weight (out, in) lies in memory column after column; its shape and values stay, and it is put back."""
    weight = module.weight
    columns = new(weight.numel(), weight.dtype, available()).view(weight.shape[1], weight.shape[0])
    weight.data = columns.copy_(weight.data.t()).t()
    del columns  # the weight is the only one to hold it
    try:
        yield
    finally:
        weight.data = weight.data.contiguous()


@contextmanager
def in_rows(module: nn.Linear, columns: bool) -> Iterator[None]:
    """Inside, a weight on sparse kernels is held row after row, or column after column; it is put back as it was."""
    sparse: SparseModule = module  # type: ignore[assignment]
    hold_form(sparse, "weight", RowsForm.of(sparse._held["weight"], columns))  # type: ignore[arg-type]
    try:
        yield
    finally:
        hold_form(sparse, "weight", sparse._held["weight"].packed())  # type: ignore[attr-defined]
