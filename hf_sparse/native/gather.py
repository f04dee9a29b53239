"""Products with some rows of a matrix, dense or packed, chosen for each token; the other rows are not read."""

import torch

from hf_sparse.errors import KernelError
from hf_sparse.native.addresses import address
from hf_sparse.native.binary import kernels
from hf_sparse.native.rows import PackedRows

DTYPES = (torch.bfloat16, torch.float32)


def gather_dots(
    x: torch.Tensor, weight: torch.Tensor | PackedRows, rows: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x (tokens, in) times the rows of a weight (out, in) that `rows` (tokens, count) names for each token: (tokens, count).

    The bias (out) is added. x, weight and bias are bfloat16 or float32 on the CPU, contiguous; rows are int64. Of packed rows only the
    non-zeros are read; they are bfloat16, whatever x is.

    Raises: KernelError for anything else, and for rows that the weight does not have.
    """
    _check(x, weight, rows, bias, x_width=weight.shape[-1], bias_width=weight.shape[0])
    return _gather("gather_dots", x, weight, rows, bias, rows.shape[1])


def gather_sums(
    x: torch.Tensor, weight: torch.Tensor | PackedRows, rows: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The sum of the rows of a weight (in, out) that `rows` (tokens, count) names, each times its number in x: (tokens, out).

    With the transposed weight of a Linear this is its product with an input of which only some columns are not zero. The bias (out) is added.

    Raises: as `gather_dots`.
    """
    _check(x, weight, rows, bias, x_width=rows.shape[-1], bias_width=weight.shape[-1])
    return _gather("gather_sums", x, weight, rows, bias, weight.shape[1])


def _gather(
    name: str,
    x: torch.Tensor,
    weight: torch.Tensor | PackedRows,
    rows: torch.Tensor,
    bias: torch.Tensor | None,
    width: int,
) -> torch.Tensor:
    module = kernels()
    if module is None:
        return _slowly(name, x, weight.unpack() if isinstance(weight, PackedRows) else weight, rows, bias)
    if isinstance(weight, PackedRows):
        masks, starts, values = weight.addresses()
    else:
        masks, starts, values = 0, 0, address(weight)
    out = torch.empty(len(x), width, dtype=x.dtype, device="cpu")
    try:
        getattr(module, name)(
            values, masks, starts, *weight.shape, address(rows), rows.shape[1], len(x), address(x),
            0 if bias is None else address(bias), address(out), x.dtype == torch.float32, torch.get_num_threads(),
        )  # fmt: skip
    except ValueError as error:
        raise KernelError(f"{error}.") from None
    return out


def _slowly(
    name: str, x: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < len(weight):
        raise KernelError(f"Rows from 0 to {len(weight) - 1} can be selected; given are others.")
    chosen = weight[rows].float()  # (tokens, count, columns)
    if name == "gather_dots":
        found = torch.einsum("tk,tnk->tn", x.float(), chosen) + (0 if bias is None else bias[rows].float())
    else:
        found = torch.einsum("tn,tnk->tk", x.float(), chosen) + (0 if bias is None else bias.float())
    return found.to(x.dtype)


def _check(
    x: torch.Tensor, weight: torch.Tensor | PackedRows, rows: torch.Tensor, bias: torch.Tensor | None, x_width: int,
    bias_width: int,
) -> None:  # fmt: skip
    dense = () if isinstance(weight, PackedRows) else (weight,)
    given = (x, rows, *dense) if bias is None else (x, rows, *dense, bias)
    if (
        x.dtype in DTYPES
        and rows.dtype is torch.int64
        and all(tensor.is_cpu and tensor.is_contiguous() for tensor in given)
        and all(tensor.dtype is x.dtype for tensor in dense)
        and len(weight.shape) == rows.dim() == x.dim() == 2
        and x.shape == (rows.shape[0], x_width)
        and (bias is None or (bias.shape == (bias_width,) and bias.dtype is x.dtype))
    ):
        return
    named = {"x": x, "rows": rows} | ({} if isinstance(weight, PackedRows) else {"weight": weight})
    named |= {} if bias is None else {"bias": bias}
    wrong = [name for name, tensor in named.items() if not (tensor.is_cpu and tensor.is_contiguous())]
    told = ", ".join(f"{name} {tensor.dtype} {tuple(tensor.shape)}" for name, tensor in named.items())
    raise KernelError(
        f"Rows are gathered from a contiguous matrix of bfloat16 or float32 on the CPU, with inputs of its dtype and int64 rows for "
        f"each token; given are {told}{', not contiguous or elsewhere: ' + ', '.join(wrong) if wrong else ''}."
    )
