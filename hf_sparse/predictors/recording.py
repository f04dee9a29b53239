"""Runs the dense model over text and streams traces to files: a few bytes for each token and unit, in bounded memory."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.lib.format import open_memmap
from safetensors.torch import save_file
from torch import nn
from transformers.utils import logging as transformers_logging

from hf_sparse.blocks import find_blocks
from hf_sparse.calibrate import limits_of, ready, tokenizer_of
from hf_sparse.data import Batch, Sample, batches, read_samples, tokens_of
from hf_sparse.errors import CalibrationError
from hf_sparse.forwards import main_tensor
from hf_sparse.predictors.criteria import Scores, criterion_of, sees_labels
from hf_sparse.predictors.layout import Layout
from hf_sparse.predictors.learned import Remembering
from hf_sparse.predictors.traces import FILE, STATISTICS, About, Traces, bytes_per_token
from hf_sparse.predictors.units import BlockUnits, module_of
from hf_sparse.predictors.watch import NO_LABEL, Scorer, next_labels, rows_of

MOST_BYTES = 8 * 2**30
_TOKENS_AT_ONCE = 1024  # with gradients the activations of a whole batch stay in memory
_LARGEST = 65504.0  # of float16


def record(
    model: nn.Module,
    data: Any,
    folder: str | Path,
    *,
    criterion: str = "magnitude",
    layout: Layout | None = None,
    inputs: Sequence[int] | None = None,
    tokenizer: Any = None,
    num_samples: int | None = None,
    sequence_length: int = 512,
    seed: int = 0,
    most_bytes: int = MOST_BYTES,
) -> Traces:
    """Run the dense model over `data` (any form that calibration takes) and write what predictors learn from.

    `inputs` names the blocks whose input is recorded (default: of all that skip, which serves every kind of predictor);
    without `num_samples` all of the data is taken.

    Raises: CalibrationError where the traces would take more than `most_bytes`, or the data do not fit the model.
    """
    layout = layout or Layout.of(model)
    inputs = tuple(sorted(set(layout.blocks if inputs is None else inputs)))
    units = layout.units(model)
    remembering = Remembering(tokenizer_of(model, tokenizer))
    samples = read_samples(
        data, tokenizer=remembering, num_samples=num_samples or 1, sequence_length=sequence_length,
        seed=seed, limits=limits_of(model), all_rows=num_samples is None,
    )  # fmt: skip
    counts = tuple(_recorded(row, criterion) for row in samples.rows)
    _refuse_too_much(sum(counts), bytes_per_token(layout, inputs), most_bytes)
    about = About(layout.to_dict(), criterion, inputs, counts, samples.source, samples.fingerprint, remembering.print)
    writer = _Writer(Path(folder), layout, about, units)
    with ready(model):
        writer.run(Scorer(model, units, criterion_of(criterion)), samples.rows)
    return Traces(folder)


def _recorded(row: Sample, criterion: str) -> int:
    """How many tokens of a row are recorded: all, or those with a label where the criterion looks at labels."""
    if "input_ids" not in row:
        raise CalibrationError(f"predictors learn from token ids; the data hold {sorted(row)}.")
    return int((next_labels(row) != NO_LABEL).sum()) if sees_labels(criterion_of(criterion)) else tokens_of(row)


def _refuse_too_much(tokens: int, each: int, most: int) -> None:
    if not tokens:
        raise CalibrationError("the data hold no token to record; give longer texts.")
    if tokens * each > most:
        raise CalibrationError(
            f"traces of {tokens} tokens take {tokens * each} bytes ({each} a token), {most} are allowed; "
            f"take {max(1, most // each)} tokens (num_samples, sequence_length), larger neuron blocks, or raise most_bytes."
        )


class _Writer:
    """Writes batches behind one another into mapped arrays and keeps sums for the averages."""

    def __init__(self, folder: Path, layout: Layout, about: About, units: list[BlockUnits]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._layout, self._about, self._units = folder, layout, about, units
        self._tokens = sum(about.sequences)
        self._inputs = {block: self._open(f"input.{block}", layout.hidden_size) for block in about.inputs}
        widths = [groups + heads for groups, heads in zip(layout.groups, layout.heads)]
        self._scores = [self._open(f"scores.{at}", width) for at, width in enumerate(widths)]
        self._sums = [torch.zeros(width, dtype=torch.float64) for width in widths]
        self._up = [torch.zeros(block.neurons, dtype=torch.float64) for block in units if block.gate]
        self._scales = torch.zeros(len(widths), 2)
        self._at, self._seen = 0, 0
        self._keep = torch.zeros(0)

    def _open(self, name: str, width: int) -> Any:
        return open_memmap(self._folder / f"{name}.npy", mode="w+", dtype=numpy.float16, shape=(self._tokens, width))

    def run(self, scorer: Scorer, rows: list[Sample]) -> None:
        size = max(1, _TOKENS_AT_ONCE // max(tokens_of(row) for row in rows))
        handles = list(self._hooks(scorer.model))
        try:
            # Rows of equal length are joined, so sequences are written in the order of the batches.
            order: list[int] = []
            for batch in transformers_logging.tqdm(batches(rows, size), desc="Recording", unit="batch", leave=False):
                self._batch(scorer, batch)
                order.extend(batch.numbers)
        finally:
            for handle in handles:
                handle.remove()
        self._finish([self._about.sequences[number] for number in order])

    def _batch(self, scorer: Scorer, batch: Batch) -> None:
        labelled = (next_labels(batch.values) != NO_LABEL).flatten()
        self._keep = labelled if sees_labels(scorer.criterion) else torch.ones_like(labelled)
        scorer(batch.values, self._take)
        self._at += int(self._keep.sum())
        self._seen += self._keep.numel()

    def _take(self, index: int, scores: Scores) -> None:
        position = self._layout.blocks.index(index)
        keep = self._keep.to(scores[0].device)  # type: ignore[union-attr]
        parts = [self._layout.group(scores.neurons)[keep], scores.heads[keep]]  # type: ignore[arg-type,index]
        values = torch.cat(parts, -1)
        self._sums[position] += values.double().sum(0).cpu()
        if not self._at:  # the first batch tells how large values are: gradients are far below what float16 can hold
            self._scales[position] = torch.tensor([float(part.mean()) or 1.0 for part in parts])
        scaled = torch.cat([part / float(scale) for part, scale in zip(parts, self._scales[position])], -1)
        self._put(self._scores[position], scaled)

    def _put(self, array: Any, values: torch.Tensor) -> None:
        array[self._at : self._at + len(values)] = values.float().clamp(-_LARGEST, _LARGEST).cpu().numpy()

    def _hooks(self, model: nn.Module) -> Iterator[Any]:
        blocks = find_blocks(model)
        for block in self._about.inputs:
            yield blocks[block].module.register_forward_pre_hook(self._look_in(block), with_kwargs=True)
        for at, unit in enumerate(unit for unit in self._units if unit.gate):
            yield module_of(model, unit.up).register_forward_hook(self._look_up(at, unit))

    def _look_in(self, block: int) -> Any:
        def look(_: nn.Module, args: Any, kwargs: Any) -> None:
            hidden = main_tensor((args, kwargs))
            if hidden is not None:
                flat = hidden.detach().flatten(0, -2)
                self._put(self._inputs[block], flat[self._keep.to(flat.device)])

        return look

    def _look_up(self, at: int, block: BlockUnits) -> Any:
        def look(_: nn.Module, args: Any, product: torch.Tensor) -> None:
            self._up[at] += rows_of(product.detach(), block.up).double().square().sum(0).cpu()

        return look

    def _finish(self, sequences: list[int]) -> None:
        for array in [*self._inputs.values(), *self._scores]:
            array.flush()
        tensors = {"stored_scales": self._scales}
        for at, (total, groups) in enumerate(zip(self._sums, self._layout.groups)):
            mean = (total / self._tokens).float()
            tensors |= {f"neurons.{at}": mean[:groups].clone(), f"heads.{at}": mean[groups:].clone()}
        tensors |= {f"up.{at}": (total / self._seen).sqrt().float() for at, total in enumerate(self._up)}
        save_file(tensors, self._folder / STATISTICS)
        fields = {**asdict(self._about), "sequences": sequences}
        (self._folder / FILE).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
