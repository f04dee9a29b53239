"""Trains predictors on traces, with transformers.Trainer: progress bar, seeds, early stopping on held-out sequences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy
import torch
from torch import nn
from torch.utils.data import Dataset

from hf_sparse.config.serialise import Serialisable, share, whole
from hf_sparse.errors import CalibrationError, ConfigError, unknown
from hf_sparse.predictors.learned import check_tokenizer, print_of_tokenizer
from hf_sparse.predictors.networks import TELLS, Predictor, kind_of, rank_for
from hf_sparse.predictors.traces import Traces
from hf_sparse.predictors.units import BlockWeights


@dataclass(frozen=True, kw_only=True)
class Training(Serialisable):
    """How predictors are trained."""

    epochs: int = 12
    batch_size: int = 256  # tokens
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    held_out: float = 0.1  # share of the sequences, the last ones, that decide when to stop
    patience: int = 3  # epochs without a better loss on them
    seed: int = 0

    @classmethod
    def of(cls, options: Mapping[str, Any], seed: int) -> Self:
        """From options as a configuration or a command line has them; raises ConfigError for unknown ones."""
        known = {item.name for item in fields(cls)}
        if strange := next((name for name in options if name not in known), None):
            raise ConfigError(unknown("option training", strange, known))
        return cls(**{"seed": seed, **options})

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience"):
            whole(name, getattr(self, name), 1)
        whole("seed", self.seed, 0)
        share("held_out", self.held_out)
        if not self.learning_rate > 0:
            raise ConfigError(
                f"learning_rate={self.learning_rate!r} is not allowed; give a number above 0, such as 3e-3."
            )


def train(
    model: nn.Module,
    traces: Traces,
    kind: str = "shadow",
    training: Training | None = None,
    *,
    tokenizer: Any = None,
    **options: Any,
) -> Predictor:
    """A predictor of a kind for the model that the traces were recorded on; one without weights is only put together.

    `tokenizer` is the model's, where it should be checked that the traces are in its tokens.

    Options: `rank` (of the networks; default: what 3 % of the model's weights allow), `tells` (("neurons", "heads") or one of them), `look_ahead` (dejavu).

    Raises: CalibrationError for traces in the tokens of another tokenizer, ModelError for traces of another model.
    """
    training = training or Training()
    if tokenizer is not None:
        check_tokenizer(traces.learned, print_of_tokenizer(tokenizer), f"the traces in {str(traces.folder)!r}")
    with torch.random.fork_rng([]):
        torch.manual_seed(training.seed)
        predictor = _put_together(model, traces, kind, options)
        if predictor.trained and predictor.tells:
            _fit(predictor, traces, training)
    predictor.learned = traces.learned
    return predictor.eval().requires_grad_(False)


def _put_together(model: nn.Module, traces: Traces, kind: str, options: dict[str, Any]) -> Predictor:
    made, layout, statistics = kind_of(kind, options), traces.layout, traces.statistics
    units = layout.units(model)
    if made.trained and "rank" not in options:
        size = sum(parameter.numel() for parameter in model.parameters())
        options = {**options, "rank": rank_for(size, layout, kind, options.get("tells", TELLS))}
    if kind != "gate_first":
        return made(layout, traces.about.criterion, statistics, options)
    if len(statistics.up) != len(units):
        raise ConfigError('kind="gate_first" needs gated feed-forwards in all blocks that skip; take kind="shadow".')
    weights = [up * BlockWeights(model, block).down_norm.cpu() for up, block in zip(statistics.up, units)]
    return made(layout, traces.about.criterion, statistics, options, weights)  # type: ignore[call-arg]


class _Tokens(Dataset[dict[str, torch.Tensor]]):
    """Tokens [start, stop) of traces, read from disk batch by batch."""

    def __init__(self, predictor: Predictor, traces: Traces, start: int, stop: int) -> None:
        self._predictor, self._start, self._stop = predictor, start, stop
        self._inputs = [traces.inputs(block) for block in predictor.reads()]
        self._scores = [traces.scores(position) for position in range(len(traces.layout.blocks))]
        self._factors = [self._factor(traces, position) for position in range(len(self._scores))]

    def _factor(self, traces: Traces, position: int) -> torch.Tensor:
        """From what is stored to the criterion divided by its block's mean."""
        stored, scales = traces.stored_scales[position], self._predictor.scales[position].cpu()
        counts = (traces.layout.groups[position], traces.layout.heads[position])
        return torch.cat([(stored[at] / scales[at]).expand(count) for at, count in enumerate(counts)])

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        rows = numpy.asarray(indices) + self._start
        hidden = torch.stack([_float(array, rows) for array in self._inputs], 1)
        targets = [self._target(position, rows) for position in range(len(self._scores))]
        return {"hidden": hidden, "targets": torch.cat(targets, -1)}

    def _target(self, position: int, rows: numpy.ndarray[Any, Any]) -> torch.Tensor:
        values = _float(self._scores[position], rows) * self._factors[position]
        parts = values.split((self._groups(position), values.shape[-1] - self._groups(position)), -1)
        return torch.cat([part for kind, part in zip(TELLS, parts) if kind in self._predictor.tells], -1)

    def _groups(self, position: int) -> int:
        return self._predictor.layout.groups[position]


def _float(array: numpy.ndarray[Any, Any], rows: numpy.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(array[rows].astype(numpy.float32))


class _Fitting(nn.Module):
    """A predictor with its loss: squared error of scores, in which every block weighs the same, as do its neurons and heads."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.predictor = predictor

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        widths = [self.predictor.widths(position) for position in range(len(self.predictor.layout.blocks))]
        wanted = targets.split([sum(width) for width in widths], -1)
        losses = []
        for at, block in enumerate(self.predictor.reads()):
            for position, scores in self.predictor(block, hidden[:, at]).items():
                parts = wanted[position].split(widths[position], -1)
                losses += [nn.functional.mse_loss(s, w) for s, w in zip(scores, parts) if s is not None]
        return {"loss": torch.stack(losses).mean()}


def _fit(predictor: Predictor, traces: Traces, training: Training) -> None:
    from transformers import EarlyStoppingCallback, Trainer

    border = _border(traces, training)
    with TemporaryDirectory() as folder:
        trainer = Trainer(
            model=_Fitting(predictor),
            args=_arguments(training, folder),
            train_dataset=_Tokens(predictor, traces, 0, border),
            eval_dataset=_Tokens(predictor, traces, border, len(traces)),
            data_collator=_as_it_is,
            callbacks=[EarlyStoppingCallback(training.patience)],
        )
        silence_(trainer)
        trainer.train()


def silence_(trainer: Any) -> None:
    """Take from a Trainer what writes a line for every log to standard output, which belongs to the caller; a bar stays."""
    from transformers import PrinterCallback, ProgressCallback

    class Bar(ProgressCallback):  # type: ignore[misc]
        def on_log(self, *args: Any, **kwargs: Any) -> None:
            pass

    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(Bar)


def _as_it_is(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return batch  # the data set reads whole batches


def _border(traces: Traces, training: Training) -> int:
    """Where the held-out sequences begin."""
    sequences = traces.about.sequences
    held = max(1, round(training.held_out * len(sequences)))
    if held >= len(sequences):
        raise CalibrationError(
            f"traces of {len(sequences)} sequences leave none to train on beside those held out; record at least 2."
        )
    return sum(sequences[:-held])


def _arguments(training: Training, folder: str) -> Any:
    from transformers import TrainingArguments
    from transformers.utils import logging

    return TrainingArguments(
        output_dir=folder, num_train_epochs=training.epochs, per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=4 * training.batch_size, learning_rate=training.learning_rate,
        weight_decay=training.weight_decay, lr_scheduler_type="cosine", warmup_steps=0.1, optim="adamw_torch",
        eval_strategy="epoch", save_strategy="epoch", save_total_limit=1, save_only_model=True,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=False, prediction_loss_only=True,
        label_names=["targets"], logging_strategy="epoch", report_to=[], seed=training.seed,
        disable_tqdm=not logging.is_progress_bar_enabled(), remove_unused_columns=False, dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
