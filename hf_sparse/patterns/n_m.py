"""N:M: of every M consecutive weights of a row the N with the highest scores stay."""

import torch

# Up to this many weights a group, comparing all pairs is faster than sorting.
_PAIRWISE = 16


def _ranks(groups: torch.Tensor) -> torch.Tensor:
    """Rank of each score within its group (the last dimension), lowest first; of equals the lower index ranks lower."""
    size = groups.shape[-1]
    if size > _PAIRWISE:
        return groups.argsort(dim=-1, stable=True).argsort(-1)
    ranks = torch.zeros(groups.shape, dtype=torch.uint8, device=groups.device)
    for left in range(size):
        for right in range(left + 1, size):
            right_is_lower = groups[..., right] < groups[..., left]
            ranks[..., left] += right_is_lower
            ranks[..., right] += ~right_is_lower
    return ranks


def n_m_mask(scores: torch.Tensor, keep: int, group: int) -> torch.Tensor:
    """Mask along the last dimension of (rows, columns).

    A ragged tail of r weights keeps round(r * keep / group), halves to even.
    """
    whole = scores.shape[-1] // group * group
    full = scores[:, :whole].unflatten(-1, (-1, group)) if whole else scores.new_empty(len(scores), 0, group)
    parts = [(_ranks(full) >= group - keep).flatten(1)]
    if tail := scores.shape[-1] - whole:
        parts.append(_ranks(scores[:, whole:]) >= tail - round(tail * keep / group))
    return torch.cat(parts, dim=1)
