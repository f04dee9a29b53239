"""Wanda: magnitude times the norm of the input feature (Sun et al., arXiv 2306.11695, section 3)."""

import torch

from hf_sparse.metrics import Inputs
from hf_sparse.registry import METRICS


@METRICS.register("wanda", source="arXiv 2306.11695, section 3", needs=("norm",))
def wanda(weight: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Absolute value times the norm of the input feature."""
    return weight.abs() * inputs.own["norm"]
