"""Finds the sites of a model: every matrix that its blocks multiply with, whatever tensor holds it."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from hf_sparse.blocks import Block, find_blocks
from hf_sparse.families.exclusions import Exclusions, leftover
from hf_sparse.families.experts import register_experts, sites_of_experts
from hf_sparse.families.fused import register_fused
from hf_sparse.families.linear import sites_of_linear
from hf_sparse.families.names import register_role
from hf_sparse.runtime import SparseModule
from hf_sparse.sites import Site, plain_name

__all__ = ["Inventory", "find_sites", "register_experts", "register_fused", "register_role"]


_PARTNERS: dict[str, set[str | None]] = {"o": {"v"}, "gate": {"up", "down"}, "up": {"down"}, "down": {"up"}}


Seen = dict[int, tuple[str, torch.Tensor]]  # by id, with the tensor itself, so that none takes another's id


@dataclass(frozen=True)
class Inventory:
    """What a model's blocks hold: sites to prune, and what is left out and why."""

    blocks: list[Block]
    sites: dict[int, list[Site]]  # block index -> sites in module order
    left_out: dict[str, str]  # "module.path.parameter" -> one sentence

    def all(self) -> list[Site]:
        """The sites of all blocks, in the order of the blocks."""
        return [site for block in self.blocks for site in self.sites[block.index]]


def find_sites(model: nn.Module) -> Inventory:
    """Every matrix product's weight inside the model's blocks as a site, and a reason for each parameter that is none."""
    blocks = find_blocks(model)
    exclusions = Exclusions(model)
    seen: Seen = {}
    left_out: dict[str, str] = {}
    sites = {block.index: _with_partners(_sites_of_block(block, exclusions, seen, left_out)) for block in blocks}
    return Inventory(blocks, sites, left_out)


def _sites_of_block(block: Block, exclusions: Exclusions, seen: Seen, left_out: dict[str, str]) -> list[Site]:
    found: list[Site] = []
    for path, module, owner in _modules(block.name, block.module, block.module, left_out):
        exclusions.enter(path, module)
        for name, parameter in _parameters(module):
            full = f"{path}.{name}"
            if parameter.ndim < 2:
                continue
            if id(parameter) in seen:
                if seen[id(parameter)][0] != full:
                    left_out[full] = f"It is the same tensor as {seen[id(parameter)][0]}."
                continue
            seen[id(parameter)] = (full, parameter)
            reason = exclusions.reason(path, module, owner, name, parameter)
            sites = [] if reason else sites_of_experts(path, module, name, parameter)
            sites = sites or ([] if reason else sites_of_linear(path, module, owner, name, parameter))
            if not sites:
                left_out[full] = reason or leftover(module, name, parameter)
            found.extend(sites)
    return found


def _parameters(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """A module's own parameters; what runs on sparse kernels is none any more, but a site all the same."""
    if isinstance(module, SparseModule):
        yield from ((name, getattr(module, name)) for name in module._held)
    yield from module.named_parameters(recurse=False)


def _modules(
    path: str, module: nn.Module, owner: nn.Module, left_out: dict[str, str]
) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(path, module, owner) below a module; of an adapted layer only the layer inside the adapter."""
    base = getattr(module, "base_layer", None)
    if isinstance(base, nn.Module):
        for name, parameter in module.named_parameters():
            if parameter.ndim >= 2 and not name.startswith("base_layer."):
                left_out[f"{path}.{name}"] = "It belongs to an adapter."
        yield from _modules(f"{path}.base_layer", base, owner, left_out)
        return
    yield path, module, owner
    for name, child in module.named_children():
        yield from _modules(f"{path}.{name}", child, module, left_out)


def _with_partners(sites: list[Site]) -> list[Site]:
    """Takes back roles that make no sense alone: an out projection without values, a gate without up and down."""
    roles_below: dict[str, set[str | None]] = defaultdict(set)
    for site in sites:
        path = plain_name(site.module).split(".")
        for length in range(1, len(path) + 1):
            roles_below[".".join(path[:length])].add(site.role)
    return [site if _has_partner(site, roles_below) else replace(site, role=None) for site in sites]


def _has_partner(site: Site, roles_below: dict[str, set[str | None]]) -> bool:
    needed = _PARTNERS.get(site.role or "")
    if needed is None:
        return True
    path = plain_name(site.module).removesuffix(".linear").split(".")
    # BERT's attention.output.dense finds its v in attention.self; routed heads find theirs beside the experts
    levels = 2 if site.expert is not None or path[-1] == "dense" or path[-1].isdigit() else 1
    return any(needed <= roles_below[".".join(path[:-level])] for level in range(1, levels + 1))
