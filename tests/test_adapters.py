"""Adapters on sparse models: masked LoRA equals what is merged, merges keep every zero, SHiRA stays inside the support."""

import copy
import importlib
import importlib.util
import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import bert, llama, mixtral, phi3, token_rows
from packaging.version import Version
from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig, PeftModel, ShiraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedConfig

import hf_sparse
from hf_sparse import SparsityConfig, after_import, peft_hook
from hf_sparse.adapters import mask_lora_, merge_and_unload, sparse_shira_config
from hf_sparse.adapters.product import MaskedProduct
from hf_sparse.errors import ConfigError, ModelError
from hf_sparse.families import find_sites
from hf_sparse.sites import read

ROOT = Path(__file__).parents[1]
ROWS = token_rows(3, 8)
TWO_FOUR = SparsityConfig(pattern="2:4", metric="magnitude")
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def gpt2(layers: int = 2) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=layers, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config).eval()


FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "llama": (llama, {"target_modules": LLAMA}),
    "phi3": (phi3, {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "mixtral": (
        mixtral,
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "bert": (bert, {"target_modules": ["query", "key", "value", "intermediate.dense", "output.dense"]}),
}
LINEAR = [name for name in FAMILIES if name != "mixtral"]  # PEFT has no DoRA for bare parameters


def sparse(model: Any, config: SparsityConfig = TWO_FOUR) -> Any:
    hf_sparse.prune_(model, config)
    return model


def fill_(model: nn.Module, prefix: tuple[str, ...] = ("lora_A", "lora_B"), size: float = 0.1) -> None:
    """Adapters as after training: no factor is zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in prefix):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


def adapted(family: str = "llama", **options: Any) -> Any:
    make, targets = FAMILIES[family]
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, **targets, **options})
    model = get_peft_model(sparse(make()), config).eval()
    fill_(model)
    return model


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ROWS, **inputs).logits


def zeros(model: Any) -> int:
    """Zeros of all sites that are +0.0; a zero with a sign does not count."""
    found = 0
    for site in find_sites(model).all():
        weight = read(model, site)
        found += int(((weight == 0) & ~torch.signbit(weight)).sum())
    return found


def layers(model: Any) -> Iterator[tuple[str, Any]]:
    """(name of the base layer, LoRA layer)."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, peft.tuners.lora.layer.LoraLayer):
            yield name.replace(".base_layer", ""), module


def delta(layer: Any, adapter: str = "default") -> torch.Tensor:
    """scaling * B A as PEFT stores it, written out: of experts, one product each."""
    a, b, scaling = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter]
    if not hasattr(layer, "parameter_name"):
        return scaling * (b @ a).T if layer.fan_in_fan_out else scaling * b @ a
    a, b = a.view(layer.num_experts, -1, a.shape[1]), b.view(b.shape[0], -1, layer.num_experts)
    return scaling * torch.stack([b[:, :, expert] @ a[expert] for expert in range(layer.num_experts)])


def written_out(model: Any, adapters: tuple[str, ...] = ("default",), dora: bool = False) -> Any:
    """A copy of the base with W + mask * delta (DoRA: rows of that length m) in place of W, and biases added."""
    base = copy.deepcopy(model).unload()
    for name, layer in layers(model):
        module, parameter = base.get_submodule(name), getattr(layer, "parameter_name", "weight")
        weight = getattr(module, parameter).data
        mask, original = weight != 0, weight.clone()
        for adapter in adapters:
            weight = weight + mask * delta(layer, adapter)
            if dora:
                axis = 0 if layer.fan_in_fan_out else 1
                norm = (original + mask * delta(layer, adapter)).norm(dim=axis, keepdim=True)
                length = layer.lora_magnitude_vector[adapter].weight
                weight = weight * (length if axis == 0 else length[:, None]) / norm
            if layer.lora_bias[adapter]:
                module.bias.data += layer.lora_B[adapter].bias * layer.scaling[adapter]
        getattr(module, parameter).data = weight.detach()
    return base


# ------------------------------------------------------------------------------------------------ masked LoRA: the forward pass


@pytest.mark.parametrize("family", FAMILIES)
def test_the_forward_pass_is_the_formula_and_what_is_merged(family: str) -> None:
    model = adapted(family)
    before, expected = logits(model), logits(written_out(model))
    named = mask_lora_(model)
    assert len(named) == len(list(layers(model)))
    masked = logits(model)
    torch.testing.assert_close(masked, expected)
    assert not torch.allclose(masked, before)
    count = zeros(model.get_base_model())
    merged = model.merge_and_unload()  # PEFT's own
    assert torch.equal(logits(merged), masked)
    assert zeros(merged) == count == hf_sparse.report(merged).zeros


@pytest.mark.parametrize("family", LINEAR)
def test_dora_scales_the_rows_of_the_masked_sum(family: str) -> None:
    model = adapted(family, use_dora=True)
    with torch.no_grad():
        for _, layer in layers(model):
            layer.lora_magnitude_vector["default"].weight.mul_(-1.5)  # times zero, that is -0.0
    expected = logits(written_out(model, dora=True))
    mask_lora_(model)
    torch.testing.assert_close(logits(model), expected)
    count = zeros(model.get_base_model())
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected)
    assert zeros(merged) == count == hf_sparse.report(merged).zeros


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"lora_bias": True},
        {"r": 1, "lora_alpha": 32},
        {"rank_pattern": {"c_fc": 2}, "alpha_pattern": {"c_attn": 5}},
        {"lora_dropout": 0.5},  # none in evaluation
        {"init_lora_weights": False},
    ],
    ids=str,
)
def test_options_of_lora(options: dict[str, Any]) -> None:
    model = adapted("gpt2", **options)
    expected = logits(written_out(model))
    mask_lora_(model)
    torch.testing.assert_close(logits(model), expected)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dropout_is_on_what_the_adapter_reads(family: str, dora: bool) -> None:
    model = adapted(family, lora_dropout=0.4, use_dora=dora)
    model.add_adapter("other", LoraConfig(r=2, use_dora=dora, lora_dropout=0.2, **FAMILIES[family][1]))
    fill_(model)
    model.base_model.set_adapter(["default", "other"])
    mask_lora_(model)
    name, layer = next(layers(model))
    steps = [written_out(model, ("default", "other")[:number], dora).get_submodule(name).weight for number in range(3)]
    x = torch.randn(5, layer.in_features)
    layer.train()
    torch.manual_seed(3)
    found = layer(x)
    torch.manual_seed(3)
    expected = layer.base_layer(x)
    for share, before, after in zip((0.4, 0.2), steps, steps[1:]):
        change = after - before
        expected = expected + nn.functional.dropout(x, share) @ (change if layer.fan_in_fan_out else change.T)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("family", "dora"), [*((name, False) for name in FAMILIES), *((name, True) for name in LINEAR)]
)
def test_several_active_adapters(family: str, dora: bool) -> None:
    model = adapted(family, use_dora=dora)
    model.add_adapter("other", LoraConfig(**{"r": 2, "lora_alpha": 3, "use_dora": dora, **FAMILIES[family][1]}))
    fill_(model)
    model.base_model.set_adapter(["default", "other"])
    expected = logits(written_out(model, ("default", "other"), dora))
    mask_lora_(model)
    masked = logits(model)
    torch.testing.assert_close(masked, expected)
    model.base_model.set_adapter("other")
    torch.testing.assert_close(logits(model), logits(written_out(model, ("other",), dora)))
    model.base_model.set_adapter(["default", "other"])
    if dora and Version(peft.__version__) < Version("0.21"):
        return  # which took the norm of the second from the weight that the first had been merged into
    torch.testing.assert_close(logits(merge_and_unload(model)), masked)


def test_one_of_two_adapters_can_be_masked() -> None:
    model = adapted(lora_bias=False)
    model.add_adapter("plain", LoraConfig(r=2, lora_alpha=3, target_modules=LLAMA))
    fill_(model)
    model.set_adapter("plain")
    plain = logits(model)
    mask_lora_(model, "default")
    assert torch.equal(logits(model), plain)
    model.set_adapter("default")
    torch.testing.assert_close(logits(model), logits(written_out(model)))
    model.base_model.set_adapter(["default", "plain"])
    _, layer = next(layers(model))
    x, weight = torch.randn(5, layer.in_features), layer.get_base_layer().weight
    whole = weight + (weight != 0) * delta(layer) + delta(layer, "plain")
    torch.testing.assert_close(layer(x), x @ whole.T)


def test_a_mixed_batch_takes_each_rows_adapter() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=3, target_modules=LLAMA))
    model.add_adapter("plain", LoraConfig(r=2, lora_alpha=3, target_modules=LLAMA))
    fill_(model)
    mask_lora_(model, ["default", "other"])
    expected = []
    for name in ("other", "default", "plain"):
        model.set_adapter(name)
        expected.append(logits(model))
    with model.disable_adapter():
        expected.append(logits(model))
    rows = torch.cat([ROWS, ROWS[:2]])
    with torch.no_grad():
        found = model(input_ids=rows, adapter_names=["other", "default", "__base__", "plain", "other"]).logits
    wanted = [expected[0][0], expected[1][1], expected[3][2], expected[2][0], expected[0][1]]
    torch.testing.assert_close(found, torch.stack(wanted))


@pytest.mark.parametrize("family", FAMILIES)
def test_disabled_adapters_give_the_base(family: str) -> None:
    model = adapted(family)
    expected = logits(copy.deepcopy(model).unload())
    mask_lora_(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_and_autocast_give_what_the_merged_model_gives(family: str, dtype: torch.dtype) -> None:
    model = adapted(family)
    model.get_base_model().to(dtype)
    mask_lora_(model)
    merged = copy.deepcopy(model).merge_and_unload()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        assert torch.equal(logits(model), logits(merged))
        assert logits(model).dtype == torch.bfloat16
        # merging in there rounds no more than outside
        assert torch.equal(logits(copy.deepcopy(model).merge_and_unload()), logits(merged))


def test_adapters_in_single_precision_on_a_base_in_half_precision() -> None:
    model = get_peft_model(sparse(llama().to(torch.bfloat16)), LoraConfig(r=4, target_modules=LLAMA)).eval()
    fill_(model)
    assert {parameter.dtype for name, parameter in model.named_parameters() if "lora_" in name} == {torch.float32}
    mask_lora_(model)
    assert torch.equal(logits(model), logits(copy.deepcopy(model).merge_and_unload()))


def test_hooks_on_the_base_layer_still_run() -> None:
    model = adapted()
    mask_lora_(model)
    expected, seen = logits(model), []
    for _, layer in layers(model):
        layer.get_base_layer().register_forward_hook(lambda module, args, output: seen.append(output.shape))
    torch.testing.assert_close(logits(model), expected)
    assert len(seen) == 14


# ------------------------------------------------------------------------------------------------ masked LoRA: training


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_of_the_product(transposed: bool, bias: bool) -> None:
    torch.manual_seed(0)
    wide = {"dtype": torch.float64, "requires_grad": True}
    weight = torch.randn(6, 4, dtype=torch.float64) * (torch.rand(6, 4) > 0.5)
    inputs, outputs = (6, 4) if transposed else (4, 6)
    x, left, right = torch.randn(2, 3, inputs, **wide), torch.randn(6, 2, **wide), torch.randn(2, 4, **wide)
    shift = torch.randn(outputs, **wide) if bias else None
    assert torch.autograd.gradcheck(
        lambda *given: MaskedProduct.apply(given[0], weight, *given[1:3], 0.7, given[3], transposed),
        (x, left, right, shift),
    )


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_are_those_of_the_formula(family: str, dora: bool) -> None:
    model = adapted(family, use_dora=dora).double()
    mask_lora_(model)
    _, layer = next(layers(model))
    x = torch.randn(5, layer.in_features, dtype=torch.float64)
    layer(x).square().sum().backward()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    found = [a.grad, b.grad]
    a.grad = b.grad = None
    weight = layer.get_base_layer().weight
    total = weight + (weight != 0) * delta(layer)
    if dora:
        axis = 0 if layer.fan_in_fan_out else 1
        length = layer.lora_magnitude_vector["default"].weight
        total = (length if axis == 0 else length[:, None]) * total / total.norm(dim=axis, keepdim=True).detach()
    result = x @ (total if layer.fan_in_fan_out else total.T)
    if layer.get_base_layer().bias is not None:
        result = result + layer.get_base_layer().bias
    result.square().sum().backward()
    torch.testing.assert_close(found, [a.grad, b.grad])


def test_the_frozen_weight_gets_no_gradient_and_no_second_copy_is_kept_for_backward() -> None:
    model = adapted()
    mask_lora_(model)
    _, layer = next(layers(model))
    weight, kept = layer.get_base_layer().weight, []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(5, layer.in_features, requires_grad=True)).sum().backward()
    whole = [tensor for tensor in kept if tensor.shape == weight.shape]
    assert [tensor.data_ptr() for tensor in whole] == [weight.data_ptr()]
    assert weight.grad is None


def train(model: Any, steps: int = 3) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ROWS, labels=ROWS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize("family", FAMILIES)
def test_training_lowers_the_loss_and_keeps_every_zero(family: str) -> None:
    model = adapted(family)
    mask_lora_(model)
    count = zeros(model.get_base_model())
    losses = train(model)
    assert losses[-1] < losses[0]
    trained = logits(model)
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), trained)
    assert zeros(merged) == count


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # PEFT passes it on
@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(family: str, reentrant: bool) -> None:
    losses = []
    for checkpointing in (False, True):
        model = adapted(family)
        mask_lora_(model)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        losses.append(train(model))
    assert losses[0] == losses[1]


def test_training_under_autocast() -> None:
    model = adapted()
    mask_lora_(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ROWS, labels=ROWS).loss
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if "lora_" in name}
    model.zero_grad()
    model(input_ids=ROWS, labels=ROWS).loss.backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert found[name].dtype == torch.float32
            similarity = torch.cosine_similarity(found[name].flatten(), parameter.grad.flatten(), dim=0)
            assert similarity > 0.99


def test_the_product_can_be_traced_as_one_graph() -> None:
    model = adapted()
    mask_lora_(model)
    _, layer = next(layers(model))
    x = torch.randn(5, layer.in_features)
    traced = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(traced(x), layer(x))


# ------------------------------------------------------------------------------------------------ masked LoRA: state


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_unmerging_restores_the_weights_bit_for_bit(family: str) -> None:
    model = adapted(family)
    with torch.no_grad():  # numbers with few bits, whose sums are exact
        for name, parameter in model.named_parameters():
            scale = 8 if "lora_" in name else 64
            parameter.copy_((parameter * scale).round() / scale)
        for _, layer in layers(model):
            layer.scaling["default"] = 0.5
    mask_lora_(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count, masked = zeros(model.get_base_model()), logits(model)
    model.merge_adapter()
    assert torch.equal(logits(model), masked)
    assert zeros(model.get_base_model()) > count  # some sums are zero, which the mask must survive
    model.unmerge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_kept_weight_that_a_merge_makes_zero_comes_back() -> None:
    model = adapted(r=1, lora_alpha=1)
    model.add_adapter("other", LoraConfig(r=1, lora_alpha=1, target_modules=LLAMA))
    model.base_model.set_adapter(["default", "other"])
    mask_lora_(model)
    _, layer = next(layers(model))
    weight = layer.get_base_layer().weight
    row, column = (weight != 0).nonzero()[0].tolist()
    with torch.no_grad():
        for adapter, value in (("default", -weight[row, column]), ("other", torch.tensor(0.5))):
            layer.lora_A[adapter].weight.fill_(1.0)
            layer.lora_B[adapter].weight.zero_()
            layer.lora_B[adapter].weight[row] = value
    before, masked = weight.clone(), logits(model)
    model.merge_adapter(["default"])
    assert weight[row, column] == 0
    model.unmerge_adapter()
    assert torch.equal(weight == 0, before == 0)
    assert weight[row, column] == before[row, column]
    model.merge_adapter()  # the other adapter changes the weight that the first one has made zero
    assert weight[row, column] == 0.5
    assert torch.equal(logits(model), masked)


def test_an_ordinary_adapter_that_is_merged_first_does_not_hide_the_mask() -> None:
    model = adapted()
    model.add_adapter("plain", LoraConfig(r=2, lora_alpha=3, target_modules=LLAMA))
    fill_(model)
    mask_lora_(model, "default")
    model.base_model.set_adapter(["plain", "default"])
    masked, count = logits(model), zeros(model.get_base_model())
    model.merge_adapter(["plain"])
    assert zeros(model.get_base_model()) == 0
    with pytest.warns(UserWarning, match="additionally merging default"):
        model.merge_adapter(["plain", "default"])
    assert torch.equal(logits(model), masked)
    model.unmerge_adapter()
    assert zeros(model.get_base_model()) == count
    torch.testing.assert_close(logits(model), masked)


def test_calling_it_twice_changes_nothing() -> None:
    model = adapted()
    named, masked = mask_lora_(model), logits(model)
    kinds = [type(layer) for _, layer in layers(model)]
    assert mask_lora_(model) == named
    assert [type(layer) for _, layer in layers(model)] == kinds
    assert torch.equal(logits(model), masked)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_names_and_state_stay_those_of_peft(family: str) -> None:
    model = adapted(family)
    before = model.state_dict()
    mask_lora_(model)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_adapters_come_and_go_on_masked_layers(family: str) -> None:
    model = adapted(family)
    mask_lora_(model)
    masked = logits(model)
    config = LoraConfig(**{"r": 2, **FAMILIES[family][1]})
    model.add_adapter("later", config)
    fill_(model, ("later",))
    assert torch.equal(logits(model), masked)
    model.set_adapter("later")
    ordinary = logits(model)
    mask_lora_(model, "later")
    torch.testing.assert_close(logits(model), logits(written_out(model, ("later",))))
    model.delete_adapter("later")
    model.set_adapter("default")
    assert torch.equal(logits(model), masked)
    model.add_adapter("later", config)  # the name again, for an adapter that nobody masked
    fill_(model, ("later",))
    model.set_adapter("later")
    assert torch.equal(logits(model), ordinary)


def test_only_lora_on_sparse_sites_is_masked() -> None:
    model = sparse(llama(), SparsityConfig(pattern="2:4", metric="magnitude", targets="mlp"))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=[*LLAMA, "embed_tokens", "lm_head"]))
    roles = ("gate_proj", "up_proj", "down_proj")
    assert mask_lora_(model) == [f"model.layers.{block}.mlp.{role}" for block in range(2) for role in roles]
    assert type(model.get_base_model().lm_head) is peft.tuners.lora.layer.Linear


def test_a_transformers_model_that_carries_adapters_itself() -> None:
    model = sparse(llama())
    count = zeros(model)
    model.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=LLAMA))
    fill_(model)
    assert len(mask_lora_(model)) == 14
    masked = logits(model)
    torch.testing.assert_close(masked, logits(adapted_and_masked()))
    merged = merge_and_unload(model)
    assert merged is model
    assert torch.equal(logits(merged), masked)
    assert zeros(merged) == count
    assert {type(module) for name, module in merged.named_modules() if name.endswith("_proj")} == {nn.Linear}


def adapted_and_masked() -> Any:
    model = adapted()
    mask_lora_(model)
    return model


# ------------------------------------------------------------------------------------------------ masked LoRA: refusals


class Quantized(nn.Module):
    """As GPTQ layers are: no `weight`, but packed integers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 32, dtype=torch.int32))


def break_(model: Any, how: str) -> None:
    _, layer = next(layers(model))
    if how == "merged":
        layer.merge()
    elif how == "meta":
        layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.to("meta"), requires_grad=False)
    elif how == "packed":
        layer.base_layer = Quantized()
    elif how == "integers":
        layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.to(torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("how", "message"),
    [("merged", "unmerge"), ("meta", "meta device"), ("packed", "quantized"), ("integers", "quantized")],
)
def test_a_site_whose_mask_cannot_be_known_is_named(how: str, message: str) -> None:
    model = adapted()
    break_(model, how)
    with pytest.raises(ModelError, match=message) as error:
        mask_lora_(model)
    assert "model.layers.0.self_attn.q_proj" in str(error.value)
    assert {type(layer) for _, layer in layers(model)} == {peft.tuners.lora.layer.Linear}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(target_modules=LLAMA, alora_invocation_tokens=[5], task_type="CAUSAL_LM"), "ALoraLinearVariant"),
        (LoHaConfig(target_modules=LLAMA), "loha"),
        (peft.AdaLoraConfig(target_modules=LLAMA, total_step=10), "SVDLinear"),
        (peft.VeraConfig(target_modules=["gate_proj"]), "vera"),
        (IA3Config(target_modules=LLAMA, feedforward_modules=["down_proj"]), "nothing to mask"),
        (peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "nothing to mask"),
        (LoraConfig(target_modules=["lm_head"]), "nothing to mask"),
        (LoraConfig(target_modules=LLAMA, init_lora_weights="pissa"), "PiSSA"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_cannot_be_masked_is_refused(config: Any, message: str) -> None:
    model = get_peft_model(sparse(llama()), config)
    with pytest.raises(ModelError, match=message):
        mask_lora_(model)


def test_one_adapter_inside_another_is_refused() -> None:
    model = peft.PeftMixedModel(sparse(llama()), LoHaConfig(target_modules=["q_proj"]), "inner")
    model.add_adapter("outer", LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ModelError, match=r"q_proj carries one adapter inside another|loha"):
        mask_lora_(model, "outer")


def test_dora_on_rows_without_a_weight_is_refused() -> None:
    model = sparse(llama())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = 0
    model = get_peft_model(model, LoraConfig(target_modules=LLAMA, use_dora=True))
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj has rows"):
        mask_lora_(model)


@pytest.mark.parametrize("function", [mask_lora_, merge_and_unload])
def test_models_and_adapters_that_are_not_there(function: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match="has no adapters; attach one"):
        function(sparse(llama()))
    with pytest.raises(ModelError, match="has no adapters"):
        function(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"'defualt' does not exist\. Did you mean 'default'"):
        function(adapted(), "defualt")


def test_a_dense_base_has_nothing_to_mask() -> None:
    with pytest.raises(ModelError, match=r"nothing to mask.*prune_"):
        mask_lora_(get_peft_model(llama(), LoraConfig(target_modules=LLAMA)))


def test_another_variant_beside_a_masked_adapter_is_refused_when_both_run() -> None:
    model = adapted_and_masked()
    model.add_adapter("asking", LoraConfig(target_modules=LLAMA, alora_invocation_tokens=[5], task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "asking"])
    with pytest.raises(ModelError, match="one of them at a time"):
        logits(model)


# ------------------------------------------------------------------------------------------------ merging


METHODS: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "lora": ("llama", LoraConfig(r=4, target_modules=LLAMA), ("lora_",)),
    "lora fused": ("phi3", LoraConfig(r=4, **FAMILIES["phi3"][1]), ("lora_",)),
    "lora conv1d": ("gpt2", LoraConfig(r=4, **FAMILIES["gpt2"][1]), ("lora_",)),
    "lora experts": ("mixtral", LoraConfig(r=4, **FAMILIES["mixtral"][1]), ("lora_",)),
    "lora bert": ("bert", LoraConfig(r=4, **FAMILIES["bert"][1]), ("lora_",)),
    "dora": ("llama", LoraConfig(r=4, target_modules=LLAMA, use_dora=True), ("lora_A", "lora_B")),
    "loha": ("llama", LoHaConfig(r=4, target_modules=LLAMA), ("hada_",)),
    "oft": ("llama", OFTConfig(r=0, oft_block_size=4, target_modules=LLAMA), ("oft_",)),
    "ia3": ("llama", IA3Config(target_modules=LLAMA, feedforward_modules=["down_proj"]), ("ia3_",)),
    "shira": ("llama", ShiraConfig(r=2, target_modules=LLAMA), ("shira_",)),
}
KEEP_ZEROS_ANYWAY = {"ia3"}


def of_method(method: str, base: Any = None) -> Any:
    family, config, prefix = METHODS[method]
    model = get_peft_model(sparse(FAMILIES[family][0]()) if base is None else base, copy.deepcopy(config)).eval()
    fill_(model, prefix)
    return model


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_every_zero_stays_and_what_is_cut_is_told(method: str, safe: bool) -> None:
    model = of_method(method)
    base = model.get_base_model()
    count, report, claim = zeros(base), hf_sparse.report(base), base.config.hf_sparse
    before = {site.name: read(base, site) != 0 for site in find_sites(base).all()}
    merged_by_peft = copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged = merge_and_unload(model, safe_merge=safe)
    told = [str(warning.message) for warning in caught if "cut off" in str(warning.message)]
    assert bool(told) == (method not in KEEP_ZEROS_ANYWAY)
    assert all("mask_lora_" in message for message in told)
    assert not any("fills in" in str(warning.message) for warning in caught)
    assert merged is base
    assert zeros(merged) == count == report.zeros
    assert hf_sparse.report(merged) is report
    assert merged.config.hf_sparse == claim
    assert not any("merge" in vars(module) for module in merged.modules())
    # kept weights are those of PEFT's merge
    dense = merged_by_peft.merge_and_unload(safe_merge=safe)
    for site in find_sites(merged).all():
        mask = before[site.name]
        torch.testing.assert_close(read(merged, site), read(dense, site) * mask)


def test_the_share_that_was_cut() -> None:
    model = adapted()
    cut = whole = 0.0
    for _, layer in layers(model):
        change, dropped = delta(layer).detach(), layer.get_base_layer().weight == 0
        cut, whole = cut + float((change * dropped).square().sum()), whole + float(change.square().sum())
    with pytest.warns(UserWarning, match=f"{(cut / whole) ** 0.5:.1%} of what the adapters add"):
        merge_and_unload(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_masked_adapter_is_merged_without_a_word(family: str) -> None:
    model = adapted(family)
    mask_lora_(model)
    masked = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = merge_and_unload(model)
    assert torch.equal(logits(merged), masked)


def test_a_masked_adapter_that_is_merged_already_is_only_unloaded() -> None:
    model = adapted_and_masked()
    masked = logits(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="already merged, nothing to do"):
        merged = merge_and_unload(model)
    assert torch.equal(logits(merged), masked)
    assert zeros(merged) == hf_sparse.report(merged).zeros


@pytest.mark.parametrize("method", ["lora", "loha", "lora experts"])
def test_a_dense_base_is_merged_as_peft_does(method: str) -> None:
    base = FAMILIES[METHODS[method][0]][0]()
    model = of_method(method, base)
    expected = logits(copy.deepcopy(model).merge_and_unload())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(logits(merge_and_unload(model)), expected)


def test_negative_zeros_of_a_base_become_zeros() -> None:
    model = adapted()
    with torch.no_grad():
        for _, layer in layers(model):
            weight = layer.get_base_layer().weight
            weight[weight == 0] = -0.0
    with pytest.warns(UserWarning, match="cut off"):
        merged = merge_and_unload(model)
    assert zeros(merged) == hf_sparse.report(merged).zeros


def test_only_the_named_adapters_are_merged() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    fill_(model, ("other",))
    mask_lora_(model)
    expected = logits(written_out(model))
    torch.testing.assert_close(logits(merge_and_unload(model, ["default"])), expected)


def test_an_unmasked_adapter_that_is_merged_already_is_refused() -> None:
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ModelError, match=r"default is already merged into model\.layers.*unmerge_adapter"):
        merge_and_unload(model)


def test_adapters_that_are_no_weights_are_refused() -> None:
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ModelError, match=r"PROMPT_TUNING.*cannot be merged"):
        merge_and_unload(get_peft_model(sparse(llama()), config))


def test_a_broken_adapter_leaves_no_trace() -> None:
    model = adapted_and_masked()
    _, layer = next(layers(model))
    with torch.no_grad():
        layer.lora_A["default"].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        merge_and_unload(model, safe_merge=True)
    assert not any("merge" in vars(module) for module in model.modules())


def test_zeros_that_an_initialisation_has_filled_in_are_told() -> None:
    model = get_peft_model(sparse(llama()), LoraConfig(target_modules=LLAMA, init_lora_weights="pissa"))
    with pytest.warns(UserWarning, match="lost zeros before this merge"):
        merge_and_unload(model)


def test_copies_of_whole_modules_keep_their_zeros() -> None:
    model = get_peft_model(sparse(llama()), LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp", "lm_head"]))
    count = zeros(sparse(llama()))
    fill_(model, ("modules_to_save",))
    with pytest.warns(UserWarning, match="cut off"):
        merged = merge_and_unload(model)
    assert zeros(merged) == count
    assert torch.count_nonzero(merged.lm_head.weight) == merged.lm_head.weight.numel()


class Attention(nn.Module):
    """A block whose attention is torch's own, which PEFT merges in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.out = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.attention(x, x, x, need_weights=False)[0])


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = PreTrainedConfig()
        self.layers = nn.ModuleList([Attention(), Attention()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_torchs_own_attention_keeps_its_zeros_and_is_not_masked() -> None:
    base = sparse(Stack())
    count = zeros(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["attention", "out"]))
    fill_(model)
    with pytest.raises(ModelError, match="MultiheadAttention"):
        mask_lora_(model)
    with pytest.warns(UserWarning, match="cut off"):
        assert zeros(merge_and_unload(model)) == count


def test_adapters_of_several_kinds_in_one_model() -> None:
    base = sparse(llama())
    count = zeros(base)
    model = peft.PeftMixedModel(base, LoHaConfig(target_modules=["q_proj"]), "one")
    model.add_adapter("two", LoraConfig(target_modules=["q_proj", "up_proj"]))
    model.set_adapter(["one", "two"])
    fill_(model, ("lora_", "hada_"))
    with pytest.warns(UserWarning, match="cut off"):
        merged = merge_and_unload(model)
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert zeros(merged) == count


@settings(max_examples=25)
@given(
    family=st.sampled_from(["llama", "gpt2", "phi3"]),
    r=st.integers(1, 8),
    alpha=st.floats(0.1, 100),
    dora=st.booleans(),
    masked=st.booleans(),
    number=st.integers(1, 3),
    half=st.booleans(),
    config=st.one_of(
        st.sampled_from(["2:4", "1:4", "4:8"]).map(lambda pattern: SparsityConfig(pattern=pattern, metric="magnitude")),
        st.floats(0.05, 0.9).map(lambda share: SparsityConfig(sparsity=share, pattern="unstructured", metric="magnitude")),
    ),
)  # fmt: skip
def test_no_merge_loses_a_zero(
    family: str, r: int, alpha: float, dora: bool, masked: bool, number: int, half: bool, config: SparsityConfig
) -> None:
    make, targets = FAMILIES[family]
    base = sparse(make().to(torch.bfloat16 if half else torch.float32), config)
    count = zeros(base)
    options = {"r": r, "lora_alpha": alpha, "use_dora": dora, **targets}
    model = get_peft_model(base, LoraConfig(**options))
    for index in range(1, number):
        model.add_adapter(f"adapter{index}", LoraConfig(**options))
    model.base_model.set_adapter(list(model.peft_config))
    fill_(model)
    rows_without = any((layer.get_base_layer().weight == 0).all(1).any() for _, layer in layers(model))
    if masked and not (dora and rows_without):
        mask_lora_(model)
    dropped = {site.name: read(base, site) == 0 for site in find_sites(base).all()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = merge_and_unload(model)
    assert zeros(merged) >= count
    for site in find_sites(merged).all():
        assert not read(merged, site)[dropped[site.name]].any()


# ------------------------------------------------------------------------------------------------ files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sparse(llama()).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def saved_adapter(folder: Path, config: Any = None, mask: bool = True) -> tuple[Path, Any]:
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = get_peft_model(base, config or LoraConfig(r=4, lora_alpha=6, target_modules=LLAMA)).eval()
    fill_(model, ("lora_A", "lora_B", "shira_"))
    if mask:
        mask_lora_(model)
    model.save_pretrained(folder.parent / "adapter")
    return folder.parent / "adapter", model


def test_a_masked_adapter_is_saved_as_an_ordinary_one_and_masked_again_after_loading(folder: Path) -> None:
    file, model = saved_adapter(folder)
    masked = logits(model)
    assert {path.name for path in file.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), file)
    assert not torch.allclose(logits(again), masked)
    mask_lora_(again)
    assert torch.equal(logits(again), masked)


def test_a_model_loaded_by_the_folder_of_its_adapter(folder: Path) -> None:
    file, model = saved_adapter(folder)
    masked = logits(model)
    again = AutoModelForCausalLM.from_pretrained(file)
    assert hf_sparse.is_sparse(again)
    assert again.config.hf_sparse == model.config.hf_sparse
    mask_lora_(again)
    assert torch.equal(logits(again), masked)
    merged = merge_and_unload(again)
    assert torch.equal(logits(merged), masked)
    assert hf_sparse.report(merged).to_dict() == hf_sparse.report(model).to_dict()


def test_a_merged_model_is_saved_as_the_sparse_model_it_is(folder: Path) -> None:
    _, model = saved_adapter(folder)
    merged = merge_and_unload(model)
    merged.save_pretrained(folder.parent / "merged")
    again = AutoModelForCausalLM.from_pretrained(folder.parent / "merged")
    assert torch.equal(logits(again), logits(merged))
    assert zeros(again) == hf_sparse.report(again).zeros
    assert again.config.hf_sparse["totals"]["zeros"] == zeros(again)


def test_a_model_merged_from_adapters_it_carries_itself_is_saved_whole(folder: Path) -> None:
    file, _ = saved_adapter(folder)
    model = AutoModelForCausalLM.from_pretrained(file)
    mask_lora_(model)
    merge_and_unload(model).save_pretrained(folder.parent / "merged")
    assert (folder.parent / "merged" / "model.safetensors").is_file()
    again = AutoModelForCausalLM.from_pretrained(folder.parent / "merged")
    assert torch.equal(logits(again), logits(model))


# ------------------------------------------------------------------------------------------------ SHiRA


def shira(base: Any, **options: Any) -> Any:
    model = get_peft_model(base, sparse_shira_config(base, **{"r": 4, **options})).eval()
    fill_(model, ("shira_",))
    return model


def positions(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: module.shira_indices["default"].long()
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "shira_indices")
    }


@pytest.mark.parametrize(("family", "linears"), [("llama", 14), ("phi3", 8), ("bert", 12)])
def test_shira_trains_kept_weights_only_and_merges_with_every_zero(family: str, linears: int) -> None:
    base = sparse(FAMILIES[family][0]())
    count = zeros(base)
    model = shira(base)
    places = positions(model)
    assert len(places) == linears
    for name, (rows, columns) in places.items():
        weight = model.get_base_model().get_submodule(name).get_base_layer().weight
        assert len(rows) == 4 * sum(weight.shape)
        assert bool((weight[rows, columns] != 0).all())
    trained = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = merge_and_unload(copy.deepcopy(model))
        by_peft = model.merge_and_unload()
    for one in (merged, by_peft):
        torch.testing.assert_close(logits(one), trained)
        assert zeros(one) == count


def test_shira_loads_with_plain_peft(folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder)
    file, model = saved_adapter(folder, sparse_shira_config(base, r=4), mask=False)
    expected = logits(model)
    torch.save({"rows": ROWS, "logits": expected}, folder.parent / "expected")
    assert torch.equal(logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), file)), expected)
    code = f"""
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(folder)!r}), {str(file)!r})
expected = torch.load({str(folder.parent / "expected")!r})
with torch.no_grad():
    same = torch.equal(model(input_ids=expected["rows"]).logits, expected["logits"])
print(same, "hf_sparse" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True False", done.stderr


def test_positions_depend_on_seed_and_layer_but_not_on_order() -> None:
    base = sparse(llama())
    first, second, other = (positions(shira(copy.deepcopy(base), seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    alone = positions(shira(copy.deepcopy(base), target_modules=["layers.1.mlp.up_proj"]))
    name = "model.layers.1.mlp.up_proj"
    assert list(alone) == [name]
    assert torch.equal(alone[name], first[name])

    def drawn(name: str) -> torch.Tensor:
        """Which of a layer's kept weights were drawn, counted among the kept ones."""
        rows, columns = first[name]
        kept = base.get_submodule(name).weight.detach() != 0
        return (kept.view(-1).cumsum(0).view_as(kept) - 1)[rows, columns]

    assert not torch.equal(drawn(name), drawn("model.layers.0.mlp.up_proj"))


@pytest.mark.parametrize(
    ("targets", "number"),
    [(["q_proj", "lm_head"], 3), (r".*layers\.1\.mlp\..*_proj", 3), ("all-linear", 14)],
)
def test_targets_may_be_given_as_peft_takes_them(targets: Any, number: int) -> None:
    model = get_peft_model(base := sparse(llama()), sparse_shira_config(base, r=4, target_modules=targets))
    assert len(positions(model)) == number


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"r": 6}, ConfigError, r"r=6 asks for 288 weights of model\.layers\.0\.self_attn\.k_proj, which keeps 256; take r=5"),
        ({"r": 7, "target_modules": ["mlp.up_proj"]}, None, ""),
        ({"r": 0}, ConfigError, "r is 0; give a whole number"),
        ({"r": 2.5}, ConfigError, "r is 2.5"),
        ({"mask_type": "random"}, ConfigError, "mask_type has no effect"),
        ({"random_seed": 3}, ConfigError, "random_seed has no effect"),
        ({"target_modules": ["absent"]}, ConfigError, "names no Linear"),
    ],
)  # fmt: skip
def test_shira_settings(change: dict[str, Any], error: type[Exception] | None, message: str) -> None:
    base = sparse(llama())
    if error is None:
        assert len(positions(shira(base, **change))) == 2
        return
    with pytest.raises(error, match=message):
        sparse_shira_config(base, **{"r": 4, **change})


@pytest.mark.parametrize(
    ("make", "message"),
    [(llama, "none of the 14 Linear sites"), (lambda: sparse(gpt2()), "none of the 0 Linear sites"), (lambda: llama().to("meta"), "meta device")],
)  # fmt: skip
def test_models_without_a_support(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        sparse_shira_config(make(), r=2)


def test_options_of_shira_are_passed_on() -> None:
    config = sparse_shira_config(sparse(llama()), r=2, task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    assert (config.task_type, config.modules_to_save, config.r) == ("CAUSAL_LM", ["lm_head"], 2)


# ------------------------------------------------------------------------------------------------ the plain merge warns


@pytest.fixture
def watched() -> Iterator[None]:
    before = peft_hook._enabled
    peft_hook.install()
    yield
    (peft_hook.install if before else peft_hook.uninstall)()


@pytest.fixture
def unwatched() -> Iterator[None]:
    before = peft_hook._enabled
    peft_hook.uninstall()
    yield
    (peft_hook.install if before else peft_hook.uninstall)()


def fills_in(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught if "fills in" in str(warning.message)]


@pytest.mark.parametrize("method", METHODS)
def test_a_plain_merge_warns_with_the_number_of_zeros(method: str, watched: None) -> None:
    model = of_method(method)
    before = hf_sparse.report(model).zeros
    found = fills_in(model.merge_and_unload)
    lost = before - sum(int((~mask).sum()) for mask in hf_sparse.masks(model.get_base_model()).values())
    if method in KEEP_ZEROS_ANYWAY:
        assert (found, lost) == ([], 0)
    else:
        assert len(found) == 1
        assert f"fills in {lost:,} zeros" in found[0]
        assert "hf_sparse.merge_and_unload" in found[0]


def test_it_warns_before_anything_is_merged(watched: None) -> None:
    model = adapted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="fills in"):
            model.merge_and_unload()
    assert zeros(model.get_base_model()) == hf_sparse.report(model).zeros


def with_a_zero(model: Any) -> Any:
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 0
    return model


@pytest.mark.parametrize(
    "make",
    [
        adapted_and_masked,
        lambda: shira(sparse(llama())),
        lambda: get_peft_model(llama(), LoraConfig(target_modules=LLAMA)),
        lambda: get_peft_model(with_a_zero(llama()), LoraConfig(target_modules=LLAMA)),
        lambda: get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"])),
    ],
    ids=["masked", "sparse shira", "dense", "dense but for one weight", "no blocks"],
)
def test_what_loses_no_zeros_merges_without_a_word(make: Callable[[], Any], watched: None) -> None:
    assert fills_in(make().merge_and_unload) == []


def test_our_own_merge_does_not_trigger_it(watched: None) -> None:
    model = adapted()
    assert fills_in(lambda: merge_and_unload(model)) == []


def test_only_the_adapters_that_are_merged_count(watched: None) -> None:
    model = adapted_and_masked()
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["q_proj"]))
    assert fills_in(lambda: copy.deepcopy(model).merge_and_unload()) == []
    assert "fills in 1,024 zeros" in fills_in(lambda: model.merge_and_unload(adapter_names=["plain"]))[0]


def test_all_tuners_inherit_the_method_that_is_wrapped() -> None:
    kinds = [BaseTuner]
    for kind in kinds:
        kinds += kind.__subclasses__()
    assert [kind for kind in kinds if "merge_and_unload" in vars(kind)] == [BaseTuner]
    assert len(kinds) > 20


def test_it_is_put_in_once_and_taken_out_whole(unwatched: None) -> None:
    original = vars(BaseTuner)["merge_and_unload"]
    peft_hook.install()
    ours = vars(BaseTuner)["merge_and_unload"]
    peft_hook.install()
    assert vars(BaseTuner)["merge_and_unload"] is ours
    assert ours is not original
    peft_hook.uninstall()
    assert vars(BaseTuner)["merge_and_unload"] is original
    assert fills_in(adapted().merge_and_unload) == []


def test_another_wrapper_on_top_stays(watched: None) -> None:
    ours, seen = vars(BaseTuner)["merge_and_unload"], []

    def theirs(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append("theirs")
        return ours(self, *args, **kwargs)

    BaseTuner.merge_and_unload = theirs
    try:
        peft_hook.uninstall()
        assert fills_in(adapted().merge_and_unload) == []
        assert seen == ["theirs"]
        peft_hook.install()
        assert len(fills_in(adapted().merge_and_unload)) == 1
    finally:
        BaseTuner.merge_and_unload = ours


@pytest.fixture
def not_imported(unwatched: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """A module in the place of PEFT's that nobody has imported yet; imports it and gives its class."""
    (tmp_path / "not_peft").mkdir()
    (tmp_path / "not_peft" / "__init__.py").write_text("")
    (tmp_path / "not_peft" / "tuners.py").write_text(
        "class BaseTuner:\n    def merge_and_unload(self):\n        return 'merged'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(peft_hook, "_MODULE", "not_peft.tuners")

    def imported() -> Any:
        return importlib.import_module("not_peft.tuners").BaseTuner

    yield imported
    peft_hook.uninstall()
    for name in ("not_peft", "not_peft.tuners"):
        sys.modules.pop(name, None)


def test_versions_of_peft_without_the_method_are_left_alone(not_imported: Callable[[], Any], tmp_path: Path) -> None:
    (tmp_path / "not_peft" / "tuners.py").write_text("class BaseTuner:\n    pass\n")
    peft_hook.install()
    assert not hasattr(not_imported(), "merge_and_unload")
    assert peft_hook._installed is None
    assert not waiting()


def is_wrapped(kind: Any) -> bool:
    return hasattr(vars(kind)["merge_and_unload"], "__wrapped__")


def waiting() -> int:
    return int(peft_hook._MODULE in after_import._finder.waiting and after_import._finder in sys.meta_path)


def test_it_waits_for_the_import_and_then_gets_out_of_the_way(not_imported: Callable[[], Any]) -> None:
    peft_hook.install()
    peft_hook.install()
    assert waiting() == 1
    assert importlib.util.find_spec("not_peft.tuners") is not None
    assert "not_peft.tuners" not in sys.modules  # a look is no import
    assert waiting() == 1
    assert is_wrapped(not_imported())
    assert waiting() == 0
    assert "exec_module" not in vars(sys.modules["not_peft.tuners"].__spec__.loader)
    assert inspect.getsource(not_imported()).startswith("class BaseTuner")
    peft_hook.uninstall()
    assert not is_wrapped(not_imported())
    peft_hook.install()
    assert is_wrapped(not_imported())


def test_taken_out_before_the_import_it_leaves_nothing(not_imported: Callable[[], Any]) -> None:
    peft_hook.install()
    peft_hook.uninstall()
    assert waiting() == 0
    assert not is_wrapped(not_imported())


def test_an_import_that_fails_fails_as_it_would_and_the_next_one_is_followed(
    not_imported: Callable[[], Any], tmp_path: Path
) -> None:
    file = tmp_path / "not_peft" / "tuners.py"
    good = file.read_text()
    file.write_text("raise RuntimeError('broken')")
    peft_hook.install()
    with pytest.raises(RuntimeError, match="broken"):
        not_imported()
    file.write_text(good + "# whole again")
    importlib.invalidate_caches()
    assert is_wrapped(not_imported())


def test_a_module_that_is_not_there_is_not_found(not_imported: Callable[[], Any], tmp_path: Path) -> None:
    (tmp_path / "not_peft" / "tuners.py").unlink()
    peft_hook.install()
    with pytest.raises(ImportError):
        not_imported()


def test_importing_hf_sparse_does_not_import_peft_and_peft_imported_later_is_wrapped() -> None:
    code = """
import sys
import hf_sparse, hf_sparse.adapters
from hf_sparse import peft_hook
peft_hook.install()
assert "peft" not in sys.modules
from peft.tuners.tuners_utils import BaseTuner
print("peft_hook" in BaseTuner.merge_and_unload.__code__.co_filename)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.strip() == "True", done.stderr
