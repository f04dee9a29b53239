"""Marked parts of a README: what stands between two comments of ours is written anew, everything else is a person's."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from model_cards.escape import json_text

PREDICTORS = "predictors"  # the part about contextual predictors
TRAINER = "trainer"  # the part with the text of Transformers' Trainer; our own section is the part without a name
# A block of code, as CommonMark has it (section 4.5): three or more backticks or tildes, closed by as many or more.
_FENCE = r" {0,3}(`{3,}|~{3,})([^\n]*)"


def begin(name: str = "") -> str:
    """The comment that opens a part, on a line of its own."""
    return f"<!-- hf_sparse:{_prefix(name)}begin -->"


def end(name: str = "") -> str:
    """The comment that closes a part, on a line of its own."""
    return f"<!-- hf_sparse:{_prefix(name)}end -->"


def _prefix(name: str) -> str:
    return f"{name}:" if name else ""


BEGIN, END = begin(), end()


def part_of(text: str, name: str = "") -> str | None:
    """The first part of that name, with its markers; None where there is none."""
    span = next(iter(_spans(text, name)), None)
    return None if span is None else text[slice(*span)]


def count(text: str, name: str = "") -> int:
    """How many parts of that name a text has."""
    return len(_spans(text, name))


def content_of(text: str, name: str = "") -> str | None:
    """What stands between the markers of the first part of that name; None where there is none."""
    part = part_of(text, name)
    return None if part is None else part.partition("\n")[2].rpartition("\n")[0].removesuffix("\r")


def replace_part(text: str, name: str, content: str, newline: str = "\n") -> str:
    """A text with the content of a part renewed, or with the part added at its end; a second part of that name is taken out.

    What stands outside the markers stays.
    """
    lines = [begin(name), *content.replace("\r\n", "\n").strip("\n").split("\n"), end(name)]
    part, spans = newline.join(lines), _spans(text, name)
    if not spans:
        before = text.rstrip()
        return f"{before}{2 * newline}{part}{newline}" if before else f"{newline}{part}{newline}"
    pieces, position = [], 0
    for number, (start, stop) in enumerate(spans):
        pieces += [text[position:start], "" if number else part]
        position = stop
    return "".join([*pieces, text[position:]])


def without_part(text: str, name: str) -> str:
    """A text without the parts of that name."""
    for start, stop in reversed(_spans(text, name)):
        text = text[:start].rstrip("\r\n") + "\n" * bool(text[:start].strip()) + text[stop:]
    return text


# ---------------------------------------------------------------------------------------------------- where parts are


def _spans(text: str, name: str) -> list[tuple[int, int]]:
    """Start and end of every part: from a begin to the next end, with no other begin between them."""
    found, opened = [], None
    for is_begin, start, stop in _markers(text, name):
        if is_begin:
            opened = start
        elif opened is not None:
            found.append((opened, stop))
            opened = None
    return found


def _markers(text: str, name: str) -> Iterator[tuple[bool, int, int]]:
    """Whether it begins a part, start and end of every line that is a marker and not part of an example.

    A pair inside one and the same block of code is somebody's example. A single marker in there counts: a fence that somebody
    forgot to close must not hide our section from us.
    """
    if begin(name) not in text:
        return
    in_code: list[tuple[bool, int, int]] = []  # markers in the block of code that is open
    fence = ""
    for line in re.finditer(rf"^(?:({begin(name)}|{end(name)})[ \t]*(?=\r?$)|{_FENCE})", text, re.MULTILINE):
        marker, opening, rest = line.groups()
        if marker:
            found = (marker == begin(name), line.start(), line.end())
            in_code.append(found)
            if not fence:
                yield in_code.pop()
        elif not fence:
            # After backticks no other backtick may follow: that would be code within a line.
            fence = "" if "`" in rest and opening[0] == "`" else opening
        elif opening.startswith(fence) and not rest.strip():
            if len({is_begin for is_begin, _, _ in in_code}) < 2:
                yield from in_code
            fence, in_code = "", []
    yield from in_code


# ---------------------------------------------------------------------------------------------------- what a part remembers


def header_comment(header: Mapping[str, Any], name: str = "") -> str:
    """A comment that remembers what was written into the header, so that later a person's changes can be told from ours."""
    return f"{_header_start(name)}{json_text(dict(header), indent=None)} -->"


def remembered(part: str | None, name: str = "") -> dict[str, Any]:
    """What `header_comment` put into a part; nothing where it was edited by hand, so that every value counts as the person's."""
    start = (part or "").find(_header_start(name))
    if part is None or start < 0:
        return {}
    try:
        found = json.loads(part[start + len(_header_start(name)) :].partition(" -->")[0])
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _header_start(name: str) -> str:
    return f"<!-- hf_sparse:{_prefix(name)}header "
