"""OWL: blocks with many outliers keep more (Yin et al., arXiv 2310.05175, section 3.2).

As the published code counts them: over all targeted sites of a block at once. The paper's blocks are of one size; where they are
not, the mean that the shares are moved to is weighted by size. Each stack is measured against itself.
"""

from collections.abc import Mapping
from typing import Any

import torch

from hf_sparse.allocations import BlockSize, Measured, Shares, spread, stacks
from hf_sparse.registry import ALLOCATIONS


def outlier_share(sites: Measured, options: Mapping[str, Any]) -> float:
    """Percentage of the block's weights whose magnitude times input norm exceeds `threshold` times the mean."""
    total = sum(float((weight.abs() * inputs["norm"]).sum(dtype=torch.float64)) for weight, inputs in sites)
    size = sum(weight.numel() for weight, _ in sites)
    limit = options["threshold"] * total / size
    # Made again rather than held: a block's scores take as much memory as its weights.
    outliers = sum(int((weight.abs() * inputs["norm"] > limit).sum()) for weight, inputs in sites)
    return 100 * outliers / size


@ALLOCATIONS.register(
    "owl",
    source="arXiv 2310.05175, section 3.2",
    needs=("norm",),
    options={"threshold": 5.0, "limit": 0.08},
    ranges={"limit": (0.0, 0.5)},
    measure=outlier_share,
)
def owl(target: float, blocks: list[BlockSize], threshold: float = 5.0, limit: float = 0.08) -> Shares:
    """Blocks with more outliers keep more; no two of a stack differ by more than twice `limit`."""
    found: Shares = {}
    for stack in stacks(blocks):
        shares = [block.measured or 0.0 for block in stack]
        low, high = min(shares), max(shares)
        wanted = [-2 * limit * (share - low) / (high - low) if high > low else 0.0 for share in shares]
        found |= spread(stack, wanted, target)
    return found
