"""Which sites of a model carry an adapter, of whatever PEFT method."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_sparse.checkpoint import CONFIG_KEY, report, unwrap
from hf_sparse.errors import ConfigError, ModelError, unknown
from hf_sparse.families import find_sites
from hf_sparse.sites import count_zeros, plain_name


@dataclass(frozen=True, eq=False)
class Adapted:
    """One stored tensor that holds sites and that an adapter changes."""

    name: str  # path of the adapted module, with the parameter where that is not `weight`
    layer: Any  # the PEFT layer; of nested ones, each has an entry of its own
    owner: nn.Module
    parameter: str

    @property
    def weight(self) -> torch.Tensor:
        weight: torch.Tensor = getattr(self.owner, self.parameter)
        return weight

    def adapters(self) -> set[str]:
        """Names of the adapters that the layer holds."""
        held = (getattr(self.layer, name, {}) for name in self.layer.adapter_layer_names)
        return {adapter for one in held if isinstance(one, (nn.ModuleDict, nn.ParameterDict)) for adapter in one}


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(plain name, layer) of every PEFT layer of a model, the outer of nested ones first."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in unwrap(model).named_modules():
        if isinstance(module, BaseTunerLayer):
            yield plain_name(name), module


def site_tensors(model: nn.Module) -> set[tuple[int, str]]:
    """(identity of the module, name of its parameter) of every tensor that holds a site."""
    inner = unwrap(model)
    return {(id(inner.get_submodule(site.module)), site.parameter) for site in find_sites(inner).all()}


def adapted_sites(model: nn.Module) -> list[Adapted]:
    """Every tensor with sites that an adapter changes.

    Raises: ModelError where the model has no list of layers, and so no blocks.
    """
    sites = site_tensors(model)
    found = []
    for name, layer in tuner_layers(model):
        owner = layer.get_base_layer()
        only = getattr(layer, "parameter_name", None)
        for parameter in [only] if only else [key for key, _ in owner.named_parameters(recurse=False)]:
            if (id(owner), parameter) in sites:
                full = name if parameter == "weight" else f"{name}.{parameter}"
                found.append(Adapted(full, layer, owner, parameter))
    return found


def is_masked(layer: Any, adapter: str) -> bool:
    """Whether `mask_lora_` has masked an adapter on a layer."""
    return adapter in getattr(layer, "masked_adapters", ())


def check_names(model: nn.Module, names: str | Iterable[str] | None) -> list[str] | None:
    """The names as a list, or None for none given.

    Raises: ModelError for a model without adapters, ConfigError for an adapter that it does not have.
    """
    known = getattr(peft_part(model), "peft_config", None)
    if not known:
        raise ModelError(
            f"the {type(model).__name__} has no adapters; attach one with peft.get_peft_model(model, config) or load one with "
            "PeftModel.from_pretrained(model, folder)."
        )
    if names is None:
        return None
    given = [names] if isinstance(names, str) else list(names)
    for name in given:
        if name not in known:
            raise ConfigError(unknown("adapter", name, known))
    return given


def peft_part(model: Any) -> Any:
    """The part of a wrapped model that PEFT knows the adapters by."""
    while not getattr(model, "peft_config", None):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner
    return model


def zeros_at_stake(model: nn.Module, names: list[str] | None) -> int:
    """How many zeros of a sparse model's sites a plain merge would fill in; nothing is computed that a merge would have to.

    Weights without a claim or report count as sparse from a tenth of zeros on, as in `is_sparse`.
    Raises: ModelError where the model has no blocks.
    """
    lost = zeros = size = 0
    for item in adapted_sites(model):
        if item.weight.device.type == "meta":
            continue
        present = count_zeros(item.weight.detach())
        zeros, size = zeros + present, size + item.weight.numel()
        wanted = set(names or item.layer.active_adapters) & item.adapters() - set(item.layer.merged_adapters)
        lost += max((_lost(item, adapter, present) for adapter in wanted), default=0)
    inner = unwrap(model)
    known = report(inner) is not None or isinstance(getattr(getattr(inner, "config", None), CONFIG_KEY, None), dict)
    return lost if known or zeros >= 0.1 * size else 0


def _lost(item: Adapted, adapter: str, zeros: int) -> int:
    """Zeros of one tensor that one adapter fills in when it is merged."""
    from peft.tuners.ia3.layer import IA3Layer
    from peft.tuners.shira.layer import ShiraLayer

    if is_masked(item.layer, adapter) or isinstance(item.layer, IA3Layer):  # IA3 only scales rows or columns
        return 0
    if isinstance(item.layer, ShiraLayer):
        rows, columns = item.layer.shira_indices[adapter].long()
        return count_zeros(item.weight.detach()[rows, columns])
    return zeros
