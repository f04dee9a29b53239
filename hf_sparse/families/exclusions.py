"""Why a parameter of a block is no site."""

import re

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hf_sparse.families.names import role_of
from hf_sparse.runtime.lazy import LazyWeight
from hf_sparse.sites import plain_name

_ROUTER_NAMES = {"gate", "shared_expert_gate", "wg", "gating"}
_ROUTER_CLASS = re.compile(r"Router|TopK|Gating(?!MLP)|Mo[eE]Gate(?!d)")
_EXPERT_COUNTS = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts", "n_experts",
)  # fmt: skip


def _key(tensor: torch.Tensor) -> int:
    # What a DTensor says of its address is where it lies in the whole, the same for many; its own part tells.
    data = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return data.data_ptr() or id(tensor)  # tensors on the meta device all lie at 0


class Exclusions:
    """Knows what a model ties, routes with, keeps in full precision or has quantized."""

    def __init__(self, model: nn.Module) -> None:
        self._tied = {_key(m.weight): name for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
        if isinstance(model, PreTrainedModel):
            head = model.get_output_embeddings()
            if isinstance(getattr(head, "weight", None), torch.Tensor):
                self._tied[_key(head.weight)] = "the output embeddings"
        self._strict = self._patterns(model, "_keep_in_fp32_modules_strict")
        self._wide = self._patterns(model, "_keep_in_fp32_modules")
        self._routers: set[str] = set()

    @staticmethod
    def _patterns(model: nn.Module, attribute: str) -> re.Pattern[str] | None:
        names: set[str] = set()
        for module in model.modules():
            names.update(getattr(module, attribute, None) or ())
        return re.compile("|".join(rf"(?:^|\.){name}(?:$|\.)" for name in sorted(names))) if names else None

    def reason(self, path: str, module: nn.Module, owner: nn.Module, name: str, parameter: torch.Tensor) -> str | None:
        """One sentence if the parameter must not be pruned although it may look like a site, else None."""
        plain = plain_name(path)
        full = f"{plain}.{name}"
        if isinstance(module, nn.Embedding):
            return "It is an embedding table."
        if _key(parameter) in self._tied:
            return f"It is tied to the embeddings ({self._tied[_key(parameter)]})."
        if self._is_router(path, module, owner, parameter):
            return "It belongs to a router, which decides between experts."
        if self._strict and self._strict.search(full):
            return "The model keeps it in full precision."
        # T5 lists its `wo` here for the range of fp16 only: a matrix with a role is pruned all the same.
        if self._wide and self._wide.search(full) and role_of(plain) is None:
            return "The model keeps it in full precision."
        if not parameter.is_floating_point() or parameter.element_size() < 2 or _is_foreign(parameter):
            return "Its weights are quantized."
        return None

    def _is_router(self, path: str, module: nn.Module, owner: nn.Module, parameter: torch.Tensor) -> bool:
        if any(path.startswith(router + ".") for router in self._routers):
            return True
        last = plain_name(path).rsplit(".", 1)[-1]
        named = "router" in last or (last in _ROUTER_NAMES and parameter.shape[0] in _expert_counts(module, owner))
        if named or _ROUTER_CLASS.search(type(module).__name__) or _ROUTER_CLASS.search(type(owner).__name__):
            self._routers.add(path)
            return True
        return False

    def enter(self, path: str, module: nn.Module) -> None:
        """Remember a module all of whose children decide between experts."""
        if _ROUTER_CLASS.search(type(module).__name__):
            self._routers.add(path)


def _expert_counts(module: nn.Module, owner: nn.Module) -> set[int]:
    counts = {1, getattr(module, "num_experts", 1)}
    holders = [owner, *owner.children(), getattr(owner, "config", None)]
    for holder in holders:
        counts.update(value for name in _EXPERT_COUNTS if isinstance(value := getattr(holder, name, None), int))
    return counts | {len(child) for child in owner.children() if isinstance(child, (nn.ModuleList, nn.ModuleDict))}


def _is_foreign(parameter: torch.Tensor) -> bool:
    """A tensor subclass stores something else than it shows; distributed tensors only split what they show."""
    kind = type(parameter.data)
    return (
        kind not in (torch.Tensor, nn.Parameter, LazyWeight)
        and kind.__name__ != "DTensor"
        and "Fake" not in kind.__name__
    )


def leftover(module: nn.Module, name: str, parameter: torch.Tensor) -> str:
    """Why a parameter that no table knows is left alone."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return "It is the kernel of a convolution."
    if isinstance(module, nn.RNNBase):
        return "It belongs to a recurrent layer."
    if "bias" in name:
        return "It is a bias or a table of biases."
    if "lora_" in name:
        return "It belongs to an adapter."
    return f"How {type(module).__name__} uses it is not known."
