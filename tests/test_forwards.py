"""Walking block by block gives exactly what the model's own forward gives, for every architecture."""

import contextlib
import gc
from typing import Any

import pytest
import torch
from families_table import FAMILIES
from models import llama, token_rows
from torch.utils._pytree import tree_leaves

from hf_sparse.blocks import find_blocks
from hf_sparse.calibrate import ready
from hf_sparse.forwards import walk

FEW = [
    "llama",
    "gemma3_text",
    "mixtral",
    "gpt2",
    "t5",
    "bart",
    "albert",
    "swin",
    "modernbert",
    "llava",
    "qwen3_vl",
    "zamba2",
    "whisper",
    "deberta-v2",
]


@pytest.mark.parametrize("family", FEW)
def test_two_runs_of_each_block_leave_the_models_output_as_it_is(family: str) -> None:
    model, inputs = FAMILIES[family].build()
    outputs: dict[int, Any] = {}

    def run(number: int) -> Any:
        def forward() -> None:
            outputs[number] = model(**inputs)

        return forward

    with ready(model):
        expected = model(**inputs)
        for calls in walk(find_blocks(model), [run(0), run(1), run(2)]):
            assert len({call.block.index for call in calls}) == 1
            for call in calls:
                call()
                call.output = call()
    assert set(outputs) == {0, 1, 2}
    for output in outputs.values():
        for one, other in zip(tree_leaves(dict(output)), tree_leaves(dict(expected)), strict=True):
            if isinstance(one, torch.Tensor):
                assert torch.equal(one, other)


def test_blocks_come_in_the_order_in_which_the_model_runs_them() -> None:
    model, inputs = FAMILIES["bart"].build()
    with ready(model):
        seen = []
        for calls in walk(find_blocks(model), [lambda: model(**inputs)] * 2):
            seen.append(calls[0].block.name)
            for call in calls:
                call.output = call()
    stacks = [name.rpartition(".")[0] for name in seen]
    assert [name for index, name in enumerate(stacks) if index == 0 or stacks[index - 1] != name] == [
        "model.encoder.layers", "model.decoder.layers",
    ]  # fmt: skip


def test_closing_ends_the_passes_without_the_head() -> None:
    model = llama(layers=3)
    heads: list[int] = []
    model.lm_head.register_forward_hook(lambda *_: heads.append(1))
    with (
        ready(model),
        contextlib.closing(walk(find_blocks(model), [lambda: model(input_ids=token_rows(2, 4))] * 3)) as turns,
    ):
        for calls in turns:
            for call in calls:
                call.output = call()
            if calls[0].block.index == 2:
                break
    assert not heads
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)


def test_an_error_in_the_model_comes_through_and_everything_is_put_back() -> None:
    model = llama()

    def fail(*_: Any) -> None:
        raise KeyError("inside")

    model.model.norm.register_forward_hook(fail)

    def walk_through() -> None:
        for calls in walk(find_blocks(model), [lambda: model(input_ids=token_rows(2, 4))]):
            for call in calls:
                call.output = call()

    with ready(model), pytest.raises(KeyError, match="inside"):
        walk_through()
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)
    gc.collect()
