"""Factorisations of Gram matrices: right where the matrix is sound, damped with a note where it is not."""

from collections.abc import Callable

import pytest
import torch

from hf_sparse.errors import ModelError
from hf_sparse.normal_equations import damped, eigen, factor, inverse_factor

FEATURES = 12


def gram(seed: int = 0, tokens: int = 50) -> torch.Tensor:
    x = torch.randn(tokens, FEATURES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x


def with_smallest(value: float) -> torch.Tensor:
    """A Gram matrix whose smallest eigenvalue is `value` times the mean of its diagonal."""
    values, vectors = torch.linalg.eigh(gram())
    values[0] = 0.0
    values[0] = value * values.sum() / (FEATURES - value)
    return (vectors * values) @ vectors.T


def from_factor(matrix: torch.Tensor, damping: float, notes: list[str]) -> torch.Tensor:
    lower = factor(matrix, damping, notes)
    return lower @ lower.T


def from_inverse_factor(matrix: torch.Tensor, damping: float, notes: list[str]) -> torch.Tensor:
    upper = inverse_factor(matrix, damping, notes)
    assert torch.equal(upper, upper.triu())
    return torch.linalg.inv(upper.T @ upper)


def from_eigen(matrix: torch.Tensor, damping: float, notes: list[str]) -> torch.Tensor:
    values, vectors = eigen(matrix, damping, notes)
    assert (values >= 0).all()
    return (vectors * values) @ vectors.T


Rebuild = Callable[[torch.Tensor, float, list[str]], torch.Tensor]
ALL = [from_factor, from_inverse_factor, from_eigen]
CHOLESKY = [from_factor, from_inverse_factor]


def test_damping_is_a_share_of_the_mean_diagonal() -> None:
    matrix = gram()
    mean = float(matrix.diagonal().mean())
    torch.testing.assert_close(damped(matrix, 0.5), matrix + 0.5 * mean * torch.eye(FEATURES, dtype=torch.float64))
    assert torch.equal(damped(matrix, 0.0), matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_damping_makes_a_copy_in_double_precision(dtype: torch.dtype) -> None:
    matrix = gram().to(dtype)
    before = matrix.clone()
    found = damped(matrix, 0.01)
    assert found.dtype == torch.float64
    found.zero_()
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("rebuild", ALL)
@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_factors_give_the_damped_matrix_back(rebuild: Rebuild, damping: float) -> None:
    matrix, notes = gram(), []
    before = matrix.clone()
    torch.testing.assert_close(rebuild(matrix, damping, notes), damped(matrix, damping), rtol=1e-9, atol=1e-9)
    assert notes == []
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("rebuild", CHOLESKY)
@pytest.mark.parametrize(
    ("smallest", "damping", "used"), [(-0.05, 0.01, 0.1), (-0.5, 0.01, 1), (-1e-3, 0.0, 0.01), (-1e-7, 0.0, 1e-6)]
)
def test_damping_is_raised_in_steps_and_noted(rebuild: Rebuild, smallest: float, damping: float, used: float) -> None:
    matrix, notes = with_smallest(smallest), []
    torch.testing.assert_close(rebuild(matrix, damping, notes), damped(matrix, used), rtol=1e-6, atol=1e-6)
    assert notes == [f"damping raised from {damping:g} to {used:g} of the mean diagonal to factorise"]


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("rebuild", ALL)
def test_fewer_tokens_than_features_are_enough(rebuild: Rebuild, tokens: int) -> None:
    matrix, notes = gram(tokens=tokens), []
    torch.testing.assert_close(rebuild(matrix, 0.01, notes), damped(matrix, 0.01), rtol=1e-8, atol=1e-8)
    assert notes == []


@pytest.mark.parametrize("rebuild", ALL)
def test_an_input_that_was_always_zero_gets_the_identity(rebuild: Rebuild) -> None:
    zero = torch.zeros(FEATURES, FEATURES)
    torch.testing.assert_close(rebuild(zero, 0.01, []), torch.eye(FEATURES, dtype=torch.float64))


def test_negative_eigenvalues_are_cut_off_rather_than_damped() -> None:
    notes: list[str] = []
    values, _ = eigen(with_smallest(-0.05), 0.0, notes)
    assert (float(values[0]), notes) == (0.0, [])


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("function", [factor, inverse_factor, eigen])
def test_values_that_are_not_finite_are_refused(function: Callable[..., object], broken: float) -> None:
    matrix = gram()
    matrix[3, 4] = broken
    with pytest.raises(ModelError, match=r"12 inputs.*not finite.*wider dtype"):
        function(matrix, 0.01, [])


@pytest.mark.parametrize("function", [factor, inverse_factor])
def test_a_matrix_that_no_damping_repairs_is_refused(function: Callable[..., object]) -> None:
    with pytest.raises(ModelError, match="12 inputs cannot be factorised even with damping"):
        function(-gram(), 0.01, [])
