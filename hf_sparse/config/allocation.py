"""Checks an allocation against the pattern and the sparsity of the same configuration."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from hf_sparse.config.serialise import share
from hf_sparse.errors import ConfigError
from hf_sparse.patterns import Pattern
from hf_sparse.registry import ALLOCATIONS

_WHOLE = 1e-3  # how far M times a share may lie from a whole number: 0.3333 of 3 is meant to be 1


def plain_allocation(value: Any) -> Any:
    """A list as a tuple, a mapping as a dict of its own, the values as floats; raises ConfigError for other values."""
    if isinstance(value, str) or not isinstance(value, list | tuple | Mapping):
        return value  # a name, or what the registry shall refuse
    named = dict(value.items() if isinstance(value, Mapping) else enumerate(value))
    if not named:
        raise ConfigError(f"allocation={value!r} is empty; give one sparsity per block, or a mapping from site globs.")
    for key, item in named.items():
        if isinstance(value, Mapping) and (not isinstance(key, str) or not key):
            raise ConfigError(f"allocation has the key {key!r}; give globs over site names, such as '*.mlp.*'.")
        if isinstance(item, bool) or not isinstance(item, int | float) or not 0 <= item < 1:
            raise ConfigError(
                f"allocation[{key!r}]={item!r} is not allowed; give a share from 0 (dense) to below 1, such as 0.5."
            )
    if not any(named.values()):
        raise ConfigError(f"allocation={value!r} leaves everything dense; give a share above 0 somewhere.")
    return {key: float(item) for key, item in named.items()} if isinstance(value, Mapping) else tuple(map(float, value))


def check_allocation(allocation: Any, sparsity: float | None, pattern: Pattern) -> None:
    """Raise ConfigError where allocation, sparsity and pattern contradict each other or leave something open."""
    if sparsity is not None:
        share("sparsity", sparsity)
    if isinstance(allocation, tuple | dict):
        items = allocation.items() if isinstance(allocation, dict) else enumerate(allocation)
        _check_whole_groups(items, pattern)
        return
    ALLOCATIONS[allocation]
    if sparsity is None:
        if pattern.sparsity is None:
            raise ConfigError('pattern="unstructured" needs sparsity, the share to drop, such as sparsity=0.5.')
        return
    if pattern.sparsity is None or pattern.group is None:
        return
    if allocation == "uniform" and not math.isclose(sparsity, pattern.sparsity):
        raise ConfigError(
            f"sparsity={sparsity} contradicts pattern={str(pattern)!r}, which drops {pattern.sparsity:g} of every group; leave "
            "sparsity out, choose another pattern, or an allocation other than uniform, which gives each block an N of its own."
        )
    if sparsity > 1 - 1 / pattern.group + 1e-9:
        raise ConfigError(
            f"sparsity={sparsity} is more than pattern={str(pattern)!r} can drop: every group of {pattern.group} keeps one, so at "
            f"most {1 - 1 / pattern.group:g}; give less, or a larger M."
        )


def _check_whole_groups(items: Iterable[tuple[Any, float]], pattern: Pattern) -> None:
    """Explicit shares must be whole numbers of every M weights; nothing is rounded behind the user's back."""
    if pattern.group is None:
        return
    for key, value in items:
        dropped = value * pattern.group
        if abs(dropped - round(dropped)) > _WHOLE or round(dropped) >= pattern.group:
            near = {math.floor(dropped), min(math.ceil(dropped), pattern.group - 1)}
            allowed = " or ".join(f"{count / pattern.group:g}" for count in sorted(near))
            raise ConfigError(
                f"allocation[{key!r}]={value:g} is no whole number of every {pattern.group} weights, as pattern={str(pattern)!r} "
                f"needs it; the nearest allowed: {allowed}."
            )
