"""Compares what the README states, in its header and line by line in our section, with the report."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from hf_sparse import environment
from hf_sparse.errors import ConfigError
from hf_sparse.report import Report
from hf_sparse.text import one_line
from hf_sparse.verify import header
from hf_sparse.verify.rows import AGREES, DIFFERS, Row, compared, skipped
from hf_sparse.verify.subject import Subject

CHECK = header.CHECK
# Rows of the card's first table: name in the first cell, zeros and size in the second.
_ZEROS = ("Zeros in the pruned sites", "Zeros in all matrices of the blocks", "Zeros in all parameters of the model")
_SHOWN = 20  # lines of each kind that get a row of their own
_NUMBER = re.compile(r"\d[\d.,]*")
_QUALITY = re.compile(r"^#{1,6}[ \t]+quality\b.*\n((?:(?!#).*\n?)*)", re.MULTILINE | re.IGNORECASE)
# What a report that was made by hand may bring out of a template.
_SPOILED = (LookupError, ValueError, TypeError, OverflowError)


def check(subject: Subject) -> Iterator[Row]:
    """Rows for the header and for our section: what the report does not give, and what it gives and is not there."""
    from model_cards import parts

    if subject.report is None or not subject.card:
        why = "there is none" if not subject.card else "there is no report to compare it with"
        yield skipped(CHECK, "README.md", why)
        return
    text = subject.card.replace("\r\n", "\n")
    try:
        yield from header.check(subject, text)
        section = parts.content_of(text)
        if section is None:
            yield skipped(CHECK, "section", "README.md has no section of hf_sparse")
            return
        if (number := parts.count(text)) > 1:
            yield Row(CHECK, "section", DIFFERS, f"{number} sections of hf_sparse", "1 is written")
        yield from _section(subject, section, subject.report)
    except ConfigError:  # a template of the user's own
        raise
    except _SPOILED as error:
        yield Row(CHECK, "section", DIFFERS, None, None, f"no card can be made of the report: {one_line(error, 200)}")


def _section(subject: Subject, text: str, report: Report) -> Iterator[Row]:
    from hf_sparse.verify.expected import Section, compare_section

    found: Section = compare_section(subject, text)
    if found.typed:
        yield skipped(CHECK, "the command that was typed", "the report does not hold it")
    if found.distance == 0:
        same = f"{len(found.stated)} lines as the report gives them"
        ordered = found.stated == found.expected
        yield compared(CHECK, "section", same if ordered else "lines in another order", same)
        return
    why = _written_by(found.stated, found.expected, report)
    if why:
        yield skipped(CHECK, f"section: {found.distance} lines", why)
        yield from _partly(text, found.extra, found.missing, report)
        return
    yield from _rows(found.extra, stated=True)
    yield from _rows(found.missing, stated=False)


def _rows(lines: Sequence[str], *, stated: bool) -> Iterator[Row]:
    reason = "a line that the report does not give" if stated else "a line of the report that the card does not state"
    for line in lines[:_SHOWN]:
        claimed, found = (line, None) if stated else (None, line)
        yield Row(CHECK, f"section: {_first_words(line)}", DIFFERS, claimed, found, reason)
    if len(lines) > _SHOWN:
        yield Row(CHECK, f"section: {len(lines) - _SHOWN} more lines", DIFFERS, None, None, f"each {reason}")


def _first_words(line: str) -> str:
    cells = line.strip("|").split("|")[0] if line.startswith("|") else line
    return one_line(cells.strip(" #"), 60)


def _written_by(stated: Sequence[str], expected: Sequence[str], report: Report) -> str:
    """Why the words of a section need not be those that this version writes; empty where they need to be.

    A template of one's own is told by lacking both most of our lines and most of our headings.
    """
    here = environment.versions().get("hf_sparse")
    # A card is written anew at every save, so by the last version that is recorded, or one that came later.
    trained = report.recoveries[-1].versions if report.recoveries else {}
    last = (trained or report.versions).get("hf_sparse")
    if last != here:
        return f"written by hf_sparse {one_line(last or 'of unknown version', 40)}, this is {here}; only figures are compared"
    headings = [line for line in expected if line.startswith("##")]
    present = set(stated)
    lacking, unheaded = (sum(line not in present for line in lines) for lines in (expected, headings))
    if 2 * lacking > len(expected) and 2 * unheaded > len(headings):
        return "written by another template, so only figures are compared; in Python, model_cards.set_card_class names its class"
    return ""


# ---------------------------------------------------------------------------------------------------- other wordings


def _partly(text: str, extra: Sequence[str], missing: Sequence[str], report: Report) -> Iterator[Row]:
    """Figures in a section whose words are not ours: zeros, quality, and our own lines with other numbers in them."""
    rows = [*_zeros(text, report), *_quality(text, report)]
    yield from rows
    told = {row.claimed for row in rows}
    ours = {_without_numbers(line) for line in missing if _NUMBER.search(line)}
    others = [
        line for line in extra if line not in told and not line.startswith(tuple(f"| {name} |" for name in _ZEROS))
    ]
    wrong = [line for line in others if _NUMBER.search(line) and _without_numbers(line) in ours]
    yield from _rows(wrong, stated=True)


def _without_numbers(line: str) -> str:
    return _NUMBER.sub("0", line)


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

    part = _QUALITY.search(section)
    if part is None:
        yield skipped(CHECK, "table of quality", "the card has none")
        return
    known = [evaluation.Evaluation.from_dict(values) for values in report.evaluations]
    stated = Counter(_table_rows(part[1].split("\n")))
    expected = Counter([*evaluation.rows(known), *evaluation.task_rows(known)])
    for row in (stated & expected).elements():
        yield Row(CHECK, f"quality: {_cells(row)}", AGREES, row, row)
    yield from _rows(list((stated - expected).elements()), stated=True)
    yield from _rows(list((expected - stated).elements()), stated=False)


def _table_rows(lines: Sequence[str]) -> list[str]:
    """The rows of all tables, without their two first lines."""
    found, inside = [], False
    for line in (line.rstrip(" \t") for line in lines):
        if not line.startswith("|"):
            inside = False
        elif re.fullmatch(r"\|[-:| ]+\|", line):
            inside = True
        elif inside:
            found.append(line)
    return found


def _cells(row: str) -> str:
    return ", ".join(cell.strip() for cell in row.strip("|").split("|")[:3])
