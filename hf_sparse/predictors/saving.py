"""Predictors in a file beside a model: one safetensors file, with a description in its header and a print of the weights."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from hf_sparse.config import PredictorConfig
from hf_sparse.errors import CheckpointError, HfSparseError, ModelError
from hf_sparse.predictors.figures import Figure, read_figures
from hf_sparse.predictors.layout import Layout
from hf_sparse.predictors.learned import Learned
from hf_sparse.predictors.networks import Predictor, from_tensors
from hf_sparse.remote import PREDICTORS as FILE
from hf_sparse.schema import check_plain, parse_json
from hf_sparse.sites import parameter_of
from hf_sparse.text import one_line

__all__ = ["FILE", "About", "Saved", "load", "print_of", "put_figures", "read_about", "save"]

_HEADER = "hf_sparse_predictors"
_SAMPLED = 256  # weights of each matrix that go into the print
_LARGEST = 2**31  # bytes of a file


@dataclass(frozen=True, kw_only=True)
class About:
    """What the header of a file tells, without its tensors."""

    config: PredictorConfig
    layout: Layout
    weights: int  # of the predictors themselves: numbers in the file
    learned: Learned | None
    figures: list[Figure]


@dataclass(kw_only=True)
class Saved:
    """Predictors with all that is saved with them."""

    predictor: Predictor
    config: PredictorConfig
    trained_on: str  # `print_of` the weights that they were trained on
    figures: list[Figure] = field(default_factory=list)


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


def save(saved: Saved, folder: str | Path) -> Path:
    """Write `hf_sparse_predictors.safetensors` into a folder; a file that is there is replaced in one step."""
    tensors, about = saved.predictor.to_tensors()
    header = {
        "predictor": about, "config": saved.config.to_dict(), "weights": saved.trained_on,
        "figures": [figure.to_dict() for figure in saved.figures],
    }  # fmt: skip
    path = Path(folder) / FILE
    beside = path.with_name(f".{FILE}.partial")
    try:
        save_file(tensors, beside, {_HEADER: json.dumps(header)})
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def load(model: nn.Module, file: Path) -> Saved:
    """The predictors in a file; nothing is said about whether they were trained on the weights that the model has.

    Raises: CheckpointError for a file that holds none, ModelError for one made for another model.
    """
    tensors, header = _read(file)
    try:
        described = header["predictor"]
        layout = Layout.from_dict(described["layout"])
        layout.units(model)  # before memory is taken for what the header says
        _check_rank(described["options"], tensors, layout.hidden_size)
        predictor = from_tensors(tensors, described)
        config, weights = PredictorConfig.from_dict(header["config"]), str(header["weights"])
        figures = read_figures(header.get("figures", []))
    except ModelError:  # of another model
        raise
    except (HfSparseError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unusable(file, error) from error
    predictor.eval().requires_grad_(False)
    return Saved(predictor=predictor, config=config, trained_on=weights, figures=figures)


def read_about(file: Path) -> About:
    """What the header of a file tells; raises CheckpointError."""
    tensors, header = _read(file)
    try:
        described = header["predictor"]
        learned = described.get("learned")
        return About(
            config=PredictorConfig.from_dict(header["config"]), layout=Layout.from_dict(described["layout"]),
            weights=sum(tensor.numel() for tensor in tensors.values()),
            learned=Learned.from_dict(learned) if learned is not None else None,
            figures=read_figures(header.get("figures", [])),
        )  # fmt: skip
    except (HfSparseError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unusable(file, error) from error


def put_figures(model: nn.Module, folder: Path, figures: Sequence[Figure]) -> None:
    """Write the file in a folder anew with these figures; tensors and description stay."""
    saved = load(model, folder / FILE)
    saved.figures = list(figures)
    save(saved, folder)


def _unusable(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{one_line(file.name)} holds no predictors that this version can use ({one_line(error, 200)}); delete the file, or train anew."
    )


def _check_rank(options: Any, tensors: dict[str, torch.Tensor], hidden_size: int) -> None:
    """A rank decides how much memory is taken, so it has to be that of the tensors."""
    rank = options.get("rank")
    known = {len(tensor) for name, tensor in tensors.items() if name.endswith("first.bias") and tensor.ndim == 1}
    if rank is not None and not (known == {rank} if known else isinstance(rank, int) and rank <= hidden_size):
        raise ValueError(f"rank {one_line(rank)} is not that of the tensors")


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
