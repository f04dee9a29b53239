"""Finds every place where the channels of the residual stream lie, which one order may reorder for the whole model."""

import re
from collections import defaultdict

import torch
from torch import nn

from hf_sparse.families import Inventory
from hf_sparse.permute.places import Channels, Place, bias_of, columns_of, rows_of
from hf_sparse.sites import Site

READS = ("q", "k", "v", "gate", "up")
WRITES = ("o", "down")


def find_residual(model: nn.Module, inventory: Inventory) -> Channels | str:
    """The channels of the residual stream, or why they must stay in order.

    What a role tells is taken from it; every other dimension that is as long as an embedding is wide is supposed to be the
    residual's. Whether that is so, the model's output has to show.
    """
    try:
        width = int(model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]
    except (AttributeError, NotImplementedError, IndexError, TypeError):
        return "the model names no input embeddings"
    if reason := _forbidden(model, width):
        return reason
    sites: dict[str, list[Site]] = defaultdict(list)
    for site in inventory.all():
        sites[f"{site.module}.{site.parameter}"].append(site)
    biases = {f"{s.module}.{bias[0]}": s for s in inventory.all() if (bias := bias_of(model, s))}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    places: list[Place] = []
    for name, tensor in _tensors(model):
        if name in sites:
            found = _of_site(model, sites[name], width)
        elif name in biases and biases[name].role in (*READS, *WRITES):
            found = []  # a writer's went with its rows
        elif id(tensor) in tables:
            found = [Place(name, (slice(None), slice(0, width)))] if tensor.shape[1] == width else []
        else:
            found = [] if _is_internal(model, name, tensor, sites) else _of_length(name, tensor, width)
        places += found
    return Channels("residual", width, tuple({str(place): place for place in places}.values()))


def unseen(model: nn.Module, channels: Channels, called: set[int]) -> str | None:
    """A module that holds some of the channels but did not run, so that no sample can show whether it holds them.

    Modules may use the weights of their children without calling them; and experts need not all be reached.
    """
    for path in dict.fromkeys(place.tensor.rpartition(".")[0] for place in channels.places):
        near = [model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])]
        if not any(id(module) in called for module in near) and ".experts." not in f".{path}.":
            return path
    return None


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if buffer.is_floating_point()]
    return [*model.named_parameters(remove_duplicate=False), *buffers]


def _forbidden(model: nn.Module, width: int) -> str:
    """What a loaded checkpoint would not bring back in the new order, or what numbers cannot show."""
    if any(hasattr(module, "base_layer") for module in model.modules()):
        return "adapters expect its channels in order"
    hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]
    if any(getattr(part, "offload", False) for hook in hooks for part in getattr(hook, "hooks", (hook,))):
        return "parts of the model are offloaded"
    saved = set(model.state_dict().keys())
    unsaved = [pattern for m in model.modules() for pattern in getattr(m, "_keys_to_ignore_on_save", None) or ()]
    for name, tensor in _tensors(model):
        left_out = name not in saved or any(re.search(pattern, name) for pattern in unsaved)
        if width in tensor.shape and left_out:
            return f"{name} is not saved with the model"
    return ""


def _of_site(model: nn.Module, sites: list[Site], width: int) -> list[Place]:
    found: list[Place] = []
    for site in sites:
        every = range(width)
        if site.role not in WRITES and site.shape[1] == width:
            found += columns_of(site, every) or []
        if site.role not in READS and site.shape[0] == width:
            found += rows_of(site, every, bias_of(model, site)) or []
    return found


def _is_internal(model: nn.Module, name: str, tensor: torch.Tensor, sites: dict[str, list[Site]]) -> bool:
    """Whether a vector's module stands right beside a reader of the residual, as norms over q and k do."""
    owner = name.rpartition(".")[0].rpartition(".")[0]
    beside = [
        site for full, held in sites.items() if full.rpartition(".")[0].rpartition(".")[0] == owner for site in held
    ]
    return tensor.ndim == 1 and any(site.role in READS for site in beside) and not _is_block(model, owner)


def _is_block(model: nn.Module, path: str) -> bool:
    parent = path.rpartition(".")[0]
    return bool(path) and isinstance(model.get_submodule(parent), nn.ModuleList)


def _of_length(name: str, tensor: torch.Tensor, width: int) -> list[Place]:
    dimensions = [number for number, length in enumerate(tensor.shape) if length == width]
    return [Place(name, (*[slice(None)] * number, slice(0, width))) for number in dimensions]
