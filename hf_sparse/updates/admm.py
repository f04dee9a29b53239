"""ADMM: weights and mask are chosen together, by a penalty that grows while the mask settles.

Meng et al. (ALPS), arXiv 2406.07831, sections 3.1 to 3.3, and Boza, arXiv 2401.02938.
"""

import torch

from hf_sparse.normal_equations import damped, eigen
from hf_sparse.registry import UPDATES
from hf_sparse.updates import Problem, Solution
from hf_sparse.updates.least_squares import solve

_CHECK = 3  # iterations between two looks at how far the mask has settled
_LEAST = 10  # iterations


def _growth(changed: int, kept: int) -> float:
    """How fast the penalty grows: fast while the mask still moves much."""
    return 1.3 if changed > 0.1 * kept else 1.2 if changed > 0.005 * kept else 1.1


@UPDATES.register(
    "admm",
    source="arXiv 2406.07831, section 3",
    needs=("gram",),
    options={"mask": "choose", "penalty": 0.1, "iterations": 300, "damping": 0.01, "final_iterations": 20},
    choices={"mask": ("choose", "given")},
)
def admm(problem: Problem) -> Solution:
    """Weights and mask together by ADMM with a growing penalty, then least squares; option mask="given" keeps the metric's.

    The problem is scaled so that every input has norm one; there the largest weights are kept, which is Wanda's criterion.
    """
    hessian = damped(problem.statistics["gram"], problem.options["damping"])
    scale = hessian.diagonal().sqrt()
    values, vectors = (
        found.to(problem.target.dtype) for found in eigen(hessian / scale / scale[:, None], 0.0, problem.notes)
    )
    scale = scale.to(problem.target.dtype)
    goal = problem.target * scale
    mask = problem.choose(problem.scores) if problem.mask is None else problem.mask
    start = torch.where(mask, problem.weight * scale, 0)
    if problem.options["mask"] == "choose":
        start, mask = _settled(problem, goal, mask, values, vectors)
    unit = (vectors * values) @ vectors.T
    return solve(goal, start, mask, unit, problem.options["final_iterations"]) / scale, mask


def _settled(
    problem: Problem, goal: torch.Tensor, mask: torch.Tensor, values: torch.Tensor, vectors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights and the mask on which ADMM settles."""
    penalty = float(problem.options["penalty"])
    image = (goal @ vectors * values) @ vectors.T
    sparse, dual = torch.where(mask, goal, 0), torch.zeros_like(goal)
    inverse = (vectors / (values + penalty)) @ vectors.T
    kept = int(mask.sum())
    checked = mask
    for iteration in range(int(problem.options["iterations"])):
        free = torch.add(image, sparse - dual, alpha=penalty) @ inverse
        wanted = free.add_(dual)
        mask = problem.choose(wanted.abs())
        sparse = wanted * mask
        dual = wanted - sparse
        if iteration % _CHECK == _CHECK - 1:
            changed = int((mask ^ checked).sum()) // 2
            if changed == 0 and iteration > _LEAST:
                break
            factor = _growth(changed, kept)
            penalty, dual = penalty * factor, dual / factor
            inverse = (vectors / (values + penalty)) @ vectors.T
            checked = mask
    return sparse, mask
