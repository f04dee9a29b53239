"""Measures predictors: perplexity when every token's units are chosen from what was seen so far, against the share kept."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from hf_sparse import native
from hf_sparse.calibrate import limits_of, ready, tokenizer_of
from hf_sparse.data import Batch, batches, fingerprint, read_samples, tokens_of
from hf_sparse.errors import CalibrationError, ConfigError
from hf_sparse.evaluate import batch_loss, versions_in_words
from hf_sparse.predictors.agreement import agreement
from hf_sparse.predictors.criteria import criterion_of, sees_labels
from hf_sparse.predictors.learned import Remembering, check_tokenizer
from hf_sparse.predictors.masked import masked
from hf_sparse.predictors.networks import Oracle, Predictor
from hf_sparse.predictors.select import Selection
from hf_sparse.predictors.speeds import DENSE, decoding_speeds
from hf_sparse.predictors.table import PredictorTable, Row
from hf_sparse.runtime.choices import processor
from hf_sparse.runtime.timing import clock_name

_TOKENS_AT_ONCE = 4096


def decode_loss(
    model: nn.Module,
    data: Sequence[Batch],
    predictor: Predictor | None = None,
    selection: Selection | None = None,
    *,
    refresh_every: int = 1,
) -> tuple[float, int]:
    """Mean cross entropy of the next token and the number of tokens, dense or with a mask for every token.

    One pass over a text gives what decoding it token by token would give: masks depend on the tokens up to their own only.
    """
    total, tokens = 0.0, 0
    with ready(model):
        running = (
            masked(model, predictor, selection or Selection(), refresh_every=refresh_every, prompt="masked")
            if predictor is not None
            else nullcontext()
        )
        with running:
            for batch in transformers_logging.tqdm(data, desc="Measuring", unit="batch", leave=False):
                summed, counted = batch_loss(model, batch, "perplexity")
                total, tokens = total + summed, tokens + counted
    if not tokens:
        raise CalibrationError(
            "the text holds no token to predict; give a longer one, and windows of at least 2 tokens."
        )
    return total / tokens, tokens


def read_batches(
    model: nn.Module, data: Any, *, tokenizer: Any = None, window: int = 512, max_windows: int | None = None
) -> tuple[list[Batch], dict[str, Any]]:
    """Text to measure on, in batches, and where it is from."""
    remembering = Remembering(tokenizer_of(model, tokenizer))
    samples = read_samples(
        data, tokenizer=remembering, num_samples=1, sequence_length=window, limits=limits_of(model), all_rows=True,
    )  # fmt: skip
    rows = samples.rows[:max_windows]
    if any("input_ids" not in row for row in rows):
        raise CalibrationError(f"predictors are measured on token ids; {samples.source} holds {sorted(rows[0])}.")
    size = max(1, _TOKENS_AT_ONCE // max(tokens_of(row) for row in rows))
    about = {
        "text": samples.source, "window": max(map(tokens_of, rows)), "windows": len(rows), "fingerprint": fingerprint(rows),
        "tokenizer": remembering.print,
    }  # fmt: skip
    return batches(rows, size), about


def evaluate_predictors(
    model: nn.Module,
    predictors: Mapping[str, Sequence[Predictor]],
    data: Any,
    selections: Sequence[Selection],
    *,
    tokenizer: Any = None,
    window: int = 512,
    max_windows: int | None = None,
    refresh_every: int = 1,
    with_agreement: bool = True,
    speed_tokens: int | None = None,
) -> PredictorTable:
    """A row for each predictor (several of one name differ in their seed) at each selection that it can serve.

    A selection is left out for a predictor that does not tell the units it skips, or not for all blocks at once where it is
    global; `find` on the table then raises. With `speed_tokens` so many tokens are generated, too, to tell how fast that is.

    Raises: ConfigError where there is nothing to measure; CalibrationError for a text that cannot be used, or predictors that
        learned from tokens of another tokenizer; ModelError for predictors of another model.
    """
    if not predictors or not selections:
        raise ConfigError("nothing to measure; give at least one predictor and one selection.")
    found, about = read_batches(model, data, tokenizer=tokenizer, window=window, max_windows=max_windows)
    for name, group in predictors.items():
        for one in group:
            check_tokenizer(one.learned, about["tokenizer"], f"the predictors {name!r}")
    dense, tokens = decode_loss(model, found)
    weights = sum(parameter.numel() for parameter in model.parameters())
    rows = [
        _row(model, name, group, found, selection, refresh_every, weights, with_agreement)
        for name, group in predictors.items()
        for selection in selections
        if serves(group[0], selection)
    ]
    about = {
        "model": type(model).__name__,
        **about,
        "refreshed": f"every {refresh_every} tokens",
        "versions": versions_in_words(),
    }
    table = PredictorTable(dense, tokens, tuple(rows), about)
    return (
        table
        if speed_tokens is None
        else _with_speeds(model, predictors, selections, table, refresh_every, speed_tokens)
    )


def _with_speeds(
    model: nn.Module, predictors: Mapping[str, Sequence[Predictor]], selections: Sequence[Selection], table: PredictorTable,
    every: int, tokens: int,
) -> PredictorTable:  # fmt: skip
    """The table with how fast tokens are generated, for all that can generate."""
    chosen = {
        (name, selection): (group[0], selection)
        for name, group in predictors.items()
        for selection in selections
        if serves(group[0], selection) and not isinstance(group[0], Oracle)
    }
    numbered = {str(number): way for number, way in enumerate(chosen.values())}
    found = decoding_speeds(model, numbered, refresh_every=every, new_tokens=tokens)
    speeds = dict(zip(chosen, (found[number] for number in numbered)))
    rows = [
        replace(row, tokens_per_second=speed.tokens_per_second, share_of_time=speed.share_of_time)
        if (speed := speeds.get((row.name, _selection_of(row, selections)))) is not None
        else row
        for row in table.rows
    ]
    machine = f"{processor()}, kernels {native.instruction_set()}, threads {torch.get_num_threads()}, {clock_name()}"
    return replace(
        table, rows=tuple(rows), dense_tokens_per_second=found[DENSE].tokens_per_second, about={**table.about, "machine": machine}
    )  # fmt: skip


def _selection_of(row: Row, selections: Sequence[Selection]) -> Selection:
    told = (row.keep_neurons, row.keep_heads, row.mode)
    return next(one for one in selections if (one.keep_neurons, one.keep_heads, one.mode) == told)


def serves(predictor: Predictor, selection: Selection) -> bool:
    """Whether a predictor can choose what a selection asks for."""
    told = set(predictor.tells) | ({"neurons"} if predictor.kind == "gate_first" else set())
    kinds = {kind for kind in ("neurons", "heads") if getattr(selection, f"keep_{kind}") != 1}
    at_once = predictor.kind != "gate_first" and len(predictor.reads()) <= 1
    return kinds <= told and (at_once or not selection.needs_all_blocks())


def _row(
    model: nn.Module, name: str, group: Sequence[Predictor], data: list[Batch], selection: Selection, every: int, weights: int,
    with_agreement: bool,
) -> Row:  # fmt: skip
    first = group[0]
    losses = [decode_loss(model, data, one, selection, refresh_every=every)[0] for one in group]
    return Row(
        name, first.kind, first.criterion, selection.keep_neurons, selection.keep_heads, selection.mode, tuple(losses),
        first.weight_count() / weights, isinstance(first, Oracle) and sees_labels(criterion_of(first.criterion)),
        agreement(model, first, data, selection) if with_agreement else None,
    )  # fmt: skip
