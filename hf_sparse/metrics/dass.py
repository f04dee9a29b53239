"""DaSS: rows of gate and up count by the norm of the neuron that they produce (arXiv 2405.01943, section 4)."""

import torch

from hf_sparse.metrics import Inputs
from hf_sparse.registry import METRICS


@METRICS.register(
    "dass",
    source="arXiv 2405.01943, section 4",
    consumer_needs=("norm",),
    options={"exponent": 0.5},
    roles=("gate", "up"),
    axis="output",
    unstructured_axis="output",
    otherwise="wanda",
)
def dass(weight: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Magnitude times the norm of the gated neuron to the power `exponent` for gate and up; elsewhere wanda.

    Along the input axis all weights of a group share their neuron, so N:M groups there rank exactly as magnitude does.
    """
    return weight.abs() * (inputs.consumer["norm"] ** inputs.options["exponent"])[:, None]
