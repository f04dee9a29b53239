"""Compares what the README states, in its header and in our section, with the report."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import model_index_to_eval_results

from hf_sparse.errors import CheckpointError
from hf_sparse.report import Report
from hf_sparse.verify.rows import AGREES, DIFFERS, Row, compared, skipped
from hf_sparse.verify.subject import Subject

CHECK = "card"
# Rows of the card's first table: name in the first cell, zeros and size in the second.
_ZEROS = ("Zeros in the pruned sites", "Zeros in all matrices of the blocks", "Zeros in all parameters of the model")
# What tells two measurements from each other; the rest of a result's arguments are figures and versions.
_FIGURES = ("dense", "standard_error", "dense_standard_error")


def check(subject: Subject) -> Iterator[Row]:
    """Rows for the header's results, for the card's table of quality, and for the zeros that it states."""
    from model_cards.parts import content_of

    if subject.report is None or not subject.card:
        yield skipped(
            CHECK, "README.md", "there is none" if not subject.card else "there is no report to compare it with"
        )
        return
    yield from _header(subject.card, subject.report)
    section = content_of(subject.card.replace("\r\n", "\n"))
    if section is None:
        yield skipped(CHECK, "section", "README.md has no section of hf_sparse")
        return
    yield from _zeros(section, subject.report)
    yield from _quality(section, subject.report)


# ---------------------------------------------------------------------------------------------------- the header


def _header(card: str, report: Report) -> Iterator[Row]:
    from model_cards import header
    from model_cards.evaluation import TOOL, Evaluation, results

    expected = results([Evaluation.from_dict(values) for values in report.evaluations], None)
    try:
        stated = _results(header.read(header.split(card)[0]).get("model-index"))
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError) as error:
        yield Row(CHECK, "header", DIFFERS, f"{len(expected)} results", None, f"it cannot be read: {error}")
        return
    # Results of other tools may stand there too; they are none of the report's.
    left = [result for result in stated if (result.metric_args or {}).get("tool") == TOOL]
    for result in expected:
        same = next((other for other in left if _key(other) == _key(result)), None)
        if same is None:
            yield Row(
                CHECK, f"header: {_name(result)}", DIFFERS, None, result.metric_value, "the header does not state it"
            )
            continue
        left.remove(same)
        yield compared(CHECK, f"header: {_name(result)}", same.metric_value, result.metric_value)
        for figure in _FIGURES:
            claimed, known = ((one.metric_args or {}).get(figure) for one in (same, result))
            if (claimed, known) != (None, None):
                yield compared(CHECK, f"header: {_name(result)}, {figure}", claimed, known)
    for result in left:
        yield Row(CHECK, f"header: {_name(result)}", DIFFERS, result.metric_value, None, "the report does not hold it")


def _results(index: Any) -> list[EvalResult]:
    return model_index_to_eval_results(index)[1] if index else []


def _key(result: EvalResult) -> tuple[object, ...]:
    arguments = {key: value for key, value in (result.metric_args or {}).items() if key not in _FIGURES}
    return result.dataset_name, result.metric_type, repr(sorted(arguments.items()))


def _name(result: EvalResult) -> str:
    return f"{result.metric_name or result.metric_type} on {result.dataset_name}"


# ---------------------------------------------------------------------------------------------------- the section


def _zeros(section: str, report: Report) -> Iterator[Row]:
    from model_cards import facts

    size = sum(block.size for block in report.blocks)
    all_matrices = sum(block.all_matrices for block in report.blocks)
    for name, of in zip(_ZEROS, (size, all_matrices, report.parameters), strict=True):
        match = re.search(rf"^\| {re.escape(name)} \| (.{{0,200}}) \|$", section, re.MULTILINE)
        if match is None:
            yield skipped(CHECK, name, "the card does not state them")
        else:
            yield compared(CHECK, name, match[1], facts.share(report.zeros, of), "found is what the report says")


def _quality(section: str, report: Report) -> Iterator[Row]:
    """The rows below the heading Quality, against those that the report's evaluations give."""
    from model_cards import evaluation

    part = re.search(r"^### Quality\n(.*?)(?=^### |\Z)", section, re.MULTILINE | re.DOTALL)
    if part is None:
        yield skipped(CHECK, "table of quality", "the card has none")
        return
    known = [evaluation.Evaluation.from_dict(values) for values in report.evaluations]
    stated = _table_rows(part[1].split("\n"))
    expected = [*evaluation.rows(known), *evaluation.task_rows(known)]
    for row in expected:
        if row in stated:
            stated.remove(row)
            yield Row(CHECK, f"quality: {_cells(row)}", AGREES, row, row)
        else:
            yield Row(
                CHECK, f"quality: {_cells(row)}", DIFFERS, None, row, "a row of the report that the card does not state"
            )
    for row in stated:
        yield Row(CHECK, f"quality: {_cells(row)}", DIFFERS, row, None, "a row that the report does not give")


def _table_rows(lines: Sequence[str]) -> list[str]:
    """The rows of all tables, without their two first lines."""
    found, inside = [], False
    for line in lines:
        if not line.startswith("|"):
            inside = False
        elif re.fullmatch(r"\|[-:| ]+\|", line):
            inside = True
        elif inside:
            found.append(line)
    return found


def _cells(row: str) -> str:
    return ", ".join(cell.strip() for cell in row.strip("|").split("|")[:3])
