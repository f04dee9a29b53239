"""The product of an input with a sparse form, with all that a dense product does beside: autocast, tracing, gradients."""

import torch

from hf_sparse.errors import KernelError
from hf_sparse.native.products import refuse_tangent
from hf_sparse.runtime.forms import Form, cuts_gradients
from hf_sparse.runtime.operators import NO_GRADIENT, WAY_BACK, is_traced


def multiply(form: Form, dtype: torch.dtype, input: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """input times the transposed matrix of a form, which stands for a dense one of a dtype, plus the bias."""
    refuse_tangent(input)
    result = result_dtype(form, dtype, input)
    inner = result if result in form.dtypes else form.dtypes[-1]  # autocast to float16: rounded once, at the end
    input = input if input.dtype is inner else input.to(inner)
    bias = bias if bias is None or bias.dtype is inner else bias.to(inner)
    if torch.compiler.is_compiling() or is_traced(input):
        out = form.traced_product(input, bias)
    elif torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad)):
        out = cuts_gradients(form, input, bias, NO_GRADIENT)
    else:
        out = form.product(input, bias)
    return out if out.dtype is result else out.to(result)


def result_dtype(form: Form, dtype: torch.dtype, x: torch.Tensor) -> torch.dtype:
    """The dtype of a product with this input: the weight's own, or what autocast says, as of a dense weight.

    Raises: KernelError for an input that a dense weight would not be multiplied with either.
    """
    autocast = torch.is_autocast_enabled(x.device.type)
    fits = x.is_floating_point() and x.dtype is not torch.float64 if autocast else x.dtype is dtype
    if not fits or x.device != form.device:
        raise KernelError(
            f"These sparse weights take inputs in {dtype} on {form.device}, given is {x.dtype} on {x.device}. "
            f"Convert the input; or {WAY_BACK}."
        )
    return torch.get_autocast_dtype(x.device.type) if autocast else dtype
