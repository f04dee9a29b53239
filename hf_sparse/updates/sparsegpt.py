"""SparseGPT: one sweep over the inputs; what a dropped weight contributed is spread over the inputs still to come.

Frantar and Alistarh, arXiv 2301.00774, sections 3.2 and 3.3.
"""

from collections.abc import Mapping
from math import lcm
from typing import Any

import torch

from hf_sparse.cost import WIDE, Work
from hf_sparse.normal_equations import inverse_factor
from hf_sparse.registry import UPDATES
from hf_sparse.updates import Problem, Solution

_BLOCK = 128  # inputs after which the update of all later ones is caught up


def _piece(problem: Problem, block: int) -> int:
    """How many inputs get their mask at once: whole groups of N:M, one column of the output axis, else a block."""
    if problem.mask is not None or all(part.pattern.group is None for part in problem.parts):
        return block
    return lcm(*(part.pattern.group for part in problem.parts if part.axis == "input" and part.pattern.group))


def cost(rows: int, columns: int, options: Mapping[str, Any]) -> Work:
    """Two Cholesky factors and an inverse (4/3 in^3), catching up (out * in^2), and within a block one pass over its rest for each input."""
    return Work(
        exact=4 / 3 * columns**3, wide=rows * columns**2, moved=4 * WIDE * rows * columns * _BLOCK / 2, calls=12 * columns,
    )  # fmt: skip


@UPDATES.register(
    "sparsegpt",
    source="arXiv 2301.00774, section 3",
    needs=("gram",),
    own_metric="sparsegpt",
    options={"damping": 0.01},
    cost=cost,
)
def sparsegpt(problem: Problem) -> Solution:
    """One sweep that compensates each dropped weight in the inputs behind it; with metric="sparsegpt" it chooses the mask.

    The weights of inputs that were always zero are kept, where the published code zeroes them.
    """
    factor = inverse_factor(problem.statistics["gram"], problem.options["damping"], problem.notes)
    factor = factor.to(problem.target.dtype)
    weight = problem.target.clone()
    mask = torch.ones_like(weight, dtype=torch.bool) if problem.mask is None else problem.mask
    columns, piece = weight.shape[1], _piece(problem, _BLOCK)
    width = max(piece, _BLOCK // piece * piece)
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        part, inner = weight[:, start:stop].clone(), factor[start:stop, start:stop]
        errors = torch.zeros_like(part)
        for column in range(stop - start):
            if problem.mask is None and column % piece == 0:
                some = slice(column, min(column + piece, stop - start))
                saliency = (part[:, some] / inner.diagonal()[some]) ** 2
                mask[:, start + some.start : start + some.stop] = problem.choose_some(saliency, start + column)
            kept = torch.where(mask[:, start + column], part[:, column], 0)
            errors[:, column] = (part[:, column] - kept) / inner[column, column]
            part[:, column:] -= errors[:, column : column + 1] * inner[column, column:]
            part[:, column] = kept
        weight[:, start:stop] = part
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return torch.where(mask, weight, 0), mask
