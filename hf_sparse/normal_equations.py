"""Makes Gram matrices safe to factorise: damping, raised in steps until the factorisation succeeds."""

from collections.abc import Callable
from typing import TypeVar

import torch

from hf_sparse.errors import ModelError

_FLOOR = 1e-12  # of the mean diagonal
_STEPS = 8  # how often damping is raised tenfold before giving up
T = TypeVar("T")


def damped(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """The Gram matrix (in, in) with `damping` times its mean diagonal added to the diagonal; a copy in fp64.

    Inputs that were always zero get the damping alone, so their weights stay as they are wherever they are kept.
    """
    result = gram.double().clone()
    if not bool(torch.isfinite(result).all()):
        raise ModelError(
            f"the Gram matrix of {len(gram)} inputs has values that are not finite; calibrate on other data or in a wider dtype."
        )
    diagonal = result.diagonal()
    mean = float(diagonal.mean())
    diagonal.add_(damping * mean if mean else 1.0)
    diagonal.clamp_min_(_FLOOR * mean)  # an input that was always zero, without damping
    return result


def _attempts(gram: torch.Tensor, damping: float, notes: list[str], factorise: Callable[[torch.Tensor], T | None]) -> T:
    used = damping
    for _ in range(_STEPS):
        found = factorise(damped(gram, used))
        if found is not None:
            if used != damping:
                notes.append(f"damping raised from {damping:g} to {used:g} of the mean diagonal to factorise")
            return found
        used = max(10 * used, 1e-6)
    raise ModelError(
        f"the Gram matrix of {len(gram)} inputs cannot be factorised even with damping {used / 10:g}; its values are broken. "
        "Calibrate on other data or in a wider dtype."
    )


def inverse_factor(gram: torch.Tensor, damping: float, notes: list[str]) -> torch.Tensor:
    """Upper Cholesky factor U of the damped inverse, H^-1 = U^T U, (in, in) in fp64."""

    def factorise(matrix: torch.Tensor) -> torch.Tensor | None:
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if bool(failed):
            return None
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        return None if bool(failed) or not bool(torch.isfinite(upper).all()) else upper

    return _attempts(gram, damping, notes, factorise)


def factor(gram: torch.Tensor, damping: float, notes: list[str]) -> torch.Tensor:
    """Lower Cholesky factor of the damped matrix, (in, in) in fp64, for `torch.cholesky_solve`."""

    def factorise(matrix: torch.Tensor) -> torch.Tensor | None:
        lower, failed = torch.linalg.cholesky_ex(matrix)
        return None if bool(failed) else lower

    return _attempts(gram, damping, notes, factorise)


def eigen(gram: torch.Tensor, damping: float, notes: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues (in,), none negative, and eigenvectors (in, in) of the damped matrix, in fp64."""

    def factorise(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        try:
            values, vectors = torch.linalg.eigh(matrix)
        except RuntimeError:  # torch's LinAlgError is one, and so is what some back ends raise
            return None
        return (values.clamp_min(0), vectors) if bool(torch.isfinite(values).all()) else None

    return _attempts(gram, damping, notes, factorise)
