"""Turns the configured allocation into one sparsity for each site, in whole weights or whole N of N:M."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from heapq import nsmallest
from itertools import accumulate, groupby
from typing import Any

from hf_sparse.allocations import BlockSize, Measured, Shares, conserved, stacks, whole_counts
from hf_sparse.config import SparsityConfig
from hf_sparse.errors import ConfigError
from hf_sparse.families import Inventory
from hf_sparse.patterns import Pattern
from hf_sparse.registry import ALLOCATIONS, Entry
from hf_sparse.sites import Site

_AGREES = 1e-6  # how far the mean of a given allocation may lie from the given sparsity
_SUMS = 10_000  # sums of block sizes that are followed at a time
_NAMED = 3


def measured_by(config: SparsityConfig) -> Entry[Any] | None:
    """The allocation, where it has to look at the dense model first."""
    entry = ALLOCATIONS[config.allocation] if isinstance(config.allocation, str) else None
    return entry if entry is not None and "measure" in entry.traits else None


def measure(config: SparsityConfig, sites: Measured) -> float:
    """What the allocation measures of one dense block."""
    entry = ALLOCATIONS[str(config.allocation)]
    return float(entry.traits["measure"](sites, config.options_of(entry.name)))  # type: ignore[operator]


def shares(
    inventory: Inventory,
    chosen: Mapping[int, list[Site]],
    config: SparsityConfig,
    measured: Mapping[int, float] | None = None,
) -> Shares:
    """The sparsity of each site: a whole number of weights, or of every M; 0 leaves it dense.

    As long as nothing is `measured`, block by block, an allocation that needs it is stood in for by the uniform one.
    Raises: ConfigError where the allocation does not fit the model.
    """
    found = block_sizes(inventory, chosen)
    pattern, blocks = Pattern.parse(config.pattern), list(found.values())
    if not isinstance(config.allocation, str):
        allotted = _given(config, blocks, pattern)
        return allotted if pattern.group is not None else _whole_weights(config, allotted, blocks)
    entry = ALLOCATIONS[config.allocation]
    if measured is not None:
        blocks = [replace(block, measured=measured[index]) for index, block in found.items()]
    elif measured_by(config) or config.searches:
        return settled(config, {site: config.target for block in blocks for site in block.sites}, blocks)
    found_shares: Shares = entry.function(config.target, blocks, **config.options_of(entry.name))  # type: ignore[assignment]
    return settled(config, found_shares, blocks)


def block_sizes(inventory: Inventory, chosen: Mapping[int, list[Site]]) -> dict[int, BlockSize]:
    """The blocks to prune as an allocation sees them, by index."""
    return {
        block.index: BlockSize(block.name, block.stack, {site.name: site.size for site in chosen[block.index]})
        for block in inventory.blocks
        if block.index in chosen
    }


def settled(config: SparsityConfig, allotted: Shares, blocks: Sequence[BlockSize]) -> Shares:
    """Shares in whole weights, or in a whole N for each block, that meet the target of the configuration."""
    group = Pattern.parse(config.pattern).group
    if group is not None:
        return whole_groups(allotted, blocks, config.target, group)
    return _whole_weights(config, allotted, blocks, config.target)


def _mean(allotted: Shares, sizes: Mapping[str, int]) -> float:
    return sum(allotted[name] * size for name, size in sizes.items()) / sum(sizes.values())


def _sizes(blocks: Sequence[BlockSize]) -> dict[str, int]:
    return {name: size for block in blocks for name, size in block.sites.items()}


# ---------------------------------------------------------------------------------------------------- lists and mappings


def _given(config: SparsityConfig, blocks: Sequence[BlockSize], pattern: Pattern) -> Shares:
    """A list or mapping by site."""
    given = config.allocation
    allotted = _by_glob(given, blocks) if isinstance(given, Mapping) else _by_block(given, blocks)  # type: ignore[arg-type]
    if pattern.group is not None:  # 0.3333 of three is one third
        allotted = {name: round(share * pattern.group) / pattern.group for name, share in allotted.items()}
    mean = _mean(allotted, _sizes(blocks))
    if config.sparsity is not None and abs(mean - config.sparsity) > _AGREES:
        raise ConfigError(
            f"sparsity={config.sparsity} contradicts the allocation, whose mean over all weights of the targeted sites is "
            f"{mean:.7g}; leave sparsity out, or change the allocation."
        )
    return allotted


def _by_block(given: Sequence[float], blocks: Sequence[BlockSize]) -> Shares:
    if len(given) != len(blocks):
        raise ConfigError(
            f"allocation gives {len(given)} sparsities, but {len(blocks)} blocks have targeted sites ({blocks[0].name} to "
            f"{blocks[-1].name}); give one for each, in this order."
        )
    return {site: share for block, share in zip(blocks, given, strict=True) for site in block.sites}


def _by_glob(given: Mapping[str, float], blocks: Sequence[BlockSize]) -> Shares:
    """Of the globs that match a site the longest decides: a rule that does not depend on the order, which JSON files lose."""
    names = list(_sizes(blocks))
    matching = {name: [glob for glob in given if fnmatchcase(name, glob)] for name in names}
    unused = set(given) - {glob for globs in matching.values() for glob in globs}
    if unused:
        raise ConfigError(
            f"allocation: {min(unused)!r} matches no targeted site; they are named like {names[:_NAMED]}."
        )
    without = [name for name in names if not matching[name]]
    if without:
        raise ConfigError(
            f"allocation leaves {len(without)} of {len(names)} targeted sites without a sparsity, such as "
            f"{without[:_NAMED]}; add globs for them ('*' for all others), or take them out with exclude."
        )
    found = {}
    for name, globs in matching.items():
        longest = [glob for glob in globs if len(glob) == max(map(len, globs))]
        if len({given[glob] for glob in longest}) > 1:
            raise ConfigError(
                f"allocation: {' and '.join(map(repr, sorted(longest)))} are equally long, match {name} and differ; the "
                "longest glob decides, so make one of them longer."
            )
        found[name] = given[longest[0]]
    return found


# ---------------------------------------------------------------------------------------------------- whole numbers


def _whole_weights(
    config: SparsityConfig, allotted: Shares, blocks: Sequence[BlockSize], target: float | None = None
) -> Shares:
    """Whole numbers of weights: the total is the target's, and each stack's is the nearest that this leaves."""
    if config.options_of("unstructured")["rounding"] != "exact":
        return allotted
    sizes = {stack[0].stack: _sizes(stack) for stack in stacks(blocks)}
    totals = {name: sum(own.values()) for name, own in sizes.items()}
    means = {name: _mean(allotted, own) if target is None else target for name, own in sizes.items()}
    whole = whole_counts(means, totals, None if target is None else round(target * sum(totals.values())))
    found: Shares = {}
    for name, own in sizes.items():
        found |= whole_counts({site: allotted[site] for site in own}, own, round(whole[name] * totals[name]))
    return found


def whole_groups(allotted: Shares, blocks: Sequence[BlockSize], target: float, group: int) -> Shares:
    """Shares for which every block keeps a whole N of every `group`, 1 <= N <= group, as near to the target as integers allow.

    N = group * (1 - share) is rounded down, then raised by one in some blocks: those that bring the number of kept weights
    nearest to the target's, and of several such choices the one with the largest remainders, in weights. Blocks of one size meet
    every target that has a solution exactly. Each stack for itself.
    """
    found: Shares = {}
    for stack in stacks(blocks):
        sizes = [block.size for block in stack]
        exact = conserved([_mean(allotted, block.sites) for block in stack], sizes, target, 1 - 1 / group)
        # Shares that come from a sum may miss a whole number by the last bits.
        kept = [min(max(int(group * (1 - share) + 1e-9), 1), group) for share in exact]
        remainders = [max(group * (1 - share) - number, 0.0) for share, number in zip(exact, kept, strict=True)]
        due = group * (1 - target) * sum(sizes) - sum(n * size for n, size in zip(kept, sizes, strict=True))
        candidates = [index for index, number in enumerate(kept) if number < group]
        for index in _raised(candidates, sizes, remainders, due):
            kept[index] += 1
        found |= {site: 1 - n / group for block, n in zip(stack, kept, strict=True) for site in block.sites}
    return found


def _raised(candidates: list[int], sizes: list[int], remainders: list[float], due: float) -> list[int]:
    """The candidates whose sizes add up nearest to `due`; among equal sums those that rounding down cost most weights."""
    ranked = sorted(candidates, key=lambda index: (sizes[index], -remainders[index]))
    sums: dict[int, tuple[float, list[int]]] = {
        0: (0.0, [])
    }  # sum of sizes -> what rounding down cost the blocks that make it, and these
    expected = 0.0
    for size, members in groupby(ranked, lambda index: sizes[index]):
        same = list(members)  # of one size the largest remainders come first
        gains = [0.0, *accumulate(size * remainders[index] for index in same)]
        expected += gains[-1]
        longer: dict[int, tuple[float, list[int]]] = {}
        for total, (gain, taken) in sums.items():
            for number, more in enumerate(gains):
                new = (gain + more, taken + same[:number])
                if gain + more > longer.get(total + size * number, (-1.0,))[0]:
                    longer[total + size * number] = new
        # Blocks of many different sizes have more sums than can be followed; those near the middle suffice.
        sums = dict(nsmallest(_SUMS, longer.items(), key=lambda item: abs(item[0] - expected)))
    best = min(sums, key=lambda total: (round(abs(total - due), 3), -sums[total][0]))
    return sums[best][1]
