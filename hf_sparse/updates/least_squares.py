"""The least squares solution for a given mask, all rows at once, by preconditioned conjugate gradients.

As the last step of ALPS (Meng et al., arXiv 2406.07831, section 3.3).
"""

from collections.abc import Mapping
from typing import Any

import torch

from hf_sparse.cost import WIDE, Work
from hf_sparse.normal_equations import damped
from hf_sparse.registry import UPDATES
from hf_sparse.updates import Problem, Solution

_CONVERGED = 1e-12  # of the squared residual


def solve(
    target: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor, hessian: torch.Tensor, iterations: int
) -> torch.Tensor:
    """Kept weights that minimise (W - target) H (W - target)^T row by row, starting from `weight`; all (out, in), H (in, in).

    The preconditioner is the diagonal of H, so H must have no zero there.
    """
    solution = torch.where(mask, weight, 0)
    scale = 1 / hessian.diagonal()
    residual = torch.where(mask, (target - solution) @ hessian, 0)
    goal = _CONVERGED * (target @ hessian * target).sum().clamp_min(0)
    step = direction = residual * scale
    product = (residual * step).sum(1, keepdim=True)
    for _ in range(iterations):
        if bool(product.sum() <= goal):
            break
        image = torch.where(mask, direction @ hessian, 0)
        curvature = (direction * image).sum(1, keepdim=True)
        length = torch.where(curvature > 0, product / curvature, 0)
        solution = solution + length * direction
        residual = residual - length * image
        step = residual * scale
        before, product = product, (residual * step).sum(1, keepdim=True)
        direction = step + torch.where(before > 0, product / before, 0) * direction
    return solution


def cost(rows: int, columns: int, options: Mapping[str, Any]) -> Work:
    """One product with the matrix and a dozen passes over the weights for each iteration, and three products before the first."""
    number = int(options["iterations"])
    return Work(wide=2 * rows * columns**2 * (number + 3), moved=36 * WIDE * rows * columns * number, calls=20 * number)


@UPDATES.register(
    "least_squares",
    source="arXiv 2406.07831, section 3.3",
    needs=("gram",),
    options={"iterations": 20, "damping": 0.01},
    cost=cost,
)
def least_squares(problem: Problem) -> Solution:
    """The best values for a given mask: masked least squares by preconditioned conjugate gradients."""
    mask = problem.choose(problem.scores) if problem.mask is None else problem.mask
    hessian = damped(problem.statistics["gram"], problem.options["damping"]).to(problem.target.dtype)
    return solve(problem.target, problem.weight, mask, hessian, problem.options["iterations"]), mask
