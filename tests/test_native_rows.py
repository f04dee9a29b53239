"""Packed rows: there and back bit for bit, products that read the chosen rows only, and the choice of the largest scores."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import PATTERNS, SETS, assert_product, sparse

from hf_sparse import native
from hf_sparse.errors import KernelError
from hf_sparse.native import binary
from hf_sparse.native.gather import gather_dots, gather_sums
from hf_sparse.native.largest import largest
from hf_sparse.native.rows import PackedRows, pack_rows

shared_fixture = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
columns_of = st.one_of(st.integers(1, 130), st.sampled_from([512, 1100, 4200]))


@pytest.fixture(params=SETS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each instruction set in turn, and the path without compiled kernels."""
    if request.param == "torch":
        for name in ("gather", "rows", "largest"):
            monkeypatch.setattr(f"hf_sparse.native.{name}.kernels", lambda: None)
        yield "torch"
    else:
        before = native.instruction_set()
        yield binary.choose(request.param)
        binary.choose(before)


@shared_fixture
@given(
    rows=st.integers(1, 70), columns=columns_of, pattern=st.sampled_from(PATTERNS), transposed=st.booleans(), seed=st.integers(0, 999)
)  # fmt: skip
def test_there_and_back(kernels: str, rows: int, columns: int, pattern: str, transposed: bool, seed: int) -> None:
    weight = sparse(pattern, rows, columns, seed)
    packed = pack_rows(weight.t().contiguous().t() if transposed else weight)
    assert torch.equal(packed.unpack(), weight)
    assert packed.values.numel() == int((weight != 0).sum()) + 32


@shared_fixture
@given(
    rows=st.integers(1, 70), columns=columns_of, count=st.integers(0, 50), tokens=st.integers(0, 4), with_bias=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]), pattern=st.sampled_from(PATTERNS), seed=st.integers(0, 999),
)  # fmt: skip
def test_products(
    kernels: str, rows: int, columns: int, count: int, tokens: int, with_bias: bool, dtype: torch.dtype, pattern: str, seed: int
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    weight = sparse(pattern, rows, columns, seed)
    packed, chosen = pack_rows(weight), torch.randint(rows, (tokens, count))
    x, bias = torch.randn(tokens, columns).to(dtype), torch.randn(rows).to(dtype) if with_bias else None
    found = gather_dots(x, packed, chosen, bias)
    assert found.shape == (tokens, count)
    for token in range(tokens):
        one = chosen[token]
        assert_product(found[token : token + 1], x[token : token + 1], weight[one], None if bias is None else bias[one])
    x, bias = torch.randn(tokens, count).to(dtype), torch.randn(columns).to(dtype) if with_bias else None
    found = gather_sums(x, packed, chosen, bias)
    assert found.shape == (tokens, columns)
    for token in range(tokens):
        assert_product(found[token : token + 1], x[token : token + 1], weight[chosen[token]].t(), bias)


@pytest.mark.parametrize("threads", [1, 2])
def test_other_rows_are_not_read(kernels: str, threads: int) -> None:
    """Large enough for two threads, and in parts of the columns."""
    before, weight = torch.get_num_threads(), sparse("unstructured 50 %", 400, 4200, 0)
    chosen = torch.stack([torch.randperm(200).sort().values[:183] for _ in range(2)]) * 2
    packed = pack_rows(weight)
    spoilt = PackedRows(packed.masks, packed.starts, packed.values.clone(), packed.shape)
    for row in range(1, 400, 2):
        spoilt.values[int(packed.starts[row]) : int(packed.starts[row + 1])] = float("nan")
    torch.set_num_threads(threads)
    try:
        for product, width in ((gather_dots, 4200), (gather_sums, 183)):
            x = torch.randn(2, width).bfloat16()
            assert torch.equal(product(x, spoilt, chosen), product(x, packed, chosen))
    finally:
        torch.set_num_threads(before)


def test_rows_that_are_not_there_are_refused(kernels: str) -> None:
    packed = pack_rows(sparse("all", 5, 40, 0))
    for row in (-1, 5):
        with pytest.raises(KernelError, match="selected"):
            gather_dots(torch.ones(1, 40), packed, torch.tensor([[row]]))


@pytest.mark.parametrize("part", ["masks", "starts", "values"])
def test_buffers_that_are_no_rows_are_refused(kernels: str, part: str) -> None:
    packed = pack_rows(sparse("unstructured 50 %", 6, 40, 0))
    gather_dots(torch.ones(1, 40), packed, torch.tensor([[2]]))
    if part == "values":
        packed = PackedRows(packed.masks, packed.starts, packed.values[:-1], packed.shape)
    else:
        getattr(packed, part)[-1] += 1 if part == "starts" else 1 << 9  # masks: beyond the last column
    with pytest.raises(KernelError, match="no packed rows"):
        gather_dots(torch.ones(1, 40), packed, torch.tensor([[2]]))


@shared_fixture
@given(rows=st.integers(0, 3), units=st.integers(1, 300), size=st.integers(1, 16), levels=st.integers(1, 300), seed=st.integers(0, 999))  # fmt: skip
def test_largest(kernels: str, rows: int, units: int, size: int, levels: int, seed: int) -> None:
    """With few levels many scores are equal."""
    torch.manual_seed(seed)
    scores = torch.randint(-levels, levels + 1, (rows, units)).float() / 7
    scores[scores == 0] *= -1
    count = seed % units + 1
    order = scores.argsort(dim=-1, descending=True, stable=True)[:, :count].sort(-1).values
    expected = (order.unsqueeze(-1) * size + torch.arange(size)).flatten(1)
    assert torch.equal(largest(scores, count, size), expected)


def test_largest_of_what_is_no_number(kernels: str) -> None:
    inf, nan = float("inf"), float("nan")
    scores = torch.tensor([[1.0, -inf, nan, inf, 2.0, -nan]])
    for count, expected in ((1, [2]), (2, [2, 5]), (3, [2, 3, 5]), (5, [0, 2, 3, 4, 5]), (6, [0, 1, 2, 3, 4, 5])):
        assert largest(scores, count)[0].tolist() == expected


@pytest.mark.parametrize(("scores", "count"), [(torch.ones(2, 3), 0), (torch.ones(2, 3), 4), (torch.ones(3), 1), (torch.ones(2, 3).half(), 1)])  # fmt: skip
def test_other_choices_are_refused(scores: torch.Tensor, count: int) -> None:
    with pytest.raises(KernelError, match="can be chosen"):
        largest(scores, count)
