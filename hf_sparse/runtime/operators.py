"""The product as an operator of torch, for torch.compile; eager code calls the kernels directly, which costs less."""

import torch

from hf_sparse.errors import KernelError
from hf_sparse.native import Packed, matmul

WAY_BACK = "hf_sparse.use_dense_kernels_(model) gives the dense weights back"
NO_GRADIENT = f"No gradient flows through sparse kernels, so this model cannot be trained as it is; {WAY_BACK}."


def is_traced(x: torch.Tensor) -> bool:
    """Whether the product of this input is recorded or transformed, which takes an operator: the kernels know only memory."""
    return (
        type(x) not in (torch.Tensor, torch.nn.Parameter)
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


@torch.library.custom_op("hf_sparse::packed_linear", mutates_args=(), device_types="cpu")
def packed_linear(
    x: torch.Tensor,
    masks: torch.Tensor,
    offsets: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    columns: int,
) -> torch.Tensor:
    """x times the transposed packed matrix, plus the bias; the buffers are those of a `Packed`."""
    return matmul(x, Packed.of(masks, offsets, values, (rows, columns)), bias)


@packed_linear.register_fake
def _(
    x: torch.Tensor,
    masks: torch.Tensor,
    offsets: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    columns: int,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _refuse(context: object, gradient: torch.Tensor) -> None:
    raise KernelError(f"{NO_GRADIENT} To run it compiled, call it under torch.no_grad().")


packed_linear.register_autograd(_refuse)


@torch.library.custom_op("hf_sparse::packed_dense", mutates_args=(), device_types="cpu")
def packed_dense(
    masks: torch.Tensor, offsets: torch.Tensor, values: torch.Tensor, rows: int, columns: int
) -> torch.Tensor:
    """The dense matrix (out, in) of the buffers of a `Packed`."""
    return Packed.of(masks, offsets, values, (rows, columns)).unpack()


@packed_dense.register_fake
def _(masks: torch.Tensor, offsets: torch.Tensor, values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return values.new_empty((rows, columns))
