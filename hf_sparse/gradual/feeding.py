"""Finds out during a training what feeds what inside its blocks, for metrics that look at a consumer's input."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Cache

from hf_sparse.blocks import Block
from hf_sparse.families import Inventory
from hf_sparse.groups import Feed, propose, prove
from hf_sparse.stored import over_processes

_NOT_RUN = "the first batches of the training did not run its block"
_ELSEWHERE = "it could not be confirmed on every process"


class Feeding:
    """Feeds that names propose and numbers confirm: the first call of each block is made a few times more, with noise in its products.

    A feed counts if every process has confirmed it on its own batch.
    """

    def __init__(self, model: nn.Module, inventory: Inventory) -> None:
        self._model, self._inventory = model, inventory
        self._proposed: dict[int, list[Feed]] = {}
        self._unnamed: dict[str, str] = {}
        for block in inventory.blocks:
            self._proposed[block.index], unresolved = propose(model, block, inventory.sites[block.index])
            self._unnamed |= unresolved
        self._proven: set[Feed] = set()
        self._refuted: dict[str, str] = {}
        self._looked: set[int] = set()

    def look(self, block: Block, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Confirm what feeds what in a block that is about to be called."""
        if block.index in self._looked:
            return
        self._looked.add(block.index)
        # A cache would grow with each run; in training it is empty before.
        values = [None if isinstance(value, Cache) else value for value in args]
        named = {key: None if isinstance(value, Cache) else value for key, value in kwargs.items()}
        with _quiet(block.module):
            proven, refuted = prove(
                self._proposed[block.index],
                self._inventory.sites[block.index],
                lambda: block.module.forward(*values, **named),
                self._model,
            )
        self._proven |= set(proven)
        self._refuted |= refuted

    def unresolved(self) -> dict[str, str]:
        """Why nothing is known of what a site feeds, by its name; all processes have to call it."""
        proposed = [(index, feed) for index, feeds in self._proposed.items() for feed in feeds]
        confirmed = torch.tensor([1.0, *(float(feed in self._proven) for _, feed in proposed)], dtype=torch.float64)
        processes, *counts = over_processes(confirmed).tolist()
        reasons = dict(self._unnamed)
        for (index, feed), count in zip(proposed, counts, strict=True):
            if count < processes:
                otherwise = _ELSEWHERE if index in self._looked else _NOT_RUN
                reasons[feed.producer] = self._refuted.get(feed.producer, otherwise)
        return reasons

    def feeds(self, unresolved: Mapping[str, str]) -> dict[int, list[Feed]]:
        """The feeds of each block but those of some producers."""
        return {
            index: [feed for feed in feeds if feed.producer not in unresolved]
            for index, feeds in self._proposed.items()
        }


@contextmanager
def _quiet(module: nn.Module) -> Iterator[None]:
    """Without dropout, and without a trace in the random state."""
    modes = [(part, part.training) for part in module.modules()]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        module.eval()
        with torch.random.fork_rng(devices), torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode
