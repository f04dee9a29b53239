"""Masked LoRA: adapters on sparse sites that change only weights that are kept, so that merging them changes no output."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hf_sparse.adapters.adapted import Adapted, adapted_sites, check_names, is_masked, tuner_layers
from hf_sparse.blocks import find_blocks
from hf_sparse.checkpoint import unwrap
from hf_sparse.errors import ModelError
from hf_sparse.sites import count_zeros, plain_name


def mask_lora_(model: nn.Module, adapter_name: str | Iterable[str] | None = None) -> list[str]:
    """Make LoRA and DoRA adapters on sparse sites change only the weights that are not zero; returns the names of the layers.

    On every site with zeros, the layer then computes `x (W + mask * scaling B A)^T`, with the mask read from the frozen base
    weight, and merging writes just that weight: all zeros stay, and no output changes. DoRA scales the rows of the masked sum,
    `W' = m * V / ||V||` (arXiv 2402.09353). Adapters on dense sites, embeddings and heads stay as they are; so do the names of
    parameters and what is saved. A layer's forward pass is one product, also with several adapters active; dropout needs one
    more for each. The weight is formed anew each time, which is little against a training step but not against generating
    single tokens: merge before generating much.

    Call it after the adapters are attached or loaded and before the model is sharded; adapters added later are ordinary until
    it is called again. An adapter that was saved is an ordinary LoRA in its file: loaded with plain PEFT it gives other
    outputs until `mask_lora_` is called, so publish the merged model, or say so.

    adapter_name: one or several adapters; None takes all that the model has now.
    Raises: ModelError for a model without adapters, without LoRA on a sparse site, or with one there whose mask cannot be known
    (merged, quantized, offloaded, sharded), or that is no LoRA or DoRA; ConfigError for an adapter that does not exist.
    Nothing is changed when it raises.
    """
    wanted = check_names(model, adapter_name)
    _check_readable(model, wanted)
    found = []
    for item in adapted_sites(model):
        names = item.adapters() if wanted is None else item.adapters() & set(wanted)
        if names and count_zeros(item.weight.detach()) and not _keeps_zeros_anyway(item.layer):
            _check_maskable(item, names)
            found.append((item, names))
    if not found:
        raise ModelError(_nothing_to_mask(model, wanted))
    for item, names in found:
        _mask_(item.layer, names)
    return [item.name for item, _ in found]


def _mask_(layer: Any, names: set[str]) -> None:
    from hf_sparse.adapters.layers import MaskedLinear, ParamWrapper

    if not isinstance(layer, (MaskedLinear, ParamWrapper)):
        layer.__class__ = ParamWrapper if hasattr(layer, "parameter_name") else MaskedLinear
    layer.masked_adapters = layer.masked_adapters | names


# ---------------------------------------------------------------------------------------------------- what cannot be masked


def _check_readable(model: nn.Module, wanted: list[str] | None) -> None:
    """Refuse a LoRA layer inside a block whose base weight cannot tell which weights it keeps."""
    from peft.tuners.lora.layer import Embedding, LoraLayer, _ConvNd

    blocks = [plain_name(block.name) + "." for block in find_blocks(unwrap(model))]
    for name, layer in tuner_layers(model):
        if not isinstance(layer, LoraLayer) or isinstance(layer, (Embedding, _ConvNd)):
            continue
        held = Adapted(name, layer, layer, "weight").adapters()
        if (wanted is None or held & set(wanted)) and any(name.startswith(block) for block in blocks):
            reason = _unreadable(layer)
            if reason:
                raise ModelError(f"{name} carries a LoRA, and what its weight drops cannot be known: {reason}")


def _unreadable(layer: Any) -> str | None:
    from peft.tuners.lora.layer import MultiheadAttention

    base = layer.get_base_layer()
    if isinstance(layer, MultiheadAttention):
        return "PEFT merges the adapter of a MultiheadAttention at every call. Leave it out of target_modules."
    if layer.merged and not all(is_masked(layer, name) for name in layer.merged_adapters):
        return f"{', '.join(layer.merged_adapters)} is merged into it. Call unmerge_adapter() first."
    weight = getattr(base, getattr(layer, "parameter_name", "weight"), None)
    if not isinstance(weight, torch.Tensor) or _is_quantized(weight):
        return f"it is quantized ({type(base).__name__}). Attach the adapter to the model in full or half precision."
    if type(weight.data).__name__ == "DTensor":
        return "it is sharded over processes. Call mask_lora_ before the model is sharded."
    if weight.device.type == "meta":
        return "it is offloaded or on the meta device. Load the model without offloading."
    return None


def _is_quantized(weight: torch.Tensor) -> bool:
    foreign = type(weight.data) not in (torch.Tensor, nn.Parameter) and type(weight.data).__name__ != "DTensor"
    return not weight.is_floating_point() or weight.element_size() < 2 or foreign


def _keeps_zeros_anyway(layer: Any) -> bool:
    from peft.tuners.ia3.layer import IA3Layer
    from peft.tuners.shira.layer import ShiraLayer

    return isinstance(layer, (IA3Layer, ShiraLayer))


def _check_maskable(item: Adapted, names: set[str]) -> None:
    from peft.tuners.lora import layer as lora

    from hf_sparse.adapters import layers

    kind = type(item.layer)
    if kind not in (lora.Linear, lora.ParamWrapper, layers.MaskedLinear, layers.ParamWrapper):
        raise ModelError(_only_lora(item.name, f"{kind.__module__.removeprefix('peft.tuners.')}.{kind.__name__}"))
    if item.layer.base_layer is not item.owner and not hasattr(item.layer, "parameter_name"):
        raise ModelError(
            f"{item.name} carries one adapter inside another, whose sum cannot be masked; attach them one at a time, or merge "
            "the inner one with hf_sparse.merge_and_unload first."
        )
    for name in sorted(names):
        variant = item.layer.lora_variant.get(name)
        if variant is not None and type(variant).__name__ != "DoraLinearVariant":
            raise ModelError(_only_lora(f"{item.name}, adapter {name!r},", type(variant).__name__))
        if variant is not None and bool((item.weight == 0).all(0 if item.layer.fan_in_fan_out else 1).any()):
            raise ModelError(
                f"{item.name} has rows of nothing but zeros, which have no direction for DoRA to scale (adapter {name!r}); "
                "use LoRA there: use_dora=False, or leave the layer out of target_modules."
            )


def _only_lora(what: str, kind: str) -> str:
    return (
        f"{what} is a {kind}, and only LoRA and DoRA can be masked; use LoraConfig without it, hf_sparse.sparse_shira_config, or "
        "hf_sparse.merge_and_unload, which cuts off what the adapter changes in dropped weights."
    )


def _nothing_to_mask(model: nn.Module, wanted: list[str] | None) -> str:
    layers = [name for name, _ in tuner_layers(model)]
    return (
        f"there is nothing to mask: none of the {len(layers)} adapted layers is a site with zeros that carries a LoRA"
        f"{f' named {wanted}' if wanted else ''}. Prune the base first (hf_sparse.prune_), then attach a LoRA to pruned layers "
        f"(target_modules). Initialisations that rewrite the base weight (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) fill its zeros; "
        "leave init_lora_weights at its default."
    )
