"""Distillation: the dense model as teacher of the one in training, by its logits and, if wanted, by its blocks' outputs."""

import math
from pathlib import Path
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_sparse import checkpoint
from hf_sparse.errors import ConfigError, ModelError, unknown
from hf_sparse.stored import over_processes
from trainer_callbacks.base import SparsityCallback
from trainer_callbacks.distillation_pass import ELSEWHERE, TaughtPasses, Weights
from trainer_callbacks.distillation_teacher import Teacher, copied, find, is_dense

_DTYPES = ("bfloat16", "float16", "float32")
_MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}
_active: "WeakKeyDictionary[nn.Module, Distillation]" = WeakKeyDictionary()  # by the student whose passes they follow


class Distillation(SparsityCallback):
    """Trains the student to say what its dense teacher says: `Trainer(..., callbacks=[KeepMasks(), Distillation()])`.

    In each training pass the teacher sees the same batch, and the model's loss becomes

        (1 - weight) * loss + weight * T^2 * KL(teacher || student) + block_weight * mean over blocks of ||h_s - h_t||^2 / ||h_t||^2

    with softmax at temperature T (Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2) in single precision, over the positions
    that the model's own loss counts (labels other than -100; all but padding where there are no labels, which needs weight 1), and
    normalised as that loss is, so that gradient accumulation gives the gradient of one large batch. Block outputs are compared
    position by position, each by its own norm (the idea of Romero et al. 2015, arXiv 1412.6550, section 2.2, without its regressor).
    Evaluation keeps the plain loss. With weight 1 the model's loss is only measured, also a load-balancing loss that it contains.

    The teacher: `None` is the dense model, that is a copy of the student as it was given to the Trainer if it was dense then (a
    callback prunes it), else the base model that the student's report names. Otherwise a path or Hub id, loaded as the student's
    class, or a model, used as it is and moved to the student's device. `teacher_dtype` is for those that are loaded or copied;
    `None` is the student's.

    Memory, on every process, whatever shards the student: the teacher's parameters in its number format (no gradients, no optimizer
    state), its activations of one block for one micro-batch, its logits (batch, length, vocabulary), and with block_weight a gradient
    the size of each block's output in single precision. TRL's SFTTrainer, which otherwise makes no whole logits, makes the student's
    too. A copy of the student stays with the callback, in the CPU's memory between trainings. Time: one forward pass of the
    teacher; with torch.compile, block outputs are taken between graphs, one for each block.

    The training logs gain `distillation_loss`, `task_loss` (the model's own) and `block_loss`, as they stand in the formula.

    Raises: ConfigError for numbers out of range and for training arguments that keep the loss out of the model; when training
    begins or in its first step ModelError where no teacher is found, or student, teacher and batches do not fit each other.
    """

    def __init__(
        self,
        teacher: str | Path | nn.Module | None = None,
        *,
        temperature: float = 1.0,
        weight: float = 1.0,
        block_weight: float = 0.0,
        teacher_dtype: str | torch.dtype | None = None,
    ) -> None:
        self._weights = Weights(temperature, weight, block_weight)
        if teacher is not None and not isinstance(teacher, str | Path | nn.Module):
            raise ConfigError(
                f"teacher is a {type(teacher).__name__}; give a path, a Hub id, a model, or None for the dense model."
            )
        name = str(teacher_dtype).removeprefix("torch.")
        if teacher_dtype is not None and name not in _DTYPES:
            raise ConfigError(unknown("teacher_dtype", name, _DTYPES))
        if teacher_dtype is not None and isinstance(teacher, nn.Module):
            raise ConfigError(
                "teacher_dtype is for a teacher that is loaded or copied; convert a model of your own before you pass it."
            )
        self._dtype: torch.dtype | None = None if teacher_dtype is None else getattr(torch, name)
        self._given = teacher
        self._dense: nn.Module | None = None
        self._dense_of: ReferenceType[nn.Module] | None = None  # the student that was trained with that copy
        self._passes: TaughtPasses | None = None
        self._state: TrainerState | None = None
        self._name = ""

    @property
    def objective(self) -> str:
        weights = self._weights
        blocks = f", block outputs weight {weights.blocks:g}" if weights.blocks else ""
        return f"distillation from {self._name}, temperature {weights.temperature:g}, weight {weights.logits:g}{blocks}"

    @property
    def settings(self) -> dict[str, Any]:
        weights = self._weights
        return {
            "teacher": self._name, "temperature": weights.temperature, "distillation_weight": weights.logits, "block_weight": weights.blocks,
        }  # fmt: skip

    def figures(self) -> dict[str, float]:
        """Means since the last log, over all processes: of steps where the Trainer counts labels, else of micro-batches."""
        if self._passes is None:
            return {}
        task, distillation, blocks, shares = over_processes(self._passes.sums).tolist()
        self._passes.sums.zero_()
        found = {
            "distillation_loss": distillation,
            "task_loss": task,
            **({"block_loss": blocks} if self._weights.blocks else {}),
        }
        return {name: value / shares for name, value in found.items() if shares and not math.isnan(value)}

    # ------------------------------------------------------------------------------------------------ events

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **events: Any) -> None:
        # The last moment before anything wraps, shards or prunes the model.
        model = events.get("model")
        self._dense = self._dense_of = None
        if self._given is None and model is not None and checkpoint.report(model) is None and is_dense(model):
            self._dense = copied(model, self._dtype)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **events: Any
    ) -> None:
        _check(args, model)
        student = checkpoint.unwrap(model)
        earlier = _active.get(student)
        if earlier is not None and earlier is not self and earlier._state is state:
            raise ConfigError("there are two Distillation callbacks in one training; leave one of them.")
        for one in (earlier, self):
            if one is not None:
                one._stop()  # of a training that broke off before it could be told
        if self._dense_of is not None and self._dense_of() is not student:
            self._dense = None  # what another student began as, such as one that model_init made
        self._dense_of = ref(student)
        given = self._given if self._given is not None else self._dense
        teacher, self._name = find(given, model, state.global_step, self._dtype)
        asked = Teacher(teacher, student, args.device, _MIXED.get(args.mixed_precision))
        is_sft = any(kind.__name__ == "SFTConfig" for kind in type(args).__mro__)
        try:
            self._passes = TaughtPasses(model, student, asked, self._weights, is_sft)
        except ModelError:
            asked.close()
            raise
        self._state, _active[student] = state, self
        self.begin(args, state, model, **events)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **events: Any
    ) -> None:
        known = checkpoint.report(model)  # by now, whatever prunes when training begins has done so
        if self._weights.blocks and known is not None and known.permutations:
            raise ModelError(
                "the student's channels were put into another order when it was pruned (permute), so its block outputs are not those of its "
                "dense model, only its logits are; leave block_weight at 0."
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **events: Any
    ) -> None:
        if self._passes is not None:
            self._passes.check_trained_on()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **events: Any
    ) -> None:
        self._stop()
        super().on_train_end(args, state, control, model, **events)

    def abandon_(self) -> None:
        self._stop()
        super().abandon_()

    def _stop(self) -> None:
        if self._passes is not None:
            self._passes.close()
            _active.pop(self._passes.student, None)
        if self._dense is not None:  # another train() begins with it; until then it takes no accelerator's memory
            self._dense.to("cpu")
        self._passes = self._state = None


def _check(args: TrainingArguments, model: nn.Module) -> None:
    """Refuse what would keep the model's loss out of the training, or the teacher from the model's inputs."""
    if args.label_smoothing_factor:
        raise ConfigError(f"with label_smoothing_factor={args.label_smoothing_factor} {ELSEWHERE}")
    if getattr(args, "loss_type", None) == "dft":
        raise ConfigError(
            'loss_type="dft" weighs each position by its own probability, where a divergence has no place; train with loss_type="nll".'
        )
    if args.n_gpu > 1:
        raise ConfigError(
            f"the Trainer would spread each batch over {args.n_gpu} devices in one process, and there is one teacher; start it with accelerate "
            "launch, or make one device visible."
        )
    configs = getattr(model, "peft_config", None) or {}
    learned = [name for name, config in configs.items() if getattr(config, "is_prompt_learning", False)]
    if learned:
        raise ConfigError(
            f"adapter {learned[0]!r} learns a prompt, positions of the student that the teacher has not; use LoRA."
        )
