"""How a compressed checkpoint is named: its files, its tensors, and what config.json says of it."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from hf_sparse.errors import CheckpointError, unknown
from hf_sparse.text import shown

FORMATS = ("dense", "bitmask")
QUANT_METHOD = "hf_sparse"
VERSION = 1
# Transformers adds a variant to the names of weight files. No loader looks for this one unless it is told to: whoever does not
# know the format finds no weights at all, where it would otherwise find none of the names that it expects and make up the values.
VARIANT = "hf_sparse"
WEIGHTS = f"model.{VARIANT}.safetensors"
INDEX = f"{WEIGHTS}.index.json"
INDEX_AS_SAVED = (
    f"model.safetensors.index.{VARIANT}.json"  # Transformers' name for the index of a variant, which it cannot load by
)
COMPRESSED_PATTERNS = (WEIGHTS, f"model.{VARIANT}-[0-9]*-of-[0-9]*.safetensors", INDEX)
VALUES, BITMASK, SHAPE = SUFFIXES = ("_values", "_bitmask", "_shape")
_SHARD = re.compile(rf"model\.{VARIANT}(-\d+-of-\d+)?\.safetensors")
_KEYS = {"quant_method", "format", "version", "weights"}


def is_compressed_weights(name: str) -> bool:
    """Whether a file is one of a compressed checkpoint: all of the weights, a shard of them, or their index."""
    return name in (INDEX, INDEX_AS_SAVED) or _SHARD.fullmatch(name) is not None


def quantization_config(weights: str) -> dict[str, Any]:
    """What config.json says under `quantization_config`, the one key by which other tools notice that they cannot read the weights."""
    return {"quant_method": QUANT_METHOD, "format": "bitmask", "version": VERSION, "weights": weights}


def is_compressed(config: Mapping[str, Any]) -> bool:
    """Whether the values of a config.json say that the weights are compressed.

    Raises: CheckpointError where they say so in a way that this version cannot read.
    """
    told = config.get("quantization_config")
    if not isinstance(told, Mapping) or told.get("quant_method") != QUANT_METHOD:
        return False
    check_config(told)
    return True


def forget_format(config: Any) -> None:
    """Take out of a model's config what it says of compressed weights: it is true of a folder, and never of a model in memory."""
    told = getattr(config, "quantization_config", None)
    method = told.get("quant_method") if isinstance(told, Mapping) else getattr(told, "quant_method", None)
    if method == QUANT_METHOD:
        del config.quantization_config


def check_config(told: Mapping[str, Any]) -> str:
    """The file to load: the weights or their index; raises CheckpointError for what this version does not know."""
    where = "quantization_config in config.json"
    version, format, weights = (told.get(key) for key in ("version", "format", "weights"))
    if version != VERSION or isinstance(version, bool):
        raise CheckpointError(
            f"{where} is of version {shown(version)}; this hf_sparse reads compressed weights of version {VERSION}. Upgrade hf_sparse."
        )
    if format != "bitmask":
        raise CheckpointError(f"the format in {where} is {shown(format)}; this hf_sparse reads 'bitmask'.")
    if weights not in (WEIGHTS, INDEX):
        raise CheckpointError(f"the weights in {where} are {shown(weights)}; they must be {WEIGHTS} or {INDEX}.")
    if strange := next((key for key in told if key not in _KEYS), None):
        raise CheckpointError(f"{where}: {unknown('key', strange, sorted(_KEYS))}")
    return str(weights)


def check_free(names: Iterable[str]) -> None:
    """Refuse tensors whose own names end like those of a compressed one; raises CheckpointError."""
    taken = next((name for name in names if name.endswith(SUFFIXES)), None)
    if taken is not None:
        raise CheckpointError(
            f"{taken!r} ends like a part of a compressed tensor, so this model cannot be saved in the format 'bitmask'; save it dense."
        )


def named(name: str, parts: Iterable[Any]) -> dict[str, Any]:
    """The parts of a tensor (values, bitmask, shape) under their names."""
    return {name + suffix: part for suffix, part in zip(SUFFIXES, parts)}


def check_gains(names: Iterable[str]) -> None:
    """Refuse a compressed checkpoint in which nothing is compressed; raises CheckpointError."""
    if not any(name.endswith(BITMASK) for name in names):
        raise CheckpointError(
            "no tensor of the model has enough zeros to become smaller (about one in eight), so there is nothing to compress; save it dense."
        )
