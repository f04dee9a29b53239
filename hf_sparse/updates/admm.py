"""ADMM: weights and mask are chosen together, by a penalty that grows while the mask settles.

Meng et al. (ALPS), arXiv 2406.07831, sections 3.1 to 3.3, and Boza, arXiv 2401.02938.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from hf_sparse.cost import WIDE, Work
from hf_sparse.normal_equations import damped, eigen, factor
from hf_sparse.registry import UPDATES
from hf_sparse.updates import Problem, Solution
from hf_sparse.updates.least_squares import cost as least_squares_cost
from hf_sparse.updates.least_squares import solve

_CHECK = 3  # iterations between two looks at how far the mask has settled
_LEAST = 10  # iterations
_USUAL = 60  # iterations until a mask has settled
_EIGEN_UPTO, _RARER = 1024, 3  # inputs; how much more rarely the penalty grows beyond


def _growth(changed: int, kept: int) -> float:
    """How fast the penalty grows: fast while the mask still moves much."""
    return 1.3 if changed > 0.1 * kept else 1.2 if changed > 0.005 * kept else 1.1


def cost(rows: int, columns: int, options: Mapping[str, Any]) -> Work:
    """Iterations until the mask settles, each a product, a choice of the mask and some passes, with an inverse for each penalty; then least
    squares. How many there are shows in the first weights that are pruned, and is taken to be the same for others.
    """
    final = least_squares_cost(rows, columns, {"iterations": options["final_iterations"]})
    if options["mask"] != "choose":
        return final
    number = min(int(options["iterations"]), _USUAL)
    work = Work(
        wide=2 * rows * columns**2 * (number + 1),
        moved=20 * WIDE * rows * columns * number,
        weighed=rows * columns * number,
    )
    penalties = number / _CHECK
    if columns > _EIGEN_UPTO:
        return final + work + Work(exact=columns**3 * penalties / _RARER)
    return final + work + Work(exact=9 * columns**3, wide=2 * columns**3 * penalties)


@UPDATES.register(
    "admm",
    source="arXiv 2406.07831, section 3",
    needs=("gram",),
    options={"mask": "choose", "penalty": 0.1, "iterations": 300, "damping": 0.01, "final_iterations": 20},
    choices={"mask": ("choose", "given")},
    cost=cost,
)
def admm(problem: Problem) -> Solution:
    """Weights and mask together by ADMM with a growing penalty, then least squares; option mask="given" keeps the metric's.

    The problem is scaled so that every input has norm one; there the largest weights are kept, which is Wanda's criterion.
    """
    hessian = damped(problem.statistics["gram"], problem.options["damping"])
    scale = hessian.diagonal().sqrt()
    unit = hessian / scale / scale[:, None]
    scale = scale.to(problem.target.dtype)
    goal = problem.target * scale
    mask = problem.choose(problem.scores) if problem.mask is None else problem.mask
    start = torch.where(mask, problem.weight * scale, 0)
    if problem.options["mask"] == "choose":
        start, mask = _settled(problem, goal, mask, unit)
    return solve(goal, start, mask, unit.to(goal.dtype), problem.options["final_iterations"]) / scale, mask


def _inverses(unit: torch.Tensor, dtype: torch.dtype, notes: list[str]) -> Callable[[float], torch.Tensor]:
    """A function that gives (unit + penalty)^-1 for any penalty.

    One eigendecomposition serves all penalties; for many inputs it takes far longer than a few Cholesky factorisations.
    """
    if len(unit) > _EIGEN_UPTO:
        eye = torch.eye(len(unit), dtype=unit.dtype, device=unit.device)
        return lambda penalty: torch.cholesky_inverse(factor(unit + penalty * eye, 0.0, notes)).to(dtype)
    values, vectors = (found.to(dtype) for found in eigen(unit, 0.0, notes))
    return lambda penalty: (vectors / (values + penalty)) @ vectors.T


def _settled(
    problem: Problem, goal: torch.Tensor, mask: torch.Tensor, unit: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights and the mask on which ADMM settles."""
    penalty = float(problem.options["penalty"])
    inverse_of = _inverses(unit, goal.dtype, problem.notes)
    image = goal @ unit.to(goal.dtype)
    sparse, dual = torch.where(mask, goal, 0), torch.zeros_like(goal)
    inverse = inverse_of(penalty)
    # Where each penalty costs a factorisation, it grows more rarely and in larger steps.
    rarer = _RARER if len(unit) > _EIGEN_UPTO else 1
    kept = int(mask.sum())
    checked = mask
    for iteration in range(int(problem.options["iterations"])):
        free = torch.add(image, sparse - dual, alpha=penalty) @ inverse
        wanted = free.add_(dual)
        mask = problem.choose(wanted.abs())
        sparse = wanted * mask
        dual = wanted - sparse
        if (iteration + 1) % (_CHECK * rarer) == 0:
            changed = int((mask ^ checked).sum()) // 2
            if changed == 0 and iteration > _LEAST:
                break
            growth = _growth(changed, kept) ** rarer
            penalty, dual = penalty * growth, dual / growth
            inverse = inverse_of(penalty)
            checked = mask
    return sparse, mask
