"""What the kernels are given is looked at before it is read: damaged buffers and wrong arguments are refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import assert_product, sparse

from hf_sparse import native
from hf_sparse.errors import KernelError
from hf_sparse.native import torch_path

SHAPE = (40, 70)  # 3 stripes, 48 pairs


def good() -> dict[str, object]:
    packed = native.pack(sparse("unstructured 50 %", *SHAPE, 0))
    return {name: getattr(packed, name).clone() for name in ("masks", "offsets", "values")} | {"shape": SHAPE}


def changed(name: str, index: tuple[int, ...], value: int):  # type: ignore[no-untyped-def]
    def change(buffers):  # type: ignore[no-untyped-def]
        buffers[name][index] = value

    return change


def replaced(name: str, make):  # type: ignore[no-untyped-def]
    def change(buffers):  # type: ignore[no-untyped-def]
        buffers[name] = make(buffers[name])

    return change


DAMAGE = {
    "a bit more": (changed("masks", (0, 0), -1), "masks"),
    "a bit less": (changed("masks", (1, 3), 0), "masks"),
    "rows beyond the last": (changed("masks", (2, 0), -1), "masks"),
    "inputs beyond the last": (changed("masks", (0, 40), 1), "masks"),
    "the first offset": (changed("offsets", (0,), 4), "offset"),
    "a falling offset": (changed("offsets", (1,), 1 << 40), "offset"),
    "a negative offset": (changed("offsets", (1,), -8), "offset"),
    "the last offset": (changed("offsets", (3,), 1 << 62), "offset"),
    "truncated values": (replaced("values", lambda v: v[:-1]), "offset"),
    "no values": (replaced("values", lambda v: v[:0]), "offset"),
    "values of another dtype": (replaced("values", lambda v: v.half()), "float16"),
    "values of two dimensions": (replaced("values", lambda v: v[None]), "1-D"),
    "spaced values": (replaced("values", lambda v: v.repeat_interleave(2)[::2]), "contiguous"),
    "a stripe less": (replaced("masks", lambda m: m[:-1]), "shape"),
    "spaced masks": (replaced("masks", lambda m: m.T.contiguous().T), "contiguous"),
    "masks of another dtype": (replaced("masks", lambda m: m.long()), "int64"),
    "offsets of another dtype": (replaced("offsets", lambda o: o.int()), "int32"),
    "an offset less": (replaced("offsets", lambda o: o[:-1]), "shape"),
    "masks without memory": (replaced("masks", lambda m: m.to("meta")), "meta"),
    "a negative side": (replaced("shape", lambda s: (-40, 70)), "sides"),
    "no rows": (replaced("shape", lambda s: (0, 70)), "sides"),
    "a huge side": (replaced("shape", lambda s: (1 << 62, 70)), "sides"),
    "huge sides": (replaced("shape", lambda s: (1 << 30, 1 << 30)), "shape"),
    "a side that is no number": (replaced("shape", lambda s: (40, 70.0)), "sides"),
    "three sides": (replaced("shape", lambda s: (2, 20, 70)), "sides"),
    "another shape": (replaced("shape", lambda s: (40, 60)), "shape"),
    "fewer rows": (replaced("shape", lambda s: (33, 70)), "masks"),
}


@pytest.fixture(params=["compiled", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "compiled" and not native.available():
        pytest.skip(native.why_not())
    if request.param == "torch":
        for module in ("packed", "products"):
            monkeypatch.setattr(f"hf_sparse.native.{module}.kernels", lambda: None)
        monkeypatch.setattr(torch_path, "say_slow", lambda reason: None)
    return str(request.param)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_buffers_are_refused(path: str, damage: str) -> None:
    change, told = DAMAGE[damage]
    buffers = good()
    native.Packed.from_buffers(**buffers)  # type: ignore[arg-type]
    change(buffers)
    with pytest.raises(KernelError, match=told):
        native.Packed.from_buffers(**buffers)  # type: ignore[arg-type]


@settings(max_examples=150)
@given(st.data())
def test_random_damage_is_refused_or_harmless(data: st.DataObject) -> None:
    buffers = good()
    name = data.draw(st.sampled_from(["masks", "offsets", "values"]))
    tensor = buffers[name]
    assert isinstance(tensor, torch.Tensor)
    width = 1 << (8 * tensor.element_size() - 1)
    flat = tensor.view(torch.int16) if name == "values" else tensor.view(-1)
    for _ in range(data.draw(st.integers(1, 4))):
        flat[data.draw(st.integers(0, flat.numel() - 1))] = data.draw(st.integers(-width, width - 1))
    shape = data.draw(st.tuples(st.integers(1, 200), st.integers(1, 200)) | st.just(SHAPE))
    try:
        packed = native.Packed.from_buffers(buffers["masks"], buffers["offsets"], buffers["values"], shape)  # type: ignore[arg-type]
    except KernelError:
        return
    x = torch.randn(3, shape[1])
    weight = packed.unpack()
    if bool(weight.isfinite().all()) and float(weight.abs().max()) < 1e18:
        assert_product(native.matmul(x, packed), x, weight)
    else:
        native.matmul(x, packed)


STORED = {
    "a value more": (lambda v, b, s: (torch.cat([v, v[:1]]), b, s), "damaged"),
    "a value less": (lambda v, b, s: (v[:-1], b, s), "damaged"),
    "no value": (lambda v, b, s: (v[:0], b, s), "damaged"),
    "a byte more": (lambda v, b, s: (v, torch.cat([b, b[:1]]), s), "bitmask"),
    "a byte less": (lambda v, b, s: (v, b[:-1], s), "bitmask"),
    "a bit more": (lambda v, b, s: (v, b | 1, s), "damaged"),
    "a bit beyond the end": (lambda v, b, s: (v, torch.cat([b[:-1], b[-1:] | 128]), s), "beyond"),
    "values of another dtype": (lambda v, b, s: (v.float(), b, s), "float32"),
    "bits of another dtype": (lambda v, b, s: (v, b.to(torch.int8), s), "int8"),
    "bits as a matrix": (lambda v, b, s: (v, b[None], s), "bitmask"),
    "a huge shape": (lambda v, b, s: (v, b, (1 << 29, 1 << 29)), "bitmask"),
    "a shape that overflows": (lambda v, b, s: (v, b, (1 << 40, 1 << 40)), "sides"),
    "a negative shape": (lambda v, b, s: (v, b, (-13, -11)), "sides"),
    "three sides": (lambda v, b, s: (v, b, (1, 13, 11)), "sides"),
}


@pytest.mark.parametrize("damage", STORED)
def test_damaged_checkpoints_are_refused(path: str, damage: str) -> None:
    change, told = STORED[damage]
    kept = torch.arange(13 * 11) % 3 == 0
    padded = torch.nn.functional.pad(kept.to(torch.uint8), (0, 1)).view(-1, 8)
    bitmask = (padded << torch.arange(8, dtype=torch.uint8)).sum(-1).to(torch.uint8)
    values = torch.ones(int(kept.sum())).bfloat16()
    assert torch.equal(native.pack_stored(values, bitmask, (13, 11)).unpack(), kept.view(13, 11).bfloat16())
    with pytest.raises(KernelError, match=told):
        native.pack_stored(*change(values, bitmask, (13, 11)))


def test_stored_zeros_are_dropped(path: str) -> None:
    packed = native.pack_stored(
        torch.tensor([1.0, -0.0, 2.0]).bfloat16(), torch.tensor([0b0111], dtype=torch.uint8), (1, 8)
    )
    assert int(packed.offsets[-1]) == 2
    assert packed.unpack().tolist() == [[1, 0, 2, 0, 0, 0, 0, 0]]


ARGUMENTS = {
    "half precision": ({"x": torch.zeros(2, 70).half()}, "float16"),
    "another width": ({"x": torch.zeros(2, 71)}, "71"),
    "no dimension": ({"x": torch.zeros(())}, "shape"),
    "no memory": ({"x": torch.zeros(2, 70, device="meta")}, "meta"),
    "a gradient": ({"x": torch.zeros(2, 70, requires_grad=True)}, "gradient"),
    "bias of another dtype": ({"bias": torch.zeros(40).bfloat16()}, "bias"),
    "bias of another length": ({"bias": torch.zeros(41)}, "bias"),
    "a spaced bias": ({"bias": torch.zeros(80)[::2]}, "bias"),
    "out of another shape": ({"out": torch.zeros(3, 40)}, "out"),
    "out of another dtype": ({"out": torch.zeros(2, 40).bfloat16()}, "out"),
    "a spaced out": ({"out": torch.zeros(40, 2).T}, "out"),
}


@pytest.mark.parametrize("what", ARGUMENTS)
def test_wrong_arguments_are_refused(path: str, what: str) -> None:
    given_, told = ARGUMENTS[what]
    packed = native.pack(sparse("none", *SHAPE, 0))
    with pytest.raises(KernelError, match=told):
        native.matmul(**{"x": torch.zeros(2, 70), "packed": packed} | given_)  # type: ignore[arg-type]


def test_out_must_not_be_the_input(path: str) -> None:
    memory = torch.zeros(200)
    with pytest.raises(KernelError, match="share no memory"):
        native.matmul(memory[:70], native.pack(sparse("none", *SHAPE, 0)), out=memory[60:100])


@pytest.mark.parametrize("weight", [torch.zeros(4, 4), torch.zeros(4).bfloat16(), torch.zeros(0, 4).bfloat16()])
def test_weights_that_cannot_be_packed(path: str, weight: torch.Tensor) -> None:
    with pytest.raises(KernelError):
        native.pack(weight)
