"""A student's training passes with its teacher beside them: what the teacher says goes into the loss that the model returns."""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_sparse.blocks import Block
from hf_sparse.errors import ConfigError, ModelError
from trainer_callbacks.distillation_blocks import BlockOutputs
from trainer_callbacks.distillation_loss import (
    aligned_labels,
    counted_positions,
    divergence_,
    is_encoder_decoder,
    relative_error,
    unpadded,
)
from trainer_callbacks.distillation_teacher import Teacher
from trainer_callbacks.distillation_trl import FUSED, OF_THE_LOSS, fused_output

ELSEWHERE = (
    "the loss of the model is not what is trained on: the Trainer works its loss out itself (compute_loss_func, label_smoothing_factor, or "
    "a compute_loss of its own that reads the logits), where Distillation cannot reach it. Let the model compute the loss from its labels."
)


@dataclass(frozen=True)
class Weights:
    """The numbers of the loss; raises ConfigError for those out of range."""

    temperature: float
    logits: float
    blocks: float

    def __post_init__(self) -> None:
        for name, value, allowed, right in (
            ("temperature", self.temperature, "greater than 0", lambda number: number > 0),
            ("weight", self.logits, "from 0 to 1", lambda number: 0 <= number <= 1),
            ("block_weight", self.blocks, "0 or greater", lambda number: number >= 0),
        ):
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not (number and right(value)):
                raise ConfigError(f"{name} is {value!r}; it must be a number {allowed}.")


class TaughtPasses:
    """Hooks on the student in a model, which act in training passes: those in training mode and with gradients.

    They run inside DistributedDataParallel, FSDP version 2, torch.compile and PEFT, and around accelerate's autocast. Raises:
    ModelError in the first pass where student, teacher and batch do not fit each other.
    """

    def __init__(self, model: nn.Module, student: nn.Module, teacher: Teacher, weights: Weights, is_sft: bool) -> None:
        self.student, self._teacher, self._weights, self._is_sft = student, teacher, weights, is_sft
        self._blocks = BlockOutputs(student, teacher.model) if weights.blocks else None
        self._asked: Mapping[str, Any] = {}  # the arguments of the present pass, as the Trainer gave them
        self._passes = self._reached = 0  # in this optimizer step; those whose loss was differentiated
        precise = torch.float32 if teacher.device.type == "mps" else torch.float64
        # Since the last log: task loss, distillation, blocks, and the shares of steps or micro-batches that they stand for.
        self.sums = torch.zeros(4, dtype=precise, device=teacher.device)
        # Up to PEFT 0.20, its wrappers call the forward of what they wrap past the hooks, so theirs is the call to follow.
        entered = next((part for part in model.modules() if hasattr(type(part), "get_base_model")), student)
        self._handles = [
            entered.register_forward_pre_hook(self._before, with_kwargs=True),
            entered.register_forward_hook(self._after, with_kwargs=True),
        ]

    def check_trained_on(self) -> None:
        """Once per optimizer step. Raises: ModelError where none of its passes gave the loss that was differentiated."""
        passes, reached, self._passes, self._reached = self._passes, self._reached, 0, 0
        if not reached:
            where = "" if passes else f"no training pass went through {type(self.student).__name__}: "
            raise ModelError(where + ELSEWHERE)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        if self._blocks is not None:
            self._blocks.remove()
        self._teacher.close()

    # ------------------------------------------------------------------------------------------------ hooks

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not _in_training(module):
            return None
        self._asked = kwargs
        if self._blocks is not None:
            self._blocks.record()
        if not kwargs.get(FUSED):
            return None
        if not self._is_sft:
            raise ModelError("of TRL's trainers only the SFTTrainer has a loss that distillation can be a part of.")
        # The pass shall give logits; what TRL reads instead is made of them afterwards.
        return args, {name: value for name, value in kwargs.items() if name not in OF_THE_LOSS}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        if not _in_training(module):
            return None
        inputs, self._asked = self._asked, {}
        logits, fused = _logits(outputs, self.student, "student"), bool(inputs.get(FUSED))
        counted = counted_positions(self.student, inputs, logits)
        share = self._norm(inputs, counted)
        divergence, blocks = self._compare(args, inputs, logits, counted, share)
        weight = self._weights.logits
        extra = divergence + blocks if weight else blocks
        if fused:
            found, task = fused_output(outputs, aligned_labels(self.student, inputs, logits), extra, weight)
            trained = found.log_probs
        else:
            task = _task_loss(outputs, weight)
            trained = extra if weight == 1 else (1 - weight) * task + extra
            found = type(outputs)(**{**outputs, "loss": trained})
        self._passes += 1
        trained.register_hook(self._differentiated)
        parts = (task, divergence / (weight or 1), blocks / (self._weights.blocks or 1), counted.sum() * share)
        self.sums += torch.stack([part.detach().to(self.sums) for part in parts])
        return found

    def _differentiated(self, gradient: torch.Tensor) -> None:
        self._reached += 1

    # ------------------------------------------------------------------------------------------------ losses

    def _norm(self, inputs: Mapping[str, Any], counted: torch.Tensor) -> torch.Tensor:
        """What a sum over this pass's positions is multiplied with in the Trainer's loss; TRL divides by itself, behind the model."""
        if inputs.get(FUSED):
            return torch.ones((), device=counted.device)
        number = inputs.get("num_items_in_batch")
        items = counted.sum() if number is None else torch.as_tensor(number, device=counted.device)
        return 1 / items.clamp(min=1)

    def _compare(
        self,
        args: tuple[Any, ...],
        inputs: Mapping[str, Any],
        logits: torch.Tensor,
        counted: torch.Tensor,
        norm: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ask the teacher; both losses, weighted and normalised. Without weight, the divergence is measured, without gradient."""
        measure = partial(self._measure, inputs, counted, self._weights.blocks * counted.sum() * norm)
        with ExitStack() as stack:
            if self._blocks is not None:
                stack.enter_context(self._blocks.compared(measure))
            wanted = _logits(self._teacher(args, inputs), self._teacher.model, "teacher").to(logits.device)
        if wanted.shape != logits.shape:
            raise ModelError(
                f"the student gives logits of shape {tuple(logits.shape)}, the teacher of shape {tuple(wanted.shape)}: they must have the same "
                "vocabulary or classes; call resize_token_embeddings on one of them, or choose another teacher."
            )
        with torch.set_grad_enabled(self._weights.logits > 0):
            divergence = divergence_(
                logits, wanted, counted, self._weights.temperature, norm * (self._weights.logits or 1)
            )
        return divergence, torch.zeros_like(divergence) if self._blocks is None else self._blocks.mean()

    def _measure(
        self, inputs: Mapping[str, Any], counted: torch.Tensor, factor: torch.Tensor, block: Block, own: torch.Tensor, other: torch.Tensor
    ) -> torch.Tensor:  # fmt: skip
        """The error of a block's output, at the counted positions where it lies beside the logits, else wherever is no padding."""
        if own.ndim > 3:  # feature maps: each sample is one position
            own, other = own.flatten(1), other.flatten(1)
        encodes = is_encoder_decoder(self.student) and "encoder" in block.stack
        beside = own.shape[:-1] == counted.shape and not encodes
        positions = counted if beside else unpadded(inputs.get("attention_mask"), own.shape[:-1], own.device)
        return relative_error(own, other, positions, factor)


def _in_training(module: nn.Module) -> bool:
    return module.training and torch.is_grad_enabled()


def _logits(outputs: Any, model: nn.Module, who: str) -> torch.Tensor:
    if not isinstance(outputs, Mapping):
        raise ModelError(
            f"the {who} {type(model).__name__} returns a {type(outputs).__name__}, without names; distillation needs its logits: leave "
            "return_dict at True."
        )
    found = outputs.get("logits")
    if not isinstance(found, torch.Tensor) or found.ndim < 2:
        raise ModelError(
            f"the {who} {type(model).__name__} returns no logits, only {', '.join(outputs)}; distillation needs a model with one head over "
            "a vocabulary or classes. Fused losses (use_liger_kernel with fused_linear_cross_entropy) leave the logits out; turn them off."
        )
    return found


def _task_loss(outputs: Mapping[str, Any], weight: float) -> torch.Tensor:
    found = outputs.get("loss")
    if found is None and weight < 1:
        raise ModelError(
            f"the model returns no loss: its batch has no labels (then weight has to be 1), or {ELSEWHERE}"
        )
    return torch.tensor(math.nan) if found is None else found
