"""What a predictor has to tell: which blocks skip, how many neurons and heads they have, in blocks of how many neurons."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from hf_sparse.config.serialise import Serialisable, whole
from hf_sparse.errors import ConfigError, ModelError
from hf_sparse.predictors.units import BlockUnits, find_units
from hf_sparse.text import one_line

_MOST_BLOCKS = 10_000


@dataclass(frozen=True, kw_only=True)
class Layout(Serialisable):
    """The units of the blocks that skip, in the order of the blocks; JSON both ways."""

    model: str  # class of the model
    hidden_size: int
    vocabulary: int
    total_blocks: int
    blocks: tuple[int, ...]  # the blocks that skip
    neurons: tuple[int, ...]  # of each of them
    heads: tuple[int, ...]
    neuron_block: int = 1

    def __post_init__(self) -> None:
        for name in ("hidden_size", "vocabulary", "total_blocks", "neuron_block"):
            whole(name, getattr(self, name), 1)
        for name in ("blocks", "neurons", "heads"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            for number in getattr(self, name):
                whole(name, number, 0 if name == "blocks" else 1)
        within = set(self.blocks) <= set(range(min(self.total_blocks, _MOST_BLOCKS)))
        if (
            self.total_blocks > _MOST_BLOCKS
            or not within
            or not len(self.blocks) == len(self.neurons) == len(self.heads)
        ):
            raise ConfigError(
                f"a layout of {len(self.blocks)} blocks of {self.total_blocks}, with {len(self.neurons)} numbers of neurons and "
                f"{len(self.heads)} of heads, is none; there are at most {_MOST_BLOCKS} blocks."
            )

    def to_dict(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in super().to_dict().items()}

    @classmethod
    def of(cls, model: nn.Module, dense_blocks: Sequence[int] = (0,), neuron_block: int = 1) -> Self:
        """The layout of a model whose `dense_blocks` skip nothing."""
        return cls._of(model, find_units(model), dense_blocks, neuron_block)

    @classmethod
    def _of(cls, model: nn.Module, units: list[BlockUnits], dense_blocks: Sequence[int], neuron_block: int) -> Self:
        wrong = [number for number in dense_blocks if not 0 <= number < len(units)]
        if wrong or len(set(dense_blocks)) == len(units):
            raise ConfigError(
                f"dense_blocks={list(dense_blocks)!r} is not allowed; the model has blocks 0 to {len(units) - 1}, "
                "of which at least one has to skip."
            )
        skip = [block for block in units if block.index not in dense_blocks]
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
        return cls(
            model=type(model).__name__, hidden_size=skip[0].o.shape[0], vocabulary=embeddings.num_embeddings,
            total_blocks=len(units), blocks=tuple(block.index for block in skip),
            neurons=tuple(block.neurons for block in skip), heads=tuple(block.heads for block in skip),
            neuron_block=neuron_block,
        )  # fmt: skip

    @property
    def groups(self) -> tuple[int, ...]:
        """Blocks of neurons in each block that skips; the last one may be shorter."""
        return tuple(-(-neurons // self.neuron_block) for neurons in self.neurons)

    @property
    def dense_blocks(self) -> tuple[int, ...]:
        return tuple(number for number in range(self.total_blocks) if number not in self.blocks)

    def units(self, model: nn.Module) -> list[BlockUnits]:
        """The units of the blocks that skip; ModelError where the model is not the one that the layout was made for."""
        units = find_units(model)
        same = len(units) == self.total_blocks
        found = Layout._of(model, units, self.dense_blocks if same else (), self.neuron_block)
        differing = [name for name in self.to_dict() if getattr(self, name) != getattr(found, name)]
        if differing:
            told = "; ".join(
                f"{name} {one_line(getattr(self, name))} there, {one_line(getattr(found, name))} here"
                for name in differing
            )
            raise ModelError(
                f"the predictors were made for another model ({one_line(self.model)} there, {found.model} here): {told}. "
                "Train predictors for this model."
            )
        return [block for block in units if block.index in self.blocks]

    def group(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of every block of neurons along the last dimension."""
        size, neurons = self.neuron_block, values.shape[-1]
        if size == 1:
            return values
        padded = nn.functional.pad(values, (0, -neurons % size)).unflatten(-1, (-1, size)).sum(-1)
        counts = values.new_full((padded.shape[-1],), size)
        counts[-1] = neurons - size * (padded.shape[-1] - 1)
        return padded / counts

    def expand(self, mask: torch.Tensor, neurons: int) -> torch.Tensor:
        """A mask over blocks of neurons as one over neurons."""
        return mask if self.neuron_block == 1 else mask.repeat_interleave(self.neuron_block, -1)[..., :neurons]
