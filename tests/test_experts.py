"""Experts in 3-D parameters on sparse kernels: the same outputs as dense, and the same model afterwards."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import mixtral, token_rows
from test_compressed import gpt_oss
from transformers import PhimoeConfig, PhimoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import hf_sparse
from hf_sparse import SparsityConfig, prune_
from hf_sparse.errors import KernelError, ModelError
from hf_sparse.runtime import SparseModule, StackedForm, sparse_modules

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip


def qwen3_moe() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=48, head_dim=8)).eval()


def phimoe() -> PhimoeForCausalLM:
    torch.manual_seed(0)
    return PhimoeForCausalLM(PhimoeConfig(**SIZES, num_local_experts=4)).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "mixtral": mixtral, "gpt_oss": gpt_oss, "qwen3_moe": qwen3_moe, "phimoe": phimoe,
}  # fmt: skip


def pruned(name: str = "mixtral", dtype: torch.dtype = torch.bfloat16) -> Any:
    model = MODELS[name]().to(dtype)
    prune_(model, SparsityConfig(pattern="2:4", metric="magnitude"))
    return model


def experts_of(model: Any) -> list[SparseModule]:
    return [
        module
        for _, module in sparse_modules(model)
        if any(isinstance(form, StackedForm) for form in module._held.values())
    ]


@pytest.mark.parametrize("name", MODELS)
def test_experts_run_sparse_and_come_back(name: str) -> None:
    model = pruned(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    parameters = [key for key, _ in model.named_parameters()]
    rows = token_rows()
    model.config._experts_implementation = "eager"
    with torch.no_grad():
        dense = model(rows).logits
    table = hf_sparse.use_sparse_kernels_(model, choose="always")
    assert len(experts_of(model)) == 2
    assert {row.parameter for row in table.sparse if len(row.shape) == 3} == {"gate_up_proj", "down_proj"}
    with torch.no_grad():
        sparse = model(rows).logits
    torch.testing.assert_close(sparse, dense, rtol=0.05, atol=0.05)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    hf_sparse.use_dense_kernels_(model)
    assert [key for key, _ in model.named_parameters()] == parameters
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(rows).logits, dense)


@pytest.mark.parametrize("name", MODELS)
def test_no_expert_becomes_dense_while_it_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned(name)
    hf_sparse.use_sparse_kernels_(model, choose="always")

    def unpack(*_: Any) -> None:
        raise AssertionError("a matrix was made dense")

    monkeypatch.setattr("hf_sparse.native.Packed.unpack", unpack)
    tokens = model.generate(token_rows(2, 5), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape == (2, 9)


def test_the_dense_weights_take_no_memory() -> None:
    model = pruned()
    module = model.model.layers[0].mlp.experts
    dense = module.gate_up_proj.nbytes
    hf_sparse.use_sparse_kernels_(model, choose="always")
    assert "gate_up_proj" not in module._parameters
    assert module._held["gate_up_proj"].nbytes < 0.75 * dense  # small matrices are padded
    assert module.gate_up_proj.shape == (4, 96, 32)
    assert module.gate_up_proj.dtype == torch.bfloat16


def test_what_models_know_of_themselves() -> None:
    model = pruned()
    masks, counted = hf_sparse.masks(model), hf_sparse.checkpoint.count(model)
    hf_sparse.use_sparse_kernels_(model, choose="always")
    again = hf_sparse.masks(model)
    assert masks.keys() == again.keys()
    assert all(torch.equal(mask, again[name]) for name, mask in masks.items())
    assert hf_sparse.checkpoint.count(model) == counted
    assert repr(model.model.layers[0].mlp.experts).startswith("SparseMixtralExperts")


@pytest.mark.parametrize("format", ["dense", "bitmask"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_saved_and_loaded(name: str, format: str, tmp_path: Path) -> None:
    model = pruned(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    hf_sparse.use_sparse_kernels_(model, choose="always")
    model.save_pretrained(tmp_path, sparse_format=format)
    for kernels in (False, {"choose": "always"}):
        loaded = type(model).from_pretrained(tmp_path, use_sparse_kernels=kernels)
        assert bool(experts_of(loaded)) == bool(kernels)
        assert all(torch.equal(tensor, before[key]) for key, tensor in loaded.state_dict().items())


def test_copied_and_pickled() -> None:
    model = pruned()
    hf_sparse.use_sparse_kernels_(model, choose="always")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    rows = token_rows()
    with torch.no_grad():
        expected = model(rows).logits
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(other(rows).logits, expected)
            assert experts_of(other)
            hf_sparse.use_dense_kernels_(other)
    assert experts_of(model)


def test_weights_are_loaded_into_it() -> None:
    model, other = pruned(), MODELS["mixtral"]().bfloat16()
    prune_(other, SparsityConfig(pattern="1:4", metric="magnitude"))
    hf_sparse.use_sparse_kernels_(model, choose="always")
    model.load_state_dict(other.state_dict())
    assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_what_would_be_lost_is_refused() -> None:
    model = pruned()
    hf_sparse.use_sparse_kernels_(model, choose="always")
    module = model.model.layers[0].mlp.experts
    with pytest.raises(KernelError, match="cannot be written"):
        module.gate_up_proj = torch.nn.Parameter(torch.zeros(4, 96, 32))
    with pytest.raises(KernelError, match="cannot be written"):
        module.gate_up_proj[1].zero_()
    with pytest.raises(KernelError, match="use_dense_kernels_"):
        model.half()
    with pytest.raises(KernelError, match="use_dense_kernels_"):
        model.train()(token_rows())
    with pytest.raises(ModelError, match="use_dense_kernels_"):
        prune_(model, SparsityConfig(pattern="1:4", metric="magnitude"))


def test_an_expert_by_its_number_and_all_of_them() -> None:
    model = pruned()
    dense = model.model.layers[0].mlp.experts.down_proj.detach().clone()
    hf_sparse.use_sparse_kernels_(model, choose="always")
    held = model.model.layers[0].mlp.experts.down_proj
    for index in (2, -1, torch.tensor(3)):
        assert torch.equal(held[index].dense(), dense[index])
    assert torch.equal(held[1:3] + 0, dense[1:3])
    assert torch.equal(held.sum(0), dense.sum(0))
    x = torch.randn(5, 48).bfloat16()
    torch.testing.assert_close(
        torch.nn.functional.linear(x, held[2]), torch.nn.functional.linear(x, dense[2]), rtol=0.05, atol=0.05
    )
