"""Sparse high-rank adapters inside the support of a sparse base: plain PEFT loads them, and merging keeps every zero."""

import hashlib
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy
import torch
from torch import nn

from hf_sparse.checkpoint import unwrap
from hf_sparse.errors import ConfigError, ModelError
from hf_sparse.families import find_sites
from hf_sparse.sites import count_zeros, plain_name


def sparse_shira_config(
    model: nn.Module, r: int = 32, target_modules: str | Iterable[str] | None = None, seed: int = 0, **shira_options: Any
) -> Any:  # fmt: skip
    """A `peft.ShiraConfig` whose trained weights all lie where the base is not zero.

    SHiRA (Bhardwaj et al., arXiv 2406.13175, section 3) trains single weights of each matrix, `r * (in + out)` of them, here
    drawn at random from the kept ones. The positions are saved with the adapter, so it loads with plain PEFT to the same
    outputs, and merging it with PEFT or with hf_sparse keeps every zero.

    r: sets how many weights are trained: as many as a LoRA of that rank has.
    target_modules: as in PEFT; None takes every Linear that holds a site with zeros.
    seed: the positions are a function of it and of where a layer's weight is not zero, whatever the order of the layers.
    Raises: ConfigError if a layer keeps fewer weights than asked for, or for an option that has no effect here; ModelError for a
    model without a sparse Linear, or with weights on the meta device.
    """
    from peft import ShiraConfig

    for name in {"mask_type", "random_seed"} & shira_options.keys():
        raise ConfigError(
            f"{name} has no effect here: positions are drawn from the kept weights by `seed`; leave it out."
        )
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ConfigError(f"r is {r!r}; give a whole number of at least 1.")
    inner = unwrap(model)
    if target_modules is None:
        target_modules = _sparse_linears(inner)
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = ShiraConfig(r=r, target_modules=targets, **shira_options)
    _check_room(inner, config)
    config.mask_fn = partial(support_mask, seed=seed)
    return config


def support_mask(base_layer: nn.Module, r: int, *, seed: int, **_: Any) -> torch.Tensor:
    """`r * (in + out)` ones at kept places of a layer's weight (out, in), zeros elsewhere, in its dtype: a PEFT `mask_fn`."""
    weight = base_layer.get_parameter("weight").detach()
    kept = weight.reshape(-1).bool().cpu()
    places = kept.nonzero().squeeze(1)
    count = r * sum(weight.shape)
    if count > len(places):
        raise ConfigError(_too_many("this layer", r, len(places), sum(weight.shape)))
    chosen = places[torch.randperm(len(places), generator=_generator(kept, seed))[:count]]
    mask = torch.zeros(weight.numel(), dtype=weight.dtype)
    mask[chosen] = 1
    return mask.view(weight.shape).to(weight.device)


def _generator(kept: torch.Tensor, seed: int) -> torch.Generator:
    """Random numbers of one layer. PEFT tells no name, so the layer is known by which weights it keeps."""
    digest = hashlib.sha256(numpy.packbits(kept.numpy()).tobytes() + str(seed).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def _sparse_linears(model: nn.Module) -> list[str]:
    modules = dict.fromkeys(site.module for site in find_sites(model).all() if site.parameter == "weight")
    linear = {name: module for name in modules if isinstance(module := model.get_submodule(name), nn.Linear)}
    sparse = [plain_name(name) for name, module in linear.items() if count_zeros(_weight(name, module))]
    if not sparse:
        raise ModelError(
            f"none of the {len(linear)} Linear sites of the {type(model).__name__} has a zero, so there is no support to stay in; "
            "prune it first (hf_sparse.prune_), or use peft.ShiraConfig as it is. SHiRA takes nn.Linear only."
        )
    return sparse


def _check_room(model: nn.Module, config: Any) -> None:
    """Refuse an r for which some targeted layer keeps too few weights."""
    room = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and _targets(model, config, plain_name(name), module):
            room[plain_name(name)] = (int(torch.count_nonzero(_weight(name, module))), sum(module.weight.shape))
    if not room:
        raise ConfigError(f"target_modules={config.target_modules!r} names no Linear of the {type(model).__name__}.")
    tight = min(room, key=lambda name: room[name][0] // room[name][1])
    kept, features = room[tight]
    if config.r * features > kept:
        raise ConfigError(_too_many(tight, config.r, kept, features))


def _targets(model: nn.Module, config: Any, name: str, module: nn.Linear) -> bool:
    from peft.tuners.tuners_utils import check_target_module_exists

    if config.target_modules == "all-linear":
        return module is not getattr(model, "get_output_embeddings", lambda: None)()
    return bool(check_target_module_exists(config, name))


def _weight(name: str, module: nn.Linear) -> torch.Tensor:
    if module.weight.device.type == "meta":
        raise ModelError(f"{name} is offloaded or on the meta device; load the model without offloading.")
    return module.weight.detach()


def _too_many(name: str, r: int, kept: int, features: int) -> str:
    most = kept // features
    way = f"take r={most} or less" if most else "no r is small enough"
    return f"r={r} asks for {r * features} weights of {name}, which keeps {kept}; {way}, or leave the layer out of target_modules."
