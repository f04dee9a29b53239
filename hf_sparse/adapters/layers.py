"""PEFT's LoRA layers, made to change only what the base weight keeps; a layer becomes one by having its class exchanged.

Exchanging the class keeps names, parameters, state dicts and files as PEFT has them. PEFT's own variants (`LoraVariant`) were
the other way: they are told the finished product of the base layer, which would cost a second product, and a variant is bound
to a field of the config, which would be saved.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import layer as lora
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from hf_sparse.adapters.product import MaskedProduct, changed, for_autocast, low_rank, without_autocast
from hf_sparse.errors import ModelError


class _Masked:
    """What both kinds of layer share: the mask is read from the base weight whenever it is needed, so it cannot be stale."""

    masked_adapters: frozenset[str] = frozenset()
    # While a merge or its undoing runs, adapter by adapter, the mask is held. As long as adapters are merged, it is remembered
    # where the weight does not tell it: the places where a sum became zero, or all of it under an adapter that is not masked.
    _held: torch.Tensor | None = None
    _remembered: torch.Tensor | tuple[torch.Tensor, ...] | None = None

    get_base_layer: Any
    lora_A: Any
    merged_adapters: list[str]

    def base_weight(self) -> torch.Tensor:
        parameter: torch.Tensor = getattr(self.get_base_layer(), getattr(self, "parameter_name", "weight"))
        return parameter

    def kept(self) -> torch.Tensor:
        """The mask, in the shape of the stored weight; True keeps."""
        if self._held is not None:
            return self._held
        if isinstance(self._remembered, torch.Tensor):
            return self._remembered
        kept = self.base_weight().detach().bool()
        if self._remembered is not None:
            kept[self._remembered] = True
        return kept

    def get_delta_weight(self, adapter: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What merging the adapter adds to the stored weight; nothing where the weight is zero."""
        delta = self.dense_delta(adapter)
        return delta.mul_(self.kept()) if adapter in self.masked_adapters else delta

    def dense_delta(self, adapter: str) -> torch.Tensor:
        raise NotImplementedError

    def effective_weight(self, names: list[str]) -> torch.Tensor:
        """The weight that merging these adapters one after the other would write."""
        weight = base = self.base_weight()
        for name in names:
            weight = self.with_adapter(name, weight)
        return weight.to(base.dtype)

    def with_adapter(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A weight after one more adapter."""
        return changed(weight, self.get_delta_weight(name))

    @contextmanager
    def _mask_held(self) -> Iterator[None]:
        if self._held is not None:  # DoRA undoes and repeats merges while it merges
            yield
            return
        held = self._held = self.kept()
        try:
            yield
        finally:
            weight = self.base_weight().data.add_(0.0)  # a negative factor makes -0.0 of zeros
            self._held = self._remembered = None
            if not self.masked_adapters.issuperset(self.merged_adapters):
                self._remembered = held
            elif self.merged_adapters:
                self._remembered = (held & (weight == 0)).nonzero(as_tuple=True)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        with self._mask_held():
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]

    def unmerge(self) -> None:
        with self._mask_held():
            super().unmerge()  # type: ignore[misc]

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)  # type: ignore[misc]
        self.masked_adapters = self.masked_adapters - {adapter_name}


class MaskedLinear(_Masked, lora.Linear):
    """LoRA or DoRA on a Linear or Conv1D: `x (W + mask * scaling B A)^T`, of DoRA with rows scaled to length m.

    DoRA (Liu et al., arXiv 2402.09353, eq. 5 and section 4.3): `W' = m * V / ||V||` with the norm of each row of
    `V = W + mask * scaling B A` taken as a constant by the backward pass.
    """

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(left, right), whose product has the layout of the stored weight."""
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return (a.T, b.T) if self.fan_in_fan_out else (b, a)

    def dense_delta(self, adapter: str) -> torch.Tensor:
        return low_rank(*self.factors(adapter), self.scaling[adapter])

    def with_adapter(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        delta = self.get_delta_weight(name)
        scale = self._row_scale(name, delta)
        return changed(weight, delta) if scale is None else changed(weight, delta) * scale

    def _row_scale(self, name: str, delta: torch.Tensor) -> torch.Tensor | None:
        """What DoRA multiplies rows with, broadcast over the stored weight; None for LoRA."""
        variant = self.lora_variant.get(name)
        if variant is None:
            return None
        if type(variant) is not DoraLinearVariant:
            raise ModelError(
                f"adapter {name!r} is a {type(variant).__name__}, which cannot run together with masked adapters on the same "
                f"layer ({', '.join(sorted(self.masked_adapters))}); activate one of them at a time."
            )
        with torch.no_grad():
            length = torch.linalg.vector_norm(self.base_weight() + delta, dim=0 if self.fan_in_fan_out else 1)
        scale = self.lora_magnitude_vector[name].weight / length
        return scale if self.fan_in_fan_out else scale[:, None]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = kwargs.get("adapter_names")
        names = self.active_adapters if given is None else given
        if self.disable_adapters or self.merged or not self.masked_adapters.intersection(names):
            return super().forward(x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        if given is not None:
            return self._mixed_batch(x, given)
        return self._run(x, [name for name in names if name in self.lora_A])

    def _mixed_batch(self, x: torch.Tensor, given: list[str]) -> torch.Tensor:
        """Each row of the batch with the adapter that is named for it, as PEFT has it; `__base__` means none."""
        parts, order = [], []
        for name in dict.fromkeys(given):
            rows = [row for row, wanted in enumerate(given) if wanted == name]
            parts.append(self._run(x[rows], [name] if name in self.lora_A else []))
            order += rows
        return torch.cat(parts)[torch.tensor(order, device=x.device).argsort()]

    def _run(self, x: torch.Tensor, names: list[str]) -> torch.Tensor:
        if self.training and any(isinstance(self.lora_dropout[name], nn.Dropout) for name in names):
            result = self._with_dropout(x, names)
        elif len(names) == 1 and self._is_masked_lora(names[0]) and self._is_plain():
            bias, x = self.get_base_layer().bias, for_autocast(x)
            bias = bias if bias is None else bias.to(x.dtype)
            result = MaskedProduct.apply(
                x, self.base_weight(), *self.factors(names[0]), self.scaling[names[0]], bias, self.fan_in_fan_out
            )
        else:
            result = self._base_with(x, names)
        for name in names:
            if self.lora_bias[name]:
                result = result + (self.lora_B[name].bias * self.scaling[name]).to(result.dtype)
        return result

    def _base_with(self, x: torch.Tensor, names: list[str]) -> torch.Tensor:
        """The base layer's own forward pass, hooks included, with the changed weight in place of its own."""
        if not names:
            return self.base_layer(x)
        return functional_call(self.base_layer, {"weight": self.effective_weight(names)}, (x,))

    def _with_dropout(self, x: torch.Tensor, names: list[str]) -> torch.Tensor:
        """Dropout is on the adapter's input only, so the change of the weight needs a product of its own."""
        result = self.base_layer(x)
        weight = self.base_weight()
        for name in names:
            delta = self.get_delta_weight(name)
            scale = self._row_scale(name, delta)
            change = delta if scale is None else (weight + delta) * scale - weight
            weight = weight + change
            dropped = for_autocast(self.lora_dropout[name](x))
            change = (change.T if self.fan_in_fan_out else change).to(dropped.dtype)
            result = result + F.linear(dropped, change).to(result.dtype)
        return result

    def _is_masked_lora(self, name: str) -> bool:
        return name in self.masked_adapters and name not in self.lora_variant

    def _is_plain(self) -> bool:
        """Whether the base layer does nothing but its product, which can then be made without calling it."""
        base = self.get_base_layer()
        hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
        return type(base) in (nn.Linear, Conv1D) and not any(hooks) and "forward" not in vars(base)


class ParamWrapper(_Masked, lora.ParamWrapper):  # PEFT knows its wrappers by the name of their class
    """LoRA on a bare parameter, such as all experts of a block in one tensor (expert, out, in) or (expert, in, out)."""

    def dense_delta(self, adapter: str) -> torch.Tensor:
        with without_autocast(self.base_weight().device):
            return lora.ParamWrapper.get_delta_weight(self, adapter)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not self.masked_adapters.intersection(names):
            return super().forward(x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        kwargs.pop("adapter_names", None)
        changed_weight = {self._path(): self.effective_weight(names)}
        return functional_call(self.base_layer, changed_weight, (x, *args), kwargs)

    def _path(self) -> str:
        """Where the parameter lies as seen from the wrapped module, which may be wrapped for another parameter as well."""
        path, module = self.parameter_name, self.base_layer
        while hasattr(module, "base_layer"):
            path, module = f"base_layer.{path}", module.base_layer
        return path
