"""What the tests of the native kernels share: the build that is tested, its instruction sets, and random sparse matrices."""

import importlib.util
import os
import sys

import pytest
import torch

NAME = "hf_sparse.native._kernels"
given = os.environ.get("HF_SPARSE_TEST_KERNELS")
if given and NAME not in sys.modules:  # another build than the installed one: the one with sanitizers
    spec = importlib.util.spec_from_file_location(NAME, given)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[NAME])

from hf_sparse import native  # noqa: E402

needs_binary = pytest.mark.skipif(not native.available(), reason=native.why_not())
SETS = [*native.instruction_sets(), "torch"]
PATTERNS = (
    "unstructured 50 %",
    "unstructured 70 %",
    "2:4 input",
    "2:4 output",
    "1:4 input",
    "all",
    "none",
    "some rows",
    "one",
)


def sparse(pattern: str, rows: int, columns: int, seed: int) -> torch.Tensor:
    """A bfloat16 matrix of normal numbers with the zeros of a pattern."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).bfloat16()
    score = torch.rand(rows, columns, generator=generator)
    if pattern.startswith("unstructured"):
        keep = score > float(pattern.split()[1]) / 100
    elif ":" in pattern:
        kept, axis = int(pattern[0]), pattern.split()[1]
        index = (
            torch.arange(columns).expand(rows, -1)
            if axis == "input"
            else torch.arange(rows)[:, None].expand(-1, columns)
        )
        keep = (index + seed) % 4 < kept
    elif pattern == "some rows":
        keep = (torch.rand(rows, 1, generator=generator) > 0.5).expand(-1, columns)
    elif pattern == "one":
        keep = torch.zeros(rows, columns, dtype=torch.bool)
        keep[seed % rows, seed % columns] = True
    else:
        keep = torch.full((rows, columns), pattern == "none")
    return torch.where(keep, weight, torch.zeros(()).bfloat16())


def assert_product(
    result: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """One rounding to the result's dtype, and of the sums no more than float32 loses."""
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    size = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    rounding = 2.0**-8 if result.dtype == torch.bfloat16 else 2.0**-23
    assert result.dtype == x.dtype
    assert result.shape == exact.shape
    error = (result.double() - exact).abs() - rounding * exact.abs() - 2e-6 * size
    assert error.numel() == 0 or float(error.max()) <= 0, f"off by {float(error.max())}"
