"""Allocations give every site its share; whole_counts makes them whole numbers of weights with the same total."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse.allocations import BlockSize, whole_counts
from hf_sparse.registry import ALLOCATIONS

BLOCKS = [
    BlockSize("model.layers.0", "model.layers", {"model.layers.0.q": 64, "model.layers.0.down": 100}),
    BlockSize("model.layers.1", "model.layers", {"model.layers.1.q": 64}),
]
SITES = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=4),
    st.tuples(st.floats(0, 1), st.integers(1, 10**7)),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize("target", [0.01, 0.5, 0.75, 2 / 3])
def test_uniform_gives_every_site_the_target(target: float) -> None:
    shares = ALLOCATIONS["uniform"].function(target, BLOCKS)
    assert shares == {"model.layers.0.q": target, "model.layers.0.down": target, "model.layers.1.q": target}


@pytest.mark.parametrize("entry", list(ALLOCATIONS), ids=lambda entry: entry.name)
def test_every_allocation_names_every_site_once_and_meets_the_target(entry: object) -> None:
    shares = entry.function(0.5, BLOCKS)  # type: ignore[attr-defined]
    sizes = {name: size for block in BLOCKS for name, size in block.sites.items()}
    assert shares.keys() == sizes.keys()
    assert all(0 <= share <= 1 for share in shares.values())
    assert sum(shares[name] * sizes[name] for name in sizes) / sum(sizes.values()) == pytest.approx(0.5, abs=1e-6)


@given(sites=SITES)
def test_whole_counts_keep_the_total_and_are_whole(sites: dict[str, tuple[float, int]]) -> None:
    shares, sizes = (
        {name: share for name, (share, _) in sites.items()},
        {name: size for name, (_, size) in sites.items()},
    )
    found = whole_counts(shares, sizes)
    counts = {name: found[name] * sizes[name] for name in sizes}
    assert found.keys() == sizes.keys()
    assert all(abs(count - round(count)) < 1e-6 for count in counts.values())
    assert sum(round(count) for count in counts.values()) == round(sum(shares[name] * sizes[name] for name in sizes))
    for name in sizes:
        assert 0 <= round(counts[name]) <= sizes[name]
        assert abs(counts[name] - shares[name] * sizes[name]) < 1 + 1e-6


@given(sites=SITES)
def test_whole_counts_change_nothing_that_is_whole(sites: dict[str, tuple[float, int]]) -> None:
    shares, sizes = (
        {name: share for name, (share, _) in sites.items()},
        {name: size for name, (_, size) in sites.items()},
    )
    once = whole_counts(shares, sizes)
    again = whole_counts(once, sizes)
    assert {name: round(once[name] * sizes[name]) for name in sizes} == {
        name: round(again[name] * sizes[name]) for name in sizes
    }


def test_the_largest_remainders_are_rounded_up_and_of_equals_the_first() -> None:
    assert whole_counts({"a": 0.25, "b": 0.5, "c": 0.75}, {"a": 1, "b": 1, "c": 1}) == {"a": 0.0, "b": 1.0, "c": 1.0}
    assert whole_counts({"a": 0.5, "b": 0.5}, {"a": 3, "b": 3}) == {"a": 2 / 3, "b": 1 / 3}
