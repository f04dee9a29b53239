"""Statistics of inputs: the same whatever the chunks, the order of merging, the dtype and autocast."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hf_sparse.registry import STATISTICS
from hf_sparse.statistics import Gram, Moments, Norm, Statistic

FEATURES = 5
INPUTS = arrays.arrays(
    "float32",
    st.tuples(st.integers(0, 40), st.just(FEATURES)),
    elements=st.floats(-1000, 1000, width=32, allow_subnormal=False),
).map(torch.from_numpy)
NAMES = [entry.name for entry in STATISTICS]


def of(name: str, *chunks: torch.Tensor, features: int = FEATURES) -> Statistic:
    found: Statistic = STATISTICS[name].function(features)
    for chunk in chunks:
        found.add(chunk)
    return found


def norm(*chunks: torch.Tensor, features: int = FEATURES) -> Norm:
    found = of("norm", *chunks, features=features)
    assert isinstance(found, Norm)
    return found


def moments(x: torch.Tensor) -> torch.Tensor:
    if not len(x):
        return torch.zeros(2, x.shape[1], dtype=torch.float64)
    return torch.stack([x.mean(0), x.var(0, unbiased=False)])


DEFINITIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "norm": lambda x: torch.linalg.vector_norm(x, dim=0),
    "gram": lambda x: x.T @ x,
    "moments": moments,
}


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found.double(), expected.double(), rtol=1e-5, atol=1e-18)


def right(name: str, found: Statistic, x: torch.Tensor) -> bool:
    """Whether a statistic is that of x, up to rounding as large as the values that went into it demand."""
    expected, size = DEFINITIONS[name](x.double()), DEFINITIONS["norm"](x.double())
    allowed = {
        "norm": size,
        "gram": torch.outer(size, size),
        "moments": torch.stack([size, size**2]) / max(len(x), 1) ** 0.5,
    }[name]
    error = (found.value.double() - expected).abs() - 1e-18  # squares of the smallest numbers vanish in float32
    return found.tokens == len(x) and found.value.shape == expected.shape and bool((error <= 1e-5 * allowed).all())


def test_every_registered_statistic_has_a_definition_here() -> None:
    assert set(DEFINITIONS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@given(x=INPUTS)
def test_it_is_what_its_definition_says(name: str, x: torch.Tensor) -> None:
    before = x.clone()
    found = of(name, x)
    assert right(name, found, x)
    assert found.finite
    assert torch.equal(x, before)


@given(x=INPUTS)
def test_the_norm_is_that_of_each_column(x: torch.Tensor) -> None:
    assert close(norm(x).value, torch.linalg.vector_norm(x.double(), dim=0))


@pytest.mark.parametrize("name", NAMES)
@given(x=INPUTS, cuts=st.lists(st.integers(0, 40), max_size=4))
def test_chunks_do_not_matter(name: str, x: torch.Tensor, cuts: list[int]) -> None:
    bounds = [0, *sorted(min(cut, len(x)) for cut in cuts), len(x)]
    assert right(name, of(name, *(x[start:stop] for start, stop in itertools.pairwise(bounds))), x)  # some are empty


@pytest.mark.parametrize("name", NAMES)
@given(parts=st.lists(INPUTS, min_size=1, max_size=4), data=st.data())
def test_merging_in_any_order_is_adding_all(name: str, parts: list[torch.Tensor], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(parts))))
    found = of(name)
    for number in order:
        found.merge(of(name, parts[number]))
    assert right(name, found, torch.cat(parts))


@pytest.mark.parametrize("name", NAMES)
def test_merging_leaves_the_partner_as_it_was_and_empty_ones_change_nothing(name: str) -> None:
    x = torch.arange(20.0).reshape(4, FEATURES)
    one, empty, other = of(name, x), of(name), of(name, x)
    one.merge(empty)
    assert torch.equal(one.value, other.value)
    empty.merge(of(name))
    assert (empty.tokens, bool(empty.value.any()), empty.finite) == (0, False, True)
    empty.merge(one)
    empty.add(x)
    assert torch.equal(one.value, other.value)
    assert right(name, empty, torch.cat([x, x]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_dtype_is_widened_first(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(5000, FEATURES, generator=torch.Generator().manual_seed(0)).to(dtype)  # more than any chunk holds
    assert right(name, of(name, x), x)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_does_not_reach_in(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(300, FEATURES, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = of(name, x)
        value = found.value
    assert torch.equal(value, of(name, x).value)
    assert right(name, found, x)


def test_large_values_do_not_overflow_float16_and_small_ones_do_not_vanish() -> None:
    assert norm(torch.full((4, FEATURES), 60000.0, dtype=torch.float16)).value.tolist() == pytest.approx(
        [120000.0] * FEATURES, rel=1e-3
    )
    tiny = torch.full((4, FEATURES), 2.0**-20, dtype=torch.float16)
    assert norm(tiny).value.tolist() == [2.0**-19] * FEATURES


@pytest.mark.parametrize(("name", "total"), [("norm", "squares"), ("gram", "products"), ("moments", "totals")])
def test_many_chunks_lose_nothing_beside_a_large_one(name: str, total: str) -> None:
    # In float32 the thousand small squares would vanish beside 1e10.
    chunks = [torch.full((1, 1), 1e5)] + [torch.ones(1, 1)] * 1000
    assert getattr(of(name, *chunks, features=1), total).flatten()[-1].item() == 1e10 + 1000


@pytest.mark.parametrize("name", NAMES)
@given(x=INPUTS, y=INPUTS)
def test_the_state_goes_out_and_in_and_is_a_copy(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
    first = of(name, x)
    state, before = first.state_dict(), first.value
    first.add(y)
    second = of(name)
    second.load_state_dict(state)
    assert torch.equal(second.value, before)
    assert second.tokens == len(x)
    second.add(y)
    assert torch.equal(second.value, first.value)
    third = of(name)
    third.load_state_dict(state)
    assert torch.equal(third.value, before)


@pytest.mark.parametrize("name", NAMES)
def test_a_value_is_a_snapshot(name: str) -> None:
    found = of(name, torch.ones(4, FEATURES))
    value = found.value
    value += 1
    assert torch.equal(found.value, of(name, torch.ones(4, FEATURES)).value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_a_single_broken_value_is_told_for_good(name: str, broken: float) -> None:
    x = torch.ones(4, FEATURES)
    x[1, 3] = broken
    found = of(name, torch.ones(2, FEATURES), x)
    assert not found.finite
    found.add(torch.ones(2, FEATURES))
    assert not found.finite
    merged = of(name, torch.ones(2, FEATURES))
    assert merged.finite
    merged.merge(found)
    assert not merged.finite


@given(x=INPUTS)
def test_the_diagonal_of_the_gram_matrix_is_the_squared_norm(x: torch.Tensor) -> None:
    found = of("gram", x)
    assert isinstance(found, Gram)
    assert close(found.value.diagonal(), norm(x).value.double() ** 2)
    assert torch.allclose(found.value, found.value.T, rtol=1e-5)
    assert found.value.dtype == torch.float64


@given(x=INPUTS)
def test_norm_and_moments_agree(x: torch.Tensor) -> None:
    found = of("moments", x)
    assert isinstance(found, Moments)
    mean, variance = found.value.double()
    assert (variance >= 0).all()
    assert torch.allclose((variance + mean**2) * len(x), norm(x).value.double() ** 2, rtol=1e-4, atol=1e-18)


def test_a_small_variance_survives_a_large_mean() -> None:
    x = 1000 + torch.tensor([[-0.125], [0.125]])
    assert of("moments", x.repeat(500, 1), features=1).value.flatten().tolist() == pytest.approx(
        [1000, 0.015625], rel=1e-5
    )


def test_every_registered_statistic_has_the_interface() -> None:
    for entry in STATISTICS:
        found = entry.function(FEATURES, torch.device("cpu"))
        for name in ("add", "merge", "value", "state_dict", "load_state_dict", "tokens", "finite"):
            assert hasattr(found, name), (entry.name, name)
        assert entry.source
        assert entry.summary
