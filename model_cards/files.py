"""The table of a card that tells the SHA-256 of the model's files, and how it is read back."""

import html
import json
import re
from collections.abc import Mapping

from hf_sparse import hashes
from hf_sparse.text import one_line
from model_cards.escape import code, json_text
from model_cards.parts import part_of

HEADING = "### Files"
_LONGEST_TEXT = 16 * 2**20  # letters of a README that are looked at
_MOST_FILES = 10_000
_LONGEST_ROW = 8192  # letters; every letter of a name of 255 may be written as an escape within an escape
_ROW = re.compile(r"\| (?:`([^`|]+)`|<code>([^<|]+)</code>) \| `([0-9a-f]{64})` \|")


def rows(files: Mapping[str, str]) -> list[str]:
    """One Markdown table row for each file: its name and SHA-256."""
    return [f"| {_cell(name)} | {code(digest)} |" for name, digest in files.items()]


def _cell(name: str) -> str:
    """A name that comes back as it was: as inline code, or as a JSON string where cleaning would change it."""
    if one_line(name) == name and not name.startswith('"'):
        return code(name)
    text = re.sub(r"[^A-Za-z0-9.]", lambda match: f"&#{ord(match[0])};", json_text(name, indent=None))
    return f"<code>{text}</code>"


def file_hashes(text: str) -> dict[str, str]:
    """Name -> SHA-256 of the files that the section of ours in a README tells of; empty where it tells none.

    Only the table under "Files" in our section counts, of a name that stands there twice the first row. The text may come from
    anyone: rows that `rows` would not write are passed over.
    """
    section = part_of(text) if len(text) <= _LONGEST_TEXT else None
    lines = (section or "").replace("\r\n", "\n").split("\n")
    if HEADING not in lines:
        return {}
    found: dict[str, str] = {}
    for line in lines[lines.index(HEADING) + 1 :]:
        if line.startswith("#") or len(found) == _MOST_FILES:
            break
        match = _ROW.fullmatch(line) if len(line) <= _LONGEST_ROW else None
        name = _name(match[1] or html.unescape(match[2])) if match else None
        if match and name is not None and hashes.misfit(name, match[3]) is None:
            found.setdefault(name, match[3])
    return found


def _name(text: str) -> str | None:
    if not text.startswith('"'):
        return text
    try:
        name = json.loads(text)
    except ValueError:
        return None
    return name if isinstance(name, str) else None
