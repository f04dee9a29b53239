"""Models whose weights accelerate keeps on the CPU or the disk are pruned like those in memory."""

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from models import llama, mixtral, token_rows
from torch import nn

from hf_sparse import masks, prune_

ROWS = token_rows()
CONFIG = {"metric": "dass", "calibration": ROWS, "num_samples": len(ROWS)}


def assert_same_masks(one: nn.Module, other: nn.Module) -> None:
    left, right = masks(one), masks(other)
    assert set(left) == set(right)
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("make", [llama, mixtral])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_blocks_come_out_right(make: type, where: str, tmp_path: Path) -> None:
    plain, model = make(), make()
    prune_(plain, CONFIG)
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        places = {
            "model.embed_tokens": "cpu",
            "model.norm": "cpu",
            "lm_head": "cpu",
            "model.rotary_emb": "cpu",
            "model.layers.0": "cpu",
            "model.layers.1": "disk",
        }
        model = dispatch_model(
            model, places, main_device="cpu", offload_dir=str(tmp_path / "offload"), force_hooks=True
        )
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    prune_(model, CONFIG)
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    assert_same_masks(plain, model)
    with torch.no_grad():
        assert torch.allclose(plain(input_ids=ROWS).logits, model(input_ids=ROWS).logits, atol=1e-6)


@pytest.mark.parametrize("make", [llama, mixtral])
def test_from_pretrained_with_a_device_map_onto_the_disk(make: type, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "dense")
    places = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "lm_head": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
    }
    plain = type(make()).from_pretrained(tmp_path / "dense", sparsity_config=CONFIG)
    model = type(plain).from_pretrained(
        tmp_path / "dense", device_map=places, offload_folder=str(tmp_path / "offload"), sparsity_config=CONFIG
    )
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    assert_same_masks(plain, model)
    model.save_pretrained(tmp_path / "sparse")
    again = type(plain).from_pretrained(tmp_path / "sparse")
    assert_same_masks(plain, again)


def test_computing_on_another_device_leaves_the_model_where_it_was() -> None:
    """`device=` moves one block at a time; on this kind of device that is a round trip to where it came from."""
    plain, model = llama(), llama()
    prune_(plain, CONFIG)
    prune_(model, {**CONFIG, "device": "cpu"})
    assert_same_masks(plain, model)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
