"""What a folder of checkpoints belongs to, so that `recover` goes on only with what it began."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_sparse.checkpoint import CONFIG_KEY
from hf_sparse.errors import CheckpointError

FILE_NAME = "recover.json"
_SAMPLED = 64  # values of each parameter, spread evenly
_LARGEST_FILE = 2**20


def check_checkpoints(folder: Path, destination: Path) -> None:
    """Refuse a folder that would be replaced with the destination, or hold it; call it before anything is loaded.

    Raises: CheckpointError.
    """
    place, other = folder.absolute().resolve(), destination.absolute().resolve()
    if place == other or other in place.parents or place in other.parents:
        raise CheckpointError(
            f"the checkpoints {str(folder)!r} and the destination {str(destination)!r} lie one in the other; give --checkpoints a folder "
            "of its own."
        )
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"the checkpoints {str(folder)!r} are a file; give a folder.")
    if last_checkpoint(folder) and not (folder / FILE_NAME).is_file():
        raise CheckpointError(
            f"{str(folder)!r} holds checkpoints and no {FILE_NAME}, so they are not of `recover` and cannot be gone on from; give an empty "
            "folder to --checkpoints."
        )


def begin(folder: Path, settings: Mapping[str, Any]) -> Path | None:
    """The checkpoint to go on from; None for a fresh start, whose settings (plain data) are written down.

    Raises: CheckpointError where the checkpoints are of a run with other settings.
    """
    last = last_checkpoint(folder)
    file = folder / FILE_NAME
    if last is None:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        return None
    earlier = _read(file)
    for name in [*settings, *(key for key in earlier if key not in settings)]:
        was, now = earlier.get(name), settings.get(name)
        if was != now:
            raise CheckpointError(
                f"the checkpoints in {str(folder)!r} are of another run: {name} was {was!r}, now it is {now!r}. Give what was given then, or "
                "an empty folder to --checkpoints."
            )
    return last


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint: the Trainer writes its own state last."""
    found = {
        int(number): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        for kind, _, number in [path.name.partition("-")]
        if kind == "checkpoint" and number.isdecimal() and (path / "trainer_state.json").is_file()
    }
    return found[max(found)] if found else None


def steps_done(checkpoint: Path) -> int:
    """How many steps the training had made at a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8") if file.stat().st_size <= _LARGEST_FILE else ""
        found = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{str(file)!r} cannot be read ({error}); give an empty folder to --checkpoints."
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{str(file)!r} is no account of a run; give an empty folder to --checkpoints.")
    return found


def model_fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits over what the config claims, and each parameter's name, shape, type and some of its values."""
    claim = getattr(getattr(model, "config", None), CONFIG_KEY, None)
    digest = hashlib.sha256(json.dumps(claim, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _SAMPLED)].cpu().contiguous()
        digest.update(
            f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode() + some.view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:16]
