"""DSnoT: kept and dropped weights change places until the mean of each output is nearly the dense one's; none gets a new value.

Zhang et al., arXiv 2310.08915, section 3.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from hf_sparse.cost import WIDE, Work
from hf_sparse.registry import UPDATES
from hf_sparse.updates import Part, Problem, Solution

_NEIGHBOURS = 16  # rows among which the weights of a column change places where the pattern has no groups
_LEAST = 1e-6  # of the largest variance: an input that never varies would be infinitely attractive


@dataclass(frozen=True)
class _State:
    """The weights of a part, (units, sets, members): in a cycle each unit swaps two members of one of its sets.

    Along the input a unit is a row, and all members share its error. Along the output it is a few rows, and a set is what they have
    of one column: each member has an error of its own. Swaps within a set keep every pattern.
    """

    mean: torch.Tensor  # a weight's share in the mean of its row's output
    spread: torch.Tensor  # what dropping it adds to the variance of the row's error, were inputs uncorrelated
    appeal: torch.Tensor  # the largest with the sign of the error comes back first
    kept: torch.Tensor
    open: torch.Tensor  # dropped, and not yet tried in vain
    error: torch.Tensor  # of the row's mean output, (units, 1) or (units, members)
    enough: torch.Tensor  # the error at which a row is done


def cost(rows: int, columns: int, options: Mapping[str, Any]) -> Work:
    """Cycles, each with some passes over all weights to find the pair that changes places."""
    number = int(options["cycles"])
    return Work(moved=20 * WIDE * rows * columns * number, weighed=rows * columns, calls=40 * number)


@UPDATES.register(
    "dsnot",
    source="arXiv 2310.08915, section 3",
    needs=("moments",),
    options={"cycles": 50, "threshold": 0.1, "variance_power": 1.0},
    cost=cost,
)
def dsnot(problem: Problem) -> Solution:
    """Swaps kept for dropped weights so that each output's mean comes closer to the dense one's; no weight gets a new value.

    As published, the dropped weight with the largest mean over variance comes back. Otherwise a swap here must make the error of the
    mean smaller, and the squared error that means and variances foretell as well; the kept weight that makes the latter smallest goes.
    The published code goes by signs alone: in a narrow row one weight adds more than the whole error, which then jumps back and forth
    while good weights are lost. And its threshold is absolute; here it is a share of the error that the row's dropped weights would
    make if their contributions were independent, so it means the same at every scale.
    """
    mask = problem.choose(problem.scores) if problem.mask is None else problem.mask
    values = torch.where(mask, problem.weight, problem.target)
    new = torch.cat([_refined(problem, part, values, mask) for part in problem.parts])
    return torch.where(new, values, 0), new


def _refined(problem: Problem, part: Part, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mask of one part after all cycles."""
    rows = slice(part.start, part.stop)
    state = _state(problem, part, values[rows], mask[rows])
    for _ in range(problem.options["cycles"]):
        if not _swap_(state):
            break
    if part.axis == "output":
        return state.kept.transpose(1, 2).flatten(0, 1)[: part.stop - part.start]
    return state.kept.flatten(1)[:, : mask.shape[1]]


def _state(problem: Problem, part: Part, values: torch.Tensor, mask: torch.Tensor) -> _State:
    target = problem.target[part.start : part.stop]
    mean, variance = problem.statistics["moments"].to(target)
    least = _LEAST * float(variance.max())
    share = values * mean
    lost = target - torch.where(mask, values, 0)
    error = (lost @ mean)[:, None]
    enough = problem.options["threshold"] * (lost**2 @ (variance + mean**2)).sqrt()[:, None]
    if part.axis == "output":
        error, enough = _cut(part, error)[:, 0], _cut(part, enough)[:, 0]
    return _State(
        mean=_cut(part, share),
        spread=_cut(part, values * (2 * target - values) * variance),
        appeal=_cut(part, share / variance.clamp_min(least or 1.0) ** problem.options["variance_power"]),
        kept=_cut(part, mask),
        open=_cut(part, ~mask),
        error=error,
        enough=enough,
    )


def _cut(part: Part, matrix: torch.Tensor) -> torch.Tensor:
    """(out, in) as (units, sets, members); cells beyond the edge are zero, so neither kept nor open."""
    rows, columns = matrix.shape
    if part.axis == "output":
        size = part.pattern.group or _NEIGHBOURS
        return pad(matrix, (0, 0, 0, -rows % size)).unflatten(0, (-1, size)).transpose(1, 2).clone()
    size = part.pattern.group or columns
    return pad(matrix, (0, -columns % size)).unflatten(1, (-1, size)).clone()


def _swap_(state: _State) -> bool:
    """One cycle; False once no unit has a weight left that might come back."""
    towards = torch.where(state.error.abs() > state.enough, state.error.sign(), 0)[:, None]
    best, place = torch.where(state.open, state.appeal * towards, 0).flatten(1).max(1)
    units = (best > 0).nonzero()[:, 0]
    if not len(units):
        return False
    sets = place[units] // state.kept.shape[2]
    back = place[units] % state.kept.shape[2]
    state.open[units, sets, back] = False
    change = _change(state, units, sets, back)
    least, away = change.min(1)
    done = least < 0
    units, sets, back, away = units[done], sets[done], back[done], away[done]
    state.kept[units, sets, back] = True
    state.kept[units, sets, away] = False
    state.open[units, sets, away] = True
    width = state.error.shape[1]  # 1 where the members share it
    state.error[units, back % width] -= state.mean[units, sets, back]
    state.error[units, away % width] += state.mean[units, sets, away]
    return True


def _change(state: _State, units: torch.Tensor, sets: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    """By how much the squared error changes when each member goes for the one that comes back, (units, members).

    Infinite where it may not: the member is not kept, or the error of a mean would not shrink.
    """
    error, mean, spread = state.error[units], state.mean[units, sets], state.spread[units, sets]
    one = back[:, None]
    if error.shape[1] == 1:
        after = error - mean.gather(1, one) + mean
        allowed = after.abs() < error.abs()
        change = after**2 - error**2
    else:
        own, after = error.gather(1, one), error + mean
        rest = own - mean.gather(1, one)
        allowed = (rest.abs() < own.abs()) & (after.abs() <= error.abs())
        change = rest**2 - own**2 + after**2 - error**2
    return torch.where(allowed & state.kept[units, sets], change + spread - spread.gather(1, one), torch.inf)
