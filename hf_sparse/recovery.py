"""What a training after (or while) pruning was: one entry of the report, and the checks for everything that a report holds."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Self, get_args, get_origin, get_type_hints

from hf_sparse.errors import CheckpointError
from hf_sparse.schema import LARGEST_NUMBER
from hf_sparse.text import one_line, shown, without_secrets

_DEEPEST = 16  # lists and mappings inside each other; far deeper ones could be read, but no longer be written
_LONGEST_LINE = 2000


@dataclass(kw_only=True)
class Recovery:
    """One training that kept the zeros. Counts go over all processes; None means not measured, or not known.

    `Report.add_recovery` puts it into the report, at every save during a training as well.
    """

    method: str  # what trained, such as "full fine-tuning" or "masked LoRA, r 16"
    callbacks: list[str]
    data: str  # what was trained on
    fingerprint: str | None = None  # of the data
    steps: int  # of the optimizer
    tokens: int  # positions trained on, padding not counted
    sequences: int
    learning_rate: float | None  # the highest; None where the loop did not tell
    schedule: str
    optimizer: str
    batch_size: int  # sequences a step, over all processes and accumulation
    precision: str
    seconds: float  # wall time
    processes: int
    loss: str  # the objective in words, such as "cross-entropy" or "distillation from user/model, temperature 1"
    settings: dict[str, Any] = field(default_factory=dict)  # a callback's own numbers
    metric: str | None = None  # such as "eval_loss"
    before: float | None = None  # that metric when the training began
    after: float | None = None
    zeros_before: int  # in the sites
    zeros_after: int
    size: int  # weights in the sites
    zeros_lost: int  # weights that were zero before and are not after
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` takes back: a figure that is not finite becomes None, what JSON has not its own words."""
        return {item.name: _plain(getattr(self, item.name)) for item in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: object) -> Self:
        """Read back what `to_dict` gave; fields of later versions are passed over.

        Raises: CheckpointError for anything else, as the data may come from anyone.
        """
        if not isinstance(values, Mapping):
            raise CheckpointError(f"this is no report of hf_sparse: a recovery is {shown(values)}.")
        fields = dataclasses.fields(cls)
        needed = [item.name for item in fields if item.default is item.default_factory is dataclasses.MISSING]
        if missing := [name for name in needed if name not in values]:
            raise CheckpointError(f"this is no report of hf_sparse: a recovery has no {', '.join(missing)}.")
        recovery = cls(**{item.name: values[item.name] for item in fields if item.name in values})
        for wrong in recovery._misfits():
            raise CheckpointError(f"this is no report of hf_sparse: in a recovery, {wrong}.")
        return recovery

    def _misfits(self) -> Iterable[str]:
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not fits(value, hint):
                yield f"{name} is {shown(value)}"
            elif (hint is int or name == "seconds") and value < 0:
                yield f"{name} is {value}, which is less than 0"
            elif name in ("zeros_before", "zeros_after") and fits(self.size, int) and value > self.size:
                yield f"{name} is {value}, which is more than the {self.size} weights in the sites"

    def __str__(self) -> str:
        rate = "not told" if self.learning_rate is None else f"{self.learning_rate:g}"
        figures = f"{_figure(self.before)} -> {_figure(self.after)}"
        return one_line(
            f"recovery: {self.method} on {self.data}, {self.steps} steps, {self.tokens} tokens, learning rate {rate} "
            f"({self.schedule}), {self.loss}; {self.metric or 'metric'} {figures}; zeros {self.zeros_before} -> "
            f"{self.zeros_after} of {self.size}, {self.zeros_lost} lost; {self.seconds:.1f} s",
            _LONGEST_LINE,
        )


def set_aside(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation after training: the sparse model's figure is now the one before recovery, until it is measured again."""
    if evaluation.get("sparse") is None:
        return dict(evaluation)
    before = evaluation.get("before_recovery")
    return {**evaluation, "sparse": None, "before_recovery": evaluation["sparse"] if before is None else before}


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _plain(value: Any, depth: int = _DEEPEST) -> Any:
    if isinstance(value, Mapping) and depth:
        return {str(key): _plain(item, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple) and depth:
        return [_plain(item, depth - 1) for item in value]
    if isinstance(value, float) and not abs(value) < LARGEST_NUMBER:
        return None
    return value if _is_plain(value, depth) else str(value)


# ---------------------------------------------------------------------------------------------------- what a report may hold


def fits(value: Any, hint: Any) -> bool:
    """Whether a value that was read is of the type of a dataclass's field; Any stands for what JSON can hold."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind is UnionType:
        return any(fits(value, one) for one in inner)
    if kind is list and inner == (int,) and isinstance(value, list) and set(map(type, value)) == {int}:
        return fits(min(value), int) and fits(max(value), int)  # millions, where channels were reordered
    if kind is list:
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if kind is tuple:
        return isinstance(value, tuple) and len(value) == len(inner) and all(map(fits, value, inner))
    if kind is dict:
        return isinstance(value, dict) and all(isinstance(key, str) and fits(value[key], inner[1]) for key in value)
    if hint is float:
        return _is_number(value)
    if hint is int:
        return not isinstance(value, bool) and isinstance(value, int) and abs(value) < 2**63
    return _is_plain(value, _DEEPEST) if hint is Any else isinstance(value, hint)


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and abs(value) < LARGEST_NUMBER


def _is_plain(value: object, depth: int) -> bool:
    if isinstance(value, dict):
        inside = depth > 0 and all(isinstance(key, str) for key in value)
        return inside and all(_is_plain(item, depth - 1) for item in value.values())
    if isinstance(value, list | tuple):
        return depth > 0 and all(_is_plain(item, depth - 1) for item in value)
    return value is None or isinstance(value, bool | str) or _is_number(value)


def writable(value: Any) -> Any:
    """Plain data as files may hold them: what is not finite becomes null, which reads as not measured, and secrets go."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: writable(item) for key, item in value.items()}
    return [writable(item) for item in value] if isinstance(value, list | tuple) else value
