"""Measures a model on text: token perplexity, or the model's own loss where that makes no sense."""

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from hf_sparse import environment
from hf_sparse.calibrate import forward, limits_of, ready, tokenizer_of
from hf_sparse.checkpoint import report, unwrap
from hf_sparse.config.serialise import whole
from hf_sparse.data import Batch, Sample, Samples, batches, fingerprint, read_samples
from hf_sparse.errors import CalibrationError, ConfigError, ModelError

_TOKENS_AT_ONCE = 4096
_MASKED_SHARE = 0.15  # of the tokens, as BERT was trained (arXiv 1810.04805, section 3.1)


@dataclass(frozen=True)
class Measurement:
    """One figure with everything that it depends on."""

    metric: str  # "perplexity", "masked loss" or "loss"
    value: float
    tokens: int  # positions that were predicted, or samples where the model's own loss has no positions
    window: int | None
    stride: int | None
    text: str  # where the data came from
    fingerprint: str
    seconds: float
    dtype: str = ""  # of the model while it was measured, such as "bfloat16"
    max_windows: int | None = None  # None: all windows that the text gives
    seed: int | None = None  # of the masked positions; None where the figure depends on none

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def as_evaluation(
    sparse: Measurement, dense: Measurement | None = None, before_recovery: Measurement | None = None
) -> dict[str, Any]:
    """Measurements of one text as a report keeps them: the fields of model_cards.Evaluation."""
    told = {name: value for name, value in sparse.to_dict().items() if name not in ("value", "seconds")}
    return {
        "dense": dense.value if dense else None, "sparse": sparse.value,
        "before_recovery": before_recovery.value if before_recovery else None, **told, "versions": versions_in_words(),
    }  # fmt: skip


def dtype_of(model: nn.Module) -> str:
    """Number format of a model's weights, "" where it has none."""
    found = getattr(model, "dtype", None) or next((weight.dtype for weight in model.parameters()), "")
    return str(found).removeprefix("torch.")


def versions_in_words() -> str:
    """The libraries that a figure depends on: "torch 2.13.0, transformers 5.23.0"."""
    installed = environment.versions()
    return ", ".join(f"{name} {installed[name]}" for name in ("torch", "transformers"))


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    tokenizer: Any = None,
    window: int | None = None,
    stride: int | None = None,
    max_windows: int | None = None,
    seed: int = 0,
    same_text_allowed: bool = False,
) -> Measurement:
    """Measure a model on `data` (any form that calibration takes).

    A decoder-only language model gets its token perplexity: exp of the mean cross entropy in nats over all predicted tokens of
    windows of `window` tokens (default: 512, or less where the model allows less), each starting `stride` tokens behind the one
    before (default: no overlap; with overlap only tokens not yet predicted count). A masked model gets its loss on 15 % masked
    tokens, any other model the loss that it computes itself on data with labels.

    Raises: CalibrationError for data that do not fit, or that the model was calibrated on unless `same_text_allowed`.
    """
    limit = limits_of(unwrap(model)).length
    window = min(512, limit or 512) if window is None else window
    for name, value in {"window": window, "stride": stride, "max_windows": max_windows}.items():
        if value is not None:
            whole(name, value, 2 if name == "window" else 1)
    if limit and window > limit:
        raise ConfigError(f"window={window} is not allowed; give 2 to {limit} tokens.")
    if stride is not None and stride > window:
        raise ConfigError(f"stride={stride} is not allowed; give 1 to window={window}.")
    start = time.monotonic()
    samples = read_samples(
        data, tokenizer=tokenizer_of(unwrap(model), tokenizer), num_samples=1, sequence_length=window, limits=limits_of(unwrap(model)),
        all_rows=True, stride=stride,
    )  # fmt: skip
    _refuse_same(model, samples, same_text_allowed)
    rows = samples.rows[:max_windows] if max_windows else samples.rows
    kind = loss_kind(unwrap(model), rows[0])
    if stride is not None and samples.kind not in ("text", "stream"):
        raise ConfigError(
            f"stride={stride} needs one long text to cut; {samples.source} holds samples that are cut already."
        )
    lengths = {row["input_ids"].shape[-1] for row in rows if "input_ids" in row}
    mask_id = _mask_id(tokenizer_of(unwrap(model), tokenizer)()) if kind == "masked loss" else 0
    with ready(unwrap(model)):
        loss, tokens = _mean_loss(unwrap(model), rows, kind, stride, seed, mask_id)
    if not math.isfinite(loss):
        raise ModelError(f"the model's {kind} on {samples.source} is {loss}, so its weights or this dtype are broken.")
    figure = math.exp(min(loss, 700)) if kind == "perplexity" else loss
    used = lengths.pop() if kind != "loss" and len(lengths) == 1 else None
    return Measurement(
        kind, figure, tokens, used, (stride or used) if kind == "perplexity" else None, samples.source,
        fingerprint(rows), time.monotonic() - start, dtype=dtype_of(unwrap(model)),
        max_windows=max_windows if len(rows) < len(samples.rows) else None, seed=seed if kind == "masked loss" else None,
    )  # fmt: skip


def _refuse_same(model: nn.Module, samples: Samples, allowed: bool) -> None:
    known = report(model)
    used = set((known.calibration or {}).get("items", ())) if known else set()
    if not allowed and (common := used & set(samples.items)):
        raise CalibrationError(
            f"the model was calibrated on {len(common)} of the texts in {samples.source}, so a figure on it would flatter; "
            "evaluate on other text, or allow it explicitly."
        )


def loss_kind(model: nn.Module, row: Sample) -> str:
    """What is measured for a model on such data: "perplexity", "masked loss" or "loss"."""
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    generates = callable(getattr(model, "can_generate", None)) and model.can_generate()  # type: ignore[operator]
    if generates and not encoder_decoder and "input_ids" in row:
        return "perplexity"
    if type(model).__name__.endswith("ForMaskedLM") and "labels" not in row:
        return "masked loss"
    return "loss"


def _mask_id(tokenizer: Any) -> int:
    if getattr(tokenizer, "mask_token_id", None) is None:
        raise CalibrationError("a masked model needs a tokenizer with a mask token, or dicts that hold labels.")
    return int(tokenizer.mask_token_id)


def _mean_loss(
    model: nn.Module, rows: list[Sample], kind: str, stride: int | None, seed: int, mask_id: int
) -> tuple[float, int]:
    size = max(1, _TOKENS_AT_ONCE // max(row["input_ids"].numel() if "input_ids" in row else 512 for row in rows))
    generator = torch.Generator().manual_seed(seed)
    total, tokens = 0.0, 0
    for number, batch in enumerate(
        transformers_logging.tqdm(batches(rows, size), desc="Evaluating", unit="batch", leave=False)
    ):
        if kind == "masked loss":
            summed, counted = _masked_losses(model, batch, generator, mask_id)
        else:
            summed, counted = batch_loss(model, batch, kind, stride, first=number == 0)
        total, tokens = total + summed, tokens + counted
    if not tokens:
        raise CalibrationError("the data hold nothing to predict; give longer text.")
    return total / tokens, tokens


def batch_loss(
    model: nn.Module, batch: Batch, kind: str, stride: int | None = None, first: bool = True
) -> tuple[float, int]:
    """Summed loss of one batch and over how many tokens (or samples): cross entropy of tokens, or the model's own loss."""
    if kind == "perplexity":
        return _token_losses(model, batch, stride, first)
    return _own_loss(model, batch)


def _token_losses(model: nn.Module, batch: Batch, stride: int | None, first: bool) -> tuple[float, int]:
    ids = batch.values["input_ids"]
    logits = forward(model, {key: value for key, value in batch.values.items() if key != "labels"})().logits  # type: ignore[attr-defined]
    targets = ids[:, 1:].to(logits.device)
    losses = nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="none"
    ).view(targets.shape)
    if stride is not None and stride < ids.shape[1]:
        new = torch.zeros_like(losses, dtype=torch.bool)
        new[:, -stride:] = True
        if first:
            new[0] = True  # the very first window has no one before it
        losses = losses[new]
    return float(losses.double().sum()), losses.numel()


def _masked_losses(model: nn.Module, batch: Batch, generator: torch.Generator, mask_id: int) -> tuple[float, int]:
    ids = batch.values["input_ids"]
    hidden = torch.rand(ids.shape, generator=generator) < _MASKED_SHARE
    if not bool(hidden.any()):
        return 0.0, 0
    logits = forward(model, {**batch.values, "input_ids": ids.masked_fill(hidden, mask_id)})().logits  # type: ignore[attr-defined]
    losses = nn.functional.cross_entropy(
        logits[hidden.to(logits.device)].float(), ids[hidden].to(logits.device), reduction="sum"
    )
    return float(losses), int(hidden.sum())


def _own_loss(model: nn.Module, batch: Batch) -> tuple[float, int]:
    loss = getattr(forward(model, batch.values)(), "loss", None)
    if loss is None:
        raise CalibrationError(
            f"{type(model).__name__} has no token perplexity and computes no loss on data with the keys {sorted(batch.values)}; "
            "give dicts that hold labels."
        )
    labels = batch.values.get("labels")
    tokens = labels is not None and labels.ndim > 1 and not labels.is_floating_point()
    # The model's mean goes over its labels; weighting by their number makes the figure independent of the batches.
    counted = int((labels != -100).sum()) if tokens and labels is not None else len(batch.numbers)
    return float(loss) * counted, counted
