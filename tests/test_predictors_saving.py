"""The file of predictors: what it tells, what is refused before memory is taken, figures and tokenizers that go with it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import llama, token_rows, tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_sparse import PredictorConfig
from hf_sparse.contextual import carried_by, train_predictors_
from hf_sparse.errors import CalibrationError, CheckpointError, ModelError
from hf_sparse.predictors.distill import distill
from hf_sparse.predictors.evaluate import evaluate_predictors
from hf_sparse.predictors.figures import Figure, measured_again, read_figures
from hf_sparse.predictors.learned import Learned, print_of_tokenizer
from hf_sparse.predictors.recording import record
from hf_sparse.predictors.saving import FILE, _read, put_figures, read_about, save
from hf_sparse.predictors.select import Selection
from hf_sparse.predictors.train import train

pytestmark = pytest.mark.usefixtures("little_garbage")
TEXTS = ["the cat sat on a mat and the dog ran on a mat and sat"] * 12
CONFIG = PredictorConfig(keep_neurons=0.5, neuron_block=1, options={"training": {"epochs": 1, "batch_size": 64}})
FIGURE = Figure(
    neurons="50 %", heads="100 %", text="other.txt", fingerprint="0" * 16, window=16, tokens=60, dense=2.0, loss=2.5,
    recall_neurons=0.7, dense_speed=10.0, speed=15.0, share_of_time=0.04, machine="a machine", versions="torch 2",
)  # fmt: skip


def other_tokenizer() -> Any:
    found = tokenizer()
    found.add_tokens(["zebra"])
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = llama()
    train_predictors_(model, CONFIG, TEXTS, tokenizer=tokenizer(), num_samples=8, sequence_length=12)
    model.save_pretrained(tmp_path)
    return tmp_path


def with_header(folder: Path, change: Any) -> None:
    file = folder / FILE
    header = _read(file)[1]
    change(header)
    save_file(load_file(file), file, {"hf_sparse_predictors": json.dumps(header)})


def test_what_the_header_tells(folder: Path) -> None:
    about = read_about(folder / FILE)
    assert about.config == CONFIG
    assert about.learned is not None
    assert about.learned.tokenizer == print_of_tokenizer(tokenizer())
    assert about.learned.tokens == 96
    assert about.weights == sum(tensor.numel() for tensor in load_file(folder / FILE).values())
    assert about.figures == []


def test_figures_stay_with_the_predictors(folder: Path, tmp_path: Path) -> None:
    put_figures(AutoModelForCausalLM.from_pretrained(folder), folder, [FIGURE])
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert carried_by(loaded).figures == [FIGURE]
    loaded.save_pretrained(tmp_path / "again")
    assert read_about(tmp_path / "again" / FILE).figures == [FIGURE]
    assert not list(folder.glob(".*partial"))


def test_a_later_figure_takes_the_place_of_an_earlier_one() -> None:
    later = Figure(**{**FIGURE.to_dict(), "loss": 2.4})
    other = Figure(**{**FIGURE.to_dict(), "neurons": "75 %"})
    assert measured_again([FIGURE, other], [later]) == [other, later]
    assert later.rise == pytest.approx(0.4)
    assert read_figures([FIGURE.to_dict()]) == [FIGURE]


@pytest.mark.parametrize(
    "change",
    [
        {"loss": "low"}, {"loss": float("nan")}, {"tokens": 1.5}, {"tokens": True}, {"speed": "fast"}, {"text": None}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_figures_that_are_none_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="measure again"):
        read_figures([{**FIGURE.to_dict(), **change}])


def test_a_file_without_the_newer_fields_is_read(folder: Path) -> None:
    def older(header: dict[str, Any]) -> None:
        del header["figures"], header["predictor"]["learned"]

    with_header(folder, older)
    assert carried_by(AutoModelForCausalLM.from_pretrained(folder)).predictor.learned is None


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda header: header["predictor"]["layout"].update(neurons=[10**12]), ModelError, "another model"),
        (lambda header: header["predictor"]["options"].update(rank=10**12), CheckpointError, "rank"),
        (lambda header: header["predictor"]["options"].update(rank=7), CheckpointError, "rank"),
        (lambda header: header["predictor"]["layout"].update(neuron_block=0), CheckpointError, "neuron_block"),
        (
            lambda header: header["predictor"]["layout"].update(total_blocks=10**12),
            CheckpointError,
            "at most 10000 blocks",
        ),
        (lambda header: header["config"].update(refresh_every=10**200), CheckpointError, "refresh_every"),
        (lambda header: header["predictor"].update(learned={"source": 3}), CheckpointError, "learned"),
        (lambda header: header.update(figures={}), CheckpointError, "figures"),
    ],
    ids=["layout", "rank", "other rank", "neuron_block", "total_blocks", "refresh_every", "learned", "figures"],
)
def test_headers_are_not_trusted(change: Any, error: type[Exception], said: str, folder: Path) -> None:
    with_header(folder, change)
    with pytest.raises(error, match=said):
        AutoModelForCausalLM.from_pretrained(folder)


def test_predictors_that_were_stale_when_saved_are_stale_when_loaded(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    trained_on = carried_by(model).trained_on
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.add_(0.1)
    model.save_pretrained(tmp_path / "changed")
    assert carried_by(AutoModelForCausalLM.from_pretrained(tmp_path / "changed")).trained_on == trained_on


def test_a_write_that_breaks_off_leaves_the_file_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / FILE).read_bytes()
    saved = carried_by(AutoModelForCausalLM.from_pretrained(folder))

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("hf_sparse.predictors.saving.os.replace", full)
    with pytest.raises(OSError, match="no space"):
        save(saved, folder)
    assert (folder / FILE).read_bytes() == before
    assert not list(folder.glob(".*partial"))


# ------------------------------------------------------------------------------------------------ tokenizers


def test_traces_in_other_tokens_are_refused(tmp_path: Path) -> None:
    model = llama()
    traces = record(model, TEXTS, tmp_path, tokenizer=tokenizer(), num_samples=8, sequence_length=12)
    assert traces.about.tokenizer == print_of_tokenizer(tokenizer()) != print_of_tokenizer(other_tokenizer())
    with pytest.raises(CalibrationError, match="another tokenizer"):
        train(model, traces, "static", tokenizer=other_tokenizer())
    predictor = train(model, traces, "static", tokenizer=tokenizer())
    half = [Selection(keep_neurons=0.5)]
    with pytest.raises(CalibrationError, match="another tokenizer"):
        evaluate_predictors(model, {"static": [predictor]}, TEXTS[:3], half, tokenizer=other_tokenizer(), window=8)
    shadow = train(model, traces, "shadow", rank=8)
    with pytest.raises(CalibrationError, match="another tokenizer"):
        distill(model, shadow, TEXTS[:3], tokenizer=other_tokenizer(), sequence_length=8)


def test_token_ids_name_no_tokenizer(tmp_path: Path) -> None:
    traces = record(llama(), token_rows(4, 12), tmp_path)
    assert traces.about.tokenizer is None
    assert traces.learned == Learned(
        source=traces.about.source, fingerprint=traces.about.fingerprint, tokens=48, tokenizer=None
    )
    train(llama(), traces, "static", tokenizer=tokenizer())
