"""RIA: a weight's share of its row and of its column, times the input norm (Zhang et al., ICLR 2024, section 3)."""

import torch

from hf_sparse.metrics import Inputs
from hf_sparse.registry import METRICS


@METRICS.register(
    "ria",
    source="Plug-and-Play (ICLR 2024), section 3.1",
    needs=("norm",),
    options={"exponent": 0.5},
    unstructured_axis="site",
)
def ria(weight: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Relative importance within row and column, times the input norm to the power `exponent`."""
    size = weight.abs()
    # A row or column of zeros has no shares; its weights score 0 instead of NaN.
    row = size.sum(1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)
    column = size.sum(0, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)
    return (size / row + size / column) * inputs.own["norm"] ** inputs.options["exponent"]
