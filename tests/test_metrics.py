"""Metrics: the published formulas, and what every registered one owes: shape, finite scores, known scaling."""

from collections.abc import Callable

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import hf_sparse.config  # noqa: F401  (fills the registries)
from hf_sparse import SparsityConfig
from hf_sparse.metrics import Inputs
from hf_sparse.patterns import Pattern
from hf_sparse.registry import METRICS, Entry

OUT, IN = 12, 8
NAMES = [entry.name for entry in METRICS]


def gram_of(own: torch.Tensor) -> torch.Tensor:
    """X^T X of some input with these norms, whose features are correlated a little."""
    squares = own.double() ** 2
    return torch.diag(squares * 0.9) + 0.1 * torch.outer(own.double(), own.double())


def inputs_for(entry: Entry, own: torch.Tensor, consumer: torch.Tensor, **options: float) -> Inputs:
    values = {"norm": own, "gram": gram_of(own)}, {"norm": consumer}
    needed = [
        {name: found[name] for name in names}
        for found, names in zip(values, (entry.needs, entry.consumer_needs), strict=True)
    ]
    return Inputs(needed[0], needed[1], METRICS.resolve_options(entry.name, dict(options)))


def score(name: str, weight: torch.Tensor, own: torch.Tensor, consumer: torch.Tensor, **options: float) -> torch.Tensor:
    return METRICS[name].function(weight, inputs_for(METRICS[name], own, consumer, **options))


def random(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=generator)
    return weight, torch.rand(IN, generator=generator) * 10 + 0.1, torch.rand(OUT, generator=generator) * 10 + 0.1


Array = numpy.ndarray


def brain_surgeon(w: Array, x: Array, z: Array) -> Array:
    gram = gram_of(torch.from_numpy(x)).numpy()
    inverse = numpy.linalg.inv(gram + 0.01 * numpy.trace(gram) / len(x) * numpy.eye(len(x)))
    return w**2 / numpy.diag(inverse)


FORMULAS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "sparsegpt": brain_surgeon,
    "magnitude": lambda w, x, z: numpy.abs(w),
    "wanda": lambda w, x, z: numpy.abs(w) * x[None, :],
    "dass": lambda w, x, z: numpy.abs(w) * numpy.sqrt(z)[:, None],
    "ria": lambda w, x, z: (
        (numpy.abs(w) / numpy.abs(w).sum(1, keepdims=True) + numpy.abs(w) / numpy.abs(w).sum(0)) * numpy.sqrt(x)
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("seed", range(3))
def test_the_formula(name: str, seed: int) -> None:
    weight, own, consumer = random(seed)
    expected = FORMULAS[name](weight.double().numpy(), own.double().numpy(), consumer.double().numpy())
    numpy.testing.assert_allclose(score(name, weight, own, consumer).double().numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("exponent", [0.0, 0.25, 0.5, 1.0, 2.0])
def test_exponents_are_on_the_norm_itself_not_on_its_square(exponent: float) -> None:
    weight, own, consumer = random()
    torch.testing.assert_close(
        score("dass", weight, own, consumer, exponent=exponent), weight.abs() * consumer[:, None] ** exponent
    )
    share = weight.abs() / weight.abs().sum(1, keepdim=True) + weight.abs() / weight.abs().sum(0)
    torch.testing.assert_close(score("ria", weight, own, consumer, exponent=exponent), share * own**exponent)


def test_defaults_are_as_published() -> None:
    assert METRICS["dass"].options == {"exponent": 0.5}
    assert METRICS["ria"].options == {"exponent": 0.5}
    assert METRICS["wanda"].options == METRICS["magnitude"].options == {}


@pytest.mark.parametrize(
    ("name", "n_m_axis", "unstructured_axis"),
    [
        ("magnitude", "input", "site"),
        ("wanda", "input", "input"),
        ("dass", "output", "output"),
        ("ria", "input", "site"),
    ],
)
def test_weights_compete_where_they_did_in_the_publication(name: str, n_m_axis: str, unstructured_axis: str) -> None:
    traits = METRICS[name].traits
    assert traits.get("axis", "input") == n_m_axis
    assert traits.get("unstructured_axis", "input") == unstructured_axis


@pytest.mark.parametrize(
    ("name", "weight_power", "own_power", "consumer_power"),
    [("magnitude", 1, 0, 0), ("wanda", 1, 1, 0), ("dass", 1, 0, 0.5), ("ria", 0, 0.5, 0)],
)
@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_how_scores_scale(
    name: str, weight_power: float, own_power: float, consumer_power: float, factor: float
) -> None:
    weight, own, consumer = random()
    plain = score(name, weight, own, consumer)
    torch.testing.assert_close(score(name, factor * weight, own, consumer), factor**weight_power * plain)
    torch.testing.assert_close(score(name, weight, factor * own, consumer), factor**own_power * plain)
    torch.testing.assert_close(score(name, weight, own, factor * consumer), factor**consumer_power * plain)


SMALL = arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12)
VALUES = st.floats(-1e4, 1e4, width=32)  # zeros and subnormal numbers too


@pytest.mark.parametrize("name", NAMES)
@given(weight=SMALL.flatmap(lambda shape: arrays.arrays("float32", shape, elements=VALUES)), data=st.data())
def test_every_metric_keeps_the_shape_and_gives_finite_scores(name: str, weight: Array, data: st.DataObject) -> None:
    norms = st.floats(0, 1e4, width=32)
    own = data.draw(arrays.arrays("float32", weight.shape[1], elements=norms))
    consumer = data.draw(arrays.arrays("float32", weight.shape[0], elements=norms))
    before = weight.copy()
    scores = score(name, torch.from_numpy(weight), torch.from_numpy(own), torch.from_numpy(consumer))
    assert scores.shape == weight.shape
    assert scores.dtype == torch.float32
    assert torch.isfinite(scores).all()
    assert (scores >= 0).all()
    numpy.testing.assert_array_equal(weight, before)  # a metric changes nothing


@pytest.mark.parametrize("name", NAMES)
def test_a_sign_does_not_matter(name: str) -> None:
    weight, own, consumer = random()
    assert torch.equal(score(name, -weight, own, consumer), score(name, weight, own, consumer))


def test_rows_and_columns_of_zeros_score_zero_under_ria() -> None:
    weight, own, consumer = random()
    weight[2], weight[:, 5] = 0.0, 0.0
    scores = score("ria", weight, own, consumer)
    assert torch.isfinite(scores).all()
    assert not scores[2].any()
    assert not scores[:, 5].any()
    rest = torch.ones_like(scores, dtype=torch.bool)
    rest[2], rest[:, 5] = False, False
    assert (scores[rest] > 0).all()


# Whole numbers, so that products round alike and equal weights stay equal.
WHOLE = arrays.arrays("float32", st.tuples(st.integers(1, 8), st.integers(1, 24)), elements=st.integers(-20, 20))


@given(
    weight=WHOLE,
    n_m=st.sampled_from(["1:2", "2:4", "1:4", "4:8", "3:5"]),
    exponent=st.sampled_from([0.25, 0.5, 1.0]),
    data=st.data(),
)
def test_dass_with_groups_along_the_input_is_magnitude(
    weight: Array, n_m: str, exponent: float, data: st.DataObject
) -> None:
    rows = weight.shape[0]
    consumer = torch.from_numpy(data.draw(arrays.arrays("float32", rows, elements=st.floats(2.0**-7, 128, width=32))))
    pattern, matrix = Pattern.parse(n_m), torch.from_numpy(weight)
    scores = score("dass", matrix, torch.ones(weight.shape[1]), consumer, exponent=exponent)
    assert torch.equal(pattern.mask(scores, 0.5, "input"), pattern.mask(matrix.abs(), 0.5, "input"))


def test_dass_with_groups_along_the_output_is_not_magnitude() -> None:
    weight, own, consumer = random()
    masks = [Pattern(2, 4).mask(score(name, weight, own, consumer), 0.5, "output") for name in ("dass", "magnitude")]
    assert not torch.equal(*masks)


def test_a_metric_is_one_function_in_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(METRICS, "_entries", dict(METRICS._entries))

        @METRICS.register("squares", needs=("norm",), options={"bias": 0.0})
        def squares(weight: torch.Tensor, inputs: Inputs) -> torch.Tensor:
            """The square of each weight's product."""
            return (weight * inputs.own["norm"]).square() + inputs.options["bias"]

        config = SparsityConfig(metric="squares", options={"squares": {"bias": 1.0}})
        assert config.options_of("squares") == {"bias": 1.0}
        weight, own, consumer = random()
        torch.testing.assert_close(score("squares", weight, own, consumer, bias=1.0), (weight * own) ** 2 + 1)
    assert "squares" not in METRICS
