"""Blocks: the repeated layers of a model, and where their weights come from."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_sparse import offload
from hf_sparse.errors import ModelError
from hf_sparse.runtime import SparseModule
from hf_sparse.sites import plain_name


class Source(Protocol):
    """Where the weights of one block are while it is not its turn."""

    elsewhere: bool  # whether they are outside of the model even when nobody asked for offloading by accelerate

    def bring_in(self, module: nn.Module, as_found: bool) -> bool:
        """Make the weights real; whether there was anything to do. `as_found`: without what was written back since."""

    def send_out(self) -> None:
        """Undo `bring_in`; changes that were not written back are lost."""

    def write_back(self) -> None:
        """Keep the present values for the next `bring_in`."""

    def revert(self) -> bool:
        """Forget all that was written back while pruning; False where the source cannot."""


_SOURCES: "WeakKeyDictionary[nn.Module, Callable[[str], Source]]" = WeakKeyDictionary()


def set_source(model: nn.Module, source: Callable[[str], Source]) -> None:
    """From now on the blocks of a model, given by name, take their weights from `source(name)`."""
    _SOURCES[model] = source


def has_source(model: nn.Module) -> bool:
    """Whether the weights of the model's blocks come from a source of their own, so that they may be on the meta device."""
    return model in _SOURCES


@dataclass(eq=False)
class Block:
    """One repeated layer; `stack` names the list it stands in (an encoder-decoder or vision-language model has two)."""

    index: int  # position among all blocks of the model
    name: str  # as `model.get_submodule` takes it
    stack: str
    module: nn.Module
    source: Source = field(default_factory=offload.Offloaded, repr=False)

    @contextmanager
    def loaded(self, device: str | torch.device | None = None, as_found: bool = False) -> Iterator[None]:
        """Make the weights real, on `device` where one is given; afterwards they are back where they were.

        Changes to weights in memory stay; changes to those that come from elsewhere only after `commit()`. `as_found` gives the
        weights as they were before pruning, where the source still has them.
        """
        home = None
        try:
            brought = self.source.bring_in(self.module, as_found)
            if device is not None and (self.source.elsewhere or not brought):
                home = next(self.module.parameters()).device
                self.module.to(device)
            yield
        finally:
            if home is not None:
                self.module.to(home)
            self.source.send_out()

    def commit(self) -> None:
        """Inside `loaded()`: write the weights back to where they came from; in memory nothing is left to do."""
        self.source.write_back()


def _has_matrices(module: nn.Module) -> bool:
    if any(parameter.ndim >= 2 for parameter in module.parameters()):
        return True
    return any(isinstance(child, SparseModule) for child in module.modules())


def _is_stack(module: nn.Module, layer_classes: set[str]) -> bool:
    if not isinstance(module, nn.ModuleList) or len(module) == 0:
        return False
    layers = [child for child in module if _has_matrices(child)]
    return bool(layers) and all(
        isinstance(child, GradientCheckpointingLayer) or type(child).__name__ in layer_classes for child in layers
    )


def _stacks(model: nn.Module, layer_classes: set[str]) -> list[str]:
    """Names of the innermost lists of layers: a stage that itself holds a list of layers is not a block."""
    names = [name for name, module in model.named_modules() if _is_stack(module, layer_classes)]
    return [name for name in names if not any(other.startswith(name + ".") for other in names)]


def _outermost_lists(model: nn.Module) -> list[str]:
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(_has_matrices(child) for child in module)
    ]
    return [name for name in lists if not any(name.startswith(other + ".") for other in lists)]


def find_blocks(model: nn.Module) -> list[Block]:
    """The blocks of a model in the order in which the modules were made.

    Transformers marks its layers as `GradientCheckpointingLayer` or names their classes in `_no_split_modules`; older and
    foreign code is searched for its outermost module lists.

    Raises: ModelError where the model has no list of layers at all.
    """
    # each model inside the model (its text, vision and sound towers) names its own
    classes = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    stacks = _stacks(model, classes) or _outermost_lists(model)
    found: list[Block] = []
    source = _SOURCES.get(model, lambda _: offload.Offloaded())
    for stack in stacks:
        for child_name, child in model.get_submodule(stack).named_children():
            if _has_matrices(child):
                name = f"{stack}.{child_name}"
                found.append(Block(len(found), name, plain_name(stack), child, source(name)))
    if not found:
        raise ModelError(f"{type(model).__name__} has no list of layers, so there are no blocks to prune.")
    return found
