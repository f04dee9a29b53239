"""Traces hold what a dense pass shows, within what float16 can tell, and say what they take."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from models import token_rows
from predictor_cases import made, small_llama, traced

from hf_sparse.calibrate import ready
from hf_sparse.errors import CalibrationError, CheckpointError, ModelError
from hf_sparse.predictors.criteria import Scores, criterion_of
from hf_sparse.predictors.layout import Layout
from hf_sparse.predictors.recording import record
from hf_sparse.predictors.traces import Traces, bytes_per_token
from hf_sparse.predictors.units import find_units, module_of
from hf_sparse.predictors.watch import Scorer
from hf_sparse.registry import CRITERIA


def truth(model: Any, criterion: str, rows: torch.Tensor) -> dict[int, Scores]:
    found: dict[int, Scores] = {}
    with ready(model):
        Scorer(model, find_units(model), criterion_of(criterion))({"input_ids": rows}, found.__setitem__)
    return found


@pytest.mark.parametrize("entry", list(CRITERIA), ids=lambda entry: entry.name)
def test_scores_are_those_of_a_dense_pass(entry: Any, tmp_path: Path) -> None:
    model, rows = small_llama(), token_rows(4, 10)
    traces = traced(model, tmp_path, rows, criterion=entry.name)
    labelled = any("gradient" in need for need in entry.needs)
    keep = (torch.arange(40) % 10 != 9) if labelled else torch.ones(40, dtype=torch.bool)
    assert len(traces) == int(keep.sum())
    for position, block in enumerate(traces.layout.blocks):
        scores = truth(model, entry.name, rows)[block]
        stored = torch.from_numpy(traces.scores(position)[:].astype("float32"))
        for at, part in enumerate(stored.split((48, 4), -1)):
            expected = scores[at][keep]
            torch.testing.assert_close(
                part * traces.stored_scales[position, at], expected, rtol=2e-3, atol=1e-4 * float(expected.mean())
            )
            mean = (traces.statistics.neurons, traces.statistics.heads)[at][position]
            torch.testing.assert_close(mean, expected.mean(0))


def test_inputs_are_the_hidden_states_before_a_block(tmp_path: Path) -> None:
    model, rows = small_llama(), token_rows(3, 8)
    traces = traced(model, tmp_path, rows, inputs=(0, 2))
    states = model(input_ids=rows, output_hidden_states=True).hidden_states
    for block in (0, 2):
        stored = torch.from_numpy(traces.inputs(block)[:].astype("float32"))
        torch.testing.assert_close(stored, states[block].flatten(0, 1).detach(), rtol=1e-3, atol=1e-3)
    with pytest.raises(CheckpointError, match=r"no input\.1; recorded inputs: \[0, 2\]"):
        traces.inputs(1)


def test_sequences_of_different_lengths_stay_together(tmp_path: Path) -> None:
    model = small_llama()
    rows = [{"input_ids": token_rows(1, length, seed=length)} for length in (5, 9, 5)]
    traces = traced(model, tmp_path, rows)
    lengths, start = traces.about.sequences, 0
    assert sorted(lengths) == [5, 5, 9]
    states = {row["input_ids"].shape[1]: model(input_ids=row["input_ids"], output_hidden_states=True) for row in rows}
    for length in lengths:
        stored = torch.from_numpy(traces.inputs(1)[start : start + length].astype("float32"))
        if length == 9:
            torch.testing.assert_close(stored, states[9].hidden_states[1][0].detach(), rtol=1e-3, atol=1e-3)
        start += length


def test_what_a_neuron_is_multiplied_by(tmp_path: Path) -> None:
    model, rows, seen = small_llama(), token_rows(4, 10), {}
    traces = traced(model, tmp_path, rows)
    block = find_units(model)[1]
    module_of(model, block.up).register_forward_hook(lambda module, args, product: seen.__setitem__("up", product))
    model(input_ids=rows)
    torch.testing.assert_close(traces.statistics.up[0], seen["up"].detach().flatten(0, 1).square().mean(0).sqrt())


def test_a_plain_feed_forward_has_no_such_thing(tmp_path: Path) -> None:
    assert traced(made("opt"), tmp_path).statistics.up == []


@pytest.mark.parametrize("neuron_block", [1, 16, 32])
def test_files_take_what_is_said(tmp_path: Path, neuron_block: int) -> None:
    traces = traced(small_llama(), tmp_path, token_rows(8, 32), neuron_block)
    each = bytes_per_token(traces.layout, traces.about.inputs)
    assert each == 2 * (2 * (-(-48 // neuron_block) + 4) + 2 * 32)
    arrays = [file for file in os.listdir(tmp_path) if file.endswith(".npy")]
    taken = sum((tmp_path / file).stat().st_size for file in arrays)
    assert taken == each * 256 + 128 * len(arrays)  # with the head of each file


def test_a_cap_is_kept_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        CalibrationError, match=r"128 tokens take 43008 bytes \(336 a token\), 20000 are allowed; take 59 tokens"
    ):
        traced(small_llama(), tmp_path / "traces", most_bytes=20000)
    assert not (tmp_path / "traces").exists()


def test_traces_of_another_model_or_tokenizer_are_refused(tmp_path: Path) -> None:
    traces = traced(small_llama(), tmp_path)
    with pytest.raises(ModelError, match="LlamaForCausalLM there, MistralForCausalLM here"):
        traces.layout.units(made("mistral"))
    other = small_llama()
    other.resize_token_embeddings(80)
    with pytest.raises(ModelError, match="vocabulary 64 there, 80 here"):
        traces.layout.units(other)


def test_tokens_that_the_model_does_not_know_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="another model's tokenizer"):
        traced(small_llama(), tmp_path, token_rows(2, 8) + 60)


@pytest.mark.parametrize("damage", ["missing", "unknown key", "no statistics"])
def test_a_damaged_folder_is_refused(tmp_path: Path, damage: str) -> None:
    traced(small_llama(), tmp_path)
    if damage == "missing":
        (tmp_path / "traces.json").unlink()
    elif damage == "no statistics":
        (tmp_path / "statistics.safetensors").unlink()
    else:
        fields = json.loads((tmp_path / "traces.json").read_text())
        (tmp_path / "traces.json").write_text(json.dumps({**fields, "surprise": 1}))
    with pytest.raises(CheckpointError, match="record them anew"):
        Traces(tmp_path)


def test_labels_given_decide_what_is_recorded(tmp_path: Path) -> None:
    rows = [{"input_ids": token_rows(1, 8), "labels": torch.tensor([[-100] * 5 + [7, 8, 9]])} for _ in range(3)]
    traces = record(small_llama(), rows, tmp_path, criterion="plainact", layout=Layout.of(small_llama()))
    assert traces.about.sequences == (3, 3, 3)


def test_sequences_without_a_label_leave_nothing_behind(tmp_path: Path) -> None:
    none = {"input_ids": token_rows(1, 60), "labels": torch.full((1, 60), -100)}
    some = {"input_ids": token_rows(1, 60, seed=1), "labels": token_rows(1, 60, seed=1)}
    model = small_llama()
    traces = record(model, [none] * 20 + [some], tmp_path, criterion="plainact", layout=Layout.of(model))
    assert len(traces) == 59
    assert bool(torch.isfinite(traces.stored_scales).all())
    assert bool(torch.from_numpy(traces.scores(0)[:].astype("float32")).isfinite().all())
    assert bool(traces.statistics.neurons[0].isfinite().all())
