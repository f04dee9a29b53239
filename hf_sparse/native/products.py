"""Products of inputs with packed weights."""

import torch
from torch.autograd import forward_ad

from hf_sparse.errors import KernelError
from hf_sparse.native import torch_path
from hf_sparse.native.addresses import address, address_of_spaced, overlap
from hf_sparse.native.binary import kernels, why_not
from hf_sparse.native.layout import STRIPE_ROWS
from hf_sparse.native.packed import Arranged, Packed

DTYPES = (torch.bfloat16, torch.float32)


def matmul(
    x: torch.Tensor, packed: Packed, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x (..., in) times the transposed weight, plus the bias, in x's dtype; sums are kept in float32 and rounded once."""
    x = checked_input(x, packed.shape)
    weight = packed.addresses()
    if bias is not None:
        check_bias(bias, x, packed.shape[0])
    if out is None:
        out = x.new_empty((*x.shape[:-1], packed.shape[0]))
    else:
        check_out(out, x, packed.shape[0], (x, bias, packed.masks, packed.offsets, packed.values))
    module = kernels()
    if module is None:
        torch_path.say_slow(why_not())
        return out.copy_(torch_path.linear(x, packed.unpack(), bias))
    module.product(
        *weight, *packed.shape, 0, 0, address(x), x.numel() // packed.shape[1], 0 if bias is None else address(bias),
        address(out), x.dtype is torch.float32, torch.get_num_threads(),
    )  # fmt: skip
    return out


def matmul_selected(
    x: torch.Tensor, packed: Packed, stripes: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Only the outputs of the given stripes (int64 indices of 16 rows each), in their order: (..., 16 * len(stripes)).

    Rows that fill up the last stripe give zeros. `bias` is that of the selected rows (16 * len(stripes)), and is added.
    """
    x = checked_input(x, packed.shape)
    if stripes.dtype != torch.int64 or stripes.dim() != 1 or stripes.device.type != "cpu":
        given = f"{stripes.dtype} on {stripes.device} with shape {tuple(stripes.shape)}"
        raise KernelError(f"Stripes are selected by a 1-D tensor of int64 on the CPU; given is {given}.")
    stripes, weight = stripes.contiguous(), packed.addresses()
    if bias is not None:
        check_bias(bias, x, len(stripes) * STRIPE_ROWS)
    module = kernels()
    if module is None:
        torch_path.say_slow(why_not())
        found = select_slowly(x, packed, stripes)
        return found if bias is None else found + bias
    out = x.new_empty((*x.shape[:-1], len(stripes) * STRIPE_ROWS))
    if out.numel():
        try:
            module.product(
                *weight, *packed.shape, address(stripes), len(stripes), address(x), x.numel() // packed.shape[1],
                0 if bias is None else address(bias), address(out), x.dtype is torch.float32, torch.get_num_threads(),
            )  # fmt: skip
        except ValueError as error:
            raise KernelError(f"{error}.") from None
    return out


def select_slowly(x: torch.Tensor, packed: Packed, stripes: torch.Tensor) -> torch.Tensor:
    count = len(packed.masks)
    if len(stripes) and not 0 <= int(stripes.min()) <= int(stripes.max()) < count:
        raise KernelError(f"Stripes from 0 to {count - 1} can be selected; given are {stripes.tolist()}.")
    weight = torch.zeros(count * STRIPE_ROWS, packed.shape[1], dtype=torch.bfloat16, device="cpu")
    weight[: packed.shape[0]] = packed.unpack()
    return torch_path.linear(x, weight.view(count, STRIPE_ROWS, -1)[stripes].flatten(0, 1), None)


def dense_matmul(
    x: torch.Tensor, arranged: Arranged, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The same product with a dense weight: the control that tells what sparsity itself gains."""
    x = checked_input(x, arranged.shape)
    weight = arranged.address()
    if bias is not None:
        check_bias(bias, x, arranged.shape[0])
    if out is None:
        out = x.new_empty((*x.shape[:-1], arranged.shape[0]))
    else:
        check_out(out, x, arranged.shape[0], (x, bias, arranged.values))
    module = kernels()
    if module is None:
        raise KernelError(f"The dense control is there for comparison with the compiled kernels: {why_not()}")
    module.product(
        0, 0, weight, *arranged.shape, 0, 0, address(x), x.numel() // arranged.shape[1],
        0 if bias is None else address(bias), address(out), x.dtype is torch.float32, torch.get_num_threads(),
    )  # fmt: skip
    return out


def checked_input(x: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The input, contiguous, after its dtype, device and width have been looked at."""
    if x.dtype not in DTYPES or not x.is_cpu or x.dim() == 0 or x.shape[-1] != shape[1]:
        raise KernelError(
            f"Inputs must be bfloat16 or float32 on the CPU with shape (..., {shape[1]}); given is {x.dtype} on {x.device} "
            f"with shape {tuple(x.shape)}. Convert them, or unpack the weight."
        )
    refuse_gradient(x)
    if torch._C._is_tracing() or torch._C._len_torch_dispatch_stack():
        refuse_recording()
    if x.is_contiguous() and not x.is_neg():
        return x
    address_of_spaced(x)
    return x.resolve_neg().contiguous()


def refuse_gradient(tensor: torch.Tensor) -> None:
    """Refuses a tensor that wants a gradient or has a tangent, of which the product would know nothing."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise KernelError(
            "No gradient flows through packed weights. Use torch.no_grad(), or unpack the weight to train."
        )
    refuse_tangent(tensor)


def refuse_tangent(tensor: torch.Tensor) -> None:
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        raise KernelError("No tangent flows through packed weights. Unpack the weight for forward differentiation.")


def refuse_recording() -> None:
    """Refuses a product that a recording would hold as a constant; modules on sparse kernels use an operator there."""
    modes = range(torch._C._len_torch_dispatch_stack())
    proxies = any("Proxy" in type(torch._C._get_dispatch_stack_at(index)).__name__ for index in modes)
    if proxies or torch._C._is_tracing():
        raise KernelError("This product cannot be traced. Trace a model after hf_sparse.use_sparse_kernels_(model).")


def check_bias(bias: torch.Tensor, x: torch.Tensor, rows: int) -> None:
    if bias.dtype is not x.dtype or bias.shape != (rows,) or not bias.is_cpu or not bias.is_contiguous():
        raise KernelError(
            f"The bias must be {x.dtype} on the CPU, contiguous, with shape ({rows},); given is {bias.dtype} on "
            f"{bias.device} with shape {tuple(bias.shape)}."
        )
    refuse_gradient(bias)


def check_out(out: torch.Tensor, x: torch.Tensor, rows: int, read: tuple[torch.Tensor | None, ...]) -> None:
    """Refuses an output that does not fit, or that lies where something is read."""
    wanted = (*x.shape[:-1], rows)
    fits = out.shape == wanted and out.dtype is x.dtype and out.is_cpu and out.is_contiguous()
    if not fits or any(part is not None and overlap(out, part) for part in read):
        raise KernelError(
            f"out must be {x.dtype} on the CPU, contiguous, with shape {wanted}, and share no memory with the input, the weight "
            f"and the bias; given is {out.dtype} on {out.device} with shape {tuple(out.shape)}."
        )
    refuse_gradient(out)
