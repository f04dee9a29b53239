"""Sparsify, the one callback from a dense model to a recovered sparse one: prunes when training begins, keeps the masks."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_sparse import checkpoint
from hf_sparse.config import SparsityConfig
from hf_sparse.errors import CalibrationError, CheckpointError, ConfigError, HfSparseError, ModelError
from hf_sparse.prune import prune_
from hf_sparse.report import Report
from trainer_callbacks.account import describe
from trainer_callbacks.keep_masks import KeepMasks, stake
from trainer_callbacks.training_data import training_samples

_MAY_DIFFER = ("calibration", "num_samples", "device")  # on resumption: they say with what and where, not what for


class Sparsify(KeepMasks):
    """Prunes the model when training begins, and keeps its zeros while it trains: `callbacks=[Sparsify(config)]`.

    `config` is a `SparsityConfig`, a dict or the path of a file, with any metric, allocation and update. Where it needs
    calibration data and names none, samples of the Trainer's own training data are taken (`num_samples` of them, or all
    there are). Under DDP every process prunes alike and then has process 0's weights. A resumed run is not pruned again:
    its masks and report come from the checkpoint. LoRA adapters on the model are masked (see `hf_sparse.mask_lora_`), as
    they are dense otherwise; a checkpoint of adapters holds no masks, so to resume one the model has to be loaded pruned.

    Raises when training begins, beside what `prune_` and `KeepMasks` raise: ModelError for a model that FSDP or
    DeepSpeed has taken over; ConfigError where a resumed checkpoint was pruned with another config; CheckpointError
    where it was not pruned.
    """

    def __init__(self, config: SparsityConfig | Mapping[str, Any] | str | Path) -> None:
        super().__init__()
        self.config = SparsityConfig.of(config)
        self.report: Report | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **events: Any
    ) -> None:
        known = checkpoint.report(model)
        if state.global_step:
            self.report = self._saved_report(state)
            checkpoint.attach(checkpoint.unwrap(model), self.report)
        elif self.report is None or known is not self.report:  # train() may be called again
            self.report = self._prune(args, checkpoint.unwrap(model), events)
        try:
            super().on_train_begin(args, state, control, model, **events)
        except HfSparseError:
            if state.global_step:  # the model is not what the report says
                checkpoint.detach(checkpoint.unwrap(model))
            raise

    def _look_at_adapters(self, model: nn.Module) -> None:
        configs = getattr(model, "peft_config", None) or {}
        if any(getattr(config.peft_type, "value", config.peft_type) == "LORA" for config in configs.values()):
            from hf_sparse.adapters import mask_lora_  # peft takes seconds to import

            if stake(model):
                mask_lora_(model)

    def _prune(self, args: TrainingArguments, model: nn.Module, events: dict[str, Any]) -> Report:
        sharded = any(type(parameter.data).__name__ == "DTensor" for parameter in model.parameters())
        if sharded or getattr(args, "deepspeed_plugin", None) is not None:
            who = (
                "in shards over processes"
                if sharded
                else "in DeepSpeed's hands, which has copies of its dense weights,"
            )
            raise ModelError(
                f"the model is {who} already, and Sparsify prunes whole models; prune it before the Trainer is made, "
                "with from_pretrained(..., sparsity_config=...) or prune_, and use KeepMasks."
            )
        config, loader = self.config, events["train_dataloader"]
        try:
            config.check_calibration()
        except CalibrationError:
            samples = training_samples(model, loader, config)
            config = replace(config, calibration=samples, num_samples=len(samples))
        with _as_loaded(model):
            report = prune_(model, config, events.get("processing_class"))
        if config is not self.config:
            report.notes.append(f"calibrated on the training data: {describe(loader.dataset)[0]}")
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for parameter in model.parameters():
                torch.distributed.broadcast(parameter.data, 0)
        return report

    def _saved_report(self, state: TrainerState) -> Report:
        values = self._saved(state).get("stored_report")
        if values is None:
            raise CheckpointError(
                f"the checkpoint of step {state.global_step} was not written by a training with {type(self).__name__}, so "
                "it is not pruned; resume without the callback, prune before you train, or start anew."
            )
        report = Report.from_dict(values)
        wanted, found = json.loads(json.dumps(self.config.resolved().to_dict())), report.config
        for key in wanted:
            if key not in _MAY_DIFFER and wanted[key] != found.get(key):
                raise ConfigError(
                    f"the checkpoint of step {state.global_step} was pruned with {key}={found.get(key)!r}, the config "
                    f"says {key}={wanted[key]!r}; resume with the same config, or start anew."
                )
        return report

    def state(self) -> dict[str, Any]:
        found = super().state()
        found["args"] = {"config": self.config.to_dict()}
        found["attributes"]["stored_report"] = self.report.to_dict() if self.report else None
        return found


@contextmanager
def _as_loaded(model: nn.Module) -> Iterator[None]:
    """The model's own forward, without the autocast that accelerate has put around it."""
    wrapper = model.__dict__.pop("forward", None) if hasattr(model, "_original_forward") else None
    try:
        yield
    finally:
        if wrapper is not None:
            model.forward = wrapper
