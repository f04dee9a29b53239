"""Verify what a sparse model claims: recount its zeros, compare its files and weights, measure its figures again."""

import argparse
import json

# Exit code where something that was checked is not as claimed; 1 is an error, as in every command.
DIFFERS = 3


def add(parser: argparse.ArgumentParser) -> None:
    from hf_sparse.verify import TOLERANCE

    parser.add_argument("model", help="path of a model folder, a repository on the Hub, or 'embedded'")
    parser.add_argument(
        "--base",
        default=None,
        metavar="MODEL",
        help="the model that was pruned (default: the one that the report names, if that is 'embedded' or like it on the Hub; folders only from here)",
    )
    parser.add_argument("--evaluate", action="store_true", help="measure the report's figures again")
    parser.add_argument(
        "--text",
        nargs="+",
        default=[],
        metavar="FILE",
        help="files of the texts that the report names, where it names files",
    )
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE,
        help=f"how much a figure may be off, as a share of it (default {TOLERANCE:g}): number format, threads and versions round differently",
    )  # fmt: skip
    group = parser.add_argument_group("loading")
    group.add_argument(
        "--dtype", default=None, help="number format to measure in: float32, bfloat16, float16 (default: the report's)"
    )
    group.add_argument("--revision", default=None, help="branch, tag or commit on the Hub")
    group.add_argument("--token", default=None, help="access token for the Hub")
    group.add_argument("--cache-dir", default=None, help="where files from the Hub are kept")
    group.add_argument("--trust-remote-code", action="store_true", help="run the model's own code from its repository")


def run(arguments: argparse.Namespace) -> int:
    from hf_sparse.verify import verify

    found = verify(
        arguments.model, base=arguments.base, evaluate=arguments.evaluate, texts=arguments.text, revision=arguments.revision,
        token=arguments.token, cache_dir=arguments.cache_dir, dtype=arguments.dtype,
        trust_remote_code=arguments.trust_remote_code, tolerance=arguments.tolerance,
    )  # fmt: skip
    print(json.dumps(found.to_dict()) if arguments.json else found)
    return 0 if found.agrees else DIFFERS
