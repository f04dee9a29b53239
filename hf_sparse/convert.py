"""Converts saved models between plain and compressed weights, tensor by tensor, without making a model of them."""

import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.serialization._base import parse_size_to_int
from safetensors.torch import save_file
from transformers.utils import logging

from hf_sparse.errors import CheckpointError, ConfigError, unknown
from hf_sparse.hashes import hashes_of
from hf_sparse.hub import is_weights
from hf_sparse.remote import CARD, CONFIG, Folder, read_config
from hf_sparse.replace import write_whole
from hf_sparse.report import FILE_NAME as REPORT_FILE
from hf_sparse.report import PICTURE_FILE, Report
from hf_sparse.storage import FORMATS, StoredTensor, compress, is_compressed, open_tensors, quantization_config
from hf_sparse.storage.names import INDEX, WEIGHTS, check_free, check_gains, named
from hf_sparse.text import one_line
from hf_sparse.verify.sizes import loaded_weights

SHARD_SIZE = "5GB"
_PLAIN = "model.safetensors"
_LEFT_OUT = re.compile(
    r"(checkpoint-\d+|runs|logs|__pycache__)/.*|(.*/)?(pytorch_model.*|optimizer|training_args)\.bin|.*\.(pt|pth|pkl|pickle|ckpt|h5|msgpack)"
    r"|(trainer_state|hf_sparse_run)\.json|pytorch_model\.bin\.index.*\.json"
)


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was written."""

    format: str  # "dense" or "bitmask"
    tensors: int
    compressed: int  # how many of them are held as non-zeros and bits
    bytes_before: int  # of the weight files
    bytes: int
    files: tuple[str, ...]  # weight files
    left_out: tuple[str, ...]  # files of the source that were not copied: pickled weights, and what a training left

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def convert(
    source: Path, destination: Path, format: str | None = None, max_shard_size: int | str = SHARD_SIZE
) -> Conversion:
    """Write the model in a folder into an empty one with its weights in another format; every value stays as it is, bit for bit.

    Without a `format`, plain weights become compressed ones and compressed ones plain. Only one shard of what is written is in
    memory, and tensors are taken one by one. Config, tokenizer and all else go along; report and card tell of the new files.

    Raises: ConfigError for a format that is none or the present one, or a size that cannot be read; CheckpointError for a folder
        without a model, damaged weights, and weights in which nothing would become smaller.
    """
    place = Folder(str(source), source)
    config = read_config(place)
    now = "bitmask" if is_compressed(config) else "dense"
    wanted = ({"dense": "bitmask", "bitmask": "dense"}[now]) if format is None else format
    _check(place, config, now, wanted)
    largest = _size(max_shard_size)
    names = loaded_weights(place)
    with open_tensors([source / name for name in names]) as stored:
        files, tensors, compressed = _write(stored, destination, wanted, largest)
    left_out = _copy_others(source, destination)
    config.pop("quantization_config", None)
    if wanted == "bitmask":
        config["quantization_config"] = quantization_config(INDEX if len(files) > 1 else WEIGHTS)
    write_whole(destination / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode("utf-8"))
    _describe(destination, config)
    return Conversion(
        format=wanted, tensors=tensors, compressed=compressed, bytes_before=sum(place.files[name].size for name in names),
        bytes=sum((destination / name).stat().st_size for name in files), files=tuple(files), left_out=tuple(left_out),
    )  # fmt: skip


def _check(place: Folder, config: dict[str, Any], now: str, wanted: str) -> None:
    shown = one_line(place.name)
    if wanted not in FORMATS:
        raise ConfigError(unknown("format", wanted, FORMATS))
    if wanted == now:
        raise ConfigError(
            f"the weights in {shown!r} are in the format {now!r} already; give the other one of {' and '.join(FORMATS)}."
        )
    if now == "dense" and config.get("quantization_config"):
        raise ConfigError(f"the weights in {shown!r} are quantized, and only plain ones are compressed.")
    if "adapter_config.json" in place.files:
        raise CheckpointError(f"{shown!r} holds an adapter; merge it, save the model, and convert that.")


def _size(given: int | str) -> int:
    try:
        size = given if isinstance(given, int) else parse_size_to_int(given)
    except ValueError:
        size = 0
    if size < 1:
        raise ConfigError(f"the largest size of a shard is {given!r}; give bytes, or a size such as '5GB'.")
    return size


# ---------------------------------------------------------------------------------------------------- weights


def _write(stored: dict[str, Any], folder: Path, format: str, largest: int) -> tuple[list[str], int, int]:
    """Writes the tensors; returns the names of the files, and how many tensors there are and are compressed."""
    if format == "bitmask":
        check_free(stored)
    held: dict[str, torch.Tensor] = {}
    shards: list[list[str]] = []
    compressed = 0
    for name, tensor in logging.tqdm(sorted(stored.items()), desc="Converting weights", unit="tensor"):
        made = _tensors(name, tensor, format)
        compressed += len(made) > 1
        if held and _bytes(held) + _bytes(made) > largest:
            shards.append(_save(held, folder, len(shards)))
            held = {}
        held |= made
    shards.append(_save(held, folder, len(shards)))
    if format == "bitmask":
        check_gains(name for names in shards for name in names)
    return _name(shards, folder, WEIGHTS if format == "bitmask" else _PLAIN), len(stored), compressed


def _tensors(name: str, stored: Any, format: str) -> dict[str, torch.Tensor]:
    if format == "bitmask" and not isinstance(stored, StoredTensor):
        tensor = stored[...]
        parts = compress(tensor)
        return {name: tensor} if parts is None else named(name, parts)
    return {name: stored[...]}


def _bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _part(folder: Path, number: int) -> Path:
    return folder / f".part-{number}"  # the final name tells how many there are


def _save(tensors: dict[str, torch.Tensor], folder: Path, number: int) -> list[str]:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, _part(folder, number), {"format": "pt"})
    return list(tensors)


def _name(shards: list[list[str]], folder: Path, whole: str) -> list[str]:
    """Gives the shards their names, and writes an index where there are several."""
    stem = whole.removesuffix(".safetensors")
    count = len(shards)
    names = [whole] if count == 1 else [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for number, name in enumerate(names):
        os.replace(_part(folder, number), folder / name)
    if count > 1:
        size = sum((folder / name).stat().st_size for name in names)
        index = {
            "metadata": {"total_size": size},
            "weight_map": {key: name for name, keys in zip(names, shards) for key in keys},
        }
        write_whole(
            folder / f"{whole}.index.json", (json.dumps(index, indent=2, sort_keys=True) + "\n").encode("utf-8")
        )
    return names


# ---------------------------------------------------------------------------------------------------- what stands beside them


def files_beside(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Of the files of a model, those that a converted one has too, and those that it has not: other weights, and what a training left."""
    shown = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    others = [name for name in shown if name != CONFIG and not is_weights(name)]
    left_out = [name for name in others if _LEFT_OUT.fullmatch(name)]
    return [name for name in others if name not in left_out], left_out


def _copy_others(source: Path, destination: Path) -> list[str]:
    """Copies what stands beside the weights, links as what they lead to; returns what was left out."""
    names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    copied, left_out = files_beside(names)
    for name in copied:
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, destination / name)
    return left_out


def _describe(folder: Path, config: dict[str, Any]) -> None:
    """Lets report and card tell of the files as they are now."""
    if not (folder / REPORT_FILE).is_file():
        return
    from model_cards import card_class, write_card

    report = Report.load(folder)
    report.files = hashes_of(folder)
    report.save(folder)
    picture = PICTURE_FILE if (folder / PICTURE_FILE).is_file() else None
    if (folder / CARD).is_file():
        write_card(folder, card_class().from_report(report, plot_name=picture, model_config=config))
