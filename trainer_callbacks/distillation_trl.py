"""What TRL's SFTTrainer reads instead of a loss: figures of each position, into which the distillation has to go."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from hf_sparse.errors import ModelError
from trainer_callbacks.distillation_loss import IGNORED

FUSED = "fused_lm_head"  # how TRL asks its patched forward for figures instead of logits
OF_THE_LOSS = (FUSED, "labels", "shift_labels", "num_items_in_batch")


def fused_output(
    outputs: Mapping[str, Any], labels: torch.Tensor | None, extra: torch.Tensor, weight: float
) -> tuple[Any, torch.Tensor]:
    """TRL's `FusedCausalLMOutput`, made of a model's logits, and the sum of cross-entropies.

    SFTTrainer's loss is less the sum of `log_probs` over the number of labels in all micro-batches, so `extra`, a sum that is to be
    divided in the same way, is spread over them. `labels` are aligned with the logits: position by position, shape (batch, length).
    """
    from trl.trainer.utils import FusedCausalLMOutput, entropy_from_logits

    if labels is None:
        raise ModelError(
            "the batch has no labels; SFTTrainer's collators make them, so leave its data_collator as it is."
        )
    logits, mask = outputs["logits"], labels != IGNORED
    with torch.set_grad_enabled(weight < 1):
        nll = functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        log_probs = -(1 - weight) * nll.view_as(labels)
    log_probs = log_probs - extra * (mask / mask.sum().clamp(min=1))
    plain = logits.detach()
    found = FusedCausalLMOutput(
        log_probs=log_probs, entropy=entropy_from_logits(plain) * mask, is_top1=(plain.argmax(-1) == labels) & mask, label_mask=mask,
        aux_loss=outputs.get("aux_loss"),
    )  # fmt: skip
    return found, nll.detach().sum()
