"""Compressed tensors come back bit for bit, and damaged ones are refused before memory is taken for them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from kernel_cases import SETS
from safetensors.torch import load_file, save_file

from hf_sparse import native
from hf_sparse.errors import CheckpointError, KernelError
from hf_sparse.native.binary import choose
from hf_sparse.native.stored import _spread_slowly
from hf_sparse.storage import Parts, StoredTensor, compress, decompress, is_compressed, open_tensors
from hf_sparse.storage.names import INDEX, WEIGHTS, quantization_config

DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip
SHAPES = ((4096,), (64, 96), (33, 65), (7, 9, 31), (1, 5000), (5000, 1), (2, 3, 4, 5, 6))


def sparse(shape: tuple[int, ...], dtype: torch.dtype, sparsity: float = 0.5, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = 10 * torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < sparsity, torch.zeros(()), values).to(dtype)


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return (
        first.shape == second.shape
        and first.dtype == second.dtype
        and torch.equal(first.contiguous().view(-1).view(torch.uint8), second.contiguous().view(-1).view(torch.uint8))
    )


def parts_of(tensor: torch.Tensor) -> Parts:
    found = compress(tensor)
    assert found is not None
    return found


# ---------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_compressed_comes_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = sparse(shape, dtype, sparsity=0.7)
    parts = compress(tensor)
    if parts is None:
        assert tensor.nbytes < 4096  # small ones gain nothing
        return
    assert parts.nbytes < tensor.nbytes
    assert same_bits(decompress("weight", parts), tensor)


@given(
    rows=st.integers(1, 70),
    columns=st.integers(20, 90),
    sparsity=st.sampled_from([0.2, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
    seed=st.integers(0, 999),
)
@settings(deadline=None, max_examples=150)
def test_any_size_layout_and_pattern(
    rows: int, columns: int, sparsity: float, dtype: torch.dtype, transposed: bool, seed: int
) -> None:
    tensor = sparse((rows, columns), dtype, sparsity, seed)
    tensor = tensor.T if transposed else tensor
    parts = compress(tensor)
    if parts is not None:
        assert same_bits(decompress("weight", parts), tensor.contiguous())
        assert parts.values.numel() == int((tensor != 0).sum())


def test_a_bit_for_everything_that_is_not_all_zero_bits() -> None:
    tensor = torch.zeros(4096)
    tensor[:4] = torch.tensor([-0.0, math.nan, math.inf, 1e-45])
    parts = parts_of(tensor)
    assert parts.values.numel() == 4
    assert same_bits(decompress("weight", parts), tensor)


@pytest.mark.parametrize(
    "tensor", [torch.ones(64, 64), torch.zeros(8, 8), torch.zeros(100, 100, dtype=torch.bool), torch.zeros(0)], ids=str
)
def test_only_where_it_is_smaller(tensor: torch.Tensor) -> None:
    assert compress(tensor) is None


@pytest.mark.parametrize(("sparsity", "share"), [(0.5, 0.5625), (0.7, 0.3625)])
def test_share_of_the_dense_bytes(sparsity: float, share: float) -> None:
    tensor = torch.ones(1000, 1000, dtype=torch.bfloat16)
    tensor[:, : int(1000 * sparsity)] = 0
    assert parts_of(tensor).nbytes / tensor.nbytes == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("width", [torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_every_instruction_set_spreads_alike(name: str, width: torch.dtype) -> None:
    for size in (1, 8, 31, 32, 33, 64, 1000, 4097):
        tensor = sparse((size,), width, seed=size)
        kept = tensor != 0
        bits = torch.zeros(-(-size // 8), dtype=torch.uint8)
        for place in kept.nonzero().flatten().tolist():
            bits[place // 8] |= 1 << place % 8
        if name == "torch":
            row = torch.empty(size, dtype=width)
            _spread_slowly(tensor[kept].numpy(), bits.numpy(), row.numpy())
        else:
            choose(name)
            try:
                row = native.spread_bits(tensor[kept], bits, size)
            finally:
                choose("")
        assert torch.equal(row, tensor)


@pytest.mark.parametrize(
    ("values", "bits", "size"),
    [
        (torch.ones(2, dtype=torch.int16), torch.tensor([1], dtype=torch.uint8), 8),
        (torch.ones(1, dtype=torch.int16), torch.tensor([16], dtype=torch.uint8), 4),
        (torch.ones(1, dtype=torch.int16), torch.tensor([1, 0], dtype=torch.uint8), 8),
        (torch.ones(1), torch.tensor([1], dtype=torch.uint8), 8),
        (torch.ones(1, dtype=torch.int16), torch.tensor([1], dtype=torch.int8), 8),
    ],
)
def test_what_cannot_be_spread_is_refused(values: torch.Tensor, bits: torch.Tensor, size: int) -> None:
    with pytest.raises(KernelError):
        native.spread_bits(values, bits, size)


# ---------------------------------------------------------------------------------------------------- files


def saved(tensors: dict[str, torch.Tensor], file: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return file


def whole(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    parts = parts_of(tensor)
    return {"a.weight_values": parts.values, "a.weight_bitmask": parts.bitmask, "a.weight_shape": parts.shape}


def test_plain_and_compressed_side_by_side(tmp_path: Path) -> None:
    weight, norm = sparse((64, 96), torch.bfloat16), torch.ones(5)
    file = saved({**whole(weight), "norm.weight": norm}, tmp_path / "model.safetensors")
    with open_tensors([file]) as stored:
        assert stored.keys() == {"a.weight", "norm.weight"}
        found = stored["a.weight"]
        assert isinstance(found, StoredTensor)
        assert (found.get_shape(), found.get_dtype()) == ([64, 96], "BF16")
        assert same_bits(found[...], weight)
        assert same_bits(found[3:5, ::2].contiguous(), weight[3:5, ::2].contiguous())
        assert same_bits(stored["norm.weight"][...], norm)


def test_parts_may_lie_in_different_files(tmp_path: Path) -> None:
    weight = sparse((64, 96), torch.float32)
    files = [saved({name: part}, tmp_path / f"{name}.safetensors") for name, part in whole(weight).items()]
    with open_tensors(files) as stored:
        assert same_bits(stored["a.weight"][...], weight)


WEIGHT = sparse((64, 96), torch.bfloat16)
HUGE = 2**62
FAULTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "a value too few": (lambda t: t.update({"a.weight_values": t["a.weight_values"][1:]}), "bitmask marks"),
    "a value too many": (lambda t: t.update({"a.weight_values": t["a.weight_values"].repeat(2)}), "bitmask marks"),
    "a bit turned": (lambda t: t["a.weight_bitmask"].__setitem__(0, t["a.weight_bitmask"][0] ^ 1), "bitmask marks"),
    "a short bitmask": (lambda t: t.update({"a.weight_bitmask": t["a.weight_bitmask"][:-1]}), "64 x 96"),
    "another shape": (lambda t: t.update({"a.weight_shape": torch.tensor([64, 97])}), "64 x 97"),
    "a huge shape": (lambda t: t.update({"a.weight_shape": torch.tensor([HUGE, HUGE, HUGE])}), "does not fit"),
    "a negative shape": (lambda t: t.update({"a.weight_shape": torch.tensor([-64, -96])}), "does not fit"),
    "no shape": (lambda t: t.update({"a.weight_shape": torch.zeros(0, dtype=torch.int64)}), "none that can be read"),
    "too many sides": (lambda t: t.update({"a.weight_shape": torch.ones(99, dtype=torch.int64)}), "none that can be"),
    "a shape of floats": (lambda t: t.update({"a.weight_shape": torch.tensor([64.0, 96.0])}), "F32"),
    "a square shape": (lambda t: t.update({"a.weight_shape": torch.tensor([[64, 96]])}), "not as a row"),
    "a bitmask of int8": (lambda t: t.update({"a.weight_bitmask": t["a.weight_bitmask"].view(torch.int8)}), "I8"),
    "a square of values": (lambda t: t.update({"a.weight_values": torch.ones(64, 48)}), "where a row should stand"),
    "values of bool": (lambda t: t.update({"a.weight_values": t["a.weight_values"].bool()}), "its values are BOOL"),
    "values left away": (lambda t: t.pop("a.weight_values"), "'a.weight_values' is missing"),
    "shape left away": (lambda t: t.pop("a.weight_shape"), "'a.weight_shape' is missing"),
    "plain as well": (lambda t: t.update({"a.weight": torch.ones(64, 96)}), "both plain and compressed"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_told(fault: str, tmp_path: Path) -> None:
    damage, message = FAULTS[fault]
    tensors = {name: part.clone() for name, part in whole(WEIGHT).items()}
    damage(tensors)
    file = saved(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message), open_tensors([file]) as stored:
        stored["a.weight"][...]


def test_bits_beyond_the_shape_are_damage() -> None:
    parts = parts_of(sparse((63, 65), torch.bfloat16))
    parts.bitmask[-1] |= 0x80
    with pytest.raises(CheckpointError, match="beyond the end"):
        decompress("weight", parts)


@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_a_file_with_wrong_bytes_gives_an_error_or_tensors_of_the_right_shape(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Turned, cut and inserted bytes: whatever is read, memory is taken only for what the bitmask covers."""
    file = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    saved({**whole(WEIGHT), "norm": torch.ones(3)}, file)
    content = bytearray(file.read_bytes())
    kind = data.draw(st.sampled_from(["turn", "cut", "insert", "header"]))
    header = 8 + int.from_bytes(content[:8], "little")
    place = data.draw(st.integers(0, (header if kind == "header" else len(content)) - 1))
    if kind == "cut":
        del content[place:]
    elif kind == "insert":
        content[place:place] = bytes(data.draw(st.integers(1, 9)))
    else:
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    try:
        with open_tensors([file]) as stored:
            read = {name: tensor[...] for name, tensor in stored.items()}
    except CheckpointError:
        return
    assert sum(tensor.nbytes for tensor in read.values()) <= 64 * len(content)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    files = [saved({"norm": torch.ones(3)}, tmp_path / f"{i}.safetensors") for i in range(2)]
    with pytest.raises(CheckpointError, match="in two files"), open_tensors(files):
        pass


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(CheckpointError, match="cannot be read"), open_tensors([tmp_path / "model.safetensors"]):
        pass


# ---------------------------------------------------------------------------------------------------- what config.json says


def test_what_is_told_is_read() -> None:
    for name in (WEIGHTS, INDEX):
        assert is_compressed(json.loads(json.dumps({"quantization_config": quantization_config(name)})))
    assert not is_compressed({})
    assert not is_compressed({"quantization_config": {"quant_method": "gptq", "bits": 4}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2.*Upgrade"),
        ({"version": True}, "version True"),
        ({"version": None}, "version None"),
        ({"format": "os.system"}, "format.*'os.system'"),
        ({"weights": "../../etc/passwd.safetensors"}, "must be model.hf_sparse.safetensors"),
        ({"weights": ["a"]}, "must be"),
        ({"extra": 1}, "'extra' does not exist"),
    ],
)
def test_what_is_not_known_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        is_compressed({"quantization_config": {**quantization_config(WEIGHTS), **change}})


def test_load_file_sees_the_documented_parts(tmp_path: Path) -> None:
    """What docs/formats.md says, in ten lines and without hf_sparse."""
    weight = sparse((48, 80), torch.bfloat16)
    stored = load_file(saved(whole(weight), tmp_path / "model.safetensors"))
    bits = stored["a.weight_bitmask"]
    kept = ((bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).bool().flatten()
    dense = torch.zeros(tuple(stored["a.weight_shape"].tolist()), dtype=torch.bfloat16)
    dense.view(-1)[kept[: dense.numel()]] = stored["a.weight_values"]
    assert torch.equal(dense, weight)
