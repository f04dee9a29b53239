"""TrainPredictors: contextual predictors for the model that a training has made, since it makes those from before stale."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_sparse import checkpoint, contextual
from hf_sparse.config import PredictorConfig, SparsityConfig
from hf_sparse.errors import ModelError
from trainer_callbacks.training_data import training_samples


class TrainPredictors(TrainerCallback):  # type: ignore[misc]
    """Trains predictors when training ends, on the Trainer's own data: `callbacks=[TrainPredictors(PredictorConfig(...))]`.

    Those that the model carries are taken off when training begins, as they do not run in training mode. Afterwards the model carries
    the new ones, which `save_model` writes beside it. `num_samples` rows of the training data are taken, or all there are; `calibration`
    names other data.

    Raises: ModelError when training begins in several processes, and for models whose heads and neurons cannot be told.
    """

    def __init__(
        self, config: PredictorConfig | Mapping[str, Any], *, calibration: Any = None, num_samples: int = 128,
        sequence_length: int = 512, seed: int = 0,
    ) -> None:  # fmt: skip
        self.config = config if isinstance(config, PredictorConfig) else PredictorConfig.from_dict(config)
        self.calibration, self.sequence_length = calibration, sequence_length
        # Says how many rows are drawn, and with which seed.
        self.samples = SparsityConfig(pattern="2:4", metric="magnitude", num_samples=num_samples, seed=seed)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **events: Any
    ) -> None:
        if (
            torch.distributed.is_available()
            and torch.distributed.is_initialized()
            and torch.distributed.get_world_size() > 1
        ):
            raise ModelError(
                "TrainPredictors trains in one process, and here are several; train the predictors afterwards, with "
                "hf_sparse.train_predictors_ or `hf-sparse predictor train`."
            )
        inner = checkpoint.unwrap(model)
        contextual.check(inner, self.config)
        contextual.detach(inner)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **events: Any
    ) -> None:
        inner, data = checkpoint.unwrap(model), self.calibration
        if data is None:
            data = training_samples(inner, events["train_dataloader"], self.samples)
        with contextual.evaluating(inner):
            contextual.train_predictors_(
                inner, self.config, data, tokenizer=events.get("processing_class"), num_samples=self.samples.num_samples,
                sequence_length=self.sequence_length, seed=self.samples.seed,
            )  # fmt: skip
