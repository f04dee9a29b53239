"""What `recover` trains with: the plan, the Trainer and its callbacks."""

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_sparse.cli.resuming import model_fingerprint
from hf_sparse.cli.sequences import Data, collator
from hf_sparse.errors import ConfigError, ModelError

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
    device: torch.device
    distils: bool
    quiet: bool  # nothing on stdout, and no progress bar

    def rate(self, model: Any) -> float:
        """The highest learning rate."""
        hidden: int = model.config.get_text_config().hidden_size
        return self.learning_rate or (_LORA_RATE if self.lora else _RATE) / hidden

    def steps(self, data: Data) -> tuple[int, int]:
        """Of the optimizer, and the tokens that they take."""
        return data.steps(self.tokens, self.batch_size, self.accumulate)

    def settings(self, model: Any, name: str, data: Data, teacher: str | None) -> dict[str, Any]:
        """All that the weights after training depend on, as JSON holds it; what was typed comes before what follows from it."""
        taught = _whereabouts(teacher) if self.distils and teacher else None
        return {
            "model": _whereabouts(name), "data": data.source, "tokens": self.tokens, "sequence_length": data.length,
            "batch_size": self.batch_size, "accumulate": self.accumulate, "seed": self.seed, "lora": self.lora,
            "rank": self.rank if self.lora else None, "learning_rate": self.rate(model), "bf16": self.bf16,
            "gradient_checkpointing": self.gradient_checkpointing, "distillation": self.distils, "teacher": taught,
            "temperature": self.temperature if self.distils else None, "data_fingerprint": data.samples.fingerprint,
            "model_fingerprint": model_fingerprint(model),
        }  # fmt: skip


def _whereabouts(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name


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


# ---------------------------------------------------------------------------------------------------- number formats


def training_dtype(model: Any, lora: bool) -> torch.dtype:
    """What the weights have while they are trained: small steps are lost in half precision, and float16 overflows under a LoRA."""
    dtype: torch.dtype = model.dtype
    return torch.float32 if dtype in _widened(lora) else dtype


def _widened(lora: bool) -> tuple[torch.dtype, ...]:
    return (torch.float16,) if lora else (torch.float16, torch.bfloat16)


def widen_(model: Any, lora: bool) -> dict[str, torch.dtype]:
    """Give parameters the type to train in; returns the types that they had. Buffers stay: some are meant to differ."""
    had = {name: parameter.dtype for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        if parameter.dtype in _widened(lora):
            parameter.data = parameter.data.float()
    return had


def restore_(model: Any, had: Mapping[str, torch.dtype]) -> None:
    """Give each parameter the type back that it had."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(had[name])


# ---------------------------------------------------------------------------------------------------- training


def tune(model: Any, data: Data, plan: Plan, teacher: Any, processor: Any, last: Path | None) -> Any:
    """Train in place by the Trainer with its callbacks, from a checkpoint on where one is given; a LoRA is merged.

    The trained model comes back in inference mode on the CPU.
    """
    from transformers import PrinterCallback, Trainer, set_seed

    import hf_sparse.adapters as adapters
    from trainer_callbacks import Distillation, KeepMasks

    set_seed(plan.seed)  # the Trainer sets it again, too late for what a LoRA begins with
    callbacks: list[Any] = [KeepMasks()]
    if plan.distils:
        callbacks.append(Distillation(teacher, temperature=plan.temperature))
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
            data_collator=collator(model, data, processor),
            callbacks=callbacks,
        )
        if plan.quiet:
            trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    return (adapters.merge_and_unload(trained) if plan.lora else model).cpu().eval()


def _with_lora(model: Any, plan: Plan) -> Any:
    from peft import LoraConfig, get_peft_model

    from hf_sparse.adapters import mask_lora_
    from hf_sparse.adapters.adapted import adapted_sites, site_tensors
    from hf_sparse.families import find_sites
    from hf_sparse.sites import parameter_of

    sites = find_sites(model).all()
    experts = sorted({f"{site.module}.{site.parameter}" for site in sites if parameter_of(model, site).ndim == 3})
    every = site_tensors(model)
    config = LoraConfig(
        r=plan.rank, lora_alpha=2 * plan.rank, target_modules="all-linear", target_parameters=experts or None
    )
    adapted = get_peft_model(model, config)
    mask_lora_(adapted)
    left = len(every) - len({(id(item.owner), item.parameter) for item in adapted_sites(adapted)})
    if left:
        print(
            f"note: PEFT has no LoRA for {left} of the {len(every)} matrices of the blocks; they stay as they are.",
            file=sys.stderr,
        )
    return adapted


def _arguments(folder: str, model: Any, data: Data, plan: Plan) -> Any:
    from transformers import TrainingArguments

    steps, _ = plan.steps(data)
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=plan.batch_size // plan.accumulate, gradient_accumulation_steps=plan.accumulate,
        learning_rate=plan.rate(model), lr_scheduler_type="cosine", warmup_steps=min(max(1, steps // 20), steps - 1), weight_decay=0.0, adam_beta2=0.99,
        bf16=plan.bf16, use_cpu=plan.device.type == "cpu", seed=plan.seed, report_to=[], disable_tqdm=True if plan.quiet else None,
        logging_steps=max(1, steps // 20), save_strategy="steps" if plan.checkpoints else "no", save_steps=max(1, steps // 10),
        save_total_limit=2,
    )  # fmt: skip
    if arguments.n_gpu > 1:
        # As the Trainer does for models that are placed already: it would spread each batch over all devices it sees.
        arguments._n_gpu = 1
    return arguments


@contextmanager
def _folder(plan: Plan) -> Iterator[str]:
    if plan.checkpoints:
        yield str(plan.checkpoints)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield folder


# ---------------------------------------------------------------------------------------------------- where


def training_device(given: str | None) -> torch.device:
    """The one device to train and measure on: the first accelerator that is visible, or the CPU.

    Raises: ConfigError for one that cannot be used here, or that the Trainer would not use.
    """
    from hf_sparse.prune import check_device

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if given is None:
        return torch.device(found.type, 0) if found is not None else torch.device("cpu")
    check_device(given)
    device = torch.device(given)
    if device.type == "cpu":
        return torch.device("cpu")
    if found is None or device.type != found.type:
        raise ConfigError(
            f"device={given!r} is not what the Trainer uses here; give {'cpu' if found is None else found.type + ' or cpu'}."
        )
    if device.index:
        raise ConfigError(
            f"device={given!r} is not the first, which is the one that the Trainer uses; make it the only visible one: "
            f"CUDA_VISIBLE_DEVICES={device.index} hf-sparse recover ... --device {device.type}"
        )
    return torch.device(device.type, 0)
