"""The kernels are given addresses of memory that is there, whatever tensors come, and whatever was done to packed ones."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import needs_binary, sparse
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_sparse import native
from hf_sparse.errors import KernelError
from hf_sparse.runtime import PackedForm, hold_
from hf_sparse.runtime.operators import packed_dense, packed_linear

SHAPE = (40, 70)


def weight() -> torch.Tensor:
    return sparse("unstructured 50 %", *SHAPE, 0)


def inputs(rows: int = 3) -> torch.Tensor:
    return torch.linspace(-1, 1, rows * SHAPE[1]).view(rows, -1).bfloat16()


def held() -> Any:
    module = nn.Linear(*reversed(SHAPE), bias=False, dtype=torch.bfloat16).eval().requires_grad_(False)
    module.weight.copy_(weight())
    hold_(module, PackedForm(native.pack(module.weight)))
    return module


def stored() -> tuple[torch.Tensor, torch.Tensor]:
    kept = weight().flatten() != 0
    bits = (kept.view(-1, 8).to(torch.uint8) << torch.arange(8, dtype=torch.uint8)).sum(-1).to(torch.uint8)
    return weight().flatten()[kept], bits


ANYWHERE: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "product": lambda packed, x: native.matmul(x, packed),
    "selected": lambda packed, x: native.matmul_selected(x, packed, torch.tensor([2, 0], device="cpu")),
    "pack": lambda packed, x: native.matmul(x, native.pack(packed.unpack())),
    "unpack": lambda packed, x: packed.unpack(),
    "dense": lambda packed, x: native.dense_matmul(x, native.arrange(packed.unpack())),
    "stored": lambda packed, x: native.pack_stored(*packed.stored, SHAPE).unpack(),
    "spread": lambda packed, x: native.spread_bits(packed.stored[0].view(torch.int16), packed.stored[1], 40 * 70),
    "module": lambda packed, x: packed.module(x),
    "operator": lambda packed, x: packed_linear(x, packed.masks, packed.offsets, packed.values, None, *SHAPE),
}


@needs_binary
@pytest.mark.parametrize("what", ANYWHERE)
def test_the_default_device_changes_nothing(what: str) -> None:
    packed, x = native.pack(weight()), inputs()
    packed.__dict__.update(stored=stored(), module=held())
    expected = ANYWHERE[what](packed, x)
    with torch.device("meta"):
        assert torch.equal(ANYWHERE[what](packed, x), expected)


@pytest.mark.parametrize("what", ["product", "selected", "pack", "unpack"])
def test_the_default_device_changes_nothing_without_kernels(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("packed", "products"):
        monkeypatch.setattr(f"hf_sparse.native.{module}.kernels", lambda: None)
    packed, x = native.pack(weight()), inputs()
    expected = ANYWHERE[what](packed, x)
    with torch.device("meta"):
        assert torch.equal(ANYWHERE[what](packed, x), expected)


def fake(tensor: torch.Tensor) -> torch.Tensor:
    with FakeTensorMode() as mode:
        return mode.from_tensor(tensor)


def emptied(tensor: torch.Tensor, size: int = 0) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(size)
    return tensor


class Subclass(torch.Tensor):
    """Where the elements of a subclass lie is its own affair."""


STRANGE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "fake": fake,
    "functional": torch._to_functional_tensor,
    "let go": emptied,
    "partly let go": lambda tensor: emptied(tensor, 16),
    "subclass": lambda tensor: tensor.as_subclass(Subclass),
    "meta": lambda tensor: tensor.to("meta"),
    "sparse": lambda tensor: tensor.float().to_sparse(),
}


@needs_binary
@pytest.mark.parametrize("kind", STRANGE)
def test_tensors_without_memory_of_their_own_are_refused(kind: str) -> None:
    packed, strange = native.pack(weight()), STRANGE[kind]
    bias, out = torch.zeros(40).bfloat16(), torch.zeros(3, 40).bfloat16()
    for call in (
        lambda: native.matmul(strange(inputs()), packed),
        lambda: native.matmul(inputs(), packed, strange(bias)),
        lambda: native.matmul(inputs(), packed, out=strange(out)),
        lambda: native.pack(strange(weight())),
        lambda: native.pack(strange(weight().T)),
        lambda: native.arrange(strange(weight())),
        lambda: native.Packed.from_buffers(packed.masks, packed.offsets, strange(packed.values), SHAPE),
    ):
        with pytest.raises(KernelError):
            call()


@needs_binary
def test_a_lazy_weight_is_no_matrix_to_pack() -> None:
    module = held()
    for call in (native.pack, native.arrange, lambda lazy: native.matmul(lazy, native.pack(weight()))):
        with pytest.raises(KernelError):
            call(module.weight)


@needs_binary
@pytest.mark.parametrize("transform", [torch.func.vmap, lambda f: torch.func.grad(lambda x: f(x).float().sum())])
def test_transformed_functions_are_refused(transform: Any) -> None:
    packed = native.pack(weight())
    with pytest.raises(KernelError):
        transform(lambda x: native.matmul(x, packed))(inputs())


@needs_binary
def test_modes_that_make_other_tensors_are_refused() -> None:
    packed = native.pack(weight())
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(KernelError):
        native.matmul(inputs(), packed)


# ---------------------------------------------------------------------------------------------------- packed tensors


DAMAGE: dict[str, Callable[[Any], object]] = {
    "offsets": lambda module: module.weight_packed_offsets.fill_(1 << 40),
    "masks": lambda module: module.weight_packed_masks.fill_(-1),
    "no memory": lambda module: module.weight_packed_values.untyped_storage().resize_(0),
    "less memory": lambda module: module.weight_packed_masks.untyped_storage().resize_(16),
    "another size": lambda module: module.weight_packed_offsets.set_(torch.zeros(1, dtype=torch.int64)),
    "another dtype": lambda module: setattr(module.weight_packed_masks, "data", module.weight_packed_masks.long()),
}


@needs_binary
@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("way", ["as it is", "pickled", "copied", "in inference mode"])
def test_a_damaged_module_is_refused(name: str, way: str) -> None:
    with torch.inference_mode(way == "in inference mode"):
        module = held()
        module(inputs())
        if way == "pickled":
            module = pickle.loads(pickle.dumps(module))
        if way == "copied":
            module = copy.deepcopy(module)
        module(inputs())
        DAMAGE[name](module)
        for call in (lambda: module(inputs()), module.state_dict):
            with pytest.raises(KernelError):
                call()


@needs_binary
def test_damage_is_found_after_pickling_too() -> None:
    module = held()
    module.weight_packed_offsets.fill_(1 << 40)
    module = pickle.loads(pickle.dumps(module))
    with pytest.raises(KernelError, match="no packed matrix"):
        module(inputs())


@needs_binary
def test_what_was_checked_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = native.pack(weight())
    asked: list[object] = []
    monkeypatch.setattr(native.Packed, "_check_content", lambda self: asked.append(self))
    parts = packed.masks, packed.offsets, packed.values
    native.matmul(inputs(), packed)
    packed_linear(inputs(), *parts, None, *SHAPE)
    assert not asked
    packed.values.zero_()  # any values will do
    native.matmul(inputs(), packed)
    assert not asked
    packed.masks.zero_()
    for _ in range(3):
        native.matmul(inputs(), packed)
    assert len(asked) == 1
    packed_linear(inputs(), *(part.clone() for part in parts), None, *SHAPE)
    assert len(asked) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda masks, offsets, values: (masks, offsets * 10**9, values, *SHAPE),
        lambda masks, offsets, values: (masks[:1], offsets[:1], values[:1], *SHAPE),
        lambda masks, offsets, values: (masks, offsets, values, 4000, 70),
        lambda masks, offsets, values: (masks, offsets, values.half(), *SHAPE),
        lambda masks, offsets, values: (emptied(masks), offsets, values, *SHAPE),
    ],
)
def test_the_operators_check_their_buffers(change: Any) -> None:
    packed = native.pack(weight())
    *parts, rows, columns = change(packed.masks, packed.offsets, packed.values)
    for call in (
        lambda: packed_linear(inputs(), *parts, None, rows, columns),
        lambda: packed_dense(*parts, rows, columns),
        lambda: native.matmul(inputs(), native.Packed(*parts, (rows, columns))),
    ):
        with pytest.raises(KernelError):
            call()


@needs_binary
@pytest.mark.parametrize("over", ["masks", "offsets", "values", "bias"])
def test_out_lies_over_nothing_that_is_read(over: str) -> None:
    large = native.pack(sparse("none", 640, 64, 0))
    bias = torch.zeros(640)
    tensor = bias if over == "bias" else getattr(large, over)
    out = tensor.view(torch.uint8).flatten()
    length = len(out) // 4 * 4
    if length < 640 * 4:  # offsets: the output begins before them
        memory = torch.zeros(640 * 4 + len(out), dtype=torch.uint8)
        memory[-len(out) :] = out
        large = native.Packed.from_buffers(
            large.masks, memory[-len(out) :].view(tensor.dtype), large.values, large.shape
        )
        out = memory[8:]
    with pytest.raises(KernelError, match="share no memory"):
        native.matmul(torch.zeros(1, 64), large, bias, out=out[: 640 * 4].view(torch.float32)[None])


@needs_binary
def test_inputs_with_a_sign_to_be_taken_in() -> None:
    x = torch.full((1, 70), 1 + 2j).conj().imag
    assert torch.equal(native.matmul(x, native.pack(weight())), native.matmul(x.clone(), native.pack(weight())))
