"""Updates: new values for the kept weights. One file each; every module in this folder registers itself.

An update is a function of a `Problem` that returns the new weight and its mask. It never sees a model. Its registration may say:
`needs` (statistics of the input), `own_metric` (with that metric it chooses the mask itself, and gets None), `sets_target`
(what it returns is no sparse weight but what the updates behind it shall reproduce), `second_stream` (it needs statistics of the
dense model's activations beside those of the pruned one's), `runs_blocks` (it is done on whole blocks, one floor above),
`cost` (a function of rows, columns and options that counts its work, by which the time of a run is foretold; see `hf_sparse/cost.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch

from hf_sparse.patterns import Pattern


@dataclass(frozen=True)
class Part:
    """The rows of one site in a problem, and how its weights compete."""

    start: int
    stop: int
    pattern: Pattern
    sparsity: float
    axis: str
    rounding: str = "exact"


@dataclass(frozen=True)
class Problem:
    """All sites that share an input, one below the other: their normal equations share one matrix.

    All tensors are (out, in) in fp32 or fp64. `target` is what shall be reproduced, `weight` what the update before left,
    the target itself for the first one.
    """

    target: torch.Tensor
    weight: torch.Tensor
    scores: torch.Tensor
    mask: torch.Tensor | None  # True keeps; None: the update chooses it
    statistics: Mapping[str, torch.Tensor]
    parts: tuple[Part, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what was done that the report should tell

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """The mask that the patterns of the parts make of scores (out, in)."""
        return torch.cat([_mask(part, scores[part.start : part.stop], part.sparsity) for part in self.parts])

    def choose_some(self, scores: torch.Tensor, first: int) -> torch.Tensor:
        """The mask of some columns, `first` and those behind it, so that all such pieces together drop what is due."""
        width = self.target.shape[1]
        return torch.cat([_some(part, scores[part.start : part.stop], first, width) for part in self.parts])


def _mask(part: Part, scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    return part.pattern.mask(scores, sparsity, part.axis, part.rounding)


def _some(part: Part, scores: torch.Tensor, first: int, width: int) -> torch.Tensor:
    """The mask of the columns from `first` on, of `width` in all; what all pieces drop adds up to the counts of the whole."""
    if part.pattern.group is not None:
        return _mask(part, scores, part.sparsity)
    rows, last, exact = len(scores), first + scores.shape[1], part.rounding == "exact"
    due = round(part.sparsity * (rows * width))
    if part.axis != "input":
        lines = width if part.axis == "output" else 1
        total = due if exact else lines * int(rows * width // lines * part.sparsity)
        return part.pattern.mask(scores, _between(total, first, last, width) / scores.numel(), part.axis)
    share, more = divmod(due, rows) if exact else (int(width * part.sparsity), 0)
    # The first rows drop one more in all. If each piece shared out its own odd ones, they would drop one more in every piece.
    halves = ((scores[:more], share + 1), (scores[more:], share))
    return torch.cat(
        [
            part.pattern.mask(half, _between(count, first, last, width) / half.shape[1], part.axis)
            for half, count in halves
            if len(half)
        ]
    )


def _between(total: int, first: int, last: int, width: int) -> int:
    """The share of a total that falls to columns `first` to `last`; consecutive shares add up to the total."""
    return total * last // width - total * first // width


Solution = tuple[torch.Tensor, torch.Tensor | None]  # weight, mask; None where it is left to the updates behind

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
