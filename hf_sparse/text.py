"""Makes text that came from elsewhere fit to be shown: no control characters, bounded lines, no secrets."""

import re
import reprlib
import unicodedata

LONGEST = 400  # letters of a line that quotes somebody else's text
REPLACEMENT = "\ufffd"
HIDDEN = "***"  # stands where a secret stood

# An access token of the Hub; user and password in an address; one of an address's parameters; a header of a request.
_SECRETS = re.compile(
    r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}"
    r"|(?<=://)[^/?#\s\"<>\\]+(?=@)"
    r"|(?<=[?&])([^?&=#\s\"'<>\\]{1,80})=[^&#\s\"'<>\\]+"
    r"|\b(bearer|basic) [a-z0-9._~+/=-]{16,}",
    re.IGNORECASE,
)
_SECRET_PARAMETER = re.compile(r"token|key|secret|password|signature|credential", re.IGNORECASE)


def one_line(text: object, longest: int = LONGEST) -> str:
    """One line of bounded length, without control, bidirectional or surrogate characters, and without secrets."""
    letters = (" " if letter.isspace() else letter for letter in without_secrets(str(text)))
    shown = "".join(REPLACEMENT if _acts(letter) else letter for letter in letters)
    line = " ".join(shown.split())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def printable(text: str) -> str:
    """Text of several lines, which keeps line ends and tabs; every other control, format or surrogate character is replaced."""
    if text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return "".join(REPLACEMENT if _acts(letter) and letter not in "\n\t" else letter for letter in text)


def _acts(letter: str) -> bool:
    """Whether a terminal or a page may do something else with a character than show it."""
    return unicodedata.category(letter) in _ACTING


# Control, format (bidirectional overrides are among them), surrogate, private and unassigned; separators of lines and paragraphs.
_ACTING = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def shown(value: object) -> str:
    """A short picture of a value that was refused, whatever its size and depth."""
    try:
        return f"{reprlib.repr(value):.80}"
    except ValueError:  # Python does not print numbers of thousands of digits
        return f"a huge {type(value).__name__}"


def without_secrets(text: str) -> str:
    """Text with the tokens, passwords and keys taken out that can be told by their form."""
    return _SECRETS.sub(_hidden, text)


def _hidden(match: re.Match[str]) -> str:
    parameter, scheme = match.groups()
    if parameter is not None:
        return f"{parameter}={HIDDEN}" if _SECRET_PARAMETER.search(parameter) else match[0]
    return HIDDEN if scheme is None else f"{scheme} {HIDDEN}"
