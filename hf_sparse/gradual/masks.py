"""Masks on the way to a target: one rule for every pattern."""

import torch


def due(begin: int, target: int, remaining: float) -> int:
    """How many weights of a site are dropped while a share of the way from `begin` to `target` is still to go."""
    return round(target + (begin - target) * remaining)


def partial_mask(scores: torch.Tensor, final: torch.Tensor, count: int) -> torch.Tensor:
    """The mask (out, in) that drops `count` weights: those with the lowest scores of what the `final` mask drops.

    So groups of N:M fill up one weight after the other, and with all that it drops the final mask is met exactly. Of equal scores
    the lower index is dropped first.
    """
    candidates = ~final
    lowest = scores[candidates]
    if count >= len(lowest):
        return final
    mask = final.clone()
    if count < 1:
        return mask.fill_(True)
    # To select is many times as fast as to sort on a CPU; on an accelerator it is refused where training shall be deterministic.
    bound = lowest.kthvalue(count).values if lowest.device.type == "cpu" else lowest.sort().values[count - 1]
    dropped = lowest < bound
    equal = (lowest == bound).nonzero().squeeze(1)
    dropped[equal[: count - int(dropped.sum())]] = True
    mask[candidates] = ~dropped
    return mask
