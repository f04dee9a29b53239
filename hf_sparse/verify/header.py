"""Compares the YAML header of a README with the report: results, base model, library and pattern."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import model_index_to_eval_results

from hf_sparse.errors import CheckpointError
from hf_sparse.text import one_line
from hf_sparse.verify.rows import AGREES, DIFFERS, Row, compared, skipped
from hf_sparse.verify.subject import Subject

CHECK = "card"
_PATTERN = re.compile(r"(\d+|N):\d+|unstructured|dense")  # tags that say which pattern the weights have
# What tells two measurements from each other; the rest of a result's arguments are figures and versions.
_FIGURES = ("dense", "standard_error", "dense_standard_error")


def check(subject: Subject, card: str) -> Iterator[Row]:
    """A row for each value of the header that the report can tell, and for each result."""
    from model_cards import header

    try:
        values = header.read(header.split(card)[0])
        stated = _results(values.get("model-index"))
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError) as error:
        yield Row(CHECK, "header", DIFFERS, "a header that can be read", None, f"it cannot be read: {one_line(error)}")
        return
    yield from _values(subject, values)
    yield from _figures(subject, stated)


# ---------------------------------------------------------------------------------------------------- single values


def _values(subject: Subject, values: Mapping[str, Any]) -> Iterator[Row]:
    """A value that is not there was never written, or taken away by a person, and claims nothing."""
    from hf_sparse.verify.expected import header_of

    expected = header_of(subject)
    yield from _base(subject, values, expected.get("base_model"))
    names = ("library_name", *(["base_model_relation"] if expected.get("base_model") else []))
    for name in names:
        if values.get(name) is not None:
            yield compared(CHECK, f"header: {name}", values[name], expected.get(name))
    tags = values.get("tags")
    stated = [tag for tag in tags if isinstance(tag, str) and _PATTERN.fullmatch(tag)] if isinstance(tags, list) else []
    for tag in stated:
        known = [one for one in expected.get("tags") or () if _PATTERN.fullmatch(one)]
        yield Row(CHECK, f"header: tag {tag}", AGREES if tag in known else DIFFERS, tag, ", ".join(known) or None)


def _base(subject: Subject, values: Mapping[str, Any], expected: str | None) -> Iterator[Row]:
    stated = values.get("base_model")
    names = stated if isinstance(stated, list) else [stated]
    if stated is None:
        if expected is not None:
            yield skipped(CHECK, "header: base_model", "the header does not state it")
    elif expected is not None:
        yield compared(CHECK, "header: base_model", stated if len(names) != 1 else names[0], expected)
    elif names == [subject.options.base]:
        yield compared(CHECK, "header: base_model", names[0], subject.options.base)
    else:
        reason = "the report names no repository; give --base with the one that the header names to compare the weights with it"
        yield skipped(CHECK, "header: base_model", reason, stated)


# ---------------------------------------------------------------------------------------------------- results


def _figures(subject: Subject, stated: list[EvalResult]) -> Iterator[Row]:
    from model_cards.evaluation import TOOL, Evaluation, results

    known = subject.report.evaluations if subject.report else []
    ours: dict[str, list[EvalResult]] = defaultdict(list)
    for result in stated:
        if _arguments(result).get("tool") == TOOL:
            ours[_key(result)].append(result)
    others = len(stated) - sum(map(len, ours.values()))
    if others:
        yield skipped(CHECK, f"header: {others} results of other tools", "the report does not tell of them")
    for result in results([Evaluation.from_dict(values) for values in known], None):
        name, same = f"header: {_name(result)}", ours.get(_key(result))
        if not same:
            yield Row(CHECK, name, DIFFERS, None, result.metric_value, "the header does not state it")
            continue
        found = same.pop(0)
        yield compared(CHECK, name, found.metric_value, result.metric_value)
        for figure in _FIGURES:
            claimed, measured = (_arguments(one).get(figure) for one in (found, result))
            if (claimed, measured) != (None, None):
                yield compared(CHECK, f"{name}, {figure}", claimed, measured)
    for result in (one for left in ours.values() for one in left):
        yield Row(CHECK, f"header: {_name(result)}", DIFFERS, result.metric_value, None, "the report does not hold it")


def _results(index: Any) -> list[EvalResult]:
    return model_index_to_eval_results(index)[1] if index else []


def _arguments(result: EvalResult) -> Mapping[Any, Any]:
    return result.metric_args if isinstance(result.metric_args, Mapping) else {}


def _key(result: EvalResult) -> str:
    arguments = sorted(repr(item) for item in _arguments(result).items() if item[0] not in _FIGURES)
    return repr((result.dataset_name, result.metric_type, arguments))


def _name(result: EvalResult) -> str:
    return f"{result.metric_name or result.metric_type} on {result.dataset_name}"
