"""Trains a predictor end to end: the model under its masks shall say what the dense model says."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from hf_sparse.calibrate import limits_of, ready, tokenizer_of
from hf_sparse.config.serialise import Serialisable, share, whole
from hf_sparse.data import read_samples
from hf_sparse.errors import CalibrationError, ConfigError
from hf_sparse.predictors.learned import Remembering, check_tokenizer
from hf_sparse.predictors.masked import masked
from hf_sparse.predictors.networks import Predictor, from_tensors
from hf_sparse.predictors.select import Selection
from hf_sparse.predictors.train import silence_


@dataclass(frozen=True, kw_only=True)
class Distillation(Serialisable):
    """How a predictor is trained end to end."""

    steps: int = 200
    batch_size: int = 12  # sequences
    learning_rate: float = 1e-3
    shares: tuple[float, ...] = (0.25, 0.5, 0.75)  # one is drawn in each step: the predictor shall serve them all
    softness: float = 0.1  # of the border between kept and left out, in scaled scores
    held_out: float = 0.1  # share of the sequences, the last ones, that decide which step's predictor is the best
    check_every: int = 10  # steps
    patience: int = 3  # checks without a better divergence on them
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "check_every", "patience"):
            whole(name, getattr(self, name), 1)
        whole("seed", self.seed, 0)
        object.__setattr__(self, "shares", tuple(self.shares))
        for one in self.shares:
            share("shares", one)
        share("held_out", self.held_out)
        for name in ("learning_rate", "softness"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not allowed; give a number above 0.")

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "shares": list(self.shares)}


def distill(
    model: nn.Module,
    predictor: Predictor,
    data: Any,
    *,
    distillation: Distillation | None = None,
    tokenizer: Any = None,
    sequence_length: int = 512,
) -> Predictor:
    """A predictor trained further on `data` (any form that calibration takes), by the divergence of masked from dense outputs.

    Neurons and heads are masked together, as far as the predictor tells them. The gradient passes through the whole model, so
    this takes the memory of training it on `batch_size` sequences, without an optimizer's. The model itself stays as it is.
    A predictor soon learns few sequences by heart: give several times as many as traces take, such as text of the model's own.
    """
    settings = distillation or Distillation()
    if not predictor.trained or not predictor.tells:
        raise ConfigError(f"kind={predictor.kind!r} as given has no weights to train; take 'shadow' or 'dejavu'.")
    remembering = Remembering(tokenizer_of(model, tokenizer))
    samples = read_samples(
        data, tokenizer=remembering, num_samples=1, sequence_length=sequence_length,
        limits=limits_of(model), all_rows=True,
    )  # fmt: skip
    check_tokenizer(predictor.learned, remembering.print, "the predictor's traces")
    lengths = {row["input_ids"].shape[-1] for row in samples.rows}
    if len(lengths) > 1:
        raise CalibrationError(
            f"distillation takes sequences of one length; {samples.source} has {sorted(lengths)[:5]}."
        )
    student = from_tensors(*predictor.to_tensors()).requires_grad_(True)
    with torch.random.fork_rng([]), ready(model), torch.enable_grad(), _frozen(model):
        _fit(model, student, torch.cat([row["input_ids"] for row in samples.rows]), settings)
    return student.eval().requires_grad_(False)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradient for the model's own weights meanwhile."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


class _Sequences(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, ids: torch.Tensor) -> None:
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"ids": self._ids[index]}


class _Student(nn.Module):
    """The predictor with its loss; the model is not registered, so that it is neither moved nor saved."""

    def __init__(self, model: nn.Module, predictor: Predictor, settings: Distillation) -> None:
        super().__init__()
        self.predictor = predictor
        self._model, self._settings = (model,), settings
        self._draw = random.Random(settings.seed)

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        (model,) = self._model
        ids = ids.to(next(model.parameters()).device)
        with torch.no_grad():
            dense = model(input_ids=ids).logits.float().log_softmax(-1)
        shares = [self._draw.choice(self._settings.shares)] if self.training else self._settings.shares
        return {"loss": torch.stack([self._divergence(model, ids, dense, kept) for kept in shares]).mean()}

    def _divergence(self, model: nn.Module, ids: torch.Tensor, dense: torch.Tensor, kept: float) -> torch.Tensor:
        heads = kept if "heads" in self.predictor.tells else 1.0
        neurons = kept if "neurons" in self.predictor.tells or self.predictor.kind == "gate_first" else 1.0
        selection = Selection(keep_neurons=neurons, keep_heads=heads)
        softness = self._settings.softness if self.training else None
        with masked(model, self.predictor, selection, prompt="masked", softness=softness):
            sparse = model(input_ids=ids).logits.float().log_softmax(-1)
        return nn.functional.kl_div(sparse, dense, log_target=True, reduction="none").sum(-1).mean()


def _fit(model: nn.Module, predictor: Predictor, ids: torch.Tensor, settings: Distillation) -> None:
    from transformers import EarlyStoppingCallback, Trainer

    held = max(1, round(settings.held_out * len(ids)))
    if held >= len(ids):
        raise CalibrationError(f"{len(ids)} sequences leave none to train on beside those held out; give at least 2.")
    with TemporaryDirectory() as folder:
        trainer = Trainer(
            model=_Student(model, predictor, settings),
            args=_arguments(settings, folder),
            train_dataset=_Sequences(ids[:-held]),
            eval_dataset=_Sequences(ids[-held:]),
            callbacks=[EarlyStoppingCallback(settings.patience)],
        )
        silence_(trainer)
        trainer.train()


def _arguments(settings: Distillation, folder: str) -> Any:
    from transformers import TrainingArguments
    from transformers.utils import logging

    return TrainingArguments(
        output_dir=folder, max_steps=settings.steps, per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size, learning_rate=settings.learning_rate, weight_decay=0.0,
        lr_scheduler_type="cosine", warmup_steps=0.1, optim="adamw_torch", eval_strategy="steps", save_strategy="steps",
        eval_steps=settings.check_every, save_steps=settings.check_every, save_total_limit=1, save_only_model=True,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=False, prediction_loss_only=True,
        label_names=["ids"], logging_strategy="no", report_to=[], seed=settings.seed, remove_unused_columns=False,
        disable_tqdm=not logging.is_progress_bar_enabled(), dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
