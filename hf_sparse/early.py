"""Refuses, before any block is run, what cannot fit: the cheap part of a forecast, without measuring anything."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from hf_sparse import cost
from hf_sparse.config import SparsityConfig
from hf_sparse.cost import Data
from hf_sparse.families import Inventory
from hf_sparse.forwards import spilling
from hf_sparse.room import check_disk, check_memory
from hf_sparse.shapes import recipe_of, shape_of
from hf_sparse.sites import Site


def check_run(
    model: nn.Module, inventory: Inventory, chosen: Mapping[int, Sequence[Site]], config: SparsityConfig, tokens: int
) -> None:
    """Refuse where hidden states and statistics, which are there at the same time for certain, do not fit; what else a run holds is not
    counted, so that nothing is refused that might fit.

    Raises: ConfigError for memory, CheckpointError for the disk that hidden states in files would take.
    """
    shape = shape_of(model, inventory, chosen)
    if shape.strange:
        return
    recipe, data = recipe_of(config), Data(1, tokens, 1)
    held = [cost.memory(block, recipe, data, shape.itemsize) for block in shape.blocks if block.weights_pruned]
    device: Any = getattr(model, "device", None)
    elsewhere = config.device is not None or (device is not None and device.type not in ("cpu", "meta"))
    hidden = max((one.hidden for one in held), default=0)
    statistics = 0 if elsewhere else max((one.statistics for one in held), default=0)
    on_cpu = hidden if not elsewhere or config.device is not None else 0
    what, remedy = f"calibrating on {tokens} tokens", "Give a smaller num_samples or sequence_length"
    if statistics > on_cpu:
        what, remedy = (
            "the statistics of one block",
            'Use a method without Gram matrices (metric="wanda", update="none")',
        )
    spill = spilling()
    if spill is None:
        check_memory(on_cpu + statistics, what, f"{remedy}, or prune from disk to disk (prune_checkpoint, --stream).")
        return
    check_memory(min(on_cpu, spill.limit) + statistics, what, f"{remedy}, or less hidden_memory.")
    check_disk(
        spill.folder,
        on_cpu - spill.limit,
        "keeping hidden states in files",
        "Give more hidden_memory, or fewer num_samples.",
    )
