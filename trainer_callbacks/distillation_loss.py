"""The losses of distillation: how far a student's logits and block outputs are from a teacher's, and at which positions."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from hf_sparse.errors import ModelError
from hf_sparse.forwards import full_precision

IGNORED = -100  # the label of positions that Transformers' losses leave out
# Elements at a time: on a CPU the pieces stay in the cache; elsewhere they bound the memory beside the logits.
_CPU_CHUNK, _CHUNK = 2**17, 2**25
_DEGENERATE = ("regression", "multi_label_classification")

Piece = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def divergence_(
    student: torch.Tensor, teacher: torch.Tensor, counted: torch.Tensor, temperature: float = 1.0, factor: float | torch.Tensor = 1.0
) -> torch.Tensor:  # fmt: skip
    """factor * T^2 * sum of KL(softmax(teacher / T) || softmax(student / T)) over the counted positions, in nats; a scalar in fp32.

    T^2 keeps the gradient's size when the temperature changes (Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2).
    Logits have shape (..., vocabulary), `counted` is bool of shape (...). The gradient is worked out piece by piece on the way
    and takes the place of the teacher's logits, so that no third tensor of their size is needed.
    """

    def piece(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _divergence(student, teacher, temperature, factor)

    rows = counted.reshape(-1).nonzero().squeeze(1)
    width = student.shape[-1]
    return _summed(student.reshape(-1, width), teacher.reshape(-1, width), rows, piece, teacher.dtype == student.dtype)


def relative_error(
    student: torch.Tensor, teacher: torch.Tensor, counted: torch.Tensor, factor: float | torch.Tensor = 1.0
) -> torch.Tensor:
    """factor * mean of ||h_student - h_teacher||^2 / ||h_teacher||^2 over the counted positions; a scalar in fp32, 0 if none is counted.

    Hidden states have shape (..., features), `counted` is bool of shape (...). Each position has its own norm: the few with
    massive activations would otherwise drown all the others, and sums over parts of a batch would not add up.
    """

    def piece(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        difference = student - teacher
        size = (
            teacher.square().sum(-1, keepdim=True).clamp_(min=torch.finfo(teacher.dtype).tiny).reciprocal_().mul_(each)
        )
        return (difference.square() * size).sum(), difference.mul_(2 * size)

    rows = counted.reshape(-1).nonzero().squeeze(1)
    each = factor / max(1, len(rows))
    width = student.shape[-1]
    return _summed(student.reshape(-1, width), teacher.reshape(-1, width), rows, piece, False)


def _divergence(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, factor: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and gradient for some rows. With z for logits: KL = sum p_t (z_t - z_s) - log Z_t + log Z_s.

    log Z is the largest logit less the log of the largest probability, so that `exp` is taken once for each logit.
    """
    if temperature != 1.0:
        student, teacher = student / temperature, teacher / temperature
    given, wanted = student.softmax(-1), teacher.softmax(-1)
    apart = (teacher - student).nan_to_num_(nan=0.0)  # both are -inf where a vocabulary has holes
    value = torch.dot(wanted.view(-1), apart.view(-1))
    value = value + (student.amax(-1) - given.amax(-1).log()).sum() - (teacher.amax(-1) - wanted.amax(-1).log()).sum()
    return value * (temperature**2 * factor), given.sub_(wanted).mul_(temperature * factor)


# ---------------------------------------------------------------------------------------------------- sums with a gradient


def _summed(
    student: torch.Tensor, teacher: torch.Tensor, rows: torch.Tensor, piece: Piece, in_place: bool
) -> torch.Tensor:
    with full_precision():
        return _Sum.apply(student, teacher, rows, piece, in_place)  # type: ignore[no-untyped-call]


class _Sum(torch.autograd.Function):
    """A sum over rows whose gradient is worked out together with the value, in pieces of at least single precision."""

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, rows: torch.Tensor, piece: Piece, in_place: bool
    ) -> torch.Tensor:
        precise = torch.promote_types(student.dtype, torch.float32)
        total = torch.zeros((), dtype=precise, device=student.device)
        wanted = ctx.needs_input_grad[0]
        gradient = (teacher if in_place else torch.empty_like(student)) if wanted else None
        length = max(1, (_CPU_CHUNK if student.device.type == "cpu" else _CHUNK) // student.shape[-1])
        for some in rows.split(length):
            pair = (logits.index_select(0, some).to(precise) for logits in (student, teacher))
            value, slope = piece(*pair)
            total += value
            if gradient is not None:
                gradient.index_copy_(0, some, slope.to(gradient.dtype))
        if gradient is not None:
            others = torch.ones(len(student), dtype=torch.bool, device=student.device).index_fill_(0, rows, False)
            gradient.index_fill_(0, others.nonzero().squeeze(1), 0)
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        if grad_output.device.type != "cpu" or grad_output != 1:  # a CPU need not wait for the answer
            gradient = gradient * grad_output.to(gradient.dtype)
        return gradient, None, None, None, None


# ---------------------------------------------------------------------------------------------------- positions


def aligned_labels(student: nn.Module, inputs: Mapping[str, Any], logits: torch.Tensor) -> torch.Tensor | None:
    """The label beside each position of logits (..., vocabulary), shape (...), shifted where the model's own loss shifts; None without.

    Raises: ModelError where the logits are no distribution over classes, or the labels do not lie beside them.
    """
    labels, shifted = inputs.get("shift_labels"), True
    if labels is None:
        labels, shifted = inputs.get("labels"), False
    _check_distribution(student, labels, logits)
    if labels is None:
        return None
    if isinstance(labels, torch.Tensor) and logits.ndim == 2 and labels.numel() == len(logits):
        labels = labels.reshape(-1)
    if not isinstance(labels, torch.Tensor) or labels.shape != logits.shape[:-1]:
        shape = tuple(labels.shape) if isinstance(labels, torch.Tensor) else f"a {type(labels).__name__}"
        raise ModelError(
            f"{type(student).__name__} gives logits of shape {tuple(logits.shape)} for labels of shape {shape}; distillation needs one label "
            "for each position of the logits."
        )
    if logits.ndim > 2 and not shifted and _shifts(student):
        labels = nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORED)
    return labels.to(logits.device)


def counted_positions(student: nn.Module, inputs: Mapping[str, Any], logits: torch.Tensor) -> torch.Tensor:
    """Where the student's own loss looks at its logits (..., vocabulary): bool of shape (...); all but padding without labels."""
    labels = aligned_labels(student, inputs, logits)
    if labels is not None:
        return labels != IGNORED
    name = "decoder_attention_mask" if is_encoder_decoder(student) else "attention_mask"
    return unpadded(inputs.get(name), logits.shape[:-1], logits.device)


def unpadded(mask: object, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """Which positions of that shape are not padding, bool; all, where the mask is none or one of another shape."""
    if isinstance(mask, torch.Tensor) and mask.shape == shape:
        return (mask != 0).to(device)
    return torch.ones(shape, dtype=torch.bool, device=device)


def is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _shifts(student: nn.Module) -> bool:
    """Whether the model's loss compares a position with the next label, by the rule that the Trainer counts labels with.

    Classes without a loss by name (GPT2LMHeadModel) fall back to that of causal language models.
    """
    loss = LOSS_MAPPING.get(getattr(student, "loss_type", None) or "ForCausalLM")
    return loss is ForCausalLMLoss and not is_encoder_decoder(student)


def _check_distribution(student: nn.Module, labels: object, logits: torch.Tensor) -> None:
    problem = getattr(getattr(student, "config", None), "problem_type", None)
    real = isinstance(labels, torch.Tensor) and labels.is_floating_point()
    if problem in _DEGENERATE or real or logits.shape[-1] < 2:
        raise ModelError(
            f"{type(student).__name__} is trained for {problem or 'regression'}, with logits of shape {tuple(logits.shape)}: they are no "
            "distribution over classes, so their divergence from a teacher's is not defined. Distillation needs a language model, or a "
            "classifier with one label for each position."
        )
