"""Patterns: which weights may be dropped together. A pattern makes a mask (True keeps) from scores."""

import re
from dataclasses import dataclass

import torch

from hf_sparse.errors import ConfigError
from hf_sparse.patterns.n_m import n_m_mask
from hf_sparse.patterns.unstructured import unstructured_mask

AXES = ("input", "output", "site")


@dataclass(frozen=True)
class Pattern:
    """`keep` of every `group` consecutive weights stay; both None: unstructured."""

    keep: int | None = None
    group: int | None = None

    @classmethod
    def parse(cls, text: object) -> "Pattern":
        """Read "unstructured" or "N:M" with 0 < N < M; raises ConfigError for anything else."""
        if text == "unstructured":
            return cls()
        match = re.fullmatch(r"(0|[1-9][0-9]{0,3}):(0|[1-9][0-9]{0,3})", text) if isinstance(text, str) else None
        if not match:
            raise ConfigError(
                f'pattern {text!r} is not known; give "unstructured" or "N:M" such as "2:4" (2 of 4 kept).'
            )
        keep, group = int(match[1]), int(match[2])
        if not 0 < keep < group:
            raise ConfigError(
                f"pattern {text!r} keeps {keep} of {group}; N must be at least 1 and less than M, as in 2:4 or 4:8."
            )
        return cls(keep, group)

    def __str__(self) -> str:
        return "unstructured" if self.group is None else f"{self.keep}:{self.group}"

    @property
    def sparsity(self) -> float | None:
        """The share dropped by full groups; None where the pattern does not say."""
        return None if self.group is None or self.keep is None else 1 - self.keep / self.group

    def dropping(self, sparsity: float) -> "Pattern":
        """The same M with the N that drops this share, M itself where it drops nothing; unstructured stays as it is."""
        return self if self.group is None else Pattern(round(self.group * (1 - sparsity)), self.group)

    def fits_tensor_cores(self, axis: str) -> bool:
        """Whether no aligned four weights of a row keep more than two, as sparse tensor cores need it."""
        if axis != "input" or self.group is None or self.keep is None:
            return False
        return (self.keep <= 2 and self.group % 4 == 0) or (self.keep, self.group) == (1, 2)

    def mask(self, scores: torch.Tensor, sparsity: float, axis: str, rounding: str = "exact") -> torch.Tensor:
        """A bool mask (out, in), True keeps. Equal scores: the lower index is dropped first.

        `sparsity` and `rounding` ("exact" or "truncate") only matter to the unstructured pattern.
        """
        if axis not in AXES or (axis == "site" and self.group is not None):
            raise ConfigError(f"pattern {self} has no axis {axis!r}.")
        if self.group is None or self.keep is None:
            return unstructured_mask(scores, sparsity, axis, rounding)
        if axis == "output":
            return n_m_mask(scores.T, self.keep, self.group).T
        return n_m_mask(scores, self.keep, self.group)
