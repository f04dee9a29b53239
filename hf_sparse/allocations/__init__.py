"""Allocations: how much of each site goes. One file each; every module in this folder registers itself.

An allocation is a function of the target sparsity, the blocks and its options; it never sees a model. Each stack (an encoder, a
decoder) gets the target for itself. One that looks at the dense model declares in its registration `measure`, a function of what
`Measured` describes and the options that gives one number for a block, and in `needs` the statistics that it reads; the number
then stands in `BlockSize.measured`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import groupby
from pkgutil import iter_modules

import torch


@dataclass(frozen=True)
class BlockSize:
    """A block as an allocation sees it: its stack and the number of weights of each targeted site."""

    name: str
    stack: str
    sites: dict[str, int]
    measured: float | None = None  # what the allocation's `measure` gave for the dense block

    @property
    def size(self) -> int:
        return sum(self.sites.values())


# A registered allocation: (target sparsity, blocks, **options) -> site name -> sparsity
Shares = dict[str, float]

# A block for `measure`: of each targeted site the weight (out, in) and the statistics of its input
Measured = Sequence[tuple[torch.Tensor, Mapping[str, torch.Tensor]]]


def stacks(blocks: Sequence[BlockSize]) -> list[list[BlockSize]]:
    """The blocks of each stack, in their order."""
    return [list(own) for _, own in groupby(sorted(blocks, key=lambda block: block.stack), lambda block: block.stack)]


def spread(blocks: Sequence[BlockSize], wanted: Sequence[float], target: float) -> Shares:
    """The wanted share of each block for all its sites, moved so that the target holds over all weights."""
    found = conserved(wanted, [block.size for block in blocks], target)
    return {site: share for block, share in zip(blocks, found, strict=True) for site in block.sites}


def conserved(wanted: Sequence[float], sizes: Sequence[int], target: float, most: float = 1.0) -> list[float]:
    """Shares whose mean, weighted by size, is the target, and whose differences are those wanted.

    All are moved by the same amount; a share that would leave 0..most stays at that end, and the others take over the rest. So
    share = min(max(wanted + c, 0), most) with the one c that meets the target.
    """
    total = sum(sizes)
    low, high = -max(wanted), most - min(wanted)

    def moved(by: float) -> list[float]:
        return [min(max(share + by, 0.0), most) for share in wanted]

    for _ in range(100):  # halvings: as near as a float can come
        middle = (low + high) / 2
        mean = sum(share * size for share, size in zip(moved(middle), sizes, strict=True)) / total
        low, high = (middle, high) if mean < target else (low, middle)
    return moved(high)


def whole_counts(shares: Shares, sizes: dict[str, int], total: int | None = None) -> Shares:
    """Shares that are whole numbers of weights and still drop the same total (largest remainder over all sites)."""
    exact = {name: shares[name] * sizes[name] for name in sizes}
    counts = {name: int(value) for name, value in exact.items()}
    missing = (round(sum(exact.values())) if total is None else total) - sum(counts.values())
    by_remainder: Sequence[str] = sorted(sizes, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: max(missing, 0)]:
        counts[name] += 1
    return {name: counts[name] / sizes[name] for name in sizes}


for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
