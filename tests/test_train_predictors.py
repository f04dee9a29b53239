"""TrainPredictors: a fine-tuned model gets predictors of its own when training ends."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import llama, mixtral, token_rows
from transformers import Trainer, TrainingArguments

from hf_sparse import PredictorConfig
from hf_sparse.contextual import carried_by, train_predictors_
from hf_sparse.errors import ConfigError, ModelError
from hf_sparse.predictors.saving import print_of
from trainer_callbacks import KeepMasks, Sparsify, TrainPredictors

CONFIG = PredictorConfig(keep_neurons=0.5, neuron_block=1, options={"training": {"epochs": 1, "batch_size": 64}})
ROWS = [{"input_ids": row, "labels": row} for row in token_rows(16, 16)]


def trainer(model: Any, folder: Path, *callbacks: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    return Trainer(model, arguments, train_dataset=ROWS, callbacks=list(callbacks))


def test_predictors_of_the_trained_model(tmp_path: Path) -> None:
    model = llama()
    train_predictors_(model, CONFIG, token_rows(8, 16), num_samples=8, sequence_length=16)
    before = carried_by(model).predictor
    stale = print_of(model, before)
    training = trainer(model, tmp_path, TrainPredictors(CONFIG, num_samples=8))
    training.train()
    carried = carried_by(model)
    assert carried.predictor is not before
    assert print_of(model, carried.predictor) != stale
    training.save_model(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    assert carried_by(again).config == CONFIG
    rows = token_rows(2, 6)
    model.eval()
    settings: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(rows),
    }
    assert torch.equal(again.generate(rows, **settings), model.generate(rows, **settings))


@pytest.mark.parametrize("others", ["sparsify", "masks"])
def test_beside_other_callbacks(others: str, tmp_path: Path) -> None:
    model = llama()
    more = Sparsify({"pattern": "2:4", "metric": "magnitude"}) if others == "sparsify" else KeepMasks()
    if others == "masks":
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.up_proj.weight[:, ::2] = 0
    trainer(
        model, tmp_path, more, TrainPredictors({"keep_neurons": 0.5, "options": CONFIG.options}, num_samples=8)
    ).train()
    assert carried_by(model) is not None
    assert float((model.model.layers[0].mlp.up_proj.weight == 0).float().mean()) == 0.5


def test_what_cannot_be_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expert"):
        trainer(mixtral(), tmp_path, TrainPredictors(CONFIG)).train()
    with pytest.raises(ConfigError, match="oracle"):
        trainer(llama(), tmp_path, TrainPredictors(PredictorConfig(kind="oracle"))).train()
    with pytest.raises(ConfigError, match="epoch"):
        trainer(llama(), tmp_path, TrainPredictors(PredictorConfig(options={"training": {"epoch": 1}}))).train()
