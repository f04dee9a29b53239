"""Uniform: every site loses the same share."""

from hf_sparse.allocations import BlockSize, Shares
from hf_sparse.registry import ALLOCATIONS


@ALLOCATIONS.register("uniform")
def uniform(target: float, blocks: list[BlockSize]) -> Shares:
    """The same sparsity for every site."""
    return {site: target for block in blocks for site in block.sites}
