"""Updates: new values for the kept weights. One file each; every module in this folder registers itself.

An update is a function of a `Problem` that returns the new weight and its mask. It never sees a model. Its registration may say:
`needs` (statistics of the input), `own_metric` (with that metric it chooses the mask itself, and gets None), `sets_target`
(what it returns is no sparse weight but what the updates behind it shall reproduce), `second_stream` (it needs statistics of the
dense model's activations beside those of the pruned one's), `runs_blocks` (it is done on whole blocks, one floor above).
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
        masks = []
        for part in self.parts:
            own = scores[part.start : part.stop]
            due = [round(part.sparsity * len(own) * end) for end in (first, first + own.shape[1])]
            masks.append(_mask(part, own, (due[1] - due[0]) / own.numel()))
        return torch.cat(masks)


def _mask(part: Part, scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    return part.pattern.mask(scores, sparsity, part.axis, part.rounding)


Solution = tuple[torch.Tensor, torch.Tensor]  # weight, mask

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
