"""Replaces files so that a write that breaks off leaves no half of one, nor a model that is not what it says."""

import json
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from hf_sparse.storage.names import INDEX, INDEX_AS_SAVED, WEIGHTS, is_compressed_weights, quantization_config

_ASIDE = ".hf_sparse_old-"


def _written(name: str, variant: str | None) -> bool:
    """Whether a file is one that saving weights of this variant writes, whole, in shards or their index, dense or compressed."""
    if not variant and is_compressed_weights(name):
        return True
    dot = f".{re.escape(variant)}" if variant else ""
    weights = "(pytorch_)?model"
    shapes = (
        rf"{weights}{dot}\.(safetensors|bin)",
        rf"{weights}{dot}-\d+-of-\d+\.(safetensors|bin)",
        rf"{weights}\.(safetensors|bin)\.index{dot}\.json",
    )
    return name == "config.json" or any(re.fullmatch(shape, name) for shape in shapes)


def finish_compressed(folder: Path) -> None:
    """Make compressed weights that have just been written loadable: their index gets its name, and config.json tells of them.

    The model's own config is not touched, as other saves may read it at the same time.
    """
    if (folder / INDEX_AS_SAVED).is_file():
        os.replace(folder / INDEX_AS_SAVED, folder / INDEX)
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    values["quantization_config"] = quantization_config(INDEX if (folder / INDEX).is_file() else WEIGHTS)
    write_whole(folder / "config.json", (json.dumps(values, indent=2, sort_keys=True) + "\n").encode("utf-8"))


def write_whole(path: Path, content: bytes) -> None:
    """A file that is there is whole: written beside its place, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """What is in a file, or the names in a folder, stay whatever happens to the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some systems cannot sync folders
        if path.is_file():
            raise
    finally:
        os.close(handle)


@contextmanager
def old_weights_aside(folder: Path, variant: str | None, also: Collection[str] = ()) -> Iterator[None]:
    """Inside, the weights and the config of an older save, and the files named in `also`, stand under other names.

    They come back if the block fails.

    With several processes nothing is moved, as another one may be writing already.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_world_size() > 1:
        yield
        return

    def is_old(file: Path) -> bool:
        return file.is_file() and (file.name in also or _written(file.name, variant))

    moved = [file for file in folder.iterdir() if is_old(file)]
    for file in moved:
        file.rename(folder / (_ASIDE + file.name))
    try:
        yield
    except BaseException:
        for file in folder.iterdir():
            if is_old(file):
                file.unlink()
        for file in moved:
            (folder / (_ASIDE + file.name)).rename(file)
        raise
    for file in folder.glob(f"{_ASIDE}*"):  # of this save, and of one that was killed
        file.unlink()
