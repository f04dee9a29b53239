"""2:4 matrices on a GPU, by torch's semi-structured kernels. No GPU was there to run this on: it is tested with stand-ins only."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hf_sparse.runtime.timing import interleaved

_SECONDS = 0.05
_DTYPES = (torch.float16, torch.bfloat16)
_CAPABILITY = (8, 0)  # the first generation with sparse tensor cores
_SIDE = 64  # sides that both of torch's backends take


@dataclass(frozen=True, eq=False)
class SemiStructuredForm:
    """Of every four weights along the input two are kept, with two bits each that say which."""

    held: torch.Tensor  # a tensor of torch's own class
    name = "2:4 tensor cores"

    @property
    def shape(self) -> tuple[int, int]:
        return self.held.shape[0], self.held.shape[1]

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.held.dtype.itemsize * 9 // 16

    @property
    def device(self) -> torch.device:
        return self.held.device

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return (self.held.dtype,)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}  # its class cannot be a buffer that is moved or saved, so the module holds it as an attribute

    def unpack(self) -> torch.Tensor:
        return self.held.to_dense()

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, self.held, bias)

    # torch.compile knows the class
    traced_product = product
    traced_unpack = unpack


def why_not(weight: torch.Tensor) -> str:
    """Why a matrix (out, in) on a GPU stays dense; empty where the kernels take it."""
    if weight.dtype not in _DTYPES:
        return f"its weights are {str(weight.dtype).removeprefix('torch.')}; 2:4 tensor cores take float16 and bfloat16"
    if torch.cuda.get_device_capability(weight.device) < _CAPABILITY:
        return "the GPU has no 2:4 tensor cores"
    if weight.shape[0] % _SIDE or weight.shape[1] % _SIDE:
        return f"2:4 tensor cores take sides that are multiples of {_SIDE}"
    if not is_2_4(weight):
        return "on a GPU only 2:4 along the input axis is faster than dense"
    return ""


def is_2_4(weight: torch.Tensor) -> bool:
    """Whether at most two of every four neighbours along the input are kept."""
    return bool(((weight != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all())


def form_of(weight: torch.Tensor) -> SemiStructuredForm:
    from torch.sparse import to_sparse_semi_structured

    return SemiStructuredForm(to_sparse_semi_structured(weight.contiguous()))


def speedups(weight: torch.Tensor, form: SemiStructuredForm, tokens: tuple[int, ...]) -> dict[int, float]:
    """Tokens -> times as fast as dense, measured in turns on the GPU."""
    found = {}
    for count in tokens:
        x = torch.linspace(-1, 1, count * weight.shape[1], device=weight.device).view(count, -1).to(weight.dtype)
        ways: dict[str, list[Callable[[], object]]] = {
            "dense": [lambda x=x: F.linear(x, weight)],  # type: ignore[misc]
            "sparse": [lambda x=x: form.product(x, None)],  # type: ignore[misc]
        }
        times = interleaved(ways, _SECONDS, synchronise=torch.cuda.synchronize)
        found[count] = times["dense"].median / max(times["sparse"].median, 1e-9)
    return found
