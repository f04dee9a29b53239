"""Merging adapters into a sparse base without losing a zero."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_sparse import peft_hook
from hf_sparse.adapters.adapted import Adapted, adapted_sites, check_names, is_masked, peft_part, site_tensors
from hf_sparse.checkpoint import count, unwrap
from hf_sparse.errors import ModelError
from hf_sparse.kept import missing_zeros
from hf_sparse.sites import count_zeros


@dataclass
class _Cut:
    """How much of what adapters add lies where the base has zeros, in squared norm."""

    cut: float = 0.0
    whole: float = 0.0

    def apply_(self, weight: torch.Tensor, before: torch.Tensor) -> None:
        """Put the zeros of a weight as it was before back into what it is now."""
        now, dropped = weight.detach(), before == 0
        wide = torch.promote_types(now.dtype, torch.float32)
        change = now.to(wide) - before.to(wide)
        self.whole += float(change.square().sum())
        self.cut += float(change[dropped].square().sum())
        # selected, not multiplied: what was broken stays out, and + 0.0 makes 0.0 of -0.0
        weight.data.copy_(torch.where(dropped, 0.0, now) + 0.0)

    def tell(self) -> None:
        """Warn whoever called the merge, if anything was cut off."""
        if self.cut:
            warnings.warn(
                f"{(self.cut / self.whole) ** 0.5:.1%} of what the adapters add (its norm) lies on weights that the base drops and "
                "was cut off, so the merged model gives other outputs than the adapted one did. To train what is merged, call "
                "hf_sparse.mask_lora_(model) before training.",
                stacklevel=3,
            )


def merge_and_unload(
    model: nn.Module, adapter_names: str | Iterable[str] | None = None, safe_merge: bool = False, progressbar: bool = False
) -> nn.Module:  # fmt: skip
    """Merge adapters into the base and return it, as PEFT's `merge_and_unload`, but every zero of every site stays +0.0.

    Works with every PEFT method that can merge, on a PeftModel and on a Transformers model that carries adapters itself. What
    the base knows about its sparsity stays with it. Where an adapter was trained without the mask, what it adds to dropped
    weights is cut off; a warning tells how much of its norm that is, since the outputs change by it.

    adapter_names: the adapters to merge; None takes the active ones.
    safe_merge: refuse NaN, on a copy of each weight.
    Raises: ModelError for a model without adapters, with adapters that cannot be merged (prompts), or with unmasked ones
    merged already; ConfigError for an adapter that does not exist.
    """
    names = check_names(model, adapter_names)
    part = peft_part(model)
    injected = not hasattr(part, "merge_and_unload")
    if injected and not getattr(part, "_hf_peft_config_loaded", False):
        kinds = ", ".join(sorted({str(getattr(config, "peft_type", "")) for config in part.peft_config.values()}))
        raise ModelError(f"adapters of this kind ({kinds}) are no change of weights and cannot be merged.")
    items = adapted_sites(model)
    _check_unmerged(items)
    _warn_of_zeros_lost_before(model)
    cut = _Cut()
    saved = _trained_copies(model)
    with _zeros_kept(items, cut), peft_hook.quiet():
        if injected:
            merged = _merge_injected(part, names, safe_merge)
        else:
            merged = part.merge_and_unload(progressbar=progressbar, safe_merge=safe_merge, adapter_names=names)
    for copy, original in saved:
        cut.apply_(copy, original)
    cut.tell()
    return merged


def _warn_of_zeros_lost_before(model: nn.Module) -> None:
    missing = missing_zeros(unwrap(model), count(model))
    if missing:
        warnings.warn(
            f"the base had lost zeros before this merge: {missing}. Training without masks fills them in, and so does an "
            "init_lora_weights that rewrites the base (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA).",
            stacklevel=3,
        )


def _check_unmerged(items: list[Adapted]) -> None:
    for item in items:
        unmasked = [name for name in item.layer.merged_adapters if not is_masked(item.layer, name)]
        if unmasked:
            raise ModelError(
                f"{', '.join(unmasked)} is already merged into {item.name}, so which of its weights were zero cannot be known; "
                "call unmerge_adapter() on the model first."
            )


@contextmanager
def _zeros_kept(items: list[Adapted], cut: _Cut) -> Iterator[None]:
    """While it is open, each layer that merges puts back the zeros of its base; one copy of one weight at a time."""
    layers = {id(item.layer): item.layer for item in items}
    try:
        for layer in layers.values():
            inside = set(layer.modules()) - {layer.get_base_layer()}
            # of MultiheadAttention the layer around it also merges what belongs to the one inside
            own = [item for item in items if item.layer is layer or item.owner in inside]
            layer.merge = _guarded(layer.merge, own, cut)
        yield
    finally:
        for layer in layers.values():
            layer.__dict__.pop("merge", None)


def _guarded(merge: Any, items: list[Adapted], cut: _Cut) -> Any:
    def guarded(*args: Any, **kwargs: Any) -> None:
        sparse = [item for item in items if count_zeros(item.weight.detach())]
        before = [item.weight.detach().clone() for item in sparse]
        merge(*args, **kwargs)
        for item, old in zip(sparse, before):
            cut.apply_(item.weight, old)

    return guarded


def _trained_copies(model: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(trained copy, original) of every tensor with sites that `modules_to_save` put a whole copy beside."""
    from peft.utils.other import ModulesToSaveWrapper

    sites, found = site_tensors(model), []
    for wrapper in unwrap(model).modules():
        if not isinstance(wrapper, ModulesToSaveWrapper) or not wrapper.active_adapters:
            continue
        copy = wrapper.modules_to_save[wrapper.active_adapters[0]]
        for path, module in wrapper.original_module.named_modules():
            for name, original in module.named_parameters(recurse=False):
                if (id(module), name) in sites and count_zeros(original.detach()):
                    found.append((getattr(copy.get_submodule(path), name), original.detach()))
    return found


def _merge_injected(model: Any, names: list[str] | None, safe_merge: bool) -> nn.Module:
    """Merge adapters that a Transformers model carries without PEFT's wrapper around it, for which PEFT has no function."""
    from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    paths = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    for path in [path for path in paths if not any(path.startswith(other + ".") for other in paths)]:
        layer = model.get_submodule(path)
        with onload_layer(layer):
            if hasattr(layer, "unload_and_optionally_merge_module"):
                plain = layer.unload_and_optionally_merge_module(merge=True, safe_merge=safe_merge, adapter_names=names)
            else:
                layer.merge(safe_merge=safe_merge, adapter_names=names)
                plain = layer.get_base_layer()
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)
    del model.peft_config
    model._hf_peft_config_loaded = False
    # Loading an adapter left the renamings of its file here, by which the next save would name the model's own weights.
    model._weight_conversions = None
    return model  # type: ignore[no-any-return]
