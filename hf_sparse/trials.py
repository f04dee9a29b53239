"""Tries allocations: prunes the model with each, scores it on samples held out of the calibration, and puts it back.

Statistics are taken anew for each candidate, on fewer samples than the final pruning has: behind the first block they depend on what
was pruned before. Taking them once from the dense model is cheaper and was tried; it misjudges steep allocations.
"""

import math
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace

import torch

from hf_sparse.allocations import Shares
from hf_sparse.blockwise import Run, with_data
from hf_sparse.calibrate import Kind, forward, kind_of, make_batches
from hf_sparse.data import Sample, tokens_of
from hf_sparse.errors import CalibrationError
from hf_sparse.evaluate import batch_loss, loss_kind
from hf_sparse.forwards import main_tensor, norm, put_aside, walk
from hf_sparse.plan import needs
from hf_sparse.snapshot import Snapshot

_TOKENS = 4096  # enough for norms; a Gram matrix gets at least
_TOKENS_PER_INPUT = 4


def by_kind(rows: Sequence[Sample]) -> list[list[int]]:
    """The positions of the samples of each kind, kinds in the order of their first sample."""
    found: dict[Kind, list[int]] = {}
    for position, row in enumerate(rows):
        found.setdefault(kind_of(row), []).append(position)
    return list(found.values())


class Trials:
    """Scores of allocations on held-out samples, lower is better.

    They take the blocks' weights once more in memory and, for the selector "alignment", what each block of the dense model gives on the
    held-out samples (blocks * held-out tokens * hidden size numbers); both on the CPU. What a candidate gives is compared block by block.
    """

    def __init__(self, run: Run, rows: Sequence[Sample], held_out: Sequence[Sample], selector: str) -> None:
        self.run, self.selector = run, selector
        size = run.batch_size or "auto"
        self.batches, _ = make_batches(rows, size, run.token_budget)
        self.held_out, _ = make_batches(held_out, size, run.token_budget)
        self._few, _ = make_batches(self._enough(rows), size, run.token_budget)
        self.number = 0  # of candidates tried
        self.pruning_seconds = 0.0  # CPU seconds of the last pruning on all samples
        if selector == "loss":
            self._check_loss()
        # Copies, as the model may go on to write into what a block gave.
        self._dense = [put_aside(output) for output in self._outputs()] if selector == "alignment" else []
        self._snapshot = Snapshot([block for block in run.inventory.blocks if block.index in run.chosen])

    def score(self, shares: Shares) -> float:
        """Prune with few samples, score, put back."""
        self.number += 1
        diary = self.run.diary
        if diary is not None and (known := diary.score(shares)) is not None:
            return known
        try:
            with_data(self._trial(shares), self._few)
            found = self._score()
        finally:
            self.restore()
        if diary is not None:
            diary.scored(shares, found)
        return found

    def real(self, shares: Shares) -> tuple[Run, float]:
        """Prune on all samples and score; the run may be kept as the result, else call `restore`."""
        trial, start = self._trial(shares), time.process_time()
        with_data(trial, self.batches)
        self.pruning_seconds = time.process_time() - start
        return trial, self._score()

    def restore(self) -> None:
        """Make the model dense again."""
        self._snapshot.restore()

    def _trial(self, shares: Shares) -> Run:
        return replace(self.run, shares=shares, notes=[], done={}, changed=[], diary=None)

    def _enough(self, rows: Sequence[Sample]) -> list[Sample]:
        """The first samples of each kind that hold tokens enough for the statistics of the recipe."""
        due, taken = self._due(), set()
        for positions in by_kind(rows):
            tokens = 0
            for position in positions:
                if tokens >= due:
                    break
                taken.add(position)
                tokens += tokens_of(rows[position])
        return [row for position, row in enumerate(rows) if position in taken]

    def _due(self) -> int:
        run = self.run
        wanted = {
            name
            for block in run.inventory.blocks
            for names in needs(run.plans(block), {s.name: s for s in run.inventory.all()}, run.config.update).values()
            for name in names
        }
        widest = max(site.shape[1] for sites in run.chosen.values() for site in sites)
        return max(_TOKENS, _TOKENS_PER_INPUT * widest if "gram" in wanted else 0)

    def _check_loss(self) -> None:
        """Refuse samples on which the dense model has no loss, before anything is pruned."""
        model, reason = self.run.model, None
        kinds = {loss_kind(model, batch.values) for batch in self.held_out}
        try:
            if "masked loss" not in kinds and math.isfinite(self._loss()):
                return
        except CalibrationError as error:  # the model computes none
            reason = error
        raise CalibrationError(
            f"{type(model).__name__} gives no finite loss on the held-out samples (text without labels, say), so the search cannot go "
            f'by it; give options={{"{self.run.config.allocation}": {{"selector": "alignment"}}}}, or calibration dicts with labels.'
        ) from reason

    def _score(self) -> float:
        return self._misalignment() if self.selector == "alignment" else self._loss()

    def _loss(self) -> float:
        """The mean over all that is predicted in the held-out samples, each batch by its own kind of loss."""
        model = self.run.model
        parts = [batch_loss(model, batch, loss_kind(model, batch.values)) for batch in self.held_out]
        count = sum(number for _, number in parts)
        if not count:
            return math.inf
        # A batch without anything to predict has no mean, so its loss may be NaN.
        mean = sum(total for total, number in parts if number) / count
        return mean if math.isfinite(mean) else math.inf

    def _misalignment(self) -> float:
        """Mean over blocks and batches of ||sparse - dense|| / ||dense||, after NeuronAL (arXiv 2411.07066)."""
        errors = []
        with closing(self._outputs()) as outputs:
            for one, other in zip(outputs, self._dense, strict=True):
                if other.numel() and (size := norm(other)):
                    errors.append(norm(one.float() - other.float()) / size)
        mean = sum(errors) / len(errors) if errors else math.inf
        return mean if math.isfinite(mean) else math.inf

    def _outputs(self) -> Generator[torch.Tensor, None, None]:
        """The hidden states that each call of each block gives on the held-out samples, one after the other."""
        passes = [forward(self.run.model, batch.values) for batch in self.held_out]
        with closing(walk(self.run.inventory.blocks, passes, self.run.survey.order())) as turns:
            for calls in turns:
                with calls[0].block.loaded(self.run.config.device):
                    for call in calls:
                        call.output = call(self.run.config.device)
                        output = main_tensor(call.output)
                        yield torch.empty(0) if output is None else output.cpu()
