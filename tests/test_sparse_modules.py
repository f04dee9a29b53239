"""What can be done to a module on sparse kernels does what it does to a dense one, or is refused: nothing is lost silently."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from test_runtime import linear, logits, no_gradients, on_sparse_kernels, own_cache, pruned  # noqa: F401  # used by every test
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from hf_sparse import native, use_dense_kernels_, use_sparse_kernels_
from hf_sparse.errors import KernelError
from hf_sparse.runtime import PackedForm, hold_, sparse_modules


@pytest.mark.parametrize("way", ["pickle", "torch.save", "deepcopy"])
def test_models_are_saved_whole(way: str) -> None:
    model = on_sparse_kernels()
    expected, file = logits(model), io.BytesIO()
    if way == "pickle":
        again = pickle.loads(pickle.dumps(model))
    elif way == "torch.save":
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    else:
        again = copy.deepcopy(model)
    assert torch.equal(logits(again), expected)
    with pytest.raises(KernelError):
        again.half()
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    assert use_dense_kernels_(again).half().dtype == torch.float16


@pytest.mark.parametrize("path", ["model", "model.layers", "model.layers.1", "model.layers.0.mlp"])
def test_a_part_that_is_refused_to_move_has_not_moved(path: str) -> None:
    model = on_sparse_kernels()
    with pytest.raises(KernelError, match="use_dense_kernels_"):
        model.get_submodule(path).half()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    use_dense_kernels_(model)
    model.get_submodule(path).half()
    assert not any("_apply" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("asked", ["", "model.layers.0", "model.layers.0.mlp.up_proj"])
def test_what_trains_is_remembered(asked: str) -> None:
    model = on_sparse_kernels()
    model.get_submodule(asked).requires_grad_(False)
    use_dense_kernels_(model)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (not name.startswith(asked)), name


LOST: dict[str, Callable[[Any], object]] = {
    "item": lambda module: module.weight.__setitem__(0, 0),
    "row of data": lambda module: module.weight.data[0].zero_(),
    "masked data": lambda module: module.weight.data.__setitem__(module.weight > 0, 0),
    "view": lambda module: module.weight.view(-1).mul_(2),
    "transposed": lambda module: module.weight.t().copy_(torch.zeros(40, 24)),
    "rows": lambda module: module.weight.unbind()[3].zero_(),
    "view of a view": lambda module: module.weight.T.T[2:5].zero_(),
    "each": lambda module: torch._foreach_mul_([module.weight], 2.0),
    "out": lambda module: torch.add(torch.ones(24, 40).bfloat16(), 1, out=module.weight),
    "set": lambda module: module.weight.set_(torch.zeros(24, 40).bfloat16()),
    "gradient": lambda module: module.weight.requires_grad_(),
    "gradient by name": lambda module: module.weight.requires_grad_(requires_grad=True),
}


@pytest.mark.parametrize("name", LOST)
@pytest.mark.parametrize("inference", [False, True])
def test_no_write_is_lost(name: str, inference: bool) -> None:
    dense, held = linear()
    with torch.inference_mode(inference), pytest.raises(KernelError, match="use_dense_kernels_"):
        LOST[name](held)
    assert torch.equal(held.state_dict()["weight"], dense.weight)


def test_reading_a_weight_gives_what_a_dense_one_gives() -> None:
    dense, held = linear()
    held.weight.requires_grad_(False)
    assert torch.equal(held.weight[3] + 0, dense.weight[3])
    assert torch.equal(held.weight.t().contiguous(), dense.weight.t())
    assert torch.equal(held.weight.float().mul_(2), dense.weight.float() * 2)  # memory of its own may be written
    assert torch.equal(torch.cat(list(held.weight.split(5))), dense.weight)
    assert held.weight.tolist() == dense.weight.tolist()
    assert torch.equal(torch.from_dlpack(held.weight), dense.weight)
    assert torch.equal(torch.from_dlpack(held.weight.t()), dense.weight.t())
    assert torch.equal(copy.deepcopy(held.weight), dense.weight)
    assert torch.equal(pickle.loads(pickle.dumps(held.weight[2:4])) + 0, dense.weight[2:4])


def test_a_weight_as_input() -> None:
    dense, held = linear()
    torch.testing.assert_close(held(held.weight), dense(dense.weight))


def test_lazy_weights_are_loaded() -> None:
    (dense, held), (_, other) = linear(), linear()
    other.weight_packed_values.zero_()
    other.load_state_dict({"weight": held.weight, "bias": held.bias})
    assert torch.equal(other.state_dict()["weight"], dense.weight)


# ---------------------------------------------------------------------------------------------------- traces


@pytest.mark.parametrize("how", ["jit", "fx", "functionalized", "vmap", "export"])
def test_traces(how: str) -> None:
    _, held = linear()
    x, other = torch.ones(2, 40).bfloat16(), torch.linspace(-1, 1, 80).view(2, 40).bfloat16()
    held.bias.requires_grad_(False)
    traced = {
        "jit": lambda: torch.jit.trace(held, x),
        "fx": lambda: make_fx(lambda given: held(given))(x),
        "functionalized": lambda: torch.func.functionalize(lambda given: held(given)),
        "vmap": lambda: torch.func.vmap(lambda given: held(given)),
        "export": lambda: torch.export.export(held, (x,)).module(),
    }[how]()
    torch.testing.assert_close(traced(other), held(other))


def test_a_bare_product_is_not_traced() -> None:
    packed, x = native.pack(linear()[0].weight.detach()), torch.ones(2, 40).bfloat16()
    for trace in (
        lambda: torch.jit.trace(lambda y: native.matmul(y, packed), x),
        lambda: make_fx(lambda y: native.matmul(y, packed))(x),
    ):
        with pytest.raises(KernelError, match="cannot be traced"):
            trace()


@pytest.mark.parametrize("gradients", [True, False])
def test_tangents_are_refused(gradients: bool) -> None:
    _, held = linear()
    x = torch.ones(2, 40).bfloat16()
    with torch.set_grad_enabled(gradients):
        with forward_ad.dual_level():
            for function in (held, lambda dual: native.matmul(dual, held._form.packed)):
                with pytest.raises(KernelError, match="tangent"):
                    function(forward_ad.make_dual(x, x))
            held(x)
        with pytest.raises(KernelError, match="tangent"):
            torch.func.jvp(lambda given: held(given), (x,), (x,))


def test_a_bias_that_would_train_alone_is_refused() -> None:
    _, held = linear()
    packed, bias, x = held._form.packed, nn.Parameter(torch.zeros(24).bfloat16()), torch.ones(2, 40).bfloat16()
    with torch.enable_grad():
        with pytest.raises(KernelError, match="use_dense_kernels_"):
            held(x).sum().backward()
        with pytest.raises(KernelError, match="gradient"):
            native.matmul(x, packed, bias)
        held.bias.requires_grad_(False)
        assert not held(x).requires_grad


# ---------------------------------------------------------------------------------------------------- dtypes


def test_loading_rounds_nothing_unasked() -> None:
    dense, held = linear(torch.float32)
    exact, uneven = dense.state_dict(), {**dense.state_dict(), "weight": torch.full((24, 40), 1.001)}
    held.load_state_dict(exact)
    with pytest.raises(RuntimeError, match="round_weights"):
        held.load_state_dict(uneven)
    assert torch.equal(held.state_dict()["weight"], dense.weight)
    _, held = linear(torch.bfloat16)
    held.load_state_dict(uneven)  # rounded as a dense module of bfloat16 rounds
    model = pruned(dtype=torch.float32)
    use_sparse_kernels_(model, choose="always", round_weights=True)
    model.load_state_dict({name: tensor + 0.001 for name, tensor in model.state_dict().items()})


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("own", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [True, False])
def test_inputs_are_refused_where_a_dense_module_refuses_them(
    given: torch.dtype, own: torch.dtype, autocast: bool
) -> None:
    dense, held = linear(own)
    x = torch.ones(2, 40, dtype=given)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        try:
            expected = dense(x)
        except RuntimeError:
            with pytest.raises(KernelError, match="Convert the input"):
                held(x)
        else:
            torch.testing.assert_close(held(x), expected, rtol=2e-2, atol=1e-2)


def test_autocast_with_a_form_of_one_dtype() -> None:
    dense, held = linear()

    class OnlyBfloat16(PackedForm):
        dtypes = (torch.bfloat16,)

    module = copy.deepcopy(dense)
    hold_(module, OnlyBfloat16(held._form.packed))
    with torch.autocast("cpu", dtype=torch.float16):
        assert module(torch.ones(2, 40).bfloat16()).dtype == torch.float16


def test_nan_is_no_rounding() -> None:
    model = pruned(dtype=torch.float32).bfloat16().float()
    model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    assert all(row.sparse for row in use_sparse_kernels_(model, choose="always").rows)


def test_tied_tensors_stay_tied() -> None:
    model = pruned()
    first, second = (layer.mlp for layer in model.model.layers)
    model.extra = nn.ParameterDict({"tied": first.up_proj.weight})
    second.gate_proj.weight = nn.Parameter(first.gate_proj.weight.data)
    table = use_sparse_kernels_(model, choose="always")
    dense = {row.module: row.reason for row in table.rows if not row.sparse}
    assert set(dense) == {"model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj"}
    assert all("same tensor" in reason for reason in dense.values())
    use_dense_kernels_(model)
    assert model.extra["tied"] is first.up_proj.weight
    assert list(sparse_modules(models.llama())) == []


def test_models_that_were_loaded_compressed_are_guarded_too(tmp_path: Path) -> None:
    model = pruned(dtype=torch.float32)
    model.save_pretrained(tmp_path, sparse_format="bitmask")
    options = {"choose": "always", "round_weights": True}
    model = type(model).from_pretrained(tmp_path, dtype=torch.float32, use_sparse_kernels=options)
    assert list(sparse_modules(model))
    with pytest.raises(KernelError):
        model.half()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model.load_state_dict({name: tensor + 0.001 for name, tensor in model.state_dict().items()})
