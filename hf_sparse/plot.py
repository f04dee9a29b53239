"""Draws a report: sparsity and block output error over the depth of the model."""

import io
import math
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hf_sparse.errors import HfSparseError
from hf_sparse.replace import write_whole
from hf_sparse.report import BlockReport, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart by colour-blind readers and in print; a sixth stack starts anew.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
INK, GRID = "#333333", "#DDDDDD"
_MARKERS = ("o", "s", "^", "D", "v", "P")
_LONGEST_NAME = 60
_LOG_FROM = 100  # largest over smallest error from which a linear axis hides the small ones


def plot_report(report: Report, path: Path) -> Path:
    """Write the picture to `path`, in the format of its suffix (PNG without one), and return the path.

    Raises: HfSparseError where matplotlib is not installed or does not know the suffix.
    """
    figure = new_figure(path)
    _draw(figure, report)
    return save_figure(figure, path)


def new_figure(path: Path, size: tuple[float, float] = (9, 6)) -> "Figure":
    """An empty figure of `size` inches that `path` can take; raises HfSparseError as `plot_report` does."""
    try:
        # These need no display and keep no state, unlike pyplot.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise HfSparseError("plots need matplotlib, which is not installed: pip install hf-sparse[plots].") from error
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08), facecolor="white")
    FigureCanvasAgg(figure)
    known = figure.canvas.get_supported_filetypes()
    if _kind(path) not in known:
        raise HfSparseError(f"a plot cannot be written as {path.suffix!r}; allowed: {', '.join(sorted(known))}.")
    return figure


def save_figure(figure: "Figure", path: Path) -> Path:
    """Write a figure whole, in the format of the path's suffix (PNG without one), and return the path."""
    picture = io.BytesIO()
    figure.savefig(picture, format=_kind(path), dpi=150)
    write_whole(path, picture.getvalue())
    return path


def _kind(path: Path) -> str:
    return path.suffix.lstrip(".").lower() or "png"


def _draw(figure: "Figure", report: Report) -> None:
    upper, lower = figure.subplots(2, 1, sharex=True)
    figure.suptitle(_title(report), fontsize=12, fontweight="bold", color=INK, parse_math=False)
    stacks = list(dict.fromkeys(block.stack for block in report.pruned_blocks))
    colours = {stack: COLOURS[number % len(COLOURS)] for number, stack in enumerate(stacks)}
    for axes in (upper, lower):
        _style(axes, report.pruned_blocks)
    _draw_sparsity(upper, report, colours)
    _draw_errors(lower, report.pruned_blocks, colours)
    lower.set_xlabel("block (position among all blocks of the model)")
    if len(stacks) > 1:
        _legend(figure, stacks, colours)


def _title(report: Report) -> str:
    name = printable(os.path.basename(report.model.rstrip("/\\")) or report.model_class)
    pattern, metric = (printable(str(report.config.get(key, "unknown"))) for key in ("pattern", "metric"))
    return f"{name}\npattern {pattern}, metric {metric}"


def printable(text: str) -> str:
    """One line of bounded length: a name comes from a file and may hold anything."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return line if len(line) <= _LONGEST_NAME else f"{line[: _LONGEST_NAME - 1]}…"


def look(number: int) -> tuple[str, str]:
    """Colour and marker of a line: thirty of them look different before the first look comes again."""
    return COLOURS[number % len(COLOURS)], _MARKERS[number // len(COLOURS) % len(_MARKERS)]


def frame(axes: "Axes", label: str, grid: Literal["both", "x", "y"] = "both") -> None:
    """What all our axes have in common; `label` stands below."""
    axes.set_facecolor("white")
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.tick_params(colors=INK)
    axes.set_xlabel(label)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _style(axes: "Axes", blocks: Sequence[BlockReport]) -> None:
    from matplotlib.ticker import MaxNLocator

    frame(axes, "", grid="y")
    for left, right in pairwise(blocks):
        if left.stack != right.stack:
            axes.axvline((left.index + right.index) / 2, color="#999999", linewidth=1, linestyle=":")
    if blocks:
        axes.set_xlim(blocks[0].index - 0.6, blocks[-1].index + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_sparsity(axes: "Axes", report: Report, colours: dict[str, str]) -> None:
    axes.set_ylabel("sparsity of the sites (%)")
    axes.set_ylim(0, 100)
    if not report.pruned_blocks:
        say(axes, "no block was pruned")
        return
    heights = [100 * block.sparsity for block in report.pruned_blocks]
    axes.bar(
        [block.index for block in report.pruned_blocks],
        heights,
        width=0.8,
        color=[colours[b.stack] for b in report.pruned_blocks],
    )
    axes.axhline(100 * report.sparsity, color=INK, linewidth=1, linestyle="--")
    remark(axes, f"dashed: all sites, {100 * report.sparsity:.2f} %")


def _draw_errors(axes: "Axes", blocks: Sequence[BlockReport], colours: dict[str, str]) -> None:
    axes.set_ylabel("relative error of\nthe block's output")
    errors = [b.output_error for b in blocks if b.output_error is not None and math.isfinite(b.output_error)]
    if not errors:
        axes.set_yticks([])
        say(axes, "not measured")
        return
    for stack, colour in colours.items():
        own = [block for block in blocks if block.stack == stack]
        heights = [math.nan if block.output_error is None else block.output_error for block in own]  # NaN leaves a gap
        axes.plot([block.index for block in own], heights, color=colour, marker="o", markersize=4, linewidth=1.6)
    if min(errors) > 0 and max(errors) / min(errors) > _LOG_FROM:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.08 * max(errors) or 1)
    if missing := len(blocks) - len(errors):
        remark(axes, f"not measured for {missing} of {len(blocks)} blocks")


def remark(axes: "Axes", text: str) -> None:
    axes.set_title(text, fontsize=9, color=INK, loc="right")


def say(axes: "Axes", text: str) -> None:
    axes.text(
        0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=12, color="#777777", style="italic"
    )


def _legend(figure: "Figure", stacks: Sequence[str], colours: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    # matplotlib hides labels that begin with an underscore.
    labels = [printable(stack).lstrip("_") or "unnamed" for stack in stacks]
    legend = figure.legend(
        handles=[Patch(color=colours[stack]) for stack in stacks], labels=labels,
        loc="outside lower center", ncols=min(3, len(stacks)), frameon=False, fontsize=9,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)  # a dollar sign in a name is no formula
