"""Targets from the dense model's own activations: what was lost in the blocks before is made good by the sites behind.

Inputs from the pruned model, targets from the dense one, as in asymmetric calibration (Li et al., GPTAQ, arXiv 2504.02692); the
residual stream's error so far is added to what the sites that write into it shall produce.
"""

from collections.abc import Mapping
from typing import Any

import torch

from hf_sparse.cost import EXACT, Work
from hf_sparse.normal_equations import factor
from hf_sparse.registry import UPDATES
from hf_sparse.updates import Problem, Solution


def cost(rows: int, columns: int, options: Mapping[str, Any]) -> Work:
    """A product with what the inputs have lost, a Cholesky factor and its two triangular solutions."""
    return Work(exact=4 * rows * columns**2 + columns**3 / 3, moved=8 * EXACT * rows * columns, calls=20)


@UPDATES.register(
    "dense_stream",
    source="arXiv 2504.02692, section 4; residual error: this project",
    needs=("gram",),
    options={"inputs": 0.7, "residual": 1.0, "damping": 0.01},
    ranges={"inputs": (0, 1), "residual": (0, 1)},
    second_stream=True,
    sets_target=True,
    cost=cost,
)
def dense_stream(problem: Problem) -> Solution:
    """New targets for the updates behind it: the weights that turn the pruned model's inputs into the dense one's products.

    `inputs` weighs what the inputs have lost (statistic "drift", (x_dense - x)^T x, (in, in)), `residual` what the residual stream has
    lost ("debt", (h_dense - h)^T x, (out, in), only where a site writes into it).
    """
    if not {"drift", "debt"} & set(problem.statistics):
        problem.notes.append("not fitted to the dense stream: its tokens are others there")
        return problem.target, problem.mask
    weight = problem.target.double()
    wanted = torch.zeros_like(weight)
    if "drift" in problem.statistics:
        wanted += problem.options["inputs"] * weight @ problem.statistics["drift"]
    if "debt" in problem.statistics:
        wanted += problem.options["residual"] * problem.statistics["debt"]
    lower = factor(problem.statistics["gram"], problem.options["damping"], problem.notes)
    target = weight + torch.cholesky_solve(wanted.T.contiguous(), lower).T
    return target.to(problem.target.dtype), problem.mask
