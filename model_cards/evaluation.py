"""One measured pair, dense and sparse, as a table row and as a result for the Hub."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from huggingface_hub import EvalResult

from hf_sparse.errors import CheckpointError
from hf_sparse.report import SAME
from hf_sparse.text import one_line, shown
from model_cards.escape import code, plain

NOT_MEASURED = "not measured"
# Marks the results that are ours among those of other tools.
TOOL = "hf_sparse"


# Two figures are of one measurement if these are equal; the second group counts where both say something, as reports of
# earlier versions do not tell it.
_SAME_IF_KNOWN = ("dtype", "seed", "task_version")
_NO_NAME = re.compile(r"[^\w.-]+", re.ASCII)
_ERRORS = {"sparse": "standard_error", "dense": "dense_standard_error"}


@dataclass(frozen=True)
class Evaluation:
    """A figure of the dense model and the same figure of the sparse one; None means not measured.

    It was measured on a text, or on a task of a harness; what belongs to the other of the two is left out.
    """

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
    max_windows: int | None = None  # only so many windows of the text were used; None: all
    dtype: str = ""  # of the model while it was measured, such as "bfloat16"
    seed: int | None = None  # None: nothing was drawn, or the harness's own seeds were used
    versions: str = ""  # of the libraries, such as "torch 2.13.0, transformers 5.23.0"
    task: str = ""  # name of the harness's task
    task_version: str = ""
    filter: str = ""  # how the harness took the answer out of what the model wrote; "none" for its plain one
    few_shot: int | None = None  # examples in the prompt
    samples: int | None = None  # documents that were answered
    limit: int | None = None  # only so many documents of the task were asked for; None: all
    standard_error: float | None = None  # of `sparse`, as the harness estimates it
    dense_standard_error: float | None = None
    harness: str = ""  # what measured the task, such as "lm-eval 0.4.13"

    @classmethod
    def from_dict(cls, values: object) -> "Evaluation":
        """Build from what a report keeps, which may come from a file; raises CheckpointError for anything else."""
        kinds = get_type_hints(cls)
        if not isinstance(values, Mapping) or not {"dense", "sparse"} <= set(values) <= set(kinds):
            raise CheckpointError(
                "an evaluation in the report has other fields than this version knows; measure again."
            )
        for name, value in values.items():
            if kinds[name] is str:
                fits = isinstance(value, str)
            else:
                fits = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
            if not fits:
                raise CheckpointError(f"an evaluation in the report has {name}={shown(value)}; measure again.")
        return cls(**values)


def is_same(one: Evaluation, other: Evaluation) -> bool:
    """Whether two figures are of one measurement, so that the later takes the place of the earlier."""
    told = [(getattr(one, name), getattr(other, name)) for name in _SAME_IF_KNOWN]
    return all(getattr(one, name) == getattr(other, name) for name in SAME) and all(
        first == second for first, second in told if first not in (None, "") and second not in (None, "")
    )


def measured_again(known: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A report's evaluations with a new one: in the place of the same measurement, or at the end.

    What the new one did not measure, such as the dense model, stays as it was in the old one.

    Raises: CheckpointError for evaluations that are none.
    """
    new = Evaluation.from_dict(found)
    told = {name: value for name, value in found.items() if value not in (None, "")}
    # The error of an earlier figure says nothing of the new one.
    told |= {error: found.get(error) for value, error in _ERRORS.items() if value in told and new.task}
    kept: list[dict[str, Any]] = [dict(values) for values in known]
    for values in kept:
        if is_same(Evaluation.from_dict(values), new):
            values.update(told)
            return kept
    return [*kept, dict(found)]


def figure(value: float | None) -> str:
    """A measured value for people to read."""
    if value is None:
        return NOT_MEASURED
    return f"{value:,.4f}" if math.isfinite(value) else "not finite"


def whole(value: int | None, missing: str = NOT_MEASURED) -> str:
    """A count for people to read."""
    return missing if value is None else f"{value:,}"


def on_text(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Those that were measured on a text; the others were measured on tasks."""
    return [item for item in evaluations if not item.task]


def with_recovery(evaluations: Sequence[Evaluation]) -> bool:
    """Whether the table of texts has a column for the figures before recovery."""
    return any(item.before_recovery is not None for item in on_text(evaluations))


def rows(evaluations: Sequence[Evaluation]) -> list[str]:
    """Markdown table rows of what was measured on texts; without any one that says so."""
    has_before = with_recovery(evaluations)
    return [_row(item, has_before) for item in on_text(evaluations) or (Evaluation(None, None),)]


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
    return _line(cells)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


# ---------------------------------------------------------------------------------------------------- tasks of a harness


def _on_tasks(evaluations: Sequence[Evaluation]) -> tuple[list[Evaluation], bool]:
    found = [item for item in evaluations if item.task]
    return found, any(item.before_recovery is not None for item in found)


def task_columns(evaluations: Sequence[Evaluation]) -> str:
    """First line of the table of tasks."""
    before = ("Sparse, before recovery",) if _on_tasks(evaluations)[1] else ()
    error = "± standard error"
    return _line(
        (
            "Task",
            "Version",
            "Few-shot",
            "Metric",
            f"Dense {error}",
            *before,
            f"Sparse {error}",
            "Samples",
            "Measured with",
        )
    )


def task_line(evaluations: Sequence[Evaluation]) -> str:
    """Second line of the table of tasks."""
    return "|" + "---|" * (8 + _on_tasks(evaluations)[1])


def task_rows(evaluations: Sequence[Evaluation]) -> list[str]:
    """Markdown table rows of what was measured on tasks, none where nothing was."""
    found, has_before = _on_tasks(evaluations)
    return [_task_row(item, has_before) for item in found]


def _task_row(item: Evaluation, has_before: bool) -> str:
    before = (figure(item.before_recovery),) if has_before else ()
    samples = whole(item.samples, "not told") + (f" (only the first {item.limit:,})" if item.limit is not None else "")
    cells = (
        code(item.task), plain(item.task_version) or "not told", whole(item.few_shot, "not told"), plain(metric_name(item)),
        _with_error(item.dense, item.dense_standard_error), *before, _with_error(item.sparse, item.standard_error),
        samples, plain(item.harness) or "not told",
    )  # fmt: skip
    return _line(cells)


def metric_name(item: Evaluation) -> str:
    """The metric, with the harness's filter where it is not the plain one."""
    return f"{item.metric} ({item.filter})" if item.filter not in ("", "none") else item.metric


def _with_error(value: float | None, error: float | None) -> str:
    known = value is not None and error is not None and math.isfinite(error)
    return f"{figure(value)} ± {figure(error)}" if known else figure(value)


# ---------------------------------------------------------------------------------------------------- results for the Hub


def results(evaluations: Sequence[Evaluation], task: str | None) -> list[EvalResult]:
    """Results for the `model-index` header: the sparse model's measured, finite values and nothing else."""
    return [_result(item, task) for item in evaluations if item.sparse is not None and math.isfinite(item.sparse)]


def _result(item: Evaluation, task: str | None) -> EvalResult:
    name = one_line(item.task or item.text) or "unnamed text"
    fallback = "text-generation" if item.metric == "perplexity" or item.task else "other"
    return EvalResult(
        task_type=task or fallback,
        dataset_type=_NO_NAME.sub("-", name).strip("-")
        or "text",  # the Hub takes names such as those of repositories only
        dataset_name=name,
        metric_type=one_line(item.metric),
        metric_name=one_line(metric_name(item)),
        metric_value=float(item.sparse),  # type: ignore[arg-type]  # `results` leaves None out
        metric_args=_arguments(item),
    )


def _arguments(item: Evaluation) -> dict[str, Any]:
    """How it was measured. The Hub groups results by task and data set, so all of this stands with the metric."""
    found = {
        "tool": TOOL, "dense": _finite(item.dense), "window": item.window, "stride": item.stride, "max_windows": item.max_windows,
        "tokens": item.tokens, "fingerprint": one_line(item.fingerprint), "harness": one_line(item.harness),
        "task_version": one_line(item.task_version), "num_few_shot": item.few_shot, "filter": one_line(item.filter),
        "samples": item.samples, "limit": item.limit, "standard_error": _finite(item.standard_error),
        "dense_standard_error": _finite(item.dense_standard_error), "dtype": one_line(item.dtype), "seed": item.seed,
        "versions": one_line(item.versions),
    }  # fmt: skip
    return {key: value for key, value in found.items() if value not in (None, "")}


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
