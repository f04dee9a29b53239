"""Magnitude: the absolute value, no data needed (Han et al., arXiv 1506.02626, section 3)."""

import torch

from hf_sparse.metrics import Inputs
from hf_sparse.registry import METRICS


@METRICS.register("magnitude", source="arXiv 1506.02626, section 3", unstructured_axis="site")
def magnitude(weight: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Absolute value of the weight; needs no calibration."""
    return weight.abs()
