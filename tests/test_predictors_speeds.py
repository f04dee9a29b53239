"""How fast predictors generate, and the picture of what they cost."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import llama, token_rows
from predictor_cases import traced

from hf_sparse.errors import ConfigError, HfSparseError, ModelError
from hf_sparse.predictors.evaluate import evaluate_predictors
from hf_sparse.predictors.select import Selection
from hf_sparse.predictors.speeds import DENSE, decoding_speeds
from hf_sparse.predictors.table import PredictorTable
from hf_sparse.predictors.train import train

pytestmark = pytest.mark.usefixtures("little_garbage")
HALF = Selection(keep_neurons=0.5, keep_heads=0.5)


@pytest.fixture
def model() -> Any:
    return llama(layers=3)


def test_ways_take_turns_and_tell_their_own_share(model: Any, tmp_path: Path) -> None:
    traces = traced(model, tmp_path)
    ways = {kind: (train(model, traces, kind, rank=8), HALF) for kind in ("shadow", "dejavu", "gate_first")}
    found = decoding_speeds(model, ways, new_tokens=4, rounds=1)
    assert set(found) == {DENSE, *ways}
    assert all(way.tokens_per_second > 0 for way in found.values())
    assert found[DENSE].share_of_time is None
    for kind, (predictor, _) in ways.items():
        share = found[kind].share_of_time
        assert share is not None
        assert 0 < share < 1
        assert "forward" not in predictor.__dict__  # nothing of the watching is left


def test_what_cannot_be_timed(model: Any, tmp_path: Path) -> None:
    predictor = train(model, traced(model, tmp_path), "static")
    with pytest.raises(ConfigError, match="positions"):
        decoding_speeds(model, {"static": (predictor, HALF)}, new_tokens=10_000)
    with pytest.raises(ModelError, match="training mode"):
        decoding_speeds(model.train(), {"static": (predictor, HALF)}, new_tokens=2, rounds=1)


@pytest.fixture
def table(model: Any, tmp_path: Path) -> PredictorTable:
    traces = traced(model, tmp_path)
    predictors = {kind: [train(model, traces, kind)] for kind in ("static", "oracle")}
    return evaluate_predictors(model, predictors, token_rows(4, 16), [HALF], speed_tokens=3)


def test_speeds_stand_in_the_table(table: PredictorTable) -> None:
    static, oracle = table.find(name="static"), table.find(name="oracle")
    assert static.tokens_per_second
    assert static.share_of_time
    assert oracle.tokens_per_second is None  # it cannot generate
    assert table.dense_tokens_per_second
    assert f"threads {torch.get_num_threads()}" in table.about["machine"]
    assert "x dense" in str(table)
    assert "x dense" in table.markdown()
    figure = table.figure(static)
    assert figure.speed == static.tokens_per_second
    assert figure.dense_speed == table.dense_tokens_per_second
    assert (figure.neurons, figure.loss, figure.machine) == ("50 %", static.loss, table.about["machine"])


def test_a_picture(table: PredictorTable, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert table.plot(tmp_path / "picture.svg").read_bytes().startswith(b"<?xml")
    with pytest.raises(HfSparseError, match="xyz"):
        table.plot(tmp_path / "picture.xyz")
