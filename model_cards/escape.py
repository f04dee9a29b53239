"""Makes text from files harmless inside Markdown: a name can neither end a table, a code block nor our section."""

import json
import re
import shlex
import unicodedata
from typing import Any

from hf_sparse.text import one_line

# Numeric entities stand for the letter alone, never for its meaning in Markdown. "$" and "\" start formulas on the Hub.
_ACTIVE = re.compile(r"[&<>|`*\[\]\\~#!$@{}]|(?<!\w)_|_(?!\w)|^[-+=]|:(?=//)|(?<=www)\.", re.IGNORECASE)
_PLAIN_CODE = re.compile(r"[\w .,:/+=@%^(){}\[\]#!?'\"*-]+")
_ODD_IN_SHELL = re.compile(r"[^ -~]|[`<>]")


def plain(text: object) -> str:
    """Text that Markdown shows as it is."""
    return _ACTIVE.sub(lambda match: f"&#{ord(match[0])};", one_line(text))


def code(text: object) -> str:
    """Text as inline code."""
    line = one_line(text)
    if not line:
        return "(empty)"
    # A backtick span shows entities literally, so what needs them goes into an element instead.
    return f"`{line}`" if _PLAIN_CODE.fullmatch(line) else f"<code>{plain(line)}</code>"


def fenced(text: str, language: str) -> str:
    """A block of code whose fence is longer than any run of backticks inside; HTML comments in it lose their effect."""
    kept = "".join(letter for letter in text if letter in "\n\t" or unicodedata.category(letter)[0] != "C")
    kept = kept.replace("<!--", "<! --").rstrip()
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", kept)), default=0))
    return f"{fence}{language}\n{kept}\n{fence}"


def json_text(values: Any, indent: int | None = 2) -> str:
    """JSON that loads to the same values and holds nothing that Markdown or HTML could act on."""
    text = json.dumps(values, indent=indent, default=str)  # ASCII only
    # All of these occur inside strings only.
    for letters in ("<", ">", "`", "$", "&", "--"):
        text = text.replace(letters, "".join(f"\\u{ord(letter):04x}" for letter in letters))
    return text


def python_literal(value: Any) -> str:
    """Plain data as Python source that Markdown and HTML cannot act on."""
    text = ascii(value)
    if isinstance(value, str) and text.startswith("'") and '"' not in text:
        text = f'"{text[1:-1]}"'
    for letter in "<>`$":  # inside strings only
        text = text.replace(letter, f"\\x{ord(letter):02x}")
    return text


def shell_word(value: object) -> str:
    """One word for a POSIX shell; odd characters take bash's and zsh's $'...'."""
    text = str(value)
    if not _ODD_IN_SHELL.search(text):
        return shlex.quote(text)
    return "$'" + re.sub(r"[^ -~]|[`<>'\\]", _shell_escape, text) + "'"


def _shell_escape(match: re.Match[str]) -> str:
    number = ord(match[0])
    if number < 128:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
