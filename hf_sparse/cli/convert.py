"""Compress the weights of a saved model, or make compressed ones plain; every value stays as it is."""

import argparse
import json
from pathlib import Path

from hf_sparse.convert import SHARD_SIZE, convert, files_beside
from hf_sparse.destination import check_destination, complete_folder
from hf_sparse.hub import is_weights
from hf_sparse.remote import CONFIG, Folder, Repository, open_place
from hf_sparse.storage import FORMATS
from hf_sparse.text import one_line


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="folder of a model, a repository on the Hub, or 'embedded'")
    parser.add_argument("destination", type=Path, help="folder to write; must be empty or absent")
    parser.add_argument(
        "--to", choices=FORMATS, default=None,
        help="bitmask (non-zeros and one bit for each weight) or dense; without it, the one that the weights are not in",
    )  # fmt: skip
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a destination that is not empty, once the new one is complete"
    )
    parser.add_argument(
        "--max-shard-size",
        default=SHARD_SIZE,
        metavar="SIZE",
        help=f"of one file, such as 500MB (default {SHARD_SIZE})",
    )
    group = parser.add_argument_group("Hub")
    group.add_argument("--revision", default=None, help="branch, tag or commit")
    group.add_argument("--token", default=None, help="access token")
    group.add_argument("--cache-dir", default=None, help="where downloaded files are kept")


def run(arguments: argparse.Namespace) -> None:
    check_destination(arguments.destination, arguments.overwrite, [arguments.source])
    place = open_place(
        arguments.source, revision=arguments.revision, token=arguments.token, cache_dir=arguments.cache_dir
    )
    folder = place.path if isinstance(place, Folder) else _downloaded(place)
    with complete_folder(arguments.destination, arguments.overwrite) as fresh:
        done = convert(folder, fresh, arguments.to, arguments.max_shard_size)
    if arguments.json:
        print(json.dumps({"source": arguments.source, "destination": str(arguments.destination), **done.to_dict()}))
        return
    print(
        f"{done.compressed} of {done.tensors} tensors are compressed; the weights take {done.bytes / 2**20:.1f} MiB instead of "
        f"{done.bytes_before / 2**20:.1f} MiB ({done.bytes / max(1, done.bytes_before):.3f} of it)."
    )
    if done.left_out:
        print(
            f"not copied: {', '.join(one_line(name, 120) for name in done.left_out[:5])}{' and more' if done.left_out[5:] else ''}"
        )
    print(f"written to {arguments.destination}")


def _downloaded(place: Repository) -> Path:
    """Nothing of a repository is run; its code goes along."""
    beside, _ = files_beside(place.files)
    return place.download([*beside, *(name for name in place.files if is_weights(name) or name == CONFIG)])
