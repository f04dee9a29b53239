"""The native kernels give what the dense matrix with its zeros gives, with every instruction set of this machine."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import PATTERNS, SETS, assert_product, needs_binary, sparse

from hf_sparse import native
from hf_sparse.errors import ConfigError, KernelError
from hf_sparse.native import binary, torch_path

TOKENS = (1, 2, 4, 5, 6, 7, 16, 17, 33, 64, 130)
DTYPES = (torch.bfloat16, torch.float32)
side = st.integers(1, 100)
shared_fixture = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=SETS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each instruction set in turn, and the path without compiled kernels."""
    if request.param == "torch":
        for module in ("packed", "products"):
            monkeypatch.setattr(f"hf_sparse.native.{module}.kernels", lambda: None)
        monkeypatch.setattr(torch_path, "say_slow", lambda reason: None)
        yield "torch"
    else:
        before = native.instruction_set()
        yield binary.choose(request.param)
        binary.choose(before)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@shared_fixture
@given(
    rows=side, columns=side, pattern=st.sampled_from(PATTERNS), tokens=st.sampled_from(TOKENS),
    dtype=st.sampled_from(DTYPES), with_bias=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_products(
    kernels: str, threads: int, rows: int, columns: int, pattern: str, tokens: int, dtype: torch.dtype,
    with_bias: bool, seed: int,
) -> None:  # fmt: skip
    weight = sparse(pattern, rows, columns, seed)
    x, bias = torch.randn(tokens, columns).to(dtype), torch.randn(rows).to(dtype) if with_bias else None
    assert_product(native.matmul(x, native.pack(weight), bias), x, weight, bias)


@shared_fixture
@given(rows=side, columns=side, pattern=st.sampled_from(PATTERNS), seed=st.integers(0, 999), transposed=st.booleans())
def test_packs_bit_for_bit(kernels: str, rows: int, columns: int, pattern: str, seed: int, transposed: bool) -> None:
    weight = sparse(pattern, rows, columns, seed)
    packed = native.pack(weight.T.contiguous().T if transposed else weight)
    assert torch.equal(packed.unpack(), weight)
    assert len(packed.values) - 32 == int(packed.offsets[-1]) == int((weight != 0).sum())
    again = native.Packed.from_buffers(packed.masks, packed.offsets, packed.values, packed.shape)
    assert torch.equal(again.unpack(), weight)


@shared_fixture
@given(rows=side, columns=side, pattern=st.sampled_from(PATTERNS), seed=st.integers(0, 999), flat=st.booleans())
def test_packs_what_a_checkpoint_holds(
    kernels: str, rows: int, columns: int, pattern: str, seed: int, flat: bool
) -> None:
    weight = sparse(pattern, rows, columns, seed)
    packed = native.pack_stored(weight[weight != 0], bits(weight, flat), weight.shape)
    direct = native.pack(weight)
    for name in ("masks", "offsets", "values"):
        assert torch.equal(getattr(packed, name), getattr(direct, name)), name


def bits(weight: torch.Tensor, flat: bool) -> torch.Tensor:
    """The bitmask of a checkpoint: little-endian bits, of all rows together or of each by itself."""
    kept = (weight != 0).flatten()[None] if flat else weight != 0
    padded = torch.nn.functional.pad(kept.to(torch.uint8), (0, -kept.shape[1] % 8)).view(kept.shape[0], -1, 8)
    bytes_ = (padded << torch.arange(8, dtype=torch.uint8)).sum(-1).to(torch.uint8)
    return bytes_.flatten() if flat else bytes_


def test_the_set_changes_nothing_in_the_buffers(kernels: str) -> None:
    weight = sparse("unstructured 50 %", 70, 90, 1)
    assert [getattr(native.pack(weight), n).tolist() for n in ("masks", "offsets")] == [
        part.tolist() for part in torch_path.pack(weight)[:2]
    ]


def test_special_numbers(kernels: str) -> None:
    payloads = torch.tensor([0x7FC1, -1, 0x7F80, -0x80, 0x7F81, 1, -0x8000, 0, -0x7FFF], dtype=torch.int16)
    weight = payloads.view(torch.bfloat16).repeat(20, 4)
    unpacked = native.pack(weight).unpack().view(torch.int16)
    plain = weight.view(torch.int16)
    assert torch.equal(unpacked, torch.where(plain == -0x8000, 0, plain))  # the negative zero has become a positive one
    assert int(native.pack(weight).offsets[-1]) == int(((plain & 0x7FFF) != 0).sum())


def test_infinite_inputs_meet_the_zeros(kernels: str) -> None:
    weight = sparse("unstructured 50 %", 40, 50, 3)
    x = torch.zeros(2, 50).bfloat16()
    x[0, 7], x[1, 3] = float("inf"), float("nan")
    assert torch.equal(native.matmul(x, native.pack(weight)).isnan(), (x.double() @ weight.double().T).isnan())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 20, 40])
def test_selected_stripes(kernels: str, threads: int, dtype: torch.dtype, tokens: int) -> None:
    weight, x = sparse("unstructured 70 %", 100, 130, 5), torch.randn(tokens, 130).to(dtype)
    stripes = torch.tensor([6, 0, 3, 3, 5])
    result = native.matmul_selected(x, native.pack(weight), stripes)
    padded = torch.zeros(112, 130).bfloat16()
    padded[:100] = weight
    assert_product(result, x, padded.view(7, 16, 130)[stripes].flatten(0, 1))
    assert native.matmul_selected(x, native.pack(weight), stripes[:0]).shape == (tokens, 0)


@pytest.mark.parametrize("wrong", [[7], [-1], [0, 1 << 40]])
def test_no_stripe_outside(kernels: str, wrong: list[int]) -> None:
    packed = native.pack(sparse("none", 100, 130, 5))
    with pytest.raises(KernelError, match="0 to 6"):
        native.matmul_selected(torch.zeros(1, 130), packed, torch.tensor(wrong))


@pytest.mark.parametrize("tokens", [1, 6, 40, 515, 1030])
@pytest.mark.parametrize("dtype", DTYPES)
def test_larger_products(kernels: str, threads: int, tokens: int, dtype: torch.dtype) -> None:
    weight = sparse("unstructured 50 %", 210, 1100, 2)
    x, bias = torch.randn(tokens, 1100).to(dtype), torch.randn(210).to(dtype)
    assert_product(native.matmul(x, native.pack(weight), bias), x, weight, bias)
    if kernels != "torch":
        assert_product(native.dense_matmul(x, native.arrange(weight), bias), x, weight, bias)


def test_shapes_of_inputs(kernels: str) -> None:
    weight = sparse("2:4 input", 24, 40, 0)
    packed = native.pack(weight)
    for shape in [(40,), (2, 3, 40), (0, 40)]:
        x = torch.randn(shape)
        assert_product(native.matmul(x, packed), x, weight)
    spaced = torch.randn(4, 80)[:, ::2]
    assert_product(native.matmul(spaced, packed), spaced, weight)
    out = torch.empty(5, 24)
    assert native.matmul(torch.ones(5, 40), packed, out=out) is out


def test_several_python_threads_at_once(kernels: str, threads: int) -> None:
    weights = [sparse("unstructured 50 %", 300, 400, seed) for seed in range(4)]
    packed = [native.pack(weight) for weight in weights]
    inputs = [torch.randn(tokens, 400).bfloat16() for tokens in (1, 5, 40, 130)]
    wanted = [[native.matmul(x, p) for x in inputs] for p in packed]

    def repeat(index: int) -> bool:
        return all(
            torch.equal(native.matmul(x, packed[index]), y) for _ in range(20) for x, y in zip(inputs, wanted[index])
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(repeat, range(4)))


@needs_binary
def test_the_number_of_threads_changes_no_bit(kernels: str) -> None:
    weight, x = sparse("unstructured 50 %", 500, 600, 1), torch.randn(40, 600).bfloat16()
    packed, results = native.pack(weight), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(native.matmul(x, packed))
    torch.set_num_threads(1)
    assert all(torch.equal(results[0], result) for result in results)


@needs_binary
def test_the_environment_names_the_set() -> None:
    code = "import hf_sparse.native as native; print(native.instruction_set())"
    environment = {**os.environ, "HF_SPARSE_KERNELS": "portable"}
    if "HF_SPARSE_TEST_KERNELS" in environment:
        pytest.skip("another process would take the installed build")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "portable"


@needs_binary
def test_the_best_set_is_taken_where_none_is_named(kernels: str) -> None:
    assert binary.choose("") == native.instruction_sets()[0]


@needs_binary
def test_unknown_sets_are_refused() -> None:
    with pytest.raises(ConfigError, match="neon; allowed are portable, avx512 and amx"):
        binary.choose("neon")
    for name in {"avx512", "amx"} - set(native.instruction_sets()):
        with pytest.raises(ConfigError, match="Unset the variable"):
            binary.choose(name)


def test_says_whether_there_are_kernels() -> None:
    assert native.available() == (native.why_not() == "")


def test_torch_path_says_that_it_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("hf_sparse.native.products.kernels", lambda: None)
    monkeypatch.setattr(torch_path, "say_slow", said.append)
    native.matmul(torch.ones(1, 8), native.pack(sparse("none", 8, 8, 0)))
    assert len(said) == 1
