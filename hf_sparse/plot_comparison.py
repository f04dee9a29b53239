"""Draws a comparison: what each recipe's quality cost in sparsity, in time and in memory."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hf_sparse.comparison import Comparison, Row, threads
from hf_sparse.plot import INK, frame, look, new_figure, printable, remark, save_figure, say

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOG_FROM = 10  # largest over smallest figure from which an axis is logarithmic
_BESIDE = 3  # names in a line of the legend

Figures = Sequence[tuple[Row, float]]


def plot_comparison(comparison: Comparison, path: Path) -> Path:
    """Write the picture to `path`, in the format of its suffix (PNG without one), and return the path.

    Raises: HfSparseError where matplotlib is not installed or does not know the suffix.
    """
    lines = ceil(len(comparison.rows) / _BESIDE)
    figure = new_figure(path, (13, 5 + 0.25 * lines))
    _draw(figure, comparison)
    return save_figure(figure, path)


def _draw(figure: "Figure", comparison: Comparison) -> None:
    metric, name = str(comparison.dense["metric"]), Path(comparison.model).name or comparison.model_class
    title = f"{printable(name)}\n{metric} on {printable(str(comparison.dense['text']))}"
    figure.suptitle(title, fontsize=12, fontweight="bold", color=INK, parse_math=False)
    panels: list[tuple[str, Callable[[Row], float | None]]] = [
        (
            "sparsity of the sites (%), equal ones side by side",
            lambda row: None if row.sparsity is None else 100 * row.sparsity,
        ),
        (f"CPU seconds of pruning ({threads(comparison.threads)})", lambda row: row.cpu_seconds),
        ("extra memory (MiB)", lambda row: None if row.memory_bytes is None else row.memory_bytes / 2**20),
    ]
    done = [row for row in comparison.rows if row.value is not None]
    axes = figure.subplots(1, len(panels), sharey=True)
    for panel, (label, figure_of) in zip(axes, panels, strict=True):
        frame(panel, label)
        panel.margins(0.12)
        found = [(row, value) for row in done if (value := figure_of(row)) is not None]
        _points(panel, comparison, found, spread_out=panel is axes[0])
        if missing := len(comparison.rows) - len(found):
            remark(panel, f"not measured for {missing} of {len(comparison.rows)} recipes")
    axes[0].set_ylabel(metric)
    axes[0].set_xlim(*_widened(*axes[0].get_xlim()))
    values = [float(comparison.dense["value"]), *(edge for row in done for edge in row.spread or ())]
    _scale(axes[0], "y", values)
    _legend(figure, comparison)


def _points(axes: "Axes", comparison: Comparison, found: Figures, spread_out: bool) -> None:
    axes.axhline(float(comparison.dense["value"]), color=INK, linewidth=1, linestyle="--")
    if not found:
        axes.set_xticks([])
        say(axes, "not measured")
        return
    places = _apart([x for _, x in found]) if spread_out else [x for _, x in found]
    for (row, _), x in zip(found, places, strict=True):
        colour, marker = look(comparison.rows.index(row))
        value, (low, high) = row.value or 0.0, row.spread or (0.0, 0.0)
        spread = [[value - low], [high - value]] if len(row.draws) > 1 else None
        axes.errorbar(
            [x], [value], yerr=spread, color=colour, marker=marker, markersize=8, capsize=3, linestyle="none", markeredgecolor="white",
        )  # fmt: skip
    if not spread_out:
        _scale(axes, "x", places)


def _apart(values: Sequence[float]) -> list[float]:
    """Equal values side by side, in places that stay nearer to their own value than to any other."""
    groups = sorted({round(value, 2) for value in values})
    room = min([4.0, *(right - left for left, right in pairwise(groups))])
    counts, met = Counter(round(value, 2) for value in values), Counter[float]()
    places = []
    for value in values:
        count = counts[round(value, 2)]
        places.append(value + 0.8 * room * ((met[round(value, 2)] + 0.5) / count - 0.5))
        met[round(value, 2)] += 1
    return places


def _widened(low: float, high: float) -> tuple[float, float]:
    """At least ten points wide: one sparsity alone would be drawn with meaningless decimals."""
    missing = max(0.0, 10 - (high - low)) / 2
    return low - missing, high + missing


def _scale(axes: "Axes", which: Literal["x", "y"], values: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers where a linear one would press most points together."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if min(values) <= 0 or max(values) / min(values) < _LOG_FROM:
        return
    if which == "x":
        axes.set_xscale("log")
    else:
        axes.set_yscale("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    steps = (1, 2, 5) if max(values) / min(values) < _LOG_FROM**2 else (1,)
    axis.set_major_locator(LogLocator(subs=steps, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: "Figure", comparison: Comparison) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=INK, linestyle="--", linewidth=1)]
    labels = ["dense"]
    for number, row in enumerate(comparison.rows):
        colour, marker = look(number)
        handles.append(Line2D([], [], color=colour, marker=marker, markersize=8, linestyle="none"))
        # matplotlib hides labels that begin with an underscore.
        labels.append((printable(row.name).lstrip("_") or "unnamed") + (" (failed)" if row.error is not None else ""))
    legend = figure.legend(
        handles=handles, labels=labels, loc="outside lower center", ncols=_BESIDE, frameon=False, fontsize=10
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a dollar sign in a name is no formula
