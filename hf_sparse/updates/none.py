"""No update: kept weights stay as they are."""

from collections.abc import Mapping

import torch

from hf_sparse.patterns import Pattern
from hf_sparse.registry import UPDATES


@UPDATES.register("none")
def none(
    weight: torch.Tensor,
    scores: torch.Tensor,
    mask: torch.Tensor | None,
    statistics: Mapping[str, torch.Tensor],
    pattern: Pattern,
    sparsity: float,
    axis: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept weights keep their values."""
    if mask is None:
        mask = pattern.mask(scores, sparsity, axis)
    return weight, mask
