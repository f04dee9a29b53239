"""What predictors cost in quality, as a table: text, Markdown and JSON."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_sparse.predictors.agreement import Agreement
from hf_sparse.report_text import percent
from hf_sparse.text import one_line

_HEADS = (
    "predictor", "criterion", "neurons", "heads", "choice", "rise", "perplexity", "recall n", "recall h", "rank n", "rank h", "size"
)  # fmt: skip
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
        return {"dense_loss": self.dense_loss, "tokens": self.tokens, "rows": rows, "about": self.about}

    def markdown(self) -> str:
        """The table and what it depends on, to be pasted into a document."""
        cells = [list(_HEADS), ["---"] * _WORDS + ["---:"] * (len(_HEADS) - _WORDS), *self._cells()]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells]
        return "\n".join([*lines, "", f"({'; '.join(self._notes())}.)"])

    def __str__(self) -> str:
        cells = [list(_HEADS), *self._cells()]
        widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADS))]
        lines = [
            "  ".join(
                cell.ljust(width) if at < _WORDS else cell.rjust(width)
                for at, (cell, width) in enumerate(zip(line, widths))
            )
            for line in cells
        ]
        return "\n".join([*(line.rstrip() for line in lines), "", *self._notes()])

    def _cells(self) -> Iterator[list[str]]:
        for row in self.rows:
            marked = f"{row.criterion} (sees labels)" if row.sees_labels else row.criterion
            spread = f" ({min(row.losses) - self.dense_loss:.3f} to {max(row.losses) - self.dense_loss:.3f})"
            yield [
                one_line(row.name), one_line(marked), _share(row.keep_neurons), _share(row.keep_heads), row.mode,
                f"{self.rise(row):.3f}" + (spread if len(row.losses) > 1 else ""), f"{math.exp(row.loss):.2f}",
                *_agreements(row.agreement), percent(row.share),
            ]  # fmt: skip

    def _notes(self) -> Iterator[str]:
        yield (
            f"rise: log perplexity above the dense model's {self.dense_loss:.4f} (perplexity {math.exp(self.dense_loss):.2f}) on "
            f"{self.tokens:,} tokens, masks for each token, teacher forcing"
        )
        yield "neurons, heads: share kept in the blocks that skip; recall and rank correlation: mean over these blocks"
        yield "several figures in brackets: lowest and highest over seeds"
        yield from (f"{name}: {one_line(value)}" for name, value in self.about.items())


def _share(value: Any) -> str:
    return f"{100 * value:g} %" if isinstance(value, int | float) else "by block"


def _agreements(found: Agreement | None) -> list[str]:
    if found is None:
        return [""] * 4
    parts = (found.recall_neurons, found.recall_heads, found.correlation_neurons, found.correlation_heads)
    return ["" if None in part else f"{sum(v for v in part if v is not None) / len(part):.2f}" for part in parts]
