"""Optimal brain surgeon's saliency (Frantar and Alistarh, arXiv 2301.00774, section 3.1)."""

import torch

from hf_sparse.cost import Work
from hf_sparse.metrics import Inputs
from hf_sparse.normal_equations import factor
from hf_sparse.registry import METRICS


def cost(columns: int) -> Work:
    """A Cholesky factor and the inverse."""
    return Work(exact=columns**3, calls=20)


@METRICS.register(
    "sparsegpt",
    source="arXiv 2301.00774, section 3",
    needs=("gram",),
    unstructured_axis="site",
    options={"damping": 0.01},
    cost=cost,
)
def sparsegpt(weight: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Squared weight over its entry of the inverse Hessian; with update="sparsegpt" chosen inside the sweep instead.

    This is the error of dropping one weight when all others of its row may compensate.
    """
    inverse = torch.cholesky_inverse(factor(inputs.own["gram"], float(inputs.options["damping"]), []))
    return weight.square() / inverse.diagonal().to(weight.dtype)
