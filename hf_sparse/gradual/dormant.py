"""Keeps what a checkpoint of a training does not: the masks on their way, and the values of the weights that they drop."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from hf_sparse.errors import CheckpointError
from hf_sparse.gradual.held import Held
from hf_sparse.stored import Stored, bits, over_processes

FILE_NAME = "hf_sparse_dormant.safetensors"
_MASK = ".mask"  # behind a parameter's name: its mask as bits, eight weights to a byte, the first in the highest
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@torch.no_grad()
def save_dormant(held: Sequence[Held], folder: Path, writes: bool) -> None:
    """Write `hf_sparse_dormant.safetensors` into a folder; all processes have to call it, and one of them `writes`."""
    tensors: dict[str, torch.Tensor] = {}
    for one in held:
        if not one.moving:
            continue
        dropped = one.dropped()
        waiting = torch.zeros_like(one.stored.local())
        if one.dormant is not None:
            waiting[dropped] = one.dormant
        whole, values = _gathered(one.stored, dropped.to(torch.int8)).bool(), _gathered(one.stored, waiting)
        if writes:
            tensors[one.stored.name] = values[whole].cpu()
            tensors[one.stored.name + _MASK] = torch.from_numpy(numpy.packbits(whole.flatten().cpu().numpy()))
    if writes:
        file = folder / FILE_NAME
        new = file.with_name(f".{FILE_NAME}")
        save_file(tensors, new)
        os.replace(new, file)


def _gathered(stored: Stored, local: torch.Tensor) -> torch.Tensor:
    """The whole of what lies in pieces as the parameter does; itself where that is in one piece."""
    data = stored.parameter
    if not isinstance(data, DTensor):
        return local
    spread = DTensor.from_local(
        local, data.device_mesh, data.placements, run_check=False, shape=data.shape, stride=data.stride()
    )
    return spread.full_tensor()


@torch.no_grad()
def load_dormant_(held: Sequence[Held], file: Path | None) -> bool:
    """Take up the masks and the values that `save_dormant` wrote; False, and nothing changed, where one process cannot.

    Without a file, or with one that does not belong to these weights, the masks stay as their zeros have made them.
    Raises: CheckpointError for a file that is damaged.
    """
    moving = [one for one in held if one.moving]
    found = _read(moving, file) if file is not None and file.is_file() else None
    usable = torch.tensor([1, found is not None], dtype=torch.int64)
    processes, able = over_processes(usable).tolist()
    if able < processes or found is None:
        return False
    for one, (dropped, values) in zip(moving, found, strict=True):
        one.kept = bits(~dropped) if bool(dropped.any()) else None
        one.dormant = values
        one.apply_()
    return True


def _read(held: Sequence[Held], file: Path) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
    """For each parameter where this process's part is dropped, and the values there; None where its weights say otherwise."""
    found = []
    try:
        with safe_open(file, framework="pt") as opened:
            for one in held:
                whole, values = _checked(opened, one.stored, file)
                waiting = torch.zeros(whole.shape, dtype=values.dtype)
                waiting[whole] = values
                device = one.stored.local().device
                dropped = one.stored.piece(whole.to(device))
                if bool(one.stored.local()[dropped].any()):
                    return None  # of another training
                found.append((dropped, one.stored.piece(waiting.to(device))[dropped]))
    except SafetensorError as error:
        raise CheckpointError(_damaged(file, str(error))) from error
    return found


def _checked(opened: safe_open, stored: Stored, file: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the whole parameter is dropped and the values there; what the file says of itself is checked before it is read."""
    size, dtype = stored.parameter.numel(), _DTYPES.get(stored.parameter.dtype)
    values, mask = opened.get_slice(stored.name), opened.get_slice(stored.name + _MASK)
    right = mask.get_dtype() == "U8" and mask.get_shape() == [-(-size // 8)]
    right = right and values.get_dtype() == dtype and len(values.get_shape()) == 1 and values.get_shape()[0] <= size
    if not right:
        raise CheckpointError(_damaged(file, f"{stored.name} has another size or dtype"))
    packed = opened.get_tensor(stored.name + _MASK).numpy()
    whole = torch.from_numpy(numpy.unpackbits(packed, count=size)).bool().view(stored.parameter.shape)
    if int(whole.sum()) != values.get_shape()[0]:
        raise CheckpointError(_damaged(file, f"{stored.name} has not one value for each dropped weight"))
    return whole, opened.get_tensor(stored.name)


def _damaged(file: Path, what: str) -> str:
    return (
        f"{str(file)!r} cannot be used: {what}. Delete it to go on with zeros in the place of the dropped weights' values, or resume from "
        "another checkpoint."
    )
