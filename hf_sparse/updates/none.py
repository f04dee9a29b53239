"""No update: kept weights stay as they are."""

from collections.abc import Mapping
from typing import Any

from hf_sparse.cost import Work
from hf_sparse.registry import UPDATES
from hf_sparse.updates import Problem, Solution


def cost(rows: int, columns: int, options: Mapping[str, Any]) -> Work:
    """Nothing beside the mask."""
    return Work()


@UPDATES.register("none", cost=cost)
def none(problem: Problem) -> Solution:
    """Kept weights keep their values."""
    mask = problem.choose(problem.scores) if problem.mask is None else problem.mask
    return problem.weight, mask
