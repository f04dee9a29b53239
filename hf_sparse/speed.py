"""Speeds as a report keeps them: what `hf-sparse bench` measured, each row with the machine that it was measured on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from hf_sparse.errors import CheckpointError
from hf_sparse.text import shown

_MOST = 1000


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast one way of working was; nothing of it is a property of the model alone."""

    work: str  # "2048 x 8192, 50 % zeros" or "generate"
    tokens: int  # in one pass
    way: str
    milliseconds: float  # median
    low: float  # a tenth of the rounds was below
    high: float
    rounds: int
    speedup: float  # over torch's dense product
    machine: str  # processor, kernels, threads, clock and versions
    whole_model: bool

    @classmethod
    def from_dict(cls, values: object) -> Self:
        """Raises: CheckpointError for anything that `to_dict` does not give, as a report may come from anyone."""
        if not isinstance(values, Mapping) or set(values) != {item.name for item in fields(cls)}:
            raise CheckpointError("a speed in the report has other fields than this version knows; measure again.")
        for item in fields(cls):
            value = values[item.name]
            number = (
                isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
            )
            fits = {
                str: isinstance(value, str),
                bool: isinstance(value, bool),
                float: number,
                int: number and value == int(value),
            }
            if not fits[item.type]:  # type: ignore[index]
                raise CheckpointError(f"a speed in the report has {item.name}={shown(value)}; measure again.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def same(self) -> tuple[object, ...]:
        """Two speeds with equal ones are of one measurement: the later takes the place of the earlier."""
        return self.work, self.tokens, self.way, self.machine


def read_speeds(values: Sequence[object]) -> list[Speed]:
    """Those of a report; raises CheckpointError."""
    if len(values) > _MOST:
        raise CheckpointError(f"the report holds {len(values)} speeds; at most {_MOST} are read.")
    return [Speed.from_dict(value) for value in values]


def measured_again(known: Sequence[object], found: Sequence[Speed]) -> list[dict[str, Any]]:
    """A report's speeds with new ones in the place of those that were measured in the same way."""
    new = {speed.same for speed in found}
    return [speed.to_dict() for speed in (*(old for old in read_speeds(known) if old.same not in new), *found)]
