"""Calls that stop before products and go on together give exactly what the block gives alone."""

import contextlib
from typing import Any

import pytest
import torch
from families_table import FAMILIES
from models import llama, token_rows
from torch.utils._pytree import tree_leaves

from hf_sparse import SparsityConfig, prune_, warning_handler
from hf_sparse.calibrate import ready
from hf_sparse.families import find_sites
from hf_sparse.forwards import walk
from hf_sparse.lockstep import Lockstep
from hf_sparse.observe import Operand, operand_of

FEW = ["llama", "gemma3_text", "mixtral", "gpt2", "t5", "bart", "swin", "llava", "whisper", "phi3"]


def nothing(*given: Any) -> None:
    """What is made does not matter."""


@pytest.mark.parametrize("family", FEW)
def test_stopping_at_every_product_leaves_the_output_as_it_is(family: str) -> None:
    model, inputs = FAMILIES[family].build()
    inventory = find_sites(model)
    outputs: dict[int, Any] = {}
    stopped = 0

    def run(number: int) -> Any:
        return lambda: outputs.__setitem__(number, model(**inputs))

    with ready(model):
        expected = model(**inputs)
        for calls in walk(inventory.blocks, [run(0), run(1), run(2)]):
            sites = inventory.sites.get(calls[0].block.index, [])
            stops = {operand_of(site) for site in sites}
            lockstep = Lockstep(model, sites, stops, nothing, None)
            lockstep.start(calls)
            while lockstep.waiting:
                stopped += 1
                lockstep.go_on({lockstep.waiting[0].operand})
    assert stopped or not any(operand_of(site).expert is None for site in inventory.all())
    for output in outputs.values():
        for one, other in zip(tree_leaves(dict(output)), tree_leaves(dict(expected)), strict=True):
            if isinstance(one, torch.Tensor):
                assert torch.equal(one, other)


def test_a_weight_that_changes_while_calls_wait_is_used_by_the_product_they_wait_for() -> None:
    model, rows = llama(layers=1), token_rows(4)
    down = model.model.layers[0].mlp.down_proj.weight
    inventory = find_sites(model)
    sites = inventory.sites[0]
    stop = next(operand_of(site) for site in sites if site.role == "down")
    with ready(model):
        old = down.clone()
        down.zero_()
        expected = model(rows).logits
        down.copy_(old)
        found: list[Any] = []
        for calls in walk(inventory.blocks, [lambda: found.append(model(rows).logits)]):
            lockstep = Lockstep(model, sites, {stop}, nothing, None)
            lockstep.start(calls)
            assert [arrival.operand for arrival in lockstep.waiting] == [stop]
            assert lockstep.waiting[0].x.shape == (4, 16, 48)
            down.zero_()
            lockstep.go_on({stop})
    assert torch.equal(found[0], expected)


def test_products_are_told_with_their_call_and_input() -> None:
    model, rows = llama(layers=1), token_rows(2)
    inventory = find_sites(model)
    seen: list[tuple[int, Operand]] = []
    with ready(model):
        for calls in walk(inventory.blocks, [lambda: model(rows), lambda: model(rows)]):
            lockstep = Lockstep(
                model,
                inventory.sites[0],
                set(),
                lambda call, operand, x, product: seen.append((call.batch, operand)),
                None,
            )
            lockstep.start(calls)
            assert not lockstep.waiting
    assert len(seen) == 2 * 7
    assert [batch for batch, _ in seen] == [0] * 7 + [1] * 7


def test_closing_ends_the_calls_where_they_are() -> None:
    model, rows = llama(layers=2), token_rows(2)
    inventory = find_sites(model)
    reached: list[str] = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: reached.append("mlp"))
    with ready(model), contextlib.closing(walk(inventory.blocks, [lambda: model(rows)])) as turns:
        calls = next(turns)
        sites = inventory.sites[0]
        lockstep = Lockstep(model, sites, {operand_of(sites[0])}, nothing, None)
        lockstep.start(calls)
        assert lockstep.waiting
        lockstep.close()
        assert not lockstep.waiting
    handle.remove()
    assert not reached
    assert torch.isfinite(model(rows).logits).all()  # nothing is left hooked up


@pytest.mark.parametrize("batches", [1, 3])
def test_torchs_own_warnings_go_where_they_went_before(batches: int) -> None:
    """A pass that pauses inside of a function of torch must not leave the way that its warnings take pointing into its own stack."""
    before = warning_handler.present()
    rows = token_rows(2 * batches)
    config = SparsityConfig(metric="wanda", update="reconstruct", calibration=rows, num_samples=len(rows), batch_size=2,
                            options={"reconstruct": {"steps": 2}})  # fmt: skip
    prune_(llama(), config)
    assert warning_handler.present() == before
