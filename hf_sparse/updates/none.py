"""No update: kept weights stay as they are."""

from hf_sparse.registry import UPDATES
from hf_sparse.updates import Problem, Solution


@UPDATES.register("none")
def none(problem: Problem) -> Solution:
    """Kept weights keep their values."""
    mask = problem.choose(problem.scores) if problem.mask is None else problem.mask
    return problem.weight, mask
