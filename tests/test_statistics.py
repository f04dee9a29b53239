"""The norm of inputs: the same whatever the chunks, the order of merging and the dtype."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hf_sparse.registry import STATISTICS
from hf_sparse.statistics import Norm

FEATURES = 5
INPUTS = arrays.arrays(
    "float32",
    st.tuples(st.integers(0, 40), st.just(FEATURES)),
    elements=st.floats(-1000, 1000, width=32, allow_subnormal=False),
).map(torch.from_numpy)


def norm(*chunks: torch.Tensor, features: int = FEATURES) -> Norm:
    found = Norm(features)
    for chunk in chunks:
        found.add(chunk)
    return found


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found.double(), expected.double(), rtol=1e-5, atol=1e-18)


@given(x=INPUTS)
def test_it_is_the_norm_of_each_column(x: torch.Tensor) -> None:
    found = norm(x)
    assert found.value.shape == (FEATURES,)
    assert found.tokens == len(x)
    assert close(found.value, torch.linalg.vector_norm(x.double(), dim=0))


@given(x=INPUTS, cuts=st.lists(st.integers(0, 40), max_size=4))
def test_chunks_do_not_matter(x: torch.Tensor, cuts: list[int]) -> None:
    bounds = [0, *sorted(min(cut, len(x)) for cut in cuts), len(x)]
    found = norm(*(x[start:stop] for start, stop in itertools.pairwise(bounds)))  # some are empty
    assert found.tokens == len(x)
    assert close(found.value, norm(x).value)


@given(parts=st.lists(INPUTS, min_size=1, max_size=4), data=st.data())
def test_merging_in_any_order_is_adding_all(parts: list[torch.Tensor], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(parts))))
    found = norm()
    for number in order:
        found.merge(norm(parts[number]))
    assert found.tokens == sum(map(len, parts))
    assert close(found.value, norm(torch.cat(parts)).value)


def test_merging_leaves_the_partner_as_it_was_and_empty_ones_change_nothing() -> None:
    one, empty = norm(torch.ones(4, FEATURES)), norm()
    one.merge(empty)
    empty.merge(norm())
    assert (empty.tokens, empty.value.tolist()) == (0, [0.0] * FEATURES)
    assert (one.tokens, one.value.tolist()) == (4, [2.0] * FEATURES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_dtype_is_squared_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(300, FEATURES, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert close(norm(x).value, torch.linalg.vector_norm(x.double(), dim=0))


def test_large_values_do_not_overflow_float16_and_small_ones_do_not_vanish() -> None:
    assert norm(torch.full((4, FEATURES), 60000.0, dtype=torch.float16)).value.tolist() == pytest.approx(
        [120000.0] * FEATURES, rel=1e-3
    )
    tiny = torch.full((4, FEATURES), 2.0**-20, dtype=torch.float16)
    assert norm(tiny).value.tolist() == [2.0**-19] * FEATURES


def test_many_chunks_lose_nothing_beside_a_large_one() -> None:
    # In float32 the thousand small squares would vanish beside 1e10.
    chunks = [torch.full((1, 1), 1e5)] + [torch.ones(1, 1)] * 1000
    assert norm(*chunks, features=1).squares.item() == 1e10 + 1000


@given(x=INPUTS, y=INPUTS)
def test_the_state_goes_out_and_in_and_is_a_copy(x: torch.Tensor, y: torch.Tensor) -> None:
    first = norm(x)
    state, before = first.state_dict(), first.value
    first.add(y)
    second = norm()
    second.load_state_dict(state)
    assert torch.equal(second.value, before)
    assert second.tokens == len(x)
    second.add(y)
    assert torch.equal(second.value, first.value)


def test_every_registered_statistic_has_the_interface() -> None:
    for entry in STATISTICS:
        found = entry.function(FEATURES, torch.device("cpu"))
        for name in ("add", "merge", "value", "state_dict", "load_state_dict", "tokens"):
            assert hasattr(found, name), (entry.name, name)
        assert entry.source
        assert entry.summary
