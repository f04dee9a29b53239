"""What is foretold, for people and for machines."""

from dataclasses import asdict, dataclass
from typing import Any

from hf_sparse.cost import Rates
from hf_sparse.forecast.phases import Phase
from hf_sparse.room import Room, shown

UNKNOWN = "not foretold"


@dataclass(frozen=True)
class Forecast:
    """What a run will need; bytes and seconds."""

    model: str
    destination: str | None
    stream: bool
    ranks: int
    blocks: int
    parameters: int
    weights_pruned: int  # in sites that are targeted
    tokens: int  # of calibration, at most
    phases: tuple[Phase, ...]
    process: int  # private bytes of this process before any work, which a run has too
    memory: int  # private bytes at the peak, beside `process`
    disk: dict[str, int]
    memory_left: Room | None
    disk_left: Room | None
    problems: tuple[Exception, ...]
    measuring: float  # seconds that the forecast took
    rates: Rates
    solvers: dict[str, float]
    threads: int

    @property
    def seconds(self) -> float | None:
        """Of all phases; None where one of them is not foretold."""
        found = [phase.seconds for phase in self.phases]
        return None if None in found else sum(value for value in found if value is not None)

    @property
    def mapped(self) -> int:
        """Bytes of pages of mapped files at the peak."""
        return max(phase.mapped for phase in self.phases)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; errors as their messages."""
        return {
            **asdict(self), "phases": [asdict(phase) for phase in self.phases], "problems": [str(error) for error in self.problems],
            "seconds": self.seconds, "mapped": self.mapped,
        }  # fmt: skip

    def __str__(self) -> str:
        way = "from disk to disk" if self.stream else "in memory"
        lines = [
            f"{self.model}: {self.parameters:,} parameters, {self.weights_pruned:,} of them in sites to prune, {self.blocks} blocks; "
            f"{self.tokens:,} calibration tokens at most; {way}, {self.ranks} process{'es' if self.ranks > 1 else ''}",
            f"{'phase':<36} {'time':>13} {'memory':>10} {'mapped':>10} {'disk':>10}",
        ]
        for phase in self.phases:
            time = UNKNOWN if phase.seconds is None else duration(phase.seconds)
            sizes = " ".join(f"{shown(size) if size else '-':>10}" for size in (phase.memory, phase.mapped, phase.disk))
            lines.append(f"{phase.name:<36} {time:>13} {sizes}" + (f"  {phase.note}" if phase.note else ""))
        known = sum(phase.seconds or 0.0 for phase in self.phases)
        total = duration(known) if self.seconds is not None else f"more than {duration(known)}"
        lines.append(
            f"in all {total} on {self.threads} thread{'s' if self.threads > 1 else ''}; measured in {self.measuring:.1f} s"
        )
        left = f"; left are {shown(self.memory_left.bytes)} ({self.memory_left.limit})" if self.memory_left else ""
        lines.append(f"memory: {shown(self.memory)} beside the {shown(self.process)} of the process itself{left}")
        parts = ", ".join(f"{name} {shown(size)}" for name, size in self.disk.items() if size)
        left = f"; left are {shown(self.disk_left.bytes)} in {self.disk_left.limit}" if self.disk_left else ""
        lines.append(f"disk: {parts}{left}")
        return "\n".join([*lines, *(f"cannot fit: {error}" for error in self.problems)])


def duration(seconds: float) -> str:
    """Seconds for people."""
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.1f} s"
