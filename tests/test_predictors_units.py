"""Neurons and heads are found in dense decoders of many families; what has none that can be told is refused."""

from typing import Any

import models
import pytest
import torch
from predictor_cases import FAMILIES, made
from torch import nn

from hf_sparse.errors import ConfigError, ModelError
from hf_sparse.predictors.layout import Layout
from hf_sparse.predictors.units import BlockWeights, activation_of, find_units, module_of
from hf_sparse.sites import read


@pytest.mark.parametrize("family", FAMILIES)
def test_units_of_families(family: str) -> None:
    model = made(family)
    units = find_units(model)
    assert [block.index for block in units] == [0, 1, 2]
    for block in units:
        assert (block.neurons, block.heads, block.head_size) == (48, 4, 8)
        assert (block.gate is not None) == FAMILIES[family][2]


@pytest.mark.parametrize("family", FAMILIES)
def test_their_modules_are_the_ones_that_run(family: str) -> None:
    model, seen = made(family), {}
    block = find_units(model)[1]
    for name, site in (("neurons", block.down), ("heads", block.o)):
        module_of(model, site).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].shape[-1])
        )
    with torch.no_grad():
        model(input_ids=models.token_rows(1, 4))
    assert seen == {"neurons": 48, "heads": 32}


@pytest.mark.parametrize("family", [name for name, case in FAMILIES.items() if case[2]])
def test_neurons_are_the_activated_gate_times_up(family: str) -> None:
    model, seen = made(family), {}
    block = find_units(model)[1]
    module_of(model, block.up).register_forward_pre_hook(lambda _, args: seen.__setitem__("input", args[0]))
    module_of(model, block.down).register_forward_pre_hook(lambda _, args: seen.__setitem__("neurons", args[0]))
    with torch.no_grad():
        model(input_ids=models.token_rows(1, 4))
        gate, up = read(model, block.gate), read(model, block.up)
        expected = activation_of(model, block)(seen["input"] @ gate.T) * (seen["input"] @ up.T)
    torch.testing.assert_close(seen["neurons"], expected)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (models.mixtral, ("mixture of experts", "dense model")),
        (models.bert, ("BertForMaskedLM", "decoder-only")),
        (models.t5, ("T5ForConditionalGeneration", "decoder-only")),
    ],
)
def test_what_has_no_such_units_is_refused(model: Any, said: tuple[str, ...]) -> None:
    with pytest.raises(ModelError) as caught:
        find_units(model())
    assert all(part in str(caught.value) for part in said)


def test_a_block_whose_matrices_are_unknown_is_refused() -> None:
    model = models.llama()
    mlp = model.model.layers[1].mlp
    mlp.mystery = mlp.down_proj
    del mlp.down_proj
    with pytest.raises(ModelError, match=r"neurons of model.layers.1 cannot be told.*register_role"):
        find_units(model)


def test_weights_of_criteria() -> None:
    model = made("llama")
    block = find_units(model)[0]
    weights = BlockWeights(model, block)
    z, a = torch.randn(48), torch.randn(4, 8)
    down, o = read(model, block.down), read(model, block.o)
    torch.testing.assert_close(
        z.abs() * weights.down_norm, torch.stack([(z[i] * down[:, i]).norm() for i in range(48)])
    )
    lengths = torch.stack([(o[:, 8 * head : 8 * head + 8] @ a[head]).norm() for head in range(4)])
    torch.testing.assert_close(torch.einsum("hi,hij,hj->h", a, weights.head_gram, a).sqrt(), lengths)


# ------------------------------------------------------------------------------------------------ layouts


def test_a_layout_comes_back_from_json_and_knows_its_model() -> None:
    model = made("llama")
    layout = Layout.of(model, dense_blocks=(0, 2), neuron_block=32)
    assert layout.blocks == (1,)
    assert layout.groups == (2,)
    assert Layout.from_dict(layout.to_dict()) == layout
    assert [block.index for block in layout.units(model)] == [1]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: models.llama(layers=2), ("total_blocks 3 there, 2 here",)),
        (lambda: models.llama(layers=3, intermediate_size=64), ("neurons (48, 48) there, (64, 64) here",)),
        (lambda: made("mistral"), ("LlamaForCausalLM there, MistralForCausalLM here",)),
    ],
)
def test_another_model_is_refused_and_both_are_named(other: Any, said: tuple[str, ...]) -> None:
    layout = Layout.of(made("llama"))
    with pytest.raises(ModelError) as caught:
        layout.units(other())
    assert all(part in str(caught.value) for part in said)


@pytest.mark.parametrize("dense_blocks", [(3,), (-1,), (0, 1, 2)])
def test_dense_blocks_have_to_exist_and_leave_some(dense_blocks: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="dense_blocks"):
        Layout.of(made("llama"), dense_blocks=dense_blocks)


@pytest.mark.parametrize(("size", "expected"), [(1, [1.0, 3, 5, 7, 9]), (2, [2.0, 6, 9]), (16, [5.0])])
def test_blocks_of_neurons_are_averaged_and_the_last_may_be_shorter(size: int, expected: list[float]) -> None:
    layout = Layout(
        model="", hidden_size=1, vocabulary=1, total_blocks=1, blocks=(0,), neurons=(5,), heads=(1,), neuron_block=size
    )
    assert layout.group(torch.tensor([1.0, 3, 5, 7, 9])).tolist() == expected
    mask = torch.ones(len(expected), dtype=torch.bool)
    mask[-1] = False
    kept = size * (len(expected) - 1)
    assert layout.expand(mask, 5).tolist() == [True] * kept + [False] * (5 - kept)


def test_an_adapter_is_seen_as_the_model_calls_it() -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(made("llama"), LoraConfig(target_modules=["down_proj"], r=2))
    block = find_units(adapted)[0]
    assert isinstance(module_of(adapted, block.down), nn.Module)
    assert type(module_of(adapted, block.down)).__name__ == "Linear"
    assert hasattr(module_of(adapted, block.down), "lora_A")
