"""What the weight files of a result look like: those of the source, in another number format only where one was asked for."""

import json
import shutil
from pathlib import Path
from typing import Any

from hf_sparse.replace import write_whole
from hf_sparse.storage.names import VARIANT, is_compressed_weights
from hf_sparse.streaming.files import DTYPES, NAMES, FileTensor, Header, make_header
from hf_sparse.streaming.weights import Weights

_INDEX = "model.safetensors.index.json"


def output_headers(model: Any, weights: Weights, converts: bool) -> dict[str, Header]:
    """File name -> its header; `converts` says that floating-point tensors get the number format that the model has them in."""
    inputs = weights.inputs
    if not converts and all(isinstance(stored, FileTensor) for stored in inputs.tensors.values()):
        return dict(inputs.headers)
    formats = model.state_dict()
    files: dict[str, list[tuple[str, str, list[int]]]] = {}
    for key, stored in inputs.tensors.items():
        dtype, target = stored.get_dtype(), formats.get(weights.conversion.target[key])
        if converts and target is not None and DTYPES[dtype].is_floating_point:
            dtype = NAMES[target.dtype]
        files.setdefault(_plain_name(inputs.file_of[key]), []).append((key, dtype, stored.get_shape()))
    return {name: make_header(tensors, name) for name, tensors in files.items()}


def _plain_name(name: str) -> str:
    return name.replace(f"model.{VARIANT}", "model", 1) if is_compressed_weights(name) else name


def sizes(headers: dict[str, Header]) -> dict[str, int]:
    """File name -> bytes."""
    return {name: header.file_size for name, header in headers.items()}


def write_index(source: Path, folder: Path, weights: Weights, converts: bool) -> None:
    """The index of the shards, the source's own where the files are laid out as there."""
    inputs = weights.inputs
    if len(inputs.paths) == 1:
        return
    if (source / _INDEX).is_file() and not converts:
        shutil.copyfile(source / _INDEX, folder / _INDEX)
        return
    total = sum(weights.outputs[key].bytes for key in inputs.tensors)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {key: _plain_name(file) for key, file in inputs.file_of.items() if key in inputs.tensors},
    }
    write_whole(folder / _INDEX, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode("utf-8"))
