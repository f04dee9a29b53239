"""What `recover` trains with: the samples, the Trainer and its callbacks."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_sparse.calibrate import limits_of, tokenizer_of
from hf_sparse.data import Samples, read_samples
from hf_sparse.errors import CalibrationError, ConfigError, ModelError

_LENGTH = 512
_RATE, _LORA_RATE = 0.2, 0.6  # times 1 / hidden size: wider layers take smaller steps (arXiv 2203.03466, table 3)


@dataclass(frozen=True)
class Plan:
    """How to train; None is for a default that depends on the model."""

    tokens: int
    sequence_length: int | None
    batch_size: int
    accumulate: int
    learning_rate: float | None
    seed: int
    lora: bool
    rank: int
    bf16: bool
    gradient_checkpointing: bool
    checkpoints: Path | None
    temperature: float
    device: str | None
    distils: bool
    quiet: bool  # nothing on stdout, and no progress bar


@dataclass(frozen=True)
class Data:
    """Sequences to train on, and hashes of the texts that they came from."""

    samples: Samples

    @property
    def source(self) -> str:
        """What the account of the training calls it."""
        return self.samples.source

    @property
    def _fingerprint(self) -> str:
        return self.samples.fingerprint

    def __len__(self) -> int:
        return len(self.samples.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.samples.rows[index]
        values = {key: value[0] for key, value in row.items() if key in ("input_ids", "labels")}
        return {"labels": values["input_ids"], **values}

    def refuse_overlap(self, model: Any, processor: Any, text: str) -> None:
        """Refuse to measure on what is trained on."""
        other = read_samples(
            text, tokenizer=tokenizer_of(model, processor), num_samples=1, sequence_length=_LENGTH, limits=limits_of(model), all_rows=True
        )  # fmt: skip
        if common := set(self.samples.items) & set(other.items):
            raise CalibrationError(
                f"{len(common)} texts of {text} are in {self.samples.source} as well, so a figure on it would flatter; measure on other text."
            )


def check_kind(model: Any) -> None:
    """Refuse what is no language model that predicts its own text."""
    decoder = (
        callable(getattr(model, "can_generate", None)) and model.can_generate() and not model.config.is_encoder_decoder
    )
    if not decoder and not type(model).__name__.endswith("ForMaskedLM"):
        raise ModelError(
            f"`recover` trains causal and masked language models, and this is a {type(model).__name__}; train it by transformers.Trainer "
            "with trainer_callbacks.KeepMasks and Distillation."
        )


def training_data(model: Any, processor: Any, source: str, plan: Plan) -> Data:
    """The sequences of a source, no more than the tokens of the plan need."""
    limits = limits_of(model)
    length = plan.sequence_length or min(_LENGTH, limits.length or _LENGTH)
    if limits.length and length > limits.length:
        raise ConfigError(f"sequence_length={length} is not allowed; the model takes 2 to {limits.length} tokens.")
    samples = read_samples(
        source, tokenizer=tokenizer_of(model, processor), num_samples=-(-plan.tokens // length), sequence_length=length, seed=plan.seed,
        limits=limits, fewer_allowed=True,
    )  # fmt: skip
    return Data(samples)


def tune(model: Any, data: Data, plan: Plan, teacher: Any, processor: Any) -> Any:
    """Train in place by the Trainer with its callbacks; a LoRA is merged. The trained model comes back in inference mode."""
    from transformers import PrinterCallback, Trainer

    import hf_sparse.adapters as adapters
    from trainer_callbacks import Distillation, KeepMasks

    callbacks: list[Any] = [KeepMasks()]
    if plan.distils:
        callbacks.append(Distillation(teacher.to(model.dtype), temperature=plan.temperature))
    if plan.gradient_checkpointing:
        # its name from Transformers 5.20 on
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    trained = _with_lora(model, plan) if plan.lora else model
    with _folder(plan) as folder:
        trainer = Trainer(
            trained,
            _arguments(folder, model, data, plan),
            train_dataset=data,
            data_collator=_collator(model, data, processor),
            callbacks=callbacks,
        )
        if plan.quiet:
            trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=_last(plan))
    return (adapters.merge_and_unload(trained) if plan.lora else model).cpu().eval()


def _with_lora(model: Any, plan: Plan) -> Any:
    from peft import LoraConfig, get_peft_model

    from hf_sparse.adapters import mask_lora_

    adapted = get_peft_model(model, LoraConfig(r=plan.rank, lora_alpha=2 * plan.rank, target_modules="all-linear"))
    mask_lora_(adapted)
    return adapted


def _arguments(folder: str, model: Any, data: Data, plan: Plan) -> Any:
    from transformers import TrainingArguments

    length = max(row["input_ids"].shape[-1] for row in data.samples.rows)
    steps = max(1, plan.tokens // (plan.batch_size * length))
    hidden = model.config.get_text_config().hidden_size
    rate = plan.learning_rate or (_LORA_RATE if plan.lora else _RATE) / hidden
    on_cpu = plan.device == "cpu" or (plan.device is None and not torch.accelerator.is_available())
    return TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=plan.batch_size // plan.accumulate, gradient_accumulation_steps=plan.accumulate,
        learning_rate=rate, lr_scheduler_type="cosine", warmup_steps=max(1, steps // 20), weight_decay=0.0, adam_beta2=0.99, bf16=plan.bf16,
        use_cpu=on_cpu, seed=plan.seed, report_to=[], disable_tqdm=True if plan.quiet else None, logging_steps=max(1, steps // 20),
        save_strategy="steps" if plan.checkpoints else "no", save_steps=max(1, steps // 10), save_total_limit=2,
    )  # fmt: skip


def _collator(model: Any, data: Data, processor: Any) -> Any:
    from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, default_data_collator

    if type(model).__name__.endswith("ForMaskedLM"):
        return DataCollatorForLanguageModeling(processor)
    if len({row["input_ids"].shape for row in data.samples.rows}) == 1:
        return default_data_collator
    if getattr(processor, "pad_token_id", None) is None:
        processor.pad_token = processor.eos_token  # its labels are left out wherever it pads
    return DataCollatorForSeq2Seq(processor, label_pad_token_id=-100)


@contextmanager
def _folder(plan: Plan) -> Iterator[str]:
    if plan.checkpoints:
        yield str(plan.checkpoints)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield folder


def _last(plan: Plan) -> str | None:
    from transformers.trainer_utils import get_last_checkpoint

    return get_last_checkpoint(str(plan.checkpoints)) if plan.checkpoints and plan.checkpoints.is_dir() else None
