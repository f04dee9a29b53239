"""What a comparison found, as a table for people, as Markdown and as JSON."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from hf_sparse.replace import write_whole
from hf_sparse.report_text import percent

FORMAT = 1
_HEADS = ("recipe", "pattern", "zeros", "{metric}", "gap", "CPU seconds", "CPU ratio", "extra memory")
_UNKNOWN = "not measured"


@dataclass(frozen=True)
class Draw:
    """One pruning: a recipe with one seed for its calibration samples."""

    seed: int
    value: float  # of the sparse model, on the evaluation text
    sparsity: float
    cpu_seconds: float  # of pruning alone; work shared with other recipes is counted as if it had been done again
    seconds: float  # the same by the clock on the wall
    memory_bytes: int | None  # most by which the process grew while pruning; None: not measured
    calibration: dict[str, Any] | None  # source, fingerprint, samples and tokens


@dataclass
class Row:
    """A recipe with its draws. Figures are medians over them, memory is the most; None where it failed."""

    name: str
    config: dict[str, Any]
    draws: list[Draw] = field(default_factory=list)
    error: str | None = None  # why the recipe could not be run to its end
    notes: list[str] = field(default_factory=list)  # of the first pruning's report

    @property
    def pattern(self) -> str:
        return str(self.config["pattern"])

    @property
    def value(self) -> float | None:
        return self._median("value")

    @property
    def spread(self) -> tuple[float, float] | None:
        """The lowest and the highest value of the draws."""
        values = [draw.value for draw in self.draws]
        return None if self.error is not None or not values else (min(values), max(values))

    @property
    def sparsity(self) -> float | None:
        return self._median("sparsity")

    @property
    def cpu_seconds(self) -> float | None:
        return self._median("cpu_seconds")

    @property
    def seconds(self) -> float | None:
        return self._median("seconds")

    @property
    def memory_bytes(self) -> int | None:
        found = [draw.memory_bytes for draw in self.draws if draw.memory_bytes is not None]
        return max(found) if self.error is None and found and len(found) == len(self.draws) else None

    def _median(self, name: str) -> float | None:
        return None if self.error is not None or not self.draws else median(getattr(d, name) for d in self.draws)


@dataclass
class Comparison:
    """All recipes on one model and one text. `str()` is a table, `markdown()` another, `to_dict()` JSON, `plot(path)` a picture."""

    model: str
    model_class: str
    parameters: int
    dtype: str
    dense: dict[str, Any]  # fields of evaluate.Measurement: metric, value, tokens, window, text, fingerprint
    reference: str  # name of the row that gaps and CPU seconds are set against
    draws: int
    versions: dict[str, str]
    threads: int
    planned: int  # recipes that were given
    rows: list[Row] = field(default_factory=list)
    interrupted: bool = False

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if row.error is not None]

    def loss(self, row: Row) -> float | None:
        """How far a row lies above the dense model: in log-perplexity, or in the loss where that is what was measured."""
        if row.value is None:
            return None
        if self.dense["metric"] == "perplexity":
            return math.log(row.value) - math.log(self.dense["value"])
        return row.value - float(self.dense["value"])

    def gap(self, row: Row) -> float | None:
        """`loss` with the reference's as 1; None where the reference lost nothing or failed."""
        reference = self.row(self.reference)
        own, unit = self.loss(row), None if reference is None else self.loss(reference)
        return None if own is None or unit is None or unit <= 0 else own / unit

    def cpu_ratio(self, row: Row) -> float | None:
        """CPU seconds with the reference's as 1."""
        reference = self.row(self.reference)
        unit = None if reference is None else reference.cpu_seconds
        return None if row.cpu_seconds is None or not unit else row.cpu_seconds / unit

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold."""
        return {"format": FORMAT, **asdict(self), "rows": [self._row_dict(row) for row in self.rows]}

    def _row_dict(self, row: Row) -> dict[str, Any]:
        low, high = row.spread or (None, None)
        return {
            "name": row.name, "pattern": row.pattern, "sparsity": row.sparsity, "value": row.value, "lowest": low, "highest": high,
            "loss": self.loss(row), "gap": self.gap(row), "cpu_seconds": row.cpu_seconds, "cpu_ratio": self.cpu_ratio(row),
            "seconds": row.seconds, "memory_bytes": row.memory_bytes, "error": row.error, "notes": row.notes, "config": row.config,
            "draws": [asdict(draw) for draw in row.draws],
        }  # fmt: skip

    def save(self, path: str | Path) -> Path:
        """Write the JSON, whole or not at all."""
        write_whole(Path(path), (json.dumps(self.to_dict(), indent=1) + "\n").encode())
        return Path(path)

    def plot(self, path: str | Path) -> Path:
        """Draw the value against sparsity, time and memory into a picture file (needs matplotlib)."""
        from hf_sparse.plot_comparison import plot_comparison  # matplotlib is an extra and slow to import

        return plot_comparison(self, Path(path))

    # ------------------------------------------------------------------------------------------------ for people

    def markdown(self) -> str:
        """The table and what its figures depend on, to be pasted into a document."""
        rows = [[cell.replace("|", "\\|") for cell in cells] for cells in self._cells()]
        rows.insert(1, ["---", "---", *["---:"] * (len(_HEADS) - 2)])
        lines = ["| " + " | ".join(cells) + " |" for cells in rows]
        told = "; ".join([*self._about(), *self._surroundings()])
        return "\n".join([*lines, "", f"({told}.)", *(f"\n{line}" for line in self._troubles())])

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADS))]
        lines = ["  ".join(_aligned(line, widths)).rstrip() for line in cells]
        return "\n".join([*self._about(), "", *lines, "", *self._surroundings(), *self._troubles()])

    def _cells(self) -> list[list[str]]:
        metric = str(self.dense["metric"])
        dense = ["dense", "", "", f"{self.dense['value']:#.4g}", _number(0.0, ".3f"), "", "", ""]
        return [[head.format(metric=metric) for head in _HEADS], dense, *(self._row_cells(row) for row in self.rows)]

    def _row_cells(self, row: Row) -> list[str]:
        if row.error is not None or row.value is None:
            return [row.name, row.pattern, "", "failed", "", "", "", ""]
        spread = row.spread if len(row.draws) > 1 else None
        memory = row.memory_bytes
        return [
            row.name, row.pattern, percent(row.sparsity),
            f"{row.value:#.4g}" + (f" ({spread[0]:#.4g} to {spread[1]:#.4g})" if spread else ""),
            _number(self.gap(row), ".3f"), _number(row.cpu_seconds, ".2f"), _number(self.cpu_ratio(row), ".2f"),
            _UNKNOWN if memory is None else f"{memory / 2**20:.1f} MiB",
        ]  # fmt: skip

    def _about(self) -> Iterator[str]:
        dense = self.dense
        window = "" if dense["window"] is None else f" in windows of {dense['window']}"
        yield f"{self.model or self.model_class}, {self.parameters:,} parameters, {self.dtype}"
        yield f"{dense['metric']} on {dense['text']}, {dense['tokens']:,} predicted tokens{window}, fingerprint {dense['fingerprint']}"
        yield from self._calibrations()

    def _calibrations(self) -> Iterator[str]:
        found: dict[tuple[Any, ...], dict[int, str]] = {}
        for draw in (draw for row in self.rows for draw in row.draws if draw.calibration is not None):
            data = draw.calibration or {}
            key = (data["source"], data["samples"], data["tokens"])
            found.setdefault(key, {})[draw.seed] = data["fingerprint"]
        for (source, samples, tokens), seeds in found.items():
            drawn = ", ".join(f"seed {seed}: {mark}" for seed, mark in seeds.items())
            yield f"calibrated on {source}, {samples} samples, {tokens:,} tokens, fingerprints by seed ({drawn})"

    def _surroundings(self) -> Iterator[str]:
        many = f"; {self.draws} draws of the calibration samples, median (lowest to highest)" if self.draws > 1 else ""
        what = "log-perplexity" if self.dense["metric"] == "perplexity" else "loss"
        yield f"gap: {what} above the dense model's, {self.reference} = 1{many}"
        yield f"CPU seconds and extra memory are those of pruning alone, {threads(self.threads)}"
        yield ", ".join(f"{name} {version}" for name, version in self.versions.items() if version != "not installed")

    def _troubles(self) -> Iterator[str]:
        yield from (f"{row.name} failed: {row.error}" for row in self.failed)
        if self.interrupted:
            yield f"interrupted: {len(self.rows)} of {self.planned} recipes were finished"


def threads(number: int) -> str:
    return f"{number} thread{'' if number == 1 else 's'}"


def _number(value: float | None, how: str) -> str:
    return _UNKNOWN if value is None else format(value, how)


def _aligned(cells: list[str], widths: list[int]) -> Iterator[str]:
    """Words to the left, figures to the right."""
    for column, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        yield cell.ljust(width) if column < 2 else cell.rjust(width)
