"""Allocations: how much of each site goes. One file each; every module in this folder registers itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules


@dataclass(frozen=True)
class BlockSize:
    """A block as an allocation sees it: its stack and the number of weights of each targeted site."""

    name: str
    stack: str
    sites: dict[str, int]


# A registered allocation: (target sparsity, blocks, **options) -> site name -> sparsity
Shares = dict[str, float]


def whole_counts(shares: Shares, sizes: dict[str, int]) -> Shares:
    """Shares that are whole numbers of weights and still drop the same total (largest remainder over all sites)."""
    exact = {name: shares[name] * sizes[name] for name in sizes}
    counts = {name: int(value) for name, value in exact.items()}
    missing = round(sum(exact.values())) - sum(counts.values())
    by_remainder: Sequence[str] = sorted(sizes, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: max(missing, 0)]:
        counts[name] += 1
    return {name: counts[name] / sizes[name] for name in sizes}


for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
