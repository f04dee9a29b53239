"""How tensors of a checkpoint become a model's and go back: Transformers' own renamings and conversions, for some of them at a time."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from hf_sparse.errors import ModelError


class Conversion:
    """Which tensor of the checkpoint goes where in the model; `target` is the first parameter that it becomes (a part of)."""

    def __init__(self, model: Any, keys: Collection[str], mapping: Sequence[Any] | None) -> None:
        self._model = model
        self._prefix: str = getattr(model, "base_model_prefix", "")
        renamings = [entry for entry in mapping or () if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping or () if isinstance(entry, WeightConverter)]
        expected = model.state_dict()
        self.target: dict[str, str] = {}
        self._plain: dict[str, str] = {}  # the model's name -> the checkpoint's, where nothing but the name differs
        for key in keys:
            name, pattern = rename_source_key(key, renamings, converters, self._prefix, expected)
            if name not in expected and key in expected:  # as Transformers itself does
                name, pattern = rename_source_key(key, [], [], self._prefix, expected)
            self.target[key] = name
            if pattern is None and name in expected:
                self._plain[name] = key
        self.used = [entry for entry in mapping or () if entry.was_used()]

    def restore(self) -> None:
        """Loading a part of the weights leaves the model with the conversions of that part; give it back all."""
        self._model._weight_conversions = self.used

    def check(self, group: str, keys: Collection[str], state: Mapping[str, torch.Tensor]) -> None:
        """Raises ModelError where the tensors of a group would not come back under the names that they have in the checkpoint."""
        lost = sorted(set(keys) - set(self.reversed(keys, state)))
        known = [key for key in lost if self.target[key] in state]
        if known:
            raise ModelError(
                f"{known[0]!r} is converted when it is loaded into {group}, and Transformers does not give it back under that name, so the "
                "model cannot be streamed; prune it in memory."
            )

    def reversed(self, keys: Collection[str], state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model's tensors as the checkpoint has them, by its names."""
        found = {self._plain[name]: tensor for name, tensor in state.items() if name in self._plain}
        rest = {name: tensor for name, tensor in state.items() if name not in self._plain}
        if any(isinstance(tensor, nn.Parameter) for tensor in rest.values()):
            rest = {name: tensor.detach() for name, tensor in rest.items()}
        if rest:
            self.restore()
            for name, tensor in revert_weight_conversion(self._model, rest).items():
                found[self._as_stored(name, keys)] = tensor
        return {name: tensor for name, tensor in found.items() if name in set(keys)}

    def _as_stored(self, name: str, keys: Collection[str]) -> str:
        """Checkpoints of the base model have no prefix where those of the whole model have one, and the other way round."""
        names = (name, name.removeprefix(f"{self._prefix}."), f"{self._prefix}.{name}")
        return next((one for one in names if one in keys), name)
