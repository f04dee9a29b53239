"""What is measured about an input of sites: it is added up batch by batch and can be merged over ranks."""

from typing import Protocol

import torch

from hf_sparse.registry import STATISTICS

_CHUNK = 256  # tokens


class Statistic(Protocol):
    """Adds up inputs of shape (tokens, in); empty batches and empty partners are fine."""

    tokens: int

    def add(self, x: torch.Tensor) -> None: ...

    def merge(self, other: "Statistic") -> None: ...

    @property
    def value(self) -> torch.Tensor: ...

    def state_dict(self) -> dict[str, torch.Tensor]: ...

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None: ...


@STATISTICS.register("norm", source="arXiv 2306.11695, section 3")
class Norm:
    """L2 norm of each input feature over all tokens, (in,).

    Squares are summed in fp32 within a batch, in fp64 across batches.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.squares = torch.zeros(features, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, x: torch.Tensor) -> None:
        # Small chunks stay in the cache of a CPU, where the sum over tokens is bound by memory.
        for chunk in x.split(_CHUNK) if x.device.type == "cpu" else (x,):
            self.squares += chunk.float().square().sum(0)
        self.tokens += len(x)

    def merge(self, other: "Norm") -> None:
        self.squares += other.squares.to(self.squares.device)
        self.tokens += other.tokens

    @property
    def value(self) -> torch.Tensor:
        return self.squares.sqrt().float()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"squares": self.squares.clone(), "tokens": torch.tensor(self.tokens)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.squares = state["squares"].to(self.squares, copy=True)
        self.tokens = int(state["tokens"])
