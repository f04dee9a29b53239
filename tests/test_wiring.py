"""Which products share an input, in which order, and which enter the block's output, for blocks of every build."""

from typing import Any

import pytest
import torch
from families_table import FAMILIES
from models import bert, llama, mixtral, t5

from hf_sparse.calibrate import ready, survey
from hf_sparse.errors import ModelError
from hf_sparse.families import find_sites
from hf_sparse.wiring import Wiring


def wiring_of(model: Any, inputs: dict[str, torch.Tensor], block: int = 0) -> Wiring:
    with ready(model):
        return survey(model, find_sites(model), [inputs], False, want_wirings=True).wirings[block]


def short(operands: Any) -> list[str]:
    return [operand.module.rpartition(".")[2] for operand in operands]


IDS = {"input_ids": torch.arange(3, 19)[None]}


def test_groups_come_in_the_order_of_their_products() -> None:
    found = wiring_of(llama(), IDS)
    assert [short(group) for group in found.inputs] == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def test_in_a_pre_norm_block_o_and_down_enter_the_output_as_they_are() -> None:
    found = wiring_of(llama(), IDS)
    assert short(found.enters) == ["o_proj", "down_proj"]
    for factor in found.enters.values():
        torch.testing.assert_close(factor, torch.ones(32), rtol=1e-4, atol=1e-4)


def test_a_factor_on_the_way_is_found() -> None:
    model, inputs = FAMILIES["granite"].build()
    found = wiring_of(model, inputs)
    assert found.enters
    for factor in found.enters.values():
        expected = torch.full_like(factor, model.config.residual_multiplier)
        torch.testing.assert_close(factor, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["gemma2", "bert"])
def test_where_a_norm_stands_behind_the_products_none_enters(family: str) -> None:
    model, inputs = (bert(), IDS) if family == "bert" else FAMILIES[family].build()
    assert wiring_of(model, inputs).enters == {}


def test_parallel_blocks_have_both_entries() -> None:
    model, inputs = FAMILIES["gpt_neox"].build()
    assert len(wiring_of(model, inputs).enters) == 2


def test_experts_are_left_out_and_attention_is_not() -> None:
    found = wiring_of(mixtral(), IDS)
    assert [short(group) for group in found.inputs] == [["q_proj", "k_proj", "v_proj"], ["o_proj"]]
    assert short(found.enters) == ["o_proj"]


def test_cross_attention_reads_the_encoder() -> None:
    model = t5()
    inputs = {"input_ids": IDS["input_ids"], "decoder_input_ids": IDS["input_ids"][:, :7]}
    found = wiring_of(model, inputs, block=2)
    assert [short(group) for group in found.inputs][:4] == [["q", "k", "v"], ["o"], ["q"], ["k", "v"]]
    assert len(found.enters) == 3


def test_the_model_is_left_as_it_was() -> None:
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wiring_of(model, IDS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "granite", "gpt_neox"])
def test_half_precision_sees_the_same(family: str, dtype: torch.dtype) -> None:
    built = (llama(), IDS) if family == "llama" else FAMILIES[family].build()
    expected = wiring_of(*built).enters
    found = wiring_of(built[0].to(dtype), built[1]).enters
    assert found.keys() == expected.keys()
    for operand, factor in found.items():
        torch.testing.assert_close(factor, expected[operand], rtol=0.02, atol=0.02)


def test_a_product_behind_a_gate_does_not_enter() -> None:
    model = llama()
    mlp = model.model.layers[0].mlp
    mlp.act_fn = torch.nn.Sigmoid()  # open half way where its input is zero

    def gated(x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(5 * mlp.gate_proj(x)[..., :32]) * mlp.down_proj(mlp.up_proj(x))

    mlp.forward = gated
    assert "down_proj" not in short(wiring_of(model, IDS).enters)


def test_a_block_that_writes_into_its_input_is_refused() -> None:
    model = llama()
    layer = model.model.layers[0]
    own = layer.forward

    def writing(hidden_states: torch.Tensor, **given: Any) -> Any:
        output = own(hidden_states, **given)
        hidden_states.add_(1.0)
        return output

    layer.forward = writing
    with pytest.raises(ModelError, match="writes into its own input"):
        wiring_of(model, IDS)
