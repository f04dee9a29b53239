"""One measured pair, dense and sparse, as a table row and as a result for the Hub."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult

from hf_sparse.errors import CheckpointError
from model_cards.escape import clean, code, plain

NOT_MEASURED = "not measured"
# Marks the results that are ours among those of other tools.
TOOL = "hf_sparse"


@dataclass(frozen=True)
class Evaluation:
    """A figure of the dense model and the same figure of the sparse one; None means not measured."""

    dense: float | None
    sparse: float | None
    metric: str = "perplexity"
    window: int | None = None  # tokens
    stride: int | None = None  # tokens from the start of a window to that of the next
    text: str = ""  # name of the text
    fingerprint: str = ""  # of the text
    tokens: int | None = None
    before_recovery: float | None = (
        None  # of the pruned model before it was trained; `sparse` is that of the saved weights
    )

    @classmethod
    def from_dict(cls, values: object) -> "Evaluation":
        """Build from what a report keeps, which may come from a file; raises CheckpointError for anything else."""
        known = {item.name for item in dataclasses.fields(cls)}
        if not isinstance(values, Mapping) or not {"dense", "sparse"} <= set(values) <= known:
            raise CheckpointError(
                "an evaluation in the report has other fields than this version knows; measure again."
            )
        for name, value in values.items():
            if name in ("metric", "text", "fingerprint"):
                fits = isinstance(value, str)
            else:
                fits = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
            if not fits:
                raise CheckpointError(f"an evaluation in the report has {name}={value!r}; measure again.")
        return cls(**values)


def figure(value: float | None) -> str:
    """A measured value for people to read."""
    if value is None:
        return NOT_MEASURED
    return f"{value:,.4f}" if math.isfinite(value) else "not finite"


def whole(value: int | None, missing: str = NOT_MEASURED) -> str:
    """A count for people to read."""
    return missing if value is None else f"{value:,}"


def with_recovery(evaluations: Sequence[Evaluation]) -> bool:
    """Whether the table has a column for the figures before recovery."""
    return any(item.before_recovery is not None for item in evaluations)


def rows(evaluations: Sequence[Evaluation]) -> list[str]:
    """Markdown table rows; without evaluations one that says so."""
    has_before = with_recovery(evaluations)
    return [_row(item, has_before) for item in evaluations or (Evaluation(None, None),)]


def _row(item: Evaluation, has_before: bool) -> str:
    # A loss has neither window nor stride; where nothing at all was measured, the row says so throughout.
    missing = NOT_MEASURED if item.dense is item.sparse is item.before_recovery is None else "none"
    text = plain(item.text) if item.text else missing
    fingerprint = code(item.fingerprint) if item.fingerprint else missing
    before = (figure(item.before_recovery),) if has_before else ()
    cells = (
        plain(item.metric), figure(item.dense), *before, figure(item.sparse), whole(item.window, missing), whole(item.stride, missing),
        text, whole(item.tokens), fingerprint,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def results(evaluations: Sequence[Evaluation], task: str | None) -> list[EvalResult]:
    """Results for the `model-index` header: the sparse model's measured, finite values and nothing else."""
    return [_result(item, task) for item in evaluations if item.sparse is not None and math.isfinite(item.sparse)]


def _result(item: Evaluation, task: str | None) -> EvalResult:
    name = clean(item.text) or "unnamed text"
    fallback = "text-generation" if item.metric == "perplexity" else "other"
    return EvalResult(
        task_type=task or fallback,
        dataset_type=name,
        dataset_name=name,
        metric_type=clean(item.metric),
        metric_name=clean(item.metric),
        metric_value=float(item.sparse),  # type: ignore[arg-type]  # `results` leaves None out
        metric_args=_arguments(item),
    )


def _arguments(item: Evaluation) -> dict[str, Any]:
    """How it was measured. The Hub groups results by task and data set, so all of this stands with the metric."""
    dense = float(item.dense) if item.dense is not None and math.isfinite(item.dense) else None
    found = {
        "tool": TOOL, "dense": dense, "window": item.window, "stride": item.stride, "tokens": item.tokens,
        "fingerprint": clean(item.fingerprint) or None,
    }  # fmt: skip
    return {key: value for key, value in found.items() if value is not None}
