"""The chosen units of the tokens at hand as rows of weights, and products of Linear modules that read those rows only."""

from collections.abc import Callable
from functools import partial
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


def counted_from(chosen: torch.Tensor, starts: list[int]) -> torch.Tensor:
    """What is chosen (tokens, count), counted from each of some places: (tokens, count * places)."""
    return chosen if starts == [0] else torch.cat([chosen + start for start in starts], 1)


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
    """Outputs of a Linear for the rows (tokens, count) of its weight, which is dense or held in rows: (..., count)."""
    flat = x.view(1, -1) if len(rows) == 1 else x.reshape(len(rows), -1).contiguous()
    products = gather_dots(flat, _rows_of(module), rows, module.bias)
    return products.view(*x.shape[:-1], rows.shape[1])


def stripes_of(rows: torch.Tensor) -> torch.Tensor:
    """Rows that `fill_stripes`, as numbers of stripes: (tokens, count / 16)."""
    return rows[:, ::STRIPE_ROWS] // STRIPE_ROWS


def stripe_dots(module: nn.Linear, x: torch.Tensor, stripes: torch.Tensor) -> torch.Tensor:
    """Outputs of a Linear on sparse kernels for the stripes (tokens, count) of its weight: (..., count * 16)."""
    packed: Packed = module._held["weight"].packed  # type: ignore[union-attr, index]
    if len(stripes) == 1:
        return matmul_selected(x, packed, stripes[0], _bias(module, stripes[0]))
    flat = x.reshape(len(stripes), -1)
    products = [matmul_selected(one, packed, chosen, _bias(module, chosen)) for one, chosen in zip(flat, stripes)]
    return torch.stack(products).view(*x.shape[:-1], -1)


def _bias(module: nn.Linear, stripes: torch.Tensor) -> torch.Tensor | None:
    bias = module.bias
    return None if bias is None else bias.view(-1, STRIPE_ROWS)[stripes].view(-1)


def sums(module: nn.Linear, x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """The product of a Linear with inputs of which only the columns in `rows` are given (..., count).

    Its weight is laid by columns, or held so.
    """
    flat = x.reshape(len(rows.indices), -1)
    flat = flat if flat.is_contiguous() else flat.contiguous()
    if rows.real is not None:
        flat = flat.masked_fill(~rows.real, 0)
    columns = _rows_of(module)
    columns = columns.t() if isinstance(columns, torch.Tensor) else columns
    out = gather_sums(flat, columns, rows.indices, module.bias)
    return out.view(*x.shape[:-1], out.shape[1])


def _rows_of(module: nn.Linear) -> torch.Tensor | PackedRows:
    return module._held["weight"].rows if isinstance(module, SparseModule) else module.weight  # type: ignore[attr-defined, no-any-return]


def lay_by_columns(module: nn.Linear) -> Callable[[], None]:
    """Let a weight (out, in) lie in memory column after column; its shape and values stay. Calling what is returned puts it back."""
    weight = module.weight
    columns = new(weight.numel(), weight.dtype, available()).view(weight.shape[1], weight.shape[0])
    weight.data = columns.copy_(weight.data.t()).t()
    return partial(_lay_by_rows, weight)


def _lay_by_rows(weight: torch.Tensor) -> None:
    weight.data = weight.data.contiguous()


def hold_in_rows(module: nn.Linear, columns: bool) -> Callable[[], None]:
    """Hold a weight on sparse kernels row after row, or column after column. Calling what is returned puts it back as it was."""
    sparse: SparseModule = module  # type: ignore[assignment]
    hold_form(sparse, "weight", RowsForm.of(sparse._held["weight"], columns))  # type: ignore[arg-type]
    return partial(_hold_packed, sparse)


def _hold_packed(module: SparseModule) -> None:
    hold_form(module, "weight", module._held["weight"].packed())  # type: ignore[attr-defined]
