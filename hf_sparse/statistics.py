"""What is measured about an input of sites: it is added up batch by batch and can be merged over ranks."""

from typing import Protocol

import torch

from hf_sparse.registry import STATISTICS

_CHUNK = 256  # tokens
_PRODUCT_CHUNK = 4096  # tokens
_STRIPES, _LEAST_WIDTH = 8, 64  # into which a symmetric product is cut, and how narrow they may get


class Statistic(Protocol):
    """Adds up inputs of shape (tokens, in); empty batches and empty partners are fine."""

    tokens: int

    @property
    def finite(self) -> bool: ...

    def add(self, x: torch.Tensor) -> None: ...

    def merge(self, other: "Statistic") -> None: ...

    def sums(self) -> list[torch.Tensor]:
        """The tensors that `merge` adds up, not copied: added up over processes, in place, they are those of all."""
        ...

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

    def sums(self) -> list[torch.Tensor]:
        return [self.squares]

    @property
    def finite(self) -> bool:
        return bool(torch.isfinite(self.squares).all())

    @property
    def value(self) -> torch.Tensor:
        return self.squares.sqrt().float()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"squares": self.squares.clone(), "tokens": torch.tensor(self.tokens)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.squares = state["squares"].to(self.squares, copy=True)
        self.tokens = int(state["tokens"])


def products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of left^T right: (tokens, a), (tokens, b) -> (a, b) in fp64, each chunk's product in at least fp32."""
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64, device=left.device)
    wide = torch.promote_types(left.dtype, torch.float32)
    # A model that runs under autocast would otherwise get its products in half precision.
    with torch.autocast(left.device.type, enabled=False):
        for one, other in zip(left.split(_PRODUCT_CHUNK), right.split(_PRODUCT_CHUNK), strict=True):
            total += one.to(wide).T @ other.to(wide)
    return total


@STATISTICS.register("gram", source="arXiv 2301.00774, section 3")
class Gram:
    """X^T X over all tokens, (in, in): half the Hessian of the squared error of a product with X.

    Products are formed in fp32 within a chunk of tokens, summed in fp64 across chunks and batches.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.products = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, x: torch.Tensor) -> None:
        # The matrix is symmetric, so the part below the diagonal blocks is left out and filled in at the end.
        width = max(_LEAST_WIDTH, -(-x.shape[1] // _STRIPES))
        for start in range(0, x.shape[1], width):
            self.products[start : start + width, start:] += products(x[:, start : start + width], x[:, start:])
        self.tokens += len(x)

    def merge(self, other: "Gram") -> None:
        self.products += other.products.to(self.products.device)
        self.tokens += other.tokens

    def sums(self) -> list[torch.Tensor]:
        return [self.products]

    @property
    def finite(self) -> bool:
        # No product exceeds the larger of the two squares, and those stand on the diagonal.
        return bool(torch.isfinite(self.products.diagonal()).all())

    @property
    def value(self) -> torch.Tensor:
        return self.products.triu() + self.products.triu(1).T

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"products": self.products.clone(), "tokens": torch.tensor(self.tokens)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.products = state["products"].to(self.products, copy=True)
        self.tokens = int(state["tokens"])


@STATISTICS.register("moments", source="arXiv 2310.08915, section 3")
class Moments:
    """Mean and variance of each input feature over all tokens, (2, in)."""

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.totals = torch.zeros(2, features, dtype=torch.float64, device=device)  # of x and of x squared
        self.tokens = 0

    def add(self, x: torch.Tensor) -> None:
        wide = x.double()
        self.totals += torch.stack([wide.sum(0), wide.square().sum(0)])
        self.tokens += len(x)

    def merge(self, other: "Moments") -> None:
        self.totals += other.totals.to(self.totals.device)
        self.tokens += other.tokens

    def sums(self) -> list[torch.Tensor]:
        return [self.totals]

    @property
    def finite(self) -> bool:
        return bool(torch.isfinite(self.totals).all())

    @property
    def value(self) -> torch.Tensor:
        mean, square = self.totals / max(self.tokens, 1)
        return torch.stack([mean, (square - mean.square()).clamp_min(0)]).float()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"totals": self.totals.clone(), "tokens": torch.tensor(self.tokens)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.totals = state["totals"].to(self.totals, copy=True)
        self.tokens = int(state["tokens"])
