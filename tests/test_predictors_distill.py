"""Training end to end brings the masked model nearer to the dense one, and changes nothing but the predictor's copy."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import token_rows
from predictor_cases import small_llama, traced

from hf_sparse.errors import CalibrationError, ConfigError
from hf_sparse.predictors.distill import Distillation, distill
from hf_sparse.predictors.masked import masked, through
from hf_sparse.predictors.networks import Predictor
from hf_sparse.predictors.select import Selection
from hf_sparse.predictors.train import Training, train

pytestmark = pytest.mark.usefixtures("little_garbage")
ROWS = token_rows(16, 16, seed=3)
HALF = Selection(keep_neurons=0.5, keep_heads=0.5)
QUICK = Distillation(steps=40, batch_size=8, learning_rate=1e-2, shares=(0.5,), patience=9)


def divergence(model: Any, predictor: Predictor) -> float:
    with torch.no_grad():
        dense = model(input_ids=ROWS).logits.log_softmax(-1)
        with masked(model, predictor, HALF, prompt="masked"):
            sparse = model(input_ids=ROWS).logits.log_softmax(-1)
    return float((dense.exp() * (dense - sparse)).sum(-1).mean())


@pytest.mark.parametrize("kind", ["shadow", "dejavu", "gate_first"])
def test_it_brings_the_outputs_nearer_to_the_dense_ones(kind: str, tmp_path: Path) -> None:
    model = small_llama()
    start = train(model, traced(model, tmp_path, ROWS), kind, Training(epochs=1), rank=16)
    before, weights = start.to_tensors()[0], {name: value.clone() for name, value in model.state_dict().items()}
    found = distill(model, start, ROWS, distillation=QUICK)
    assert divergence(model, found) < 0.9 * divergence(model, start)
    assert all(torch.equal(value, before[name]) for name, value in start.state_dict().items())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in found.parameters())


def test_a_mask_that_lets_gradients_through_is_the_mask() -> None:
    scores = torch.tensor([0.1, 2.0, 1.1, 0.9], requires_grad=True)
    soft = through(torch.tensor([False, True, True, False]), scores, softness=0.1)
    assert soft.tolist() == pytest.approx([0, 1, 1, 0])
    soft.sum().backward()
    slopes = scores.grad
    assert slopes is not None
    assert slopes.argmax() in (2, 3)  # those at the border have the most to say
    assert bool((slopes >= 0).all())


def test_nothing_to_learn_is_refused(tmp_path: Path) -> None:
    model = small_llama()
    traces = traced(model, tmp_path)
    for kind, options in (("static", {}), ("oracle", {}), ("gate_first", {"tells": ()})):
        with pytest.raises(ConfigError, match="no weights to train"):
            distill(model, train(model, traces, kind, **options), ROWS)


def test_sequences_of_several_lengths_are_refused(tmp_path: Path) -> None:
    model = small_llama()
    start = train(model, traced(model, tmp_path), "shadow", Training(epochs=1))
    rows = [{"input_ids": token_rows(1, length)} for length in (5, 9)]
    with pytest.raises(CalibrationError, match=r"one length.*\[5, 9\]"):
        distill(model, start, rows)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"steps": 0}, "steps=0"),
        ({"softness": 0}, "softness=0"),
        ({"shares": (0.5, 1)}, "shares=1"),
        ({"learning_rate": 0}, "rate=0"),
    ],
)
def test_settings_check_themselves(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Distillation(**fields)


def test_what_it_learns_by_heart_is_not_kept(tmp_path: Path) -> None:
    """Of the checks it keeps the one that is best on sequences held out, and stops when they get worse."""
    model, rows = small_llama(), token_rows(12, 16, seed=3)
    start = train(model, traced(model, tmp_path, rows), "shadow", Training(epochs=1), rank=16)
    settings = Distillation(steps=400, batch_size=8, learning_rate=0.3, shares=(0.5,), check_every=2, patience=1)
    ran: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        own = transformers.Trainer.train
        patch.setattr(transformers.Trainer, "train", lambda self: (own(self), ran.append(self.state.global_step)))
        distill(model, start, rows, distillation=settings)
    assert ran[0] < 400


def test_one_sequence_is_too_few(tmp_path: Path) -> None:
    model = small_llama()
    start = train(model, traced(model, tmp_path), "shadow", Training(epochs=1))
    with pytest.raises(CalibrationError, match="give at least 2"):
        distill(model, start, token_rows(1, 16))


def test_settings_come_back_from_json() -> None:
    assert Distillation.from_dict(QUICK.to_dict()) == QUICK
