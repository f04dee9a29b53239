"""Models carry predictors: trained for them, on when tokens are generated, saved, pushed, loaded, copied and switched off."""

import copy
import gc
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub.client import Hub
from models import gpt2, llama, mixtral, phi3, token_rows
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import PredictorConfig, SparsityConfig
from hf_sparse.contextual import attach_, carried_by, detach, train_predictors_
from hf_sparse.errors import CalibrationError, CheckpointError, ConfigError, ModelError
from hf_sparse.predictors.masked import runs_now
from hf_sparse.predictors.saving import FILE

TEXT = token_rows(24, 16)
QUICK = {"training": {"epochs": 2, "batch_size": 64}}
SMALL = PredictorConfig(keep_neurons=0.5, keep_heads=0.5, neuron_block=1, options=QUICK)
MODELS: dict[str, Callable[[], Any]] = {"llama": llama, "phi3": phi3, "gpt2": gpt2}


def carrying(name: str = "llama", config: PredictorConfig = SMALL) -> Any:
    model = MODELS[name]()
    train_predictors_(model, config, TEXT, num_samples=16, sequence_length=16)
    return model


def tokens(model: Any) -> torch.Tensor:
    rows = TEXT[:2, :6]
    settings: dict[str, Any] = {
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(rows),
    }
    return model.generate(rows, output_scores=True, return_dict_in_generate=True, **settings).scores[-1]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["shadow", "dejavu", "static"])
def test_on_and_off(name: str, kind: str) -> None:
    dense = tokens(MODELS[name]())
    model = carrying(name, PredictorConfig(kind=kind, keep_neurons=0.25, keep_heads=0.5, neuron_block=1, options=QUICK))
    assert not torch.allclose(tokens(model), dense)
    with hf_sparse.predictors_disabled(model):
        assert torch.equal(tokens(model), dense)
    assert not torch.allclose(tokens(model), dense)
    detach(model)
    assert torch.equal(tokens(model), dense)
    assert not hasattr(model.config, "hf_sparse_predictors")


def test_what_is_left_out_is_not_computed_where_the_modules_allow_it(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        model = carrying()
        assert "forward" in model.model.layers[1].mlp.up_proj.__dict__
        assert "save no time" not in caplog.text
        carrying("gpt2")  # Conv1D keeps its weights the other way round
    assert "save no time" in caplog.text


def test_gate_first_on_gated_models() -> None:
    model = carrying(config=PredictorConfig(kind="gate_first", keep_neurons=0.25, neuron_block=1, options=QUICK))
    assert not torch.allclose(tokens(model), tokens(llama()))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("format", ["dense", "bitmask"])
def test_saved_and_loaded(name: str, format: str, tmp_path: Path) -> None:
    model = carrying(name)
    if format == "bitmask":
        hf_sparse.prune_(model, SparsityConfig(pattern="2:4", metric="magnitude"))
        train_predictors_(model, SMALL, TEXT, num_samples=16, sequence_length=16)
    model.save_pretrained(tmp_path, sparse_format=format)
    loaded, told = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not told["unexpected_keys"]
    assert torch.equal(tokens(loaded), tokens(model))
    assert carried_by(loaded).config == SMALL
    # A model without predictors takes them from the folder.
    detach(loaded)
    loaded.save_pretrained(tmp_path)
    assert not (tmp_path / FILE).exists()
    assert carried_by(type(model).from_pretrained(tmp_path)) is None


def test_without_hf_sparse_the_model_is_dense(tmp_path: Path) -> None:
    model = carrying()
    model.save_pretrained(tmp_path)
    detach(model)
    torch.save(tokens(model), tmp_path / "expected.pt")
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
rows = torch.load({str(tmp_path / "rows.pt")!r})
found = model.generate(rows, output_scores=True, return_dict_in_generate=True, max_new_tokens=8, do_sample=False, pad_token_id=0,
                       attention_mask=torch.ones_like(rows)).scores[-1]
assert torch.equal(found, torch.load({str(tmp_path / "expected.pt")!r}))
assert "hf_sparse" not in sys.modules
"""
    torch.save(TEXT[:2, :6].clone(), tmp_path / "rows.pt")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)


def test_pushed_and_loaded(hub: Hub) -> None:
    model = carrying()
    model.push_to_hub("user/contextual")
    assert FILE in hub.files("user/contextual")
    assert torch.equal(tokens(AutoModelForCausalLM.from_pretrained("user/contextual")), tokens(model))


def test_pruned_and_trained_while_loading(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    config = SparsityConfig(
        pattern="2:4", metric="magnitude", calibration=TEXT, num_samples=16, sequence_length=16, predictor=SMALL
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path, sparsity_config=config)
    assert hf_sparse.report(model).sparsity == 0.5
    assert carried_by(model).config == SMALL
    assert SparsityConfig.from_dict(config.to_dict() | {"calibration": None}).predictor == SMALL


def test_predictors_that_are_stale_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = carrying()
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)  # another number format is no other weights
        assert "other weights" not in caplog.text
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.add_(0.1)
        model.save_pretrained(tmp_path)
        logging.getLogger("transformers").propagate = True
        assert carried_by(type(model).from_pretrained(tmp_path)) is not None
    assert "other weights" in caplog.text


def test_pruning_makes_predictors_stale_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = carrying()
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        hf_sparse.prune_(model, SparsityConfig(pattern="2:4", metric="magnitude"))
    assert "the predictors that the model carries were trained on other weights" in caplog.text
    assert carried_by(model) is not None


def test_a_copy_has_predictors_of_its_own() -> None:
    model = carrying()
    expected = tokens(model)
    other = copy.deepcopy(model)
    assert carried_by(other).predictor is not carried_by(model).predictor
    detach(model)
    assert torch.equal(tokens(other), expected)
    assert torch.equal(tokens(model), tokens(llama()))


def test_switched_off_twice_stays_off_until_the_first_ends() -> None:
    model = carrying()
    with hf_sparse.predictors_disabled(model):
        with hf_sparse.predictors_disabled(model):
            pass
        assert not runs_now(model)
    assert runs_now(model) == "gathered"


@pytest.mark.parametrize(
    ("make", "kind", "fields", "said"),
    [
        (lambda: llama(layers=3), "dejavu", {"selection": "global"}, "all blocks at once"),
        (gpt2, "gate_first", {}, "gated feed-forwards"),
        (llama, "shadow", {"options": {"tells": ["heads"]}}, "tells neurons"),
    ],
)
def test_choices_that_cannot_be_made_are_refused_before_anything_is_trained(
    make: Callable[[], Any], kind: str, fields: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    train_predictors_(model, SMALL, TEXT, num_samples=16, sequence_length=16)
    before = carried_by(model)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("hf_sparse.contextual.record", never)
    with pytest.raises((ConfigError, ModelError), match=said):
        train_predictors_(model, PredictorConfig(kind=kind, **fields), TEXT)
    assert carried_by(model) is before


def test_predictors_that_cannot_be_used_leave_those_that_were_there(tmp_path: Path) -> None:
    model, other = carrying(), llama(intermediate_size=64)
    train_predictors_(other, SMALL, TEXT, num_samples=16, sequence_length=16)
    before = carried_by(model).predictor
    with pytest.raises(ModelError, match="another model"):
        attach_(model, carried_by(other))
    assert carried_by(model).predictor is before
    assert runs_now(model) == "gathered"
    model.save_pretrained(tmp_path)
    assert carried_by(AutoModelForCausalLM.from_pretrained(tmp_path)) is not None


def test_a_model_that_is_thrown_away_lets_its_weights_be() -> None:
    """What runs while garbage is collected may find half of the model gone."""
    model = carrying()
    weight = model.model.layers[1].mlp.down_proj.weight
    laid = weight.stride()
    assert laid == (1, weight.shape[0])  # column after column
    del model
    gc.collect()
    assert weight.stride() == laid


def test_what_cannot_be() -> None:
    model = carrying()
    with pytest.raises(ModelError, match="training mode"):
        model.train()(TEXT)
    model.eval()
    with pytest.raises(ConfigError, match="oracle"):
        train_predictors_(model, PredictorConfig(kind="oracle"), TEXT)
    with pytest.raises(ModelError, match="carries no predictors"), hf_sparse.predictors_disabled(llama()):
        pass
    with pytest.raises(ModelError, match="expert"):
        train_predictors_(mixtral(), SMALL, TEXT)
    with pytest.raises(CalibrationError, match="calibration"):
        SparsityConfig(pattern="2:4", metric="magnitude", predictor=SMALL).check_calibration()


def test_predictors_of_another_model_are_refused(tmp_path: Path) -> None:
    carrying().save_pretrained(tmp_path / "one")
    other = llama(intermediate_size=64)
    train_predictors_(other, SMALL, TEXT, num_samples=16, sequence_length=16)
    other.save_pretrained(tmp_path / "two")
    (tmp_path / "two" / FILE).write_bytes((tmp_path / "one" / FILE).read_bytes())
    with pytest.raises(ModelError, match="another model"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "two")


@pytest.mark.parametrize(
    "content", [b"", b"no file of tensors", b"\x08\0\0\0\0\0\0\0{}      "], ids=["empty", "text", "no header"]
)
def test_a_damaged_file_is_told(content: bytes, tmp_path: Path) -> None:
    carrying().save_pretrained(tmp_path)
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match="predictors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_missing_file_leaves_the_model_dense(tmp_path: Path) -> None:
    carrying().save_pretrained(tmp_path)
    (tmp_path / FILE).unlink()
    assert torch.equal(tokens(AutoModelForCausalLM.from_pretrained(tmp_path)), tokens(llama()))
