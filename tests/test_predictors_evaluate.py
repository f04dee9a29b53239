"""The table of predictors: losses as decoding would have them, agreement with the criterion, and its three forms."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import token_rows
from predictor_cases import small_llama, traced

from hf_sparse.errors import CalibrationError, ConfigError
from hf_sparse.evaluate import evaluate
from hf_sparse.predictors.agreement import agreement, spearman
from hf_sparse.predictors.evaluate import decode_loss, evaluate_predictors, read_batches
from hf_sparse.predictors.masked import masked
from hf_sparse.predictors.networks import Predictor
from hf_sparse.predictors.select import Selection
from hf_sparse.predictors.table import PredictorTable
from hf_sparse.predictors.train import Training, train

pytestmark = pytest.mark.usefixtures("little_garbage")
HALF = Selection(keep_neurons=0.5, keep_heads=0.5)
ROWS = token_rows(6, 20, seed=9)


@pytest.fixture(scope="module")
def model() -> Any:
    return small_llama()


@pytest.fixture(scope="module")
def predictors(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Predictor]]:
    """Of every kind, and of a criterion that sees labels."""
    rows, quick = token_rows(24, 24), Training(epochs=4, batch_size=32, learning_rate=1e-2)
    traces = traced(model, tmp_path_factory.mktemp("magnitude"), rows)
    labelled = traced(model, tmp_path_factory.mktemp("plainact"), rows, criterion="plainact")
    found = {kind: [train(model, traces, kind)] for kind in ("static", "oracle")}
    found |= {kind: [train(model, traces, kind, quick, rank=32)] for kind in ("dejavu", "gate_first")}
    found["shadow"] = [
        train(model, traces, "shadow", Training(**{**quick.to_dict(), "seed": seed}), rank=32) for seed in (0, 1)
    ]
    found["plainact"] = [train(model, labelled, "oracle")]
    return found


@pytest.fixture(scope="module")
def table(model: Any, predictors: dict[str, list[Predictor]]) -> PredictorTable:
    selections = [HALF, Selection(keep_neurons=0.5, keep_heads=1.0, mode="global")]
    return evaluate_predictors(model, predictors, ROWS, selections)


def test_the_dense_loss_is_that_of_evaluation(model: Any, table: PredictorTable) -> None:
    measured = evaluate(model, ROWS)
    assert table.dense_loss == pytest.approx(float(torch.tensor(measured.value, dtype=torch.float64).log()), rel=1e-6)
    assert table.tokens == measured.tokens == 6 * 19


def test_a_loss_is_that_of_decoding_token_by_token(model: Any, predictors: dict[str, list[Predictor]]) -> None:
    from transformers import DynamicCache

    predictor, losses = predictors["dejavu"][0], []
    with torch.no_grad(), masked(model, predictor, HALF, prompt="masked"):
        cache = DynamicCache(config=model.config)
        for at in range(19):
            logits = model(input_ids=ROWS[:, at : at + 1], past_key_values=cache).logits[:, -1]
            losses.append(torch.nn.functional.cross_entropy(logits, ROWS[:, at + 1]))
    found = decode_loss(model, read_batches(model, ROWS)[0], predictor, HALF)
    assert found[0] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)


def test_rows_are_what_each_can_serve(table: PredictorTable) -> None:
    found = {(row.name, row.mode) for row in table.rows}
    names = {"shadow", "dejavu", "gate_first", "static", "oracle", "plainact"}
    assert found == {(name, "block") for name in names} | {
        (name, "global") for name in names - {"dejavu", "gate_first"}
    }


def distance(model: Any, predictor: Predictor, every: int = 1) -> float:
    """How far the outputs are from the dense ones: losses of a model that has learned nothing tell no better from worse."""
    with torch.no_grad():
        dense = model(input_ids=ROWS).logits
        with masked(model, predictor, HALF, refresh_every=every, prompt="masked"):
            return float((model(input_ids=ROWS).logits - dense).square().mean())


def test_the_oracle_loses_least(model: Any, predictors: dict[str, list[Predictor]]) -> None:
    assert distance(model, predictors["oracle"][0]) < distance(model, predictors["shadow"][0])
    assert distance(model, predictors["shadow"][0]) < distance(model, predictors["static"][0])


def test_the_oracle_has_no_error(table: PredictorTable) -> None:
    agreed = table.find(name="oracle", mode="block").agreement
    assert agreed is not None
    for part in (agreed.recall_neurons, agreed.recall_heads, agreed.correlation_neurons, agreed.correlation_heads):
        assert part == pytest.approx((1.0, 1.0), abs=1e-4)


def test_what_is_learned_agrees_better_than_what_is_fixed(table: PredictorTable) -> None:
    shadow, static = (
        table.find(name="shadow", mode="block").agreement,
        table.find(name="static", mode="block").agreement,
    )
    assert shadow is not None
    assert static is not None
    assert len(shadow.recall_neurons) == len(shadow.correlation_heads) == 2
    for mine, fixed in zip(shadow.correlation_neurons, static.correlation_neurons):
        assert mine is not None
        assert fixed is not None
        assert mine > fixed


def test_those_that_see_labels_are_marked(table: PredictorTable) -> None:
    assert {row.name for row in table.rows if row.sees_labels} == {"plainact"}
    assert "plainact (sees labels)" in table.markdown()


def test_seeds_are_averaged_and_their_spread_is_told(table: PredictorTable) -> None:
    row = table.find(name="shadow", mode="block")
    assert len(row.losses) == 2
    assert row.loss == pytest.approx(sum(row.losses) / 2)
    assert " to " in next(line for line in str(table).splitlines() if line.startswith("shadow"))


def test_the_three_forms(table: PredictorTable) -> None:
    assert len([line for line in table.markdown().splitlines() if line.startswith("|")]) == len(table.rows) + 2
    assert json.loads(json.dumps(table.to_dict()))["rows"][0]["rise"] == table.rise(table.rows[0])
    for said in ("log perplexity", "teacher forcing", "LlamaForCausalLM", "torch", "fingerprint"):
        assert said in table.markdown()
        assert said in str(table)


def test_sizes_are_shares_of_the_model(model: Any, table: PredictorTable) -> None:
    weights = sum(parameter.numel() for parameter in model.parameters())
    shadow = 32 * 32 + 32 + 32 * 104 + 104
    assert table.find(name="shadow", mode="block").share == pytest.approx(shadow / weights)
    assert table.find(name="static", mode="block").share == 0


@pytest.mark.parametrize("every", [2, 5])
def test_older_choices_are_worse_ones(model: Any, predictors: dict[str, list[Predictor]], every: int) -> None:
    assert distance(model, predictors["oracle"][0], every) > distance(model, predictors["oracle"][0])


def test_agreement_of_what_is_not_told(model: Any, tmp_path: Path) -> None:
    traces = traced(model, tmp_path)
    static = train(model, traces, "static", tells=("heads",))
    found = agreement(model, static, read_batches(model, ROWS)[0], HALF)
    assert found.recall_neurons == (None, None)
    assert None not in found.recall_heads


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1.0, 2, 3, 4], [10.0, 20, 30, 400], 1.0),
        ([1.0, 2, 3, 4], [4.0, 3, 2, 1], -1.0),
        ([1.0, 2, 3, 4], [2.0, 1, 4, 3], 0.6),
    ],
)
def test_rank_correlation(one: list[float], other: list[float], expected: float) -> None:
    assert float(spearman(torch.tensor(one), torch.tensor(other))) == pytest.approx(expected)


def test_nothing_to_measure_is_refused(model: Any, predictors: dict[str, list[Predictor]]) -> None:
    with pytest.raises(ConfigError, match="nothing to measure"):
        evaluate_predictors(model, {}, ROWS, [HALF])
    with pytest.raises(ConfigError, match="nothing to measure"):
        evaluate_predictors(model, predictors, ROWS, [])
    with pytest.raises(CalibrationError):
        evaluate_predictors(model, predictors, [], [HALF])
