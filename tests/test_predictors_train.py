"""Networks learn what traces show, tell the same after saving, and a seed gives the same predictor."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from models import token_rows
from predictor_cases import small_llama, traced
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sparse.errors import CalibrationError, CheckpointError, ConfigError
from hf_sparse.predictors.layout import Layout
from hf_sparse.predictors.networks import KINDS, Predictor, from_tensors, rank_for
from hf_sparse.predictors.traces import Statistics, Traces
from hf_sparse.predictors.train import Training, _put_together, train

pytestmark = pytest.mark.usefixtures("little_garbage")
QUICK = Training(epochs=6, batch_size=32, learning_rate=1e-2)


@pytest.fixture(scope="module")
def model() -> Any:
    return small_llama()


@pytest.fixture(scope="module")
def traces(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Traces:
    return traced(model, tmp_path_factory.mktemp("traces"), token_rows(24, 24))


def error(predictor: Predictor, traces: Traces) -> float:
    """Mean squared error of scaled scores over all recorded tokens."""
    found = []
    for block in predictor.reads():
        told = predictor(block, torch.from_numpy(traces.inputs(block)[:].astype("float32")))
        for position, scores in told.items():
            truth = torch.from_numpy(traces.scores(position)[:].astype("float32")).split((48, 4), -1)
            for at, part in enumerate(scores):
                if part is not None:
                    true = truth[at] * traces.stored_scales[position, at] / predictor.scales[position, at]
                    found.append(float((part - true).square().mean()))
    return sum(found) / len(found)


@pytest.mark.parametrize("kind", ["shadow", "dejavu"])
def test_training_beats_the_average(model: Any, traces: Traces, kind: str) -> None:
    assert error(train(model, traces, kind, QUICK, rank=32), traces) < 0.8 * error(
        train(model, traces, "static"), traces
    )


@pytest.mark.parametrize("kind", ["shadow", "dejavu"])
def test_before_training_it_knows_the_average_only(model: Any, traces: Traces, kind: str) -> None:
    predictor = _put_together(model, traces, kind, {})
    for network in [predictor.network] if kind == "shadow" else predictor.networks:
        network.second.weight.data.zero_()
    static = train(model, traces, "static")
    hidden = torch.randn(2, 32)
    told = {at: scores for block in predictor.reads() for at, scores in predictor(block, hidden).items()}
    for position, scores in static(1, hidden).items():
        for mine, fixed in zip(told[position], scores):
            torch.testing.assert_close(mine, fixed.expand_as(mine))


def test_a_seed_decides(model: Any, traces: Traces) -> None:
    one, same, other = (
        train(model, traces, "shadow", Training(epochs=1, seed=seed)).to_tensors()[0] for seed in (0, 0, 1)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_training_leaves_the_callers_random_numbers_alone(model: Any, traces: Traces) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(model, traces, "shadow", Training(epochs=1))
    assert torch.equal(torch.rand(3), expected)


def test_it_stops_when_held_out_tokens_get_no_better(
    model: Any, traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    trainers = []
    own = transformers.Trainer.train

    def kept(self: Any) -> Any:
        trainers.append(self)
        return own(self)

    monkeypatch.setattr(transformers.Trainer, "train", kept)
    train(model, traces, "shadow", Training(epochs=60, batch_size=16, learning_rate=0.1, patience=1), rank=32)
    (state,) = [trainer.state for trainer in trainers]
    assert state.epoch < 60
    losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    assert min(losses) == pytest.approx(state.best_metric)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *[(kind, {}) for kind in KINDS],
        ("shadow", {"rank": 5, "tells": ("heads",)}),
        ("dejavu", {"look_ahead": True, "rank": 3}),
        ("static", {"tells": ["neurons"]}),
        ("gate_first", {"tells": ()}),
    ],
)
def test_predictors_come_back_from_tensors(
    model: Any, traces: Traces, kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    predictor = _put_together(model, traces, kind, options)
    tensors, about = predictor.to_tensors()
    safetensors.torch.save_file(tensors, tmp_path / "predictors.safetensors", {"about": json.dumps(about)})
    loaded = from_tensors(
        safetensors.torch.load_file(tmp_path / "predictors.safetensors"), json.loads(json.dumps(about))
    )
    assert (loaded.kind, loaded.criterion, loaded.layout) == (predictor.kind, predictor.criterion, predictor.layout)
    hidden = torch.randn(2, 3, 32)
    assert loaded.reads() == predictor.reads()
    for block in predictor.reads():
        for position, scores in predictor(block, hidden).items():
            for mine, theirs in zip(scores, loaded(block, hidden)[position]):
                assert (mine is None) == (theirs is None)
                assert mine is None or torch.equal(mine, theirs)
    if kind == "gate_first":
        assert torch.equal(loaded.gate_scores(1, torch.ones(2, 48)), predictor.gate_scores(1, torch.ones(2, 48)))


@pytest.mark.parametrize("damage", ["tensor gone", "wrong shape", "unknown kind", "version"])
def test_what_does_not_fit_together_is_refused(model: Any, traces: Traces, damage: str) -> None:
    tensors, about = _put_together(model, traces, "shadow", {}).to_tensors()
    if damage == "tensor gone":
        del tensors["network.first.weight"]
    elif damage == "wrong shape":
        tensors["scales"] = torch.ones(7, 2)
    elif damage == "unknown kind":
        about["kind"] = "shadows"
    else:
        about["version"] = 2
    with pytest.raises((CheckpointError, ConfigError), match=r"train it anew|Did you mean 'shadow'|upgrade"):
        from_tensors(tensors, about)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {1: (0,), 2: (1,)}),
        ({"look_ahead": True}, {0: (0,), 1: (1,)}),
    ],
)
def test_what_dejavu_reads(model: Any, traces: Traces, options: dict[str, Any], expected: dict[int, Any]) -> None:
    assert _put_together(model, traces, "dejavu", options).reads() == expected


def test_looking_ahead_needs_its_input_recorded(model: Any, traces: Traces) -> None:
    with pytest.raises(CheckpointError, match=r"no input\.0"):
        train(model, traces, "dejavu", QUICK, look_ahead=True)


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        ("shadow", 32 * 8 + 8 + 8 * 104 + 104),
        ("dejavu", 2 * (32 * 8 + 8 + 8 * 52 + 52)),
        ("gate_first", 32 * 8 + 8 + 8 * 8 + 8 + 2 * 48),
        ("static", 0),
    ],
)
def test_weights_are_counted(model: Any, traces: Traces, kind: str, weights: int) -> None:
    options = {} if kind == "static" else {"rank": 8}
    assert _put_together(model, traces, kind, options).weight_count() == weights


def test_neurons_in_blocks_make_the_network_smaller(model: Any, tmp_path: Path) -> None:
    traces = traced(model, tmp_path, neuron_block=16)
    predictor = train(model, traces, "shadow", Training(epochs=1), rank=8)
    assert predictor.weight_count() == 32 * 8 + 8 + 8 * 14 + 14
    assert predictor(1, torch.randn(2, 32))[0].neurons.shape == (2, 3)


SIZES = {
    "100M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
}  # fmt: skip


@pytest.mark.parametrize("neuron_block", [1, 32])
@pytest.mark.parametrize("kind", ["shadow", "dejavu", "gate_first"])
@pytest.mark.parametrize("size", SIZES)
def test_a_rank_that_nobody_gave_keeps_the_predictor_small(size: str, kind: str, neuron_block: int) -> None:
    with torch.device("meta"):
        large = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **SIZES[size]))
    layout = Layout.of(large, neuron_block=neuron_block)
    weights = sum(parameter.numel() for parameter in large.parameters())
    blank = Statistics([torch.ones(n) for n in layout.groups], [torch.ones(n) for n in layout.heads], [])
    rank = rank_for(weights, layout, kind)
    share = KINDS[kind](layout, "magnitude", blank, {"rank": rank}).weight_count() / weights
    assert 0 < share <= 0.03
    assert rank % 8 == 0
    assert rank >= 40


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("shadows", {}, "Did you mean 'shadow'"),
        ("shadow", {"ranks": 3}, "Did you mean 'rank'"),
        ("shadow", {"rank": 0}, "rank=0"),
        ("shadow", {"tells": ("head",)}, "Did you mean 'heads'"),
        ("static", {"rank": 3}, "option of predictor kind 'static': 'rank'"),
    ],
)
def test_what_is_wrong_is_refused(model: Any, traces: Traces, kind: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        train(model, traces, kind, **options)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"held_out": 1.0}, "held_out=1.0"),
        ({"learning_rate": -1}, "learning_rate=-1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_trainings_check_themselves(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Training(**fields)


def test_one_sequence_is_too_few(model: Any, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="record at least 2"):
        train(model, traced(model, tmp_path, token_rows(1, 16)), "shadow", QUICK)
