"""The command line: one module a command, each with `add(parser)` and `run(arguments)`, which may return an exit code."""

import argparse
import json
import os
import sys
from collections.abc import Sequence

from hf_sparse import environment
from hf_sparse.errors import HfSparseError

# Exit codes that scripts can rely on; argparse itself ends with 2 for words that it does not understand.
OK, FAILED, INTERRUPTED = 0, 1, 130


def _parser() -> argparse.ArgumentParser:
    from hf_sparse.cli import bench, compare, demo, evaluate, inspect, methods, prune, recover

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
        "inspect": inspect,
        "methods": methods,
    }.items():
        summary = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add(command)
        command.add_argument("--json", action="store_true", help="print one JSON object instead of text for people")
        command.set_defaults(run=module.run)
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; errors of the user's making are one line on stderr and exit code 1."""
    try:
        arguments = _parser().parse_args(words)  # imports torch and Transformers, which takes seconds
        try:
            return arguments.run(arguments) or OK
        except HfSparseError as error:
            return _failed(arguments, error)
        except Exception as error:  # a missing or damaged model, a full disk: every library has errors of its own
            if os.environ.get("HF_SPARSE_TRACEBACK"):
                raise
            return _failed(arguments, error)
    except KeyboardInterrupt:
        print("interrupted; nothing was written to the destination.", file=sys.stderr)
        return INTERRUPTED


def _failed(arguments: argparse.Namespace, error: Exception) -> int:
    lines = [line for line in str(error).splitlines() if line.strip()] or ["no message"]
    if not isinstance(error, HfSparseError | OSError):
        lines[0] = f"{type(error).__name__}: {lines[0]} (HF_SPARSE_TRACEBACK=1 shows where)"
    if arguments.json:
        print(json.dumps({"error": lines[0], "kind": type(error).__name__}))
    print(f"hf-sparse {arguments.command}: error: {lines[0]}", file=sys.stderr)
    return FAILED
