"""When the masks of a training change, and how far they have come at each step."""

from dataclasses import asdict, dataclass
from typing import Any

from hf_sparse.config.serialise import whole
from hf_sparse.errors import ConfigError, unknown

SHAPES = {"cubic": 3, "linear": 1}  # schedule -> power with which the distance to the target shrinks
_UPDATES = 100  # of the masks over a ramp, where nothing else is asked for


@dataclass(frozen=True)
class Schedule:
    """The steps of one training, counted in optimizer steps that are done: masks are made behind the step that ends there.

    Up to `start` the masks are those that the training began with; on the way to `end` they change behind every `every`th step
    from `start` on, and behind `end`; behind `freeze` for the last time.
    """

    start: int
    end: int
    freeze: int
    every: int
    shape: str

    def remaining(self, step: int) -> float:
        """The share of the way to the target that is still to go, 1 to 0 (Zhu and Gupta, arXiv 1710.01878, equation 1)."""
        if step >= self.end:
            return 0.0
        return (1 - max(0, step - self.start) / (self.end - self.start)) ** SHAPES[self.shape]

    def changes_at(self, step: int) -> bool:
        """Whether masks are made anew behind this step."""
        on_grid = self.start < step <= self.freeze and (step - self.start) % self.every == 0
        return step == self.end or on_grid

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.shape} from step {self.start} to step {self.end}, masks anew every {self.every} steps, frozen behind step {self.freeze}"


@dataclass(frozen=True)
class Timing:
    """A schedule as it was asked for: whole numbers are steps, others shares (0 to 1) of a training."""

    start: int | float = 0.0
    end: int | float = 0.5
    every: int | None = None  # None: about a hundred changes on the way
    freeze: int | float | None = None  # None: at the end
    shape: str = "cubic"

    def __post_init__(self) -> None:
        for name in ("start", "end", "freeze"):
            value = getattr(self, name)
            if value is not None or name != "freeze":
                _check(name, value)
        if self.every is not None:
            whole("every", self.every, 1, " step, or leave it out")
        if not isinstance(self.shape, str) or self.shape not in SHAPES:
            raise ConfigError(unknown("schedule", self.shape, SHAPES))

    def over(self, max_steps: int) -> Schedule:
        """The schedule in a training of `max_steps`.

        Raises: ConfigError where it would end after the training does, or its steps are out of order.
        """
        start, end = _step(self.start, max_steps, 0), _step(self.end, max_steps, 1)
        freeze = end if self.freeze is None else _step(self.freeze, max_steps, 1)
        if max(start, end, freeze) > max_steps:
            raise ConfigError(
                f"start={self.start!r}, end={self.end!r} and freeze={self.freeze!r} are the steps {start}, {end} and {freeze}, but the training "
                f"ends with step {max_steps}, before the target is met; give earlier steps, shares such as 0.5, or train longer."
            )
        if not start <= end <= freeze:
            raise ConfigError(
                f"start={self.start!r}, end={self.end!r} and freeze={self.freeze!r} are the steps {start}, {end} and {freeze} of {max_steps}; they "
                "must come in this order."
            )
        return Schedule(start, end, freeze, self.every or max(1, round((end - start) / _UPDATES)), self.shape)


def _check(name: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    late = isinstance(value, float) and not value <= 1  # NaN too
    if not number or late or value < 0 or (value == 0 and name != "start"):  # type: ignore[operator]
        least = "0 or more" if name == "start" else "more than 0"
        raise ConfigError(
            f"{name}={value!r} is not allowed; give a step as a whole number, or a share of the training as a number up to 1.0, {least}."
        )


def _step(value: int | float, max_steps: int, least: int) -> int:
    return value if isinstance(value, int) else max(least, round(value * max_steps))
