"""Selection: which units are kept for a token, given their scores. Always the same number, so that shapes never change."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_sparse.config.serialise import Serialisable, share
from hf_sparse.errors import ConfigError, unknown
from hf_sparse.native.largest import largest
from hf_sparse.predictors.criteria import Scores
from hf_sparse.predictors.layout import Layout

Share = float | tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Selection(Serialisable):
    """How many units are kept, of those in the blocks that skip: one share for all blocks, or one for each."""

    keep_neurons: Share = 0.5
    keep_heads: Share = 1.0
    mode: str = "block"  # "block": the share holds in every block; "global": over all blocks that skip
    scaled: bool = True  # global: scores are compared after division by their block's mean
    floor: float = 0.05  # global: share of its units that every block keeps

    def __post_init__(self) -> None:
        if self.mode not in ("block", "global"):
            raise ConfigError(unknown("selection", self.mode, ("block", "global")))
        for name in ("keep_neurons", "keep_heads"):
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                object.__setattr__(self, name, tuple(value))
            for one in value if isinstance(value, list | tuple) else (value,):
                _share(name, one)
        if self.floor != 0:
            share("floor", self.floor)
        if self.mode == "global" and not (_single(self.keep_neurons) and _single(self.keep_heads)):
            raise ConfigError('selection "global" takes one share for all blocks; give a number, or selection="block".')
        self._check_floor()

    def _check_floor(self) -> None:
        for name in ("keep_neurons", "keep_heads"):
            if self.mode == "global" and getattr(self, name) < self.floor:
                raise ConfigError(
                    f"floor={self.floor!r} is more than {name}={getattr(self, name)!r}; give a floor of at most that."
                )

    def to_dict(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in super().to_dict().items()}

    def kept(self, layout: Layout, kind: str) -> tuple[int, ...]:
        """Units kept in every block that skips, of "neurons" (counted in blocks of neurons) or "heads"; per block only."""
        totals = layout.groups if kind == "neurons" else layout.heads
        shares = self.shares(layout, kind)
        return tuple(_count(total, share) for total, share in zip(totals, shares))

    def shares(self, layout: Layout, kind: str) -> tuple[float, ...]:
        """The share of every block that skips."""
        given = self.keep_neurons if kind == "neurons" else self.keep_heads
        if not isinstance(given, tuple):
            return (given,) * len(layout.blocks)
        if len(given) != len(layout.blocks):
            raise ConfigError(
                f"keep_{kind} has {len(given)} shares, {len(layout.blocks)} blocks skip ({list(layout.blocks)}); give as many."
            )
        return given

    def needs_all_blocks(self) -> bool:
        """Whether nothing can be chosen before the scores of all blocks are known."""
        return self.mode == "global" and (self.keep_neurons != 1 or self.keep_heads != 1)

    def choose(self, layout: Layout, position: int, scores: Scores) -> Scores:
        """Masks of one block from its scores; None where nothing is skipped."""
        totals = -(-layout.neurons[position] // layout.neuron_block), layout.heads[position]
        masks = []
        for values, total, kind in zip(scores, totals, ("neurons", "heads")):
            count = _count(total, self.shares(layout, kind)[position])
            masks.append(None if values is None or count == total else top(values, count))
        return Scores(*masks)

    def choose_all(self, scores: Sequence[Scores], scales: torch.Tensor) -> list[Scores]:
        """Masks of all blocks at once, heads and neurons each in a pool of their own; `scales` turn scores back to raw."""
        neurons = self._pool([block.neurons for block in scores], self.keep_neurons, scales[:, 0])
        heads = self._pool([block.heads for block in scores], self.keep_heads, scales[:, 1])
        return [Scores(n, h) for n, h in zip(neurons, heads)]

    def _pool(
        self, scores: Sequence[torch.Tensor | None], given: Share, scales: torch.Tensor
    ) -> Sequence[torch.Tensor | None]:
        values = [block for block in scores if block is not None]
        if given == 1 or len(values) < len(scores) or isinstance(given, tuple):
            return [None] * len(scores)
        if not self.scaled:
            values = [block * float(scale) for block, scale in zip(values, scales)]
        lifted = [block.masked_fill(top(block, _count(block.shape[-1], self.floor)), float("inf")) for block in values]
        joined = torch.cat(lifted, -1)
        return top(joined, _count(joined.shape[-1], given)).split([block.shape[-1] for block in values], -1)


def top(scores: torch.Tensor, count: int) -> torch.Tensor:
    """True at the `count` largest along the last dimension, exactly so many; of equal ones the first on a CPU."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    if scores.device.type == "cpu" and scores.dtype == torch.float32:
        chosen = largest(scores.detach().reshape(-1, scores.shape[-1]), count).view(*scores.shape[:-1], count)
    else:
        chosen = scores.topk(count, -1, sorted=False).indices
    return mask.scatter_(-1, chosen, True)


def _count(total: int, share: float) -> int:
    return max(1, min(total, round(total * share)))


def _single(value: object) -> bool:
    return not isinstance(value, tuple)


def _share(name: str, value: object) -> None:
    if value != 1 or isinstance(value, bool):
        share(name, value)


def by_block(layout: Layout, given: Mapping[int, float], otherwise: float) -> tuple[float, ...]:
    """Shares in the order that `Selection` takes, from a mapping of block numbers."""
    wrong = [number for number in given if number not in layout.blocks]
    if wrong:
        raise ConfigError(
            f"blocks {wrong} skip nothing, so they take no share; those that skip are {list(layout.blocks)}."
        )
    return tuple(given.get(number, otherwise) for number in layout.blocks)
