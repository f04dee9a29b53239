"""Criteria: how much a head or neuron matters for one token, one file each; every module in this folder registers itself."""

from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import NamedTuple

import torch

from hf_sparse.predictors.units import BlockWeights
from hf_sparse.registry import CRITERIA, Entry


class Scores(NamedTuple):
    """One number for each unit and token; None where one kind of unit is not asked for."""

    neurons: torch.Tensor | None  # (..., neurons or blocks of neurons)
    heads: torch.Tensor | None  # (..., heads)


@dataclass(frozen=True)
class Seen:
    """What one block showed of some tokens; what a criterion did not name in its `needs` may be missing.

    Gradients are those of the summed cross entropy of the next tokens.
    """

    weights: BlockWeights
    activation: torch.Tensor | None = None  # input of `down` (tokens, neurons)
    heads: torch.Tensor | None = None  # input of `o` (tokens, heads, size)
    pre_activation: torch.Tensor | None = None  # what goes through the activation function (tokens, neurons)
    input: torch.Tensor | None = None  # of gate and up (tokens, hidden)
    activation_gradient: torch.Tensor | None = None
    heads_gradient: torch.Tensor | None = None
    up_gradient: torch.Tensor | None = None  # of the output of `up` (tokens, neurons)
    gate_gradient: torch.Tensor | None = None  # of the output of `gate`; None where there is none

    def get(self, name: str) -> torch.Tensor:
        """A field that the criterion needs."""
        value = getattr(self, name)
        if value is None:
            raise KeyError(f"{name} was not recorded; the criterion has to name it in its needs")
        return value


FIELDS = {
    "activation", "heads", "pre_activation", "input", "activation_gradient", "heads_gradient", "up_gradient", "gate_gradient",
}  # fmt: skip


def sees_labels(entry: Entry) -> bool:  # type: ignore[type-arg]
    """Whether a criterion looks at the tokens that follow: an oracle of it is no bound that a predictor could reach."""
    return any(need.endswith("_gradient") for need in entry.needs)


def criterion_of(name: str) -> Entry:  # type: ignore[type-arg]
    """The registered criterion of a name; an unknown one is answered with the nearest."""
    return CRITERIA[name]


for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
