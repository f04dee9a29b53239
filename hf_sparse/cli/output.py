"""What the command line lets through to a terminal: no control characters on stdout, and no secret on either stream."""

import contextlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, TextIO, cast
from urllib.parse import quote

from hf_sparse.text import HIDDEN, printable, without_secrets

_ENVIRONMENT = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
# --token, shortened as argparse allows or with a slip of the pen, but no other option such as --tolerance.
_OPTION = re.compile(r"(?:--t|-+(?:[\w-]+-)?to(?:k\w*)?)(?:=(.*))?", re.DOTALL)
# What progress bars and colours need: back to the start of the line, letters' looks, one up, clear the line.
_MOVES = re.compile(r"(\r|\x1b\[[0-9;]{0,24}[mAK])")
_SHORTEST = 6  # letters: what is shorter is no token, and would be taken out of other words


class OutputClosed(BrokenPipeError):
    """Raised when whoever read the output has stopped reading, as `head` does."""


class Guarded:
    """A text stream that changes what is written to it by a function; all else is the stream's own."""

    def __init__(self, stream: TextIO, change: Callable[[str], str]) -> None:
        self._stream, self._change = stream, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        changed = self._change(text)
        try:
            self._stream.write(changed)
        except UnicodeEncodeError:  # a terminal with few letters must not stop hours of work
            encoding = self._stream.encoding
            self._stream.write(changed.encode(encoding, "backslashreplace").decode(encoding))
        except BrokenPipeError as error:
            _closed(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError as error:
            _closed(error)


def _closed(error: BrokenPipeError) -> NoReturn:
    raise OutputClosed(*error.args) from error


@contextlib.contextmanager
def guarded(words: Sequence[str]) -> Iterator[None]:
    """Guard stdout and stderr, and the logs that go there, while a command runs; `words` are those of its command line.

    stdout loses control characters other than line ends and tabs. stderr keeps, beside these, what progress bars and colours
    need; messages of other libraries hold names out of files. Both lose the access token among `words` or in the environment,
    and whatever `without_secrets` knows.

    Raises: OutputClosed when nobody reads the output any more.
    """
    hidden = _forms([*_tokens(words), *(os.environ.get(name, "") for name in _ENVIRONMENT)])
    out, error = sys.stdout, sys.stderr
    safe_out = cast(TextIO, Guarded(out, lambda text: printable(_hide(text, hidden))))
    safe_error = cast(TextIO, Guarded(error, lambda text: _shown_on_terminal(_hide(text, hidden))))
    handlers = _handlers(error)
    sys.stdout, sys.stderr = safe_out, safe_error
    for handler in handlers:
        handler.setStream(safe_error)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, error
        for handler in handlers:
            handler.setStream(error)
        safe_out.flush()


def stop_writing() -> None:
    """Let the streams that nobody reads lead nowhere, or Python would complain about them when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def _tokens(words: Sequence[str]) -> Iterator[str]:
    """What follows an option for a token, also where the words could not be parsed."""
    for number, word in enumerate(words):
        if (option := _OPTION.fullmatch(word)) is not None:
            following = [later for later in words[number + 1 : number + 2] if not later.startswith("-")]
            yield from [option[1]] if option[1] else following


def _forms(secrets: Iterable[str]) -> list[str]:
    """The secrets as they may stand in text, in JSON, in Python and in addresses; longer ones first."""
    forms: set[str] = set()
    for secret in (given.strip() for given in secrets):
        if len(secret) >= _SHORTEST and not secret.isdecimal():  # --tokens takes a number
            forms |= {secret, json.dumps(secret)[1:-1], repr(secret)[1:-1], quote(secret, safe="")}
    return sorted(forms, key=len, reverse=True)


def _hide(text: str, forms: list[str]) -> str:
    for form in forms:
        text = text.replace(form, HIDDEN)
    return without_secrets(text)


def _shown_on_terminal(text: str) -> str:
    """Text for stderr: every other control character is replaced, also the first of a sequence that is not whole."""
    return "".join(piece if _MOVES.fullmatch(piece) else printable(piece) for piece in _MOVES.split(text))


def _handlers(stream: TextIO) -> list[Any]:
    """The log handlers that write to a stream; they took it when they were made."""
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    found = [handler for logger in loggers for handler in getattr(logger, "handlers", ())]
    return [handler for handler in found if isinstance(handler, logging.StreamHandler) and handler.stream is stream]
