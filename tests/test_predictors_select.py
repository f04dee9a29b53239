"""Selections keep exactly as many units as they say."""

from typing import Any

import pytest
import torch

from hf_sparse.errors import ConfigError
from hf_sparse.predictors.criteria import Scores
from hf_sparse.predictors.layout import Layout
from hf_sparse.predictors.select import Selection, by_block, top

LAYOUT = Layout(
    model="", hidden_size=8, vocabulary=9, total_blocks=3, blocks=(1, 2), neurons=(40, 20), heads=(4, 4), neuron_block=1
)


def scores(seed: int = 0, scale: float = 1.0) -> list[Scores]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Scores(torch.rand(3, neurons, generator=generator) * factor, torch.rand(3, heads, generator=generator))
        for neurons, heads, factor in zip(LAYOUT.neurons, LAYOUT.heads, (scale, 1.0))
    ]


@pytest.mark.parametrize(
    ("fields", "neurons", "heads"),
    [
        ({"keep_neurons": 0.5, "keep_heads": 0.5}, (20, 10), (2, 2)),
        ({"keep_neurons": 0.01, "keep_heads": 0.01}, (1, 1), (1, 1)),  # never none
        ({"keep_neurons": 1.0, "keep_heads": 1.0}, (40, 20), (4, 4)),
        ({"keep_neurons": [0.25, 0.5], "keep_heads": 1}, (10, 10), (4, 4)),
        ({"keep_neurons": by_block(LAYOUT, {2: 0.1}, otherwise=0.5)}, (20, 2), (4, 4)),
    ],
)
def test_counts(fields: dict[str, Any], neurons: tuple[int, ...], heads: tuple[int, ...]) -> None:
    selection = Selection(**fields)
    assert selection.kept(LAYOUT, "neurons") == neurons
    assert selection.kept(LAYOUT, "heads") == heads
    for position, found in enumerate(scores()):
        masks = selection.choose(LAYOUT, position, found)
        for mask, count, total in zip(masks, (neurons[position], heads[position]), (LAYOUT.neurons[position], 4)):
            assert mask is None if count == total else mask.sum(-1).tolist() == [count] * 3


def test_the_largest_are_kept_and_ties_do_not_add_any() -> None:
    assert top(torch.tensor([0.1, 3.0, -2.0, 3.0, 1.0]), 2).tolist() == [False, True, False, True, False]
    assert top(torch.ones(2, 9), 4).sum(-1).tolist() == [4, 4]


def test_global_keeps_the_share_over_all_blocks() -> None:
    masks = Selection(keep_neurons=0.5, keep_heads=0.5, mode="global").choose_all(scores(), torch.ones(2, 2))
    assert torch.cat([mask.neurons for mask in masks], -1).sum(-1).tolist() == [30] * 3
    assert torch.cat([mask.heads for mask in masks], -1).sum(-1).tolist() == [4] * 3
    assert len({int(count) for count in masks[0].neurons.sum(-1)}) > 1  # and not always the same in one block


def test_global_leaves_every_block_its_floor() -> None:
    masks = Selection(keep_neurons=0.5, keep_heads=1.0, mode="global", floor=0.2).choose_all(
        scores(scale=1e-6), torch.ones(2, 2)
    )
    assert masks[0].neurons.sum(-1).tolist() == [10] * 3  # 30 are kept, of which block 2 has only 20
    masks = Selection(keep_neurons=0.3, keep_heads=1.0, mode="global", floor=0.2).choose_all(
        scores(scale=1e-6), torch.ones(2, 2)
    )
    assert masks[0].neurons.sum(-1).tolist() == [8] * 3


def test_raw_scores_are_scaled_back() -> None:
    scales = torch.tensor([[1000.0, 1.0], [1.0, 1.0]])
    fields: dict[str, Any] = {"keep_neurons": 0.5, "keep_heads": 1.0, "mode": "global", "floor": 0.1}
    raw = Selection(**fields, scaled=False).choose_all(scores(), scales)
    scaled = Selection(**fields).choose_all(scores(), scales)
    assert raw[1].neurons.sum(-1).tolist() == [2] * 3
    assert all(count > 2 for count in scaled[1].neurons.sum(-1).tolist())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"keep_neurons": 0}, ("keep_neurons=0", "above 0")),
        ({"keep_heads": 1.5}, ("keep_heads=1.5", "below 1")),
        ({"keep_neurons": True}, ("keep_neurons=True",)),
        ({"keep_neurons": [0.5, 2]}, ("keep_neurons=2",)),
        ({"mode": "globl"}, ("Did you mean 'global'?",)),
        ({"mode": "global", "keep_neurons": [0.5, 0.5]}, ("one share for all blocks",)),
        ({"mode": "global", "keep_neurons": 0.1, "floor": 0.2}, ("floor=0.2", "keep_neurons=0.1")),
        ({"floor": 1}, ("floor=1",)),
    ],
)
def test_what_is_wrong_is_refused(fields: dict[str, Any], said: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        Selection(**fields)
    assert all(part in str(caught.value) for part in said)


def test_shares_have_to_fit_the_blocks() -> None:
    with pytest.raises(ConfigError, match="3 shares, 2 blocks skip"):
        Selection(keep_neurons=(0.5, 0.5, 0.5)).kept(LAYOUT, "neurons")
    with pytest.raises(ConfigError, match=r"blocks \[0\] skip nothing"):
        by_block(LAYOUT, {0: 0.5}, 0.5)


def test_selections_come_back_from_json() -> None:
    selection = Selection(keep_neurons=(0.5, 0.25), keep_heads=0.5)
    assert Selection.from_dict(selection.to_dict()) == selection
