"""The tensors that a compressed save of a model writes, by the names of its plain checkpoint."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from hf_sparse.errors import ModelError
from hf_sparse.runtime.lazy import LazyWeight
from hf_sparse.runtime.modules import lazy_weights
from hf_sparse.storage.bitmask import compress
from hf_sparse.storage.names import check_free, check_gains, named


def compressed_state(model: Any, state_dict: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The state dict of a model as its plain save would write it, with each tensor in parts where those are smaller.

    What is held for sparse kernels becomes dense one matrix at a time.

    Raises: ModelError for weights that are not here as a whole (offloaded, in shards); CheckpointError for names that are taken,
        and where no tensor has enough zeros to become smaller.
    """
    state = plain_state(model, state_dict)
    check_free(state)
    found: dict[str, torch.Tensor] = {}
    for name in list(state):
        tensor = state.pop(name)
        tensor = tensor.dense() if isinstance(tensor, LazyWeight) else tensor
        parts = compress(tensor)
        found |= {name: tensor} if parts is None else named(name, parts)
    check_gains(found)
    return found


def plain_state(model: Any, state_dict: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """What a plain save writes: without what is tied or ignored, with the names and layouts of the original checkpoint."""
    with lazy_weights():
        state = dict(model.state_dict() if state_dict is None else state_dict)
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(name, None)
    for name, tensor in state.items():
        _check_here(name, tensor)
    lazy = {name: tensor for name, tensor in state.items() if isinstance(tensor, LazyWeight)}
    others = {name: tensor for name, tensor in state.items() if name not in lazy}  # lazy ones are never tied
    return dict(revert_weight_conversion(model, remove_tied_weights_from_state_dict(others, model) | lazy))


def _check_here(name: str, tensor: torch.Tensor) -> None:
    way = "save it dense, then compress the folder with `hf-sparse convert`"
    if tensor.device.type == "meta":
        raise ModelError(f"{name} is offloaded, and such a model cannot be saved compressed; {way}.")
    if type(tensor.data if isinstance(tensor, nn.Parameter) else tensor).__name__ == "DTensor":
        raise ModelError(f"{name} is sharded over processes, and such a model cannot be saved compressed; {way}.")
