"""Draws what predictors cost against the share of heads and neurons that they keep."""

from pathlib import Path
from typing import TYPE_CHECKING

from hf_sparse.plot import INK, frame, look, new_figure, printable, save_figure
from hf_sparse.predictors.table import PredictorTable, Row, shown_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_predictors(table: PredictorTable, path: Path) -> Path:
    """Write the picture to `path`, in the format of its suffix (PNG without one), and return the path.

    Raises: HfSparseError where matplotlib is not installed or does not know the suffix.
    """
    with_speed = any(row.tokens_per_second is not None for row in table.rows)
    figure = new_figure(path, (12 if with_speed else 7, 5.5))
    title = f"{printable(str(table.about.get('model', '')))} on {printable(str(table.about.get('text', '')))}"
    figure.suptitle(title, fontsize=12, fontweight="bold", color=INK, parse_math=False)
    axes = figure.subplots(1, 2 if with_speed else 1, squeeze=False, sharey=True)[0]
    _by_share(axes[0], table)
    if with_speed:
        _by_speed(axes[1], table)
    for panel in axes:
        panel.axhline(0, color=INK, linewidth=1, linestyle="--")
    axes[0].set_ylabel("log perplexity above the dense model's (nats)")
    legend = axes[-1].legend(frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a dollar sign in a name is no formula
    return save_figure(figure, path)


def _by_share(axes: "Axes", table: PredictorTable) -> None:
    frame(axes, "neurons kept in the blocks that skip (%), heads alike where nothing is said")
    for number, (name, rows) in enumerate(_lines(table).items()):
        shares = [100 * float(row.keep_neurons) for row in rows]
        rises = [table.rise(row) for row in rows]
        spread = [
            [table.rise(row) - (min(row.losses) - table.dense_loss) for row in rows],
            [max(row.losses) - table.dense_loss - table.rise(row) for row in rows],
        ]
        colour, marker = look(number)
        axes.errorbar(shares, rises, yerr=spread, color=colour, marker=marker, capsize=3, label=printable(name))


def _by_speed(axes: "Axes", table: PredictorTable) -> None:
    frame(axes, "generated tokens a second, as many times as dense")
    dense = table.dense_tokens_per_second or 1.0
    for number, (name, rows) in enumerate(_lines(table).items()):
        told = [(row.tokens_per_second / dense, table.rise(row)) for row in rows if row.tokens_per_second is not None]
        colour, marker = look(number)
        axes.plot(
            [speed for speed, _ in told], [rise for _, rise in told], color=colour, marker=marker, label=printable(name)
        )  # fmt: skip


def _lines(table: PredictorTable) -> dict[str, list[Row]]:
    """Rows that keep one share of neurons in each block, by name and in the order of shares; heads kept otherwise are named."""
    drawn = [
        row for row in table.rows if all(isinstance(share, int | float) for share in (row.keep_neurons, row.keep_heads))
    ]
    named: dict[str, list[Row]] = {}
    for row in sorted(drawn, key=lambda row: float(row.keep_neurons)):
        words = [row.name, *(["sees labels"] if row.sees_labels else []), *([row.mode] if row.mode != "block" else [])]
        if row.keep_neurons != row.keep_heads:
            words.append(f"{shown_share(row.keep_heads)} of heads")
        named.setdefault(", ".join(words), []).append(row)
    return named
