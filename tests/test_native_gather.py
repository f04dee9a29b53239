"""Products with chosen rows: what the whole matrix gives for those rows, with every instruction set, and no other row is read."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import SETS, assert_product

from hf_sparse import native
from hf_sparse.errors import KernelError
from hf_sparse.native import binary
from hf_sparse.native.gather import gather_dots, gather_sums

shared_fixture = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
sizes = given(
    rows=st.integers(1, 70), columns=st.one_of(st.integers(1, 130), st.sampled_from([512, 1100, 4200])), count=st.integers(0, 50),
    tokens=st.integers(0, 4), dtype=st.sampled_from([torch.bfloat16, torch.float32]), with_bias=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip


@pytest.fixture(params=SETS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each instruction set in turn, and the path without compiled kernels."""
    if request.param == "torch":
        monkeypatch.setattr("hf_sparse.native.gather.kernels", lambda: None)
        yield "torch"
    else:
        before = native.instruction_set()
        yield binary.choose(request.param)
        binary.choose(before)


@shared_fixture
@sizes
def test_dots(
    kernels: str, rows: int, columns: int, count: int, tokens: int, dtype: torch.dtype, with_bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    weight, x = torch.randn(rows, columns).to(dtype), torch.randn(tokens, columns).to(dtype)
    bias = torch.randn(rows).to(dtype) if with_bias else None
    chosen = torch.randint(rows, (tokens, count))
    found = gather_dots(x, weight, chosen, bias)
    assert found.shape == (tokens, count)
    for token in range(tokens):
        one = chosen[token]
        assert_product(found[token : token + 1], x[token : token + 1], weight[one], None if bias is None else bias[one])


@shared_fixture
@sizes
def test_sums(
    kernels: str, rows: int, columns: int, count: int, tokens: int, dtype: torch.dtype, with_bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    weight, x = torch.randn(rows, columns).to(dtype), torch.randn(tokens, count).to(dtype)
    bias = torch.randn(columns).to(dtype) if with_bias else None
    chosen = torch.randint(rows, (tokens, count))
    found = gather_sums(x, weight, chosen, bias)
    assert found.shape == (tokens, columns)
    for token in range(tokens):
        assert_product(found[token : token + 1], x[token : token + 1], weight[chosen[token]].t(), bias)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [1, 3])
def test_other_rows_are_not_read(kernels: str, tokens: int, threads: int) -> None:
    """Large enough for two threads."""
    before, weight = torch.get_num_threads(), torch.randn(900, 700)
    chosen = torch.stack([torch.randperm(450).sort().values[:410] for _ in range(tokens)]) * 2
    spoilt = weight.clone()
    spoilt[1::2] = float("nan")
    torch.set_num_threads(threads)
    try:
        for product, width in ((gather_dots, 700), (gather_sums, 410)):
            x = torch.randn(tokens, width)
            torch.testing.assert_close(product(x, spoilt, chosen), product(x, weight, chosen), rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("row", [-1, 5, 2**62])
@pytest.mark.parametrize("product", [gather_dots, gather_sums])
def test_rows_that_are_not_there_are_refused(kernels: str, product: object, row: int) -> None:
    with pytest.raises(KernelError, match="from 0 to 4"):
        product(torch.ones(1, 2), torch.ones(5, 2), torch.tensor([[0, row]]))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("x", "weight", "rows", "bias"),
    [
        (torch.ones(1, 3), torch.ones(5, 2), torch.zeros(1, 2).long(), None),
        (torch.ones(2, 2), torch.ones(5, 2), torch.zeros(1, 2).long(), None),
        (torch.ones(1, 2).bfloat16(), torch.ones(5, 2), torch.zeros(1, 2).long(), None),
        (torch.ones(1, 2).half(), torch.ones(5, 2).half(), torch.zeros(1, 2).long(), None),
        (torch.ones(1, 2), torch.ones(5, 2), torch.zeros(1, 2).int(), None),
        (torch.ones(1, 2), torch.ones(2, 5).t(), torch.zeros(1, 2).long(), None),
        (torch.ones(1, 2), torch.ones(5, 2), torch.zeros(1, 2).long(), torch.ones(3)),
        (torch.ones(1, 2), torch.ones(5, 2, device="meta"), torch.zeros(1, 2).long(), None),
    ],
)  # fmt: skip
def test_other_tensors_are_refused(
    kernels: str, x: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None
) -> None:
    with pytest.raises(KernelError, match="Rows are gathered from a contiguous matrix"):
        gather_dots(x, weight, rows, bias)


def test_memory_that_was_let_go_is_refused() -> None:
    weight = torch.ones(5, 2)
    weight.untyped_storage().resize_(0)
    with pytest.raises(KernelError, match="lie in the CPU's memory"):
        gather_dots(torch.ones(1, 2), weight, torch.zeros(1, 1).long())
