"""The command line: one module a command, each with `add(parser)` and `run(arguments)`, which may return an exit code."""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence

from hf_sparse import environment
from hf_sparse.cli import processes
from hf_sparse.cli.output import OutputClosed, guarded, stop_writing
from hf_sparse.errors import HfSparseError
from hf_sparse.text import one_line, printable

# Exit codes that scripts can rely on; argparse itself ends with 2 for words that it does not understand, and a shell tells of a
# program that was stopped because nobody read its output with 141.
OK, FAILED, INTERRUPTED, UNREAD = 0, 1, 130, 141
_LONGEST_ERROR = 2000


def _parser() -> argparse.ArgumentParser:
    from hf_sparse.cli import (
        bench,
        compare,
        convert,
        demo,
        evaluate,
        inspect,
        methods,
        predictor,
        prune,
        push,
        recover,
        verify,
    )

    parser = argparse.ArgumentParser(
        prog="hf-sparse",
        description="Prune Hugging Face models, train them with their zeros kept, measure them and look inside.",
    )
    parser.add_argument("--version", action="version", version=f"hf_sparse {environment.versions()['hf_sparse']}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in {
        "demo": demo,
        "prune": prune,
        "recover": recover,
        "compare": compare,
        "evaluate": evaluate,
        "bench": bench,
        "convert": convert,
        "inspect": inspect,
        "predictor": predictor,
        "push": push,
        "verify": verify,
        "methods": methods,
    }.items():
        summary = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add(command)
        if name != "predictor":  # its actions have their own
            command.add_argument("--json", action="store_true", help="print one JSON object instead of text for people")
        command.set_defaults(run=module.run)
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; errors of the user's making are one line on stderr and exit code 1."""
    words = sys.argv[1:] if words is None else words
    try:
        with guarded(words):
            return _run(words)
    except OutputClosed:
        stop_writing()
        return UNREAD


def _run(words: Sequence[str]) -> int:
    try:
        arguments = _parser().parse_args(words)  # imports torch and Transformers, which takes seconds
        try:
            with processes.group(arguments.command):
                return _code(arguments)
        except HfSparseError as error:  # of the group itself
            return _failed(arguments, error)
    except KeyboardInterrupt:
        print("interrupted; nothing was written to the destination.", file=sys.stderr)
        return INTERRUPTED


def _code(arguments: argparse.Namespace) -> int:
    try:
        return arguments.run(arguments) or OK
    except OutputClosed:
        raise
    except Exception as error:  # a missing or damaged model, a full disk: every library has errors of its own
        return _failed(arguments, error)


def _failed(arguments: argparse.Namespace, error: Exception) -> int:
    if not processes.speaks(arguments.command, error):
        return FAILED
    lines = [line for line in str(error).splitlines() if line.strip()] or ["no message"]
    if not isinstance(error, HfSparseError):
        if os.environ.get("HF_SPARSE_TRACEBACK"):
            print(printable(traceback.format_exc()), end="", file=sys.stderr)
        elif not isinstance(error, OSError):
            lines[0] = f"{type(error).__name__}: {lines[0]} (HF_SPARSE_TRACEBACK=1 shows where)"
    line = one_line(lines[0], _LONGEST_ERROR)
    if arguments.json:
        print(json.dumps({"error": line, "kind": type(error).__name__}))
    print(f"hf-sparse {arguments.command}: error: {line}", file=sys.stderr)
    return FAILED
