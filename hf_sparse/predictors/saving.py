"""Predictors in a file beside a model: one safetensors file, with a description in its header and a print of the weights."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from hf_sparse.config import PredictorConfig
from hf_sparse.errors import CheckpointError, HfSparseError
from hf_sparse.predictors.networks import Predictor, from_tensors
from hf_sparse.remote import PREDICTORS as FILE
from hf_sparse.schema import check_plain, parse_json
from hf_sparse.sites import parameter_of
from hf_sparse.text import one_line

__all__ = ["FILE", "load", "print_of", "save"]

_HEADER = "hf_sparse_predictors"
_SAMPLED = 256  # weights of each matrix that go into the print
_LARGEST = 2**31  # bytes of a file


def print_of(model: nn.Module, predictor: Predictor) -> str:
    """What tells the weights that predictors were trained on from others; the number format of the model does not matter.

    Of each matrix that predictors skip parts of, a few weights are looked at, rounded to bfloat16.
    """
    digest = hashlib.sha256()
    for block in predictor.layout.units(model):
        for site in (block.down, block.o):
            flat = parameter_of(model, site).detach().reshape(-1)
            places = torch.linspace(0, len(flat) - 1, _SAMPLED, dtype=torch.float64, device="cpu").long()
            sampled = flat[places.to(flat.device)].to("cpu", torch.bfloat16).contiguous()
            digest.update(sampled.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def save(model: nn.Module, predictor: Predictor, config: PredictorConfig, folder: str | Path) -> Path:
    """Write `hf_sparse_predictors.safetensors` into a folder."""
    tensors, about = predictor.to_tensors()
    header = {"predictor": about, "config": config.to_dict(), "weights": print_of(model, predictor)}
    path = Path(folder) / FILE
    save_file(tensors, path, {_HEADER: json.dumps(header)})
    return path


def load(model: nn.Module, file: Path) -> tuple[Predictor, PredictorConfig, bool]:
    """The predictor in a file, its config, and whether it was trained on the weights that the model has.

    Raises: CheckpointError for a file that holds none, ModelError for one made for another model.
    """
    tensors, header = _read(file)
    try:
        predictor = from_tensors(tensors, header["predictor"])
        config, weights = PredictorConfig.from_dict(header["config"]), str(header["weights"])
    except (HfSparseError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{one_line(file.name)} holds no predictors that this version can use ({one_line(error, 200)}); delete the file, or train anew."
        ) from error
    fresh = print_of(model, predictor) == weights
    return predictor.eval().requires_grad_(False), config, fresh


def _read(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    what = f"the header of {one_line(file.name)}"
    try:
        if file.stat().st_size > _LARGEST:
            raise CheckpointError(
                f"{one_line(file.name)} has {file.stat().st_size} bytes; at most {_LARGEST} are read."
            )
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get(_HEADER, "")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{one_line(file.name)} cannot be read ({one_line(error)}); delete it, or train anew."
        ) from error
    header = parse_json(text.encode("utf-8"), what)
    check_plain(header, what)
    if not isinstance(header, dict):
        raise CheckpointError(f"{what} is no JSON object; delete the file, or train anew.")
    return tensors, header
