"""Products of inputs with packed weights."""

import torch

from hf_sparse.errors import KernelError
from hf_sparse.native import torch_path
from hf_sparse.native.binary import kernels, why_not
from hf_sparse.native.layout import STRIPE_ROWS
from hf_sparse.native.packed import Arranged, Packed

DTYPES = (torch.bfloat16, torch.float32)


def matmul(
    x: torch.Tensor, packed: Packed, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x (..., in) times the transposed weight, plus the bias, in x's dtype; sums are kept in float32 and rounded once."""
    x, out = prepared(x, packed.shape, bias, out)
    module = kernels()
    if module is None:
        torch_path.say_slow(why_not())
        return out.copy_(torch_path.linear(x, packed.unpack(), bias))
    module.product(
        packed.masks.data_ptr(), packed.offsets.data_ptr(), packed.values.data_ptr(), *packed.shape, 0, 0,
        x.data_ptr(), x.numel() // packed.shape[1], 0 if bias is None else bias.data_ptr(), out.data_ptr(),
        x.dtype == torch.float32, torch.get_num_threads(),
    )  # fmt: skip
    return out


def matmul_selected(x: torch.Tensor, packed: Packed, stripes: torch.Tensor) -> torch.Tensor:
    """Only the outputs of the given stripes (int64 indices of 16 rows each), in their order: (..., 16 * len(stripes)).

    Rows that fill up the last stripe give zeros.
    """
    x = checked_input(x, packed.shape)
    if stripes.dtype != torch.int64 or stripes.dim() != 1 or stripes.device.type != "cpu":
        given = f"{stripes.dtype} on {stripes.device} with shape {tuple(stripes.shape)}"
        raise KernelError(f"Stripes are selected by a 1-D tensor of int64 on the CPU; given is {given}.")
    stripes = stripes.contiguous()
    module = kernels()
    if module is None:
        torch_path.say_slow(why_not())
        return select_slowly(x, packed, stripes)
    out = x.new_empty(*x.shape[:-1], len(stripes) * STRIPE_ROWS)
    if out.numel():
        try:
            module.product(
                packed.masks.data_ptr(), packed.offsets.data_ptr(), packed.values.data_ptr(), *packed.shape,
                stripes.data_ptr(), len(stripes), x.data_ptr(), x.numel() // packed.shape[1], 0, out.data_ptr(),
                x.dtype == torch.float32, torch.get_num_threads(),
            )  # fmt: skip
        except ValueError as error:
            raise KernelError(f"{error}.") from None
    return out


def select_slowly(x: torch.Tensor, packed: Packed, stripes: torch.Tensor) -> torch.Tensor:
    count = len(packed.masks)
    if len(stripes) and not 0 <= int(stripes.min()) <= int(stripes.max()) < count:
        raise KernelError(f"Stripes from 0 to {count - 1} can be selected; given are {stripes.tolist()}.")
    weight = torch.zeros(count * STRIPE_ROWS, packed.shape[1], dtype=torch.bfloat16)
    weight[: packed.shape[0]] = packed.unpack()
    return torch_path.linear(x, weight.view(count, STRIPE_ROWS, -1)[stripes].flatten(0, 1), None)


def dense_matmul(
    x: torch.Tensor, arranged: Arranged, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The same product with a dense weight: the control that tells what sparsity itself gains."""
    x, out = prepared(x, arranged.shape, bias, out)
    module = kernels()
    if module is None:
        raise KernelError(f"The dense control is there for comparison with the compiled kernels: {why_not()}")
    module.product(
        0, 0, arranged.values.data_ptr(), *arranged.shape, 0, 0, x.data_ptr(), x.numel() // arranged.shape[1],
        0 if bias is None else bias.data_ptr(), out.data_ptr(), x.dtype == torch.float32, torch.get_num_threads(),
    )  # fmt: skip
    return out


def checked_input(x: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The input, contiguous, after its dtype, device and width have been looked at."""
    if x.dtype not in DTYPES or x.device.type != "cpu" or x.dim() == 0 or x.shape[-1] != shape[1]:
        raise KernelError(
            f"Inputs must be bfloat16 or float32 on the CPU with shape (..., {shape[1]}); given is {x.dtype} on {x.device} "
            f"with shape {tuple(x.shape)}. Convert them, or unpack the weight."
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise KernelError(
            "No gradient flows through packed weights. Use torch.no_grad(), or unpack the weight to train."
        )
    return x.contiguous()


def prepared(
    x: torch.Tensor, shape: tuple[int, int], bias: torch.Tensor | None, out: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    x = checked_input(x, shape)
    if bias is not None and (
        bias.shape != shape[:1] or bias.dtype != x.dtype or bias.device != x.device or not bias.is_contiguous()
    ):
        raise KernelError(
            f"The bias must be {x.dtype} on the CPU, contiguous, with shape ({shape[0]},); given is {bias.dtype} on "
            f"{bias.device} with shape {tuple(bias.shape)}."
        )
    wanted = (*x.shape[:-1], shape[0])
    if out is None:
        return x, torch.empty(wanted, dtype=x.dtype)
    if (
        out.shape != wanted
        or out.dtype != x.dtype
        or out.device != x.device
        or not out.is_contiguous()
        or overlaps(x, out)
    ):
        raise KernelError(
            f"out must be {x.dtype} on the CPU, contiguous, with shape {wanted}, and share no memory with the input; given is "
            f"{out.dtype} on {out.device} with shape {tuple(out.shape)}."
        )
    return x, out


def overlaps(first: torch.Tensor, second: torch.Tensor) -> bool:
    starts, ends = (first.data_ptr(), second.data_ptr()), (first.nbytes, second.nbytes)
    return starts[0] < starts[1] + ends[1] and starts[1] < starts[0] + ends[0]
