"""Copies of one matrix in modules, for timing what a model runs: so many that none is still in the caches when its turn comes."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_sparse.runtime.forms import Form
from hf_sparse.runtime.holding import hold_

Works = Mapping[str, list[Callable[[], object]]]

_LEAST = 64 * 2**20  # bytes for each way
_MOST = 512 * 2**20
_COPIES = 512
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def copies_bytes(folder: str = "/sys/devices/system/cpu/cpu0/cache") -> int:
    """One and a half times the largest cache, within limits; where the system tells no sizes, the lower limit."""
    sizes = [_size(file) for file in Path(folder).glob("index*/size")]
    return min(_MOST, max([_LEAST, *(size * 3 // 2 for size in sizes)]))


def _size(file: Path) -> int:
    try:
        text = file.read_text(encoding="ascii").strip()
        return int(text.rstrip("KMG")) * _UNITS.get(text[-1:], 1)
    except (OSError, ValueError):
        return 0


def in_modules(
    matrix: torch.Tensor, forms: Mapping[str, Callable[[], Form | None]], *, transposed: bool, bias: bool
) -> dict[str, list[nn.Module]]:
    """For each way, copies of a matrix (out, in) in modules as a model has them; a form of None is the dense weight."""
    count = max(1, min(_COPIES, copies_bytes() // matrix.nbytes))
    return {way: [_module(matrix, form(), transposed, bias) for _ in range(count)] for way, form in forms.items()}


@torch.no_grad()
def _module(matrix: torch.Tensor, form: Form | None, transposed: bool, bias: bool) -> nn.Module:
    rows, columns = matrix.shape
    with torch.device("meta"):  # uses no random numbers up
        module: nn.Module = Conv1D(rows, columns) if transposed else nn.Linear(columns, rows, bias=bias)
    if module.bias is not None:
        module.bias = nn.Parameter(torch.zeros(rows, dtype=matrix.dtype, device="cpu"), requires_grad=False)
    module.weight = nn.Parameter((matrix.T if transposed else matrix).to("meta"), requires_grad=False)
    if form is None:
        module.weight = nn.Parameter((matrix.T if transposed else matrix).clone().contiguous(), requires_grad=False)
    else:
        hold_(module, form)
    return module.eval()


def works(modules: Mapping[str, list[nn.Module]], matrix: torch.Tensor, tokens: int) -> Works:
    """The products of so many tokens, which are the same for all."""
    count = tokens * matrix.shape[1]
    x = torch.linspace(-1, 1, count, device="cpu").view(tokens, -1).to(matrix.dtype)
    return {way: [_work(module, x) for module in copies] for way, copies in modules.items()}


def _work(module: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    return lambda: module(x)
