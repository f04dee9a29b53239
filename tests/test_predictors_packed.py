"""Predictors on models that run on sparse kernels: what is left out is not read from the packed matrices, and nothing is lost."""

import copy
import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import token_rows
from predictor_cases import FAMILIES, lively, small_llama
from test_predictors_gathered import SETTINGS, decoded
from test_predictors_masked import HALF, logits, untrained
from transformers import DynamicCache

import hf_sparse
from hf_sparse import PredictorConfig, SparsityConfig, prune_, use_dense_kernels_, use_sparse_kernels_
from hf_sparse.contextual import attach_, carried_by, detach
from hf_sparse.errors import KernelError, ModelError
from hf_sparse.predictors import gathered as ways
from hf_sparse.predictors.gathered import gathered
from hf_sparse.predictors.masked import masked
from hf_sparse.predictors.saving import Saved, print_of
from hf_sparse.predictors.units import module_of
from hf_sparse.runtime import sparse_modules
from hf_sparse.runtime.forms import ArrangedForm, PackedForm
from hf_sparse.runtime.modules import hold_form
from hf_sparse.runtime.row_forms import RowsForm

CONFIG = PredictorConfig(keep_neurons=0.5, keep_heads=0.5, neuron_block=16)


@pytest.fixture(autouse=True)
def _small_projections_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "LEAST_WEIGHTS", 0)


def wide(family: str) -> Any:
    """Of sizes that fill stripes of 16 rows, heads too."""
    name, sizes, _ = FAMILIES[family]
    sizes = sizes | {"hidden_size": 64} | ({"word_embed_proj_dim": 64} if family == "opt" else {"head_dim": 16})
    torch.manual_seed(0)
    return lively(getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes)))


def packed(model: Any, pattern: str = "2:4", dtype: torch.dtype = torch.bfloat16) -> Any:
    sizes: dict[str, Any] = {"pattern": pattern} if ":" in pattern else {"pattern": pattern, "sparsity": 0.5}
    prune_(model.bfloat16(), SparsityConfig(metric="magnitude", **sizes))
    table = use_sparse_kernels_(model.to(dtype), choose="always", round_weights=True)
    assert len(table.sparse) == len(table.rows)
    return model


def held_forms(model: Any) -> list[Any]:
    return [form for _, module in sparse_modules(model) for form in module._held.values()]


def forms(model: Any) -> dict[str, type]:
    return {name: type(form) for name, module in sparse_modules(model) for form in module._held.values()}


@pytest.mark.parametrize("pattern", ["2:4", pytest.param("unstructured", marks=pytest.mark.slow)])
@pytest.mark.parametrize("neuron_block", [1, 16])
@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "shadow"), ("llama", "gate_first"), ("qwen2", "shadow"), ("phi3", "shadow"), ("phi3", "gate_first"), ("opt", "dejavu")],
)  # fmt: skip
def test_packed_is_masked_to_rounding(family: str, kind: str, neuron_block: int, pattern: str, tmp_path: Path) -> None:
    """In float32, in which the products with bfloat16 weights are exact but for the order of sums."""
    model, rows = packed(wide(family), pattern, torch.float32), token_rows(2, 9, seed=5)
    predictor = untrained(model, tmp_path, kind, neuron_block=neuron_block)
    dense, before = decoded(model, rows), forms(model)
    with masked(model, predictor, HALF):
        expected = decoded(model, rows)
    with gathered(model, predictor, HALF) as running:
        torch.testing.assert_close(decoded(model, rows), expected, rtol=1e-4, atol=1e-4)
        assert set(running._rows) == {(at, of) for at in (0, 1) for of in ("neurons", "heads")}
    assert (expected - dense).abs().mean() > 1e-2 * dense.abs().mean()
    assert forms(model) == before
    assert torch.equal(decoded(model, rows), dense)


def test_in_bfloat16_and_several_threads(tmp_path: Path) -> None:
    model, rows = packed(small_llama()), token_rows(2, 9, seed=5)
    predictor, dense = untrained(model, tmp_path, neuron_block=16), decoded(model, rows)
    with masked(model, predictor, HALF):
        expected = decoded(model, rows)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with gathered(model, predictor, HALF):
            found = decoded(model, rows)
    finally:
        torch.set_num_threads(threads)
    assert (found - expected).abs().mean() < 0.25 * (dense - expected).abs().mean()


@pytest.mark.parametrize("neuron_block", [1, 16])
def test_what_is_left_out_is_not_read(neuron_block: int, tmp_path: Path) -> None:
    """Not a number in all values of it changes nothing."""
    model, rows = packed(small_llama(), "unstructured"), token_rows(1, 6, seed=5)
    predictor = untrained(model, tmp_path, "static", neuron_block=neuron_block)
    cache = DynamicCache(config=model.config)
    with gathered(model, predictor, HALF) as running:
        logits(model, rows[:, :5], past_key_values=cache)
        expected = logits(model, rows[:, 5:], past_key_values=cache)
        cache.crop(-1)
        for position, block in enumerate(running.units):
            kept = {kind: set(running._rows[position, kind].indices[0].tolist()) for kind in ("neurons", "heads")}
            for site, kind in (
                (block.up, "neurons"),
                (block.gate, "neurons"),
                (block.down, "neurons"),
                (block.o, "heads"),
            ):
                spoil(module_of(model, site)._held["weight"], kept[kind])
            spoil(running.attentions[position].q._held["weight"], kept["heads"])
        assert torch.equal(logits(model, rows[:, 5:], past_key_values=cache), expected)
    assert logits(model, rows).isnan().all()


def spoil(form: Any, kept: set[int]) -> None:
    """In stripes whole ones only."""
    if isinstance(form, RowsForm):
        starts, values, step = form.rows.starts.tolist(), form.rows.values, 1
    else:
        starts, values, step = form.packed.offsets.tolist(), form.packed.values, 16
    for at, (start, end) in enumerate(pairwise(starts)):
        if not kept & set(range(at * step, (at + 1) * step)):
            values[start:end] = float("nan")


def test_no_dense_copies_stay(tmp_path: Path) -> None:
    model = packed(wide("llama"))
    before = sum(buffer.nbytes for buffer in model.buffers())
    with gathered(model, untrained(model, tmp_path, neuron_block=16), HALF) as running:
        kinds = forms(model)
        held = sum(buffer.nbytes for buffer in model.buffers())
        assert held < before + 8 * sum(
            form.shape[0] + form.shape[1] for form in held_forms(model)
        )  # where each row begins
        assert len({name for name, kind in kinds.items() if kind is RowsForm}) == 2 * len(running.units)
        assert all(kind is PackedForm for name, kind in kinds.items() if "up" in name or "gate" in name)
        assert sum(parameter.numel() for parameter in model.model.layers[1].mlp.parameters()) == 0


# ------------------------------------------------------------------------------------------------ carried by models


def carrying(folder: Path, model: Any) -> Any:
    """The same predictor for all."""
    predictor = untrained(pruned(), folder, neuron_block=16)
    attach_(model, Saved(predictor=predictor, config=CONFIG, trained_on=print_of(pruned(), predictor)))
    return model


def told(model: Any) -> torch.Tensor:
    return model.generate(
        token_rows(2, 5, seed=2), output_scores=True, return_dict_in_generate=True, **SETTINGS
    ).scores[-1]


def pruned() -> Any:
    model = small_llama()
    rotary = copy.deepcopy(model.model.rotary_emb)
    model.bfloat16().model.rotary_emb = rotary  # which a model that is loaded in bfloat16 has in float32
    prune_(model, SparsityConfig(metric="magnitude", pattern="2:4"))
    return model


def skips(model: Any) -> bool:
    return "forward" in model.model.layers[1].mlp.down_proj.__dict__ and RowsForm in forms(model).values()


def before(folder: Path) -> Any:
    model = carrying(folder, pruned())
    use_sparse_kernels_(model, choose="always")
    return model


def after(folder: Path) -> Any:
    model = pruned()
    use_sparse_kernels_(model, choose="always")
    return carrying(folder, model)


def loaded(folder: Path, sparse_format: str = "bitmask") -> Any:
    model = carrying(folder / "traces", pruned())
    model.save_pretrained(folder / "saved", sparse_format=sparse_format)
    return type(model).from_pretrained(folder / "saved", dtype=torch.bfloat16, use_sparse_kernels={"choose": "always"})


WAYS: list[Callable[[Path], Any]] = [before, after, loaded]


@pytest.mark.parametrize("way", WAYS)
def test_attached_before_or_after_or_loaded(
    way: Callable[[Path], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("transformers").propagate = True
    plain = pruned()
    use_sparse_kernels_(plain, choose="always")
    dense = told(plain)
    with caplog.at_level(logging.WARNING):
        model = way(tmp_path)
    assert "save no time" not in caplog.text
    assert skips(model)
    expected = told(after(tmp_path / "again"))
    assert not torch.allclose(expected, dense)
    assert torch.equal(told(model), expected)
    with hf_sparse.predictors_disabled(model):
        assert set(forms(model).values()) == {PackedForm}
        assert torch.equal(told(model), dense)
    assert torch.equal(told(model), expected)
    use_dense_kernels_(model)
    assert not forms(model)
    assert "forward" in model.model.layers[1].mlp.down_proj.__dict__
    assert (told(model) - expected).abs().mean() < 0.25 * (dense - expected).abs().mean()
    detach(model)
    for (name, found), wanted in zip(model.named_parameters(), pruned().parameters()):
        assert torch.equal(found, wanted), name


def test_kernels_that_come_while_predictors_are_disabled(tmp_path: Path) -> None:
    model = carrying(tmp_path, pruned())
    with hf_sparse.predictors_disabled(model):
        use_sparse_kernels_(model, choose="always")
        assert not skips(model)
    assert skips(model)


@pytest.mark.parametrize("sparse_format", ["dense", "bitmask"])
def test_nothing_is_lost_in_saving(sparse_format: str, tmp_path: Path) -> None:
    model = after(tmp_path / "traces")
    model.save_pretrained(tmp_path / "saved", sparse_format=sparse_format)
    other = type(model).from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    for (name, found), wanted in zip(other.named_parameters(), pruned().parameters()):
        assert torch.equal(found, wanted), name
    assert carried_by(other) is not None
    for name, saved in carried_by(model).predictor.state_dict().items():
        assert torch.equal(carried_by(other).predictor.state_dict()[name], saved)
    with hf_sparse.predictors_disabled(model), hf_sparse.predictors_disabled(other):
        for name, weight in model.state_dict().items():
            assert torch.equal(torch.as_tensor(weight), other.state_dict()[name])


def test_a_copy_skips_by_itself(tmp_path: Path) -> None:
    model = after(tmp_path)
    expected, other = told(model), copy.deepcopy(model)
    detach(model)
    assert skips(other)
    assert set(forms(model).values()) == {PackedForm}
    assert torch.equal(told(other), expected)


def test_weights_can_be_loaded_meanwhile(tmp_path: Path) -> None:
    model, other = after(tmp_path), pruned()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-1)
    model.load_state_dict(other.state_dict())
    assert skips(model)
    detach(model)
    assert torch.equal(logits(use_dense_kernels_(model), token_rows(1, 5)), logits(other, token_rows(1, 5)))


# ------------------------------------------------------------------------------------------------ refused


def test_kernels_do_not_change_inside_a_with(tmp_path: Path) -> None:
    model = packed(small_llama())
    with gathered(model, untrained(model, tmp_path), HALF):
        for change in (use_dense_kernels_, use_sparse_kernels_):
            with pytest.raises(ModelError, match="leave the `with`"):
                change(model)


def test_forms_without_rows_are_refused(tmp_path: Path) -> None:
    model = packed(small_llama())
    predictor, up = untrained(model, tmp_path), model.model.layers[1].mlp.up_proj
    hold_form(up, "weight", ArrangedForm(hf_sparse.native.arrange(up._form.unpack())))
    with pytest.raises(ModelError, match="held as arranged"), gathered(model, predictor, HALF):
        pass


def test_rows_are_not_traced(tmp_path: Path) -> None:
    model = packed(small_llama())
    with gathered(model, untrained(model, tmp_path), HALF):
        form = model.model.layers[1].mlp.down_proj._form
        for use in (lambda: form.traced_product(torch.ones(1, form.shape[1]), None), form.traced_unpack):
            with pytest.raises(KernelError, match="predictors_disabled"):
                use()
