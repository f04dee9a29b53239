"""Traces: what predictors learn from. A folder with the hidden states and criterion values of calibration tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file

from hf_sparse.errors import CheckpointError
from hf_sparse.predictors.layout import Layout
from hf_sparse.predictors.learned import Learned
from hf_sparse.schema import check_plain, parse_json

FILE, STATISTICS = "traces.json", "statistics.safetensors"


@dataclass(frozen=True)
class About:
    """What a folder of traces holds."""

    layout: dict[str, Any]
    criterion: str
    inputs: tuple[int, ...]  # blocks whose input was recorded
    sequences: tuple[int, ...]  # tokens recorded of each sequence, in order
    source: str
    fingerprint: str
    tokenizer: str | None = None  # print of its vocabulary; None where token ids were given
    version: int = 1


@dataclass(frozen=True)
class Statistics:
    """Averages over the recorded tokens, one tensor for each block that skips."""

    neurons: list[torch.Tensor]  # mean of the criterion (blocks of neurons,)
    heads: list[torch.Tensor]  # (heads,)
    up: list[
        torch.Tensor
    ]  # root mean square of what the gate is multiplied by (neurons,); empty where nothing is gated

    def scales(self) -> torch.Tensor:
        """Mean of the criterion in every block, for neurons and for heads: targets are divided by it. (blocks, 2)"""
        means = [[float(n.mean()), float(h.mean())] for n, h in zip(self.neurons, self.heads)]
        found = torch.tensor(means)
        return torch.where(found > 0, found, 1.0)


class Traces:
    """A folder written by `record`: float16 arrays on disk, mapped and not read."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            fields = parse_json((self.folder / FILE).read_bytes(), "the traces")
            check_plain(fields, f"the traces in {str(folder)!r}")
            self.about = About(**{**fields, "inputs": tuple(fields["inputs"]), "sequences": tuple(fields["sequences"])})
            saved = load_file(self.folder / STATISTICS)
        except (OSError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{str(folder)!r} holds no traces that can be read ({error}); record them anew."
            ) from error
        self.layout = Layout.from_dict(self.about.layout)
        count = len(self.layout.blocks)
        neurons, heads = ([saved[f"{name}.{at}"] for at in range(count)] for name in ("neurons", "heads"))
        up = [saved[f"up.{at}"] for at in range(count)] if "up.0" in saved else []
        self.statistics = Statistics(neurons, heads, up)
        self.stored_scales = saved["stored_scales"]  # (blocks, 2): the files hold values divided by these

    def __len__(self) -> int:
        return sum(self.about.sequences)

    @property
    def learned(self) -> Learned:
        """What predictors that are trained on these traces have learned from."""
        about = self.about
        return Learned(source=about.source, fingerprint=about.fingerprint, tokens=len(self), tokenizer=about.tokenizer)

    def inputs(self, block: int) -> numpy.ndarray[Any, Any]:
        """Hidden states before a block, (tokens, hidden)."""
        return self._array(f"input.{block}")

    def scores(self, position: int) -> numpy.ndarray[Any, Any]:
        """Criterion of a block that skips, by its position in the layout: blocks of neurons, then heads. (tokens, units)"""
        return self._array(f"scores.{position}")

    def _array(self, name: str) -> numpy.ndarray[Any, Any]:
        path = self.folder / f"{name}.npy"
        if not path.is_file():
            raise CheckpointError(
                f"the traces in {str(self.folder)!r} hold no {name}; recorded inputs: {list(self.about.inputs)}."
            )
        return numpy.load(path, mmap_mode="r", allow_pickle=False)


def bytes_per_token(layout: Layout, inputs: Sequence[int]) -> int:
    """What one token takes on disk."""
    return 2 * (sum(layout.groups) + sum(layout.heads) + layout.hidden_size * len(set(inputs)))
