"""Which neurons and attention heads the blocks of a decoder have, and the modules whose inputs they are."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from hf_sparse import groups
from hf_sparse.blocks import Block
from hf_sparse.errors import ModelError
from hf_sparse.families import Inventory, find_sites
from hf_sparse.sites import Site, read

_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")


@dataclass(frozen=True)
class BlockUnits:
    """The neurons (columns of `down`) and query heads (runs of columns of `o`) of one block."""

    index: int
    name: str  # of the block, as `model.get_submodule` takes it
    down: Site
    o: Site
    up: Site
    gate: Site | None  # None where the feed-forward is not gated
    neurons: int
    heads: int
    head_size: int

    @property
    def before_activation(self) -> Site:
        """The site whose rows go through the activation function."""
        return self.gate or self.up


class BlockWeights:
    """What criteria need of a block's weights, worked out when it is first asked for, in float32."""

    def __init__(self, model: nn.Module, units: BlockUnits) -> None:
        self._model, self._units = model, units

    @cached_property
    def down_norm(self) -> torch.Tensor:
        """Length of every column of `down`: what a neuron's value is multiplied by on its way out. (neurons,)"""
        return read(self._model, self._units.down).float().norm(dim=0)

    @cached_property
    def head_gram(self) -> torch.Tensor:
        """W^T W of every head's columns of `o`, so that a^T G a is the squared length of its output. (heads, size, size)"""
        columns = read(self._model, self._units.o).float().unflatten(1, (self._units.heads, self._units.head_size))
        return torch.einsum("ohi,ohj->hij", columns, columns)

    @cached_property
    def up_size(self) -> torch.Tensor:
        """Absolute weights of `up`. (neurons, in)"""
        return read(self._model, self._units.up).float().abs()

    @cached_property
    def gate_size(self) -> torch.Tensor:
        """Absolute weights of `gate`; only for a gated feed-forward. (neurons, in)"""
        if self._units.gate is None:
            raise ModelError(f"{self._units.name} has no gate; its feed-forward is plain.")
        return read(self._model, self._units.gate).float().abs()


def find_units(model: nn.Module) -> list[BlockUnits]:
    """The units of every block of a decoder-only language model.

    Raises: ModelError for mixtures of experts, for models that do not decode, and for blocks whose neurons or heads cannot
    be told by the roles of their matrices.
    """
    _refuse_others(model)
    inventory = find_sites(model)
    stacks = {block.stack for block in inventory.blocks}
    if len(stacks) > 1:
        raise ModelError(
            f"{type(model).__name__} has {len(stacks)} stacks of blocks ({', '.join(sorted(stacks))}); "
            "predictors work on models with one stack of decoder blocks. Give its language model alone."
        )
    return [_units(model, block, inventory) for block in inventory.blocks]


def _refuse_others(model: nn.Module) -> None:
    decodes = callable(getattr(model, "can_generate", None)) and model.can_generate()  # type: ignore[operator]
    if not decodes or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} is no decoder-only language model; predictors choose units token by token, "
            "so give a model for causal language modelling."
        )


def _units(model: nn.Module, block: Block, inventory: Inventory) -> BlockUnits:
    sites = inventory.sites[block.index]
    routed = [site.name for site in sites if site.expert is not None or site.stacked is not None]
    routers = [
        name for name, why in inventory.left_out.items() if name.startswith(block.name + ".") and "router" in why
    ]
    if routed or routers:
        raise ModelError(
            f"{block.name} is a mixture of experts ({(routed or routers)[0]}): its router already chooses what a token "
            "computes. Predictors work on dense feed-forwards only; give a dense model."
        )
    feeds, unresolved = groups.propose(model, block, sites)
    down, o = _only(block, sites, "down"), _only(block, sites, "o")
    fed = {site.role: site for site in sites for feed in feeds if feed.producer == site.name}
    if "up" not in fed or fed.get("gate", down).shape[-1 if "gate" not in fed else 0] != down.shape[1]:
        raise ModelError(_unidentified(block, "neurons", unresolved))
    if "v" not in fed:
        raise ModelError(_unidentified(block, "heads", unresolved))
    size = groups.head_size(model, fed["v"], o)
    if size is None or o.shape[1] % size:
        raise ModelError(_unidentified(block, "heads", {o.name: f"{o.shape[1]} columns do not make heads of {size}."}))
    heads = o.shape[1] // size
    return BlockUnits(block.index, block.name, down, o, fed["up"], fed.get("gate"), down.shape[1], heads, size)


def _only(block: Block, sites: list[Site], role: str) -> Site:
    found = [site for site in sites if site.role == role]
    if len(found) != 1:
        what = "neurons" if role == "down" else "heads"
        names = ", ".join(site.name for site in found) or "none"
        raise ModelError(_unidentified(block, what, {block.name: f"One {role!r} matrix is needed, found: {names}."}))
    return found[0]


def _unidentified(block: Block, what: str, reasons: dict[str, str]) -> str:
    told = " ".join(f"{name}: {why}" for name, why in list(reasons.items())[:3])
    return (
        f"the {what} of {block.name} cannot be told from its matrices. {told} "
        "hf_sparse.families.register_role and register_fused tell what they are."
    )


def module_of(model: nn.Module, site: Site) -> nn.Module:
    """The module that the model calls for a site; an adapter's layer rather than the layer inside it."""
    return model.get_submodule(site.module.removesuffix(".base_layer"))


def activation_of(model: nn.Module, units: BlockUnits) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function between a block's gate and its neurons."""
    path = units.down.module.split(".")
    for length in range(len(path) - 1, 0, -1):
        owner = model.get_submodule(".".join(path[:length]))
        for name in _ACTIVATIONS:
            found = getattr(owner, name, None)
            if callable(found):
                return found
        if ".".join(path[:length]) == units.name:
            break
    raise ModelError(
        f"the activation function of {units.name} was not found; looked for {', '.join(_ACTIVATIONS)}. "
        'kind="shadow" and kind="dejavu" do not need it.'
    )
