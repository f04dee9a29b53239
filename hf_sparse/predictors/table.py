"""What predictors cost in quality, as a table: text, Markdown and JSON."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_sparse.predictors.agreement import Agreement
from hf_sparse.predictors.figures import Figure
from hf_sparse.report_text import percent
from hf_sparse.text import one_line

_HEADS = (
    "predictor", "criterion", "neurons", "heads", "choice", "rise", "perplexity", "recall n", "recall h", "rank n", "rank h", "size"
)  # fmt: skip
_SPEEDS = ("tokens/s", "x dense", "own time")
_WORDS = 5  # columns from the left that are words


@dataclass(frozen=True)
class Row:
    """One predictor at one selection; several losses are those of predictors trained with different seeds."""

    name: str
    kind: str
    criterion: str
    keep_neurons: Any
    keep_heads: Any
    mode: str
    losses: tuple[float, ...]  # mean cross entropy of the next token, in nats
    share: float  # weights of the predictor as a share of the model's
    sees_labels: bool  # the figure uses the tokens to be predicted: no predictor can reach it
    agreement: Agreement | None = None  # of the first seed
    tokens_per_second: float | None = None  # generated, of the first seed
    share_of_time: float | None = None  # of the predictor's own work in that of a generated token

    @property
    def loss(self) -> float:
        return sum(self.losses) / len(self.losses)


@dataclass(frozen=True)
class PredictorTable:
    """Losses of a model under predictors, beside the dense model's on the same tokens."""

    dense_loss: float
    tokens: int
    rows: tuple[Row, ...]
    about: dict[str, Any] = field(default_factory=dict)  # model, text, fingerprint, versions
    dense_tokens_per_second: float | None = None

    def rise(self, row: Row) -> float:
        """By how much the log perplexity is above the dense model's."""
        return row.loss - self.dense_loss

    def find(self, **wanted: Any) -> Row:
        """The one row whose fields have these values."""
        found = [row for row in self.rows if all(getattr(row, name) == value for name, value in wanted.items())]
        if len(found) != 1:
            raise KeyError(f"{len(found)} rows have {wanted}")
        return found[0]

    def to_dict(self) -> dict[str, Any]:
        rows = [{**asdict(row), "loss": row.loss, "rise": self.rise(row)} for row in self.rows]
        return {
            "dense_loss": self.dense_loss, "tokens": self.tokens, "dense_tokens_per_second": self.dense_tokens_per_second,
            "rows": rows, "about": self.about,
        }  # fmt: skip

    def figure(self, row: Row) -> Figure:
        """A row as predictors carry it in their file."""
        recalls = means(row.agreement)[:2]  # of what is kept whole there is nothing to tell
        recall_neurons, recall_heads = (
            None if kept == 1 else recall for kept, recall in zip((row.keep_neurons, row.keep_heads), recalls)
        )
        return Figure(
            neurons=shown_share(row.keep_neurons), heads=shown_share(row.keep_heads), text=self.about["text"],
            fingerprint=self.about["fingerprint"], window=self.about["window"], tokens=self.tokens, dense=self.dense_loss,
            loss=row.loss, recall_neurons=recall_neurons, recall_heads=recall_heads, dense_speed=self.dense_tokens_per_second,
            speed=row.tokens_per_second, share_of_time=row.share_of_time, machine=self.about.get("machine", ""),
            versions=self.about["versions"],
        )  # fmt: skip

    def plot(self, path: str | Path) -> Path:
        """Draw the rise against the share kept into a picture file (needs matplotlib)."""
        from hf_sparse.predictors.plot import plot_predictors  # matplotlib is an extra and slow to import

        return plot_predictors(self, Path(path))

    def markdown(self) -> str:
        """The table and what it depends on, to be pasted into a document."""
        heads, cells = self._table()
        rule = ["---"] * _WORDS + ["---:"] * (len(heads) - _WORDS)
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in [heads, rule, *cells]]
        return "\n".join([*lines, "", f"({'; '.join(self._notes())}.)"])

    def __str__(self) -> str:
        heads, rows = self._table()
        cells = [heads, *rows]
        widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
        lines = [
            "  ".join(
                cell.ljust(width) if at < _WORDS else cell.rjust(width)
                for at, (cell, width) in enumerate(zip(line, widths))
            )
            for line in cells
        ]
        return "\n".join([*(line.rstrip() for line in lines), "", *self._notes()])

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """Names of the columns, and the cells."""
        speeds = _SPEEDS if self.dense_tokens_per_second is not None else ()
        return [*_HEADS, *speeds], [[*self._cells(row), *(self._speeds(row) if speeds else ())] for row in self.rows]

    def _cells(self, row: Row) -> Iterator[str]:
        marked = f"{row.criterion} (sees labels)" if row.sees_labels else row.criterion
        spread = f" ({min(row.losses) - self.dense_loss:.3f} to {max(row.losses) - self.dense_loss:.3f})"
        yield from (
            one_line(row.name),
            one_line(marked),
            shown_share(row.keep_neurons),
            shown_share(row.keep_heads),
            row.mode,
        )
        yield f"{self.rise(row):.3f}" + (spread if len(row.losses) > 1 else "")
        yield f"{math.exp(row.loss):.2f}"
        yield from ("" if value is None else f"{value:.2f}" for value in means(row.agreement))
        yield percent(row.share)

    def _speeds(self, row: Row) -> Iterator[str]:
        dense, speed, own = self.dense_tokens_per_second, row.tokens_per_second, row.share_of_time
        yield "" if speed is None else f"{speed:.1f}"
        yield "" if speed is None or dense is None else f"{speed / dense:.2f}"
        yield "" if own is None else percent(own)

    def _notes(self) -> Iterator[str]:
        yield (
            f"rise: log perplexity above the dense model's {self.dense_loss:.4f} (perplexity {math.exp(self.dense_loss):.2f}) on "
            f"{self.tokens:,} tokens, masks for each token, teacher forcing"
        )
        yield "neurons, heads: share kept in the blocks that skip; recall and rank correlation: mean over these blocks"
        yield "several figures in brackets: lowest and highest over seeds"
        if self.dense_tokens_per_second is not None:
            yield (
                f"dense: {self.dense_tokens_per_second:.1f} tokens a second, one sequence; own time: the predictor's in that of a token"
            )
        yield from (f"{name}: {one_line(value)}" for name, value in self.about.items() if value is not None)


def shown_share(value: Any) -> str:
    """A share in words; shares of several blocks are only named."""
    return f"{100 * value:g} %" if isinstance(value, int | float) else "by block"


def means(found: Agreement | None) -> list[float | None]:
    """Recall of neurons and heads, then rank correlations, each the mean over blocks."""
    if found is None:
        return [None] * 4
    parts = (found.recall_neurons, found.recall_heads, found.correlation_neurons, found.correlation_heads)
    return [None if None in part else sum(v for v in part if v is not None) / len(part) for part in parts]
