"""Figures that predictors carry: what they cost and gained when they were measured, kept in their own file."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from types import NoneType
from typing import Any, Self, get_args, get_type_hints

from hf_sparse.errors import CheckpointError
from hf_sparse.text import shown

_MOST = 200


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measurement of the predictors of one model at one choice of shares."""

    neurons: str  # share kept, in words
    heads: str
    text: str  # that was measured on
    fingerprint: str
    window: int  # tokens
    tokens: int
    dense: float  # mean cross entropy of the next token without predictors, in nats
    loss: float  # with them, masks for each token
    recall_neurons: float | None = None  # share of the right units among those chosen, mean over blocks
    recall_heads: float | None = None
    dense_speed: float | None = None  # generated tokens a second without predictors
    speed: float | None = None  # with them, all of their work included
    share_of_time: float | None = None  # of the predictors' own work in the time of a generated token
    machine: str = ""  # that the speeds were measured on
    versions: str = ""

    @classmethod
    def from_dict(cls, values: object) -> Self:
        """Raises: CheckpointError for anything that `to_dict` does not give, as a file may come from anyone."""
        names = {item.name for item in fields(cls)}
        if not isinstance(values, Mapping) or set(values) != names:
            raise CheckpointError("a figure of the predictors has other fields than this version knows; measure again.")
        for name, hint in get_type_hints(cls).items():
            kinds, value = get_args(hint) or (hint,), values[name]
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            fits = {
                str: isinstance(value, str),
                NoneType: value is None,
                float: number,
                int: number and value == int(value),
            }
            if not any(fits[kind] for kind in kinds):
                raise CheckpointError(f"a figure of the predictors has {name}={shown(value)}; measure again.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def rise(self) -> float:
        """By how much the log perplexity is above the dense model's."""
        return self.loss - self.dense

    @property
    def same(self) -> tuple[object, ...]:
        """Two figures with equal ones are of one measurement: the later takes the place of the earlier."""
        return self.neurons, self.heads, self.fingerprint, self.window, self.tokens


def read_figures(values: object) -> list[Figure]:
    """Those of a file; raises CheckpointError."""
    if not isinstance(values, list) or len(values) > _MOST:
        raise CheckpointError(f"the figures of the predictors are no list of at most {_MOST}; measure again.")
    return [Figure.from_dict(value) for value in values]


def measured_again(known: Sequence[Figure], found: Sequence[Figure]) -> list[Figure]:
    """Known figures with new ones in the place of those that were measured in the same way."""
    new = {figure.same for figure in found}
    return [*(old for old in known if old.same not in new), *found]
