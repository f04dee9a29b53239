"""Tries allocations: prunes the model with each, scores it on samples held out of the calibration, and puts it back.

Statistics are taken anew for each candidate, on fewer samples than the final pruning has: behind the first block they depend on what
was pruned before. Taking them once from the dense model is cheaper and was tried; it misjudges steep allocations.
"""

import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

import torch

from hf_sparse.allocations import Shares
from hf_sparse.blockwise import Run, with_data
from hf_sparse.calibrate import forward, make_batches
from hf_sparse.data import Sample, tokens_of
from hf_sparse.errors import CalibrationError
from hf_sparse.evaluate import batch_loss, loss_kind
from hf_sparse.forwards import main_tensor, norm, walk
from hf_sparse.plan import needs
from hf_sparse.snapshot import Snapshot

_TOKENS = 4096  # enough for norms; a Gram matrix gets at least
_TOKENS_PER_INPUT = 4


class Trials:
    """Scores of allocations on held-out samples, lower is better."""

    def __init__(self, run: Run, rows: Sequence[Sample], held_out: Sequence[Sample], selector: str) -> None:
        self.run, self.selector = run, selector
        size = run.batch_size or "auto"
        self.batches, _ = make_batches(rows, size, run.token_budget)
        self.held_out, _ = make_batches(held_out, size, run.token_budget)
        self._few, _ = make_batches(self._enough(rows), size, run.token_budget)
        self._snapshot = Snapshot([block for block in run.inventory.blocks if block.index in run.chosen])
        self.number = 0  # of candidates tried
        self.pruning_seconds = 0.0  # CPU seconds of the last pruning on all samples
        if selector == "loss":
            self._kind = loss_kind(run.model, self.held_out[0].values)
            if self._kind == "masked loss":
                raise CalibrationError(
                    f"{type(run.model).__name__} has no loss on text without labels, so the search cannot go by it; give "
                    f'options={{"{run.config.allocation}": {{"selector": "alignment"}}}}, or calibration dicts with labels.'
                )
        self._dense = self._outputs() if selector == "alignment" else []

    def score(self, shares: Shares) -> float:
        """Prune with few samples, score, put back."""
        self.number += 1
        try:
            with_data(self._trial(shares), self._few)
            return self._score()
        finally:
            self.restore()

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
        return replace(self.run, shares=shares, notes=[], done={}, changed=[])

    def _enough(self, rows: Sequence[Sample]) -> list[Sample]:
        """The first samples that hold tokens enough for the statistics of the recipe."""
        run = self.run
        wanted = {
            name
            for block in run.inventory.blocks
            for names in needs(run.plans(block), {s.name: s for s in run.inventory.all()}, run.config.update).values()
            for name in names
        }
        widest = max(site.shape[1] for sites in run.chosen.values() for site in sites)
        due = max(_TOKENS, _TOKENS_PER_INPUT * widest if "gram" in wanted else 0)
        taken: list[Sample] = []
        for row in rows:
            if sum(map(tokens_of, taken)) >= due:
                break
            taken.append(row)
        return taken

    def _score(self) -> float:
        if self.selector == "alignment":
            return _misalignment(self._outputs(), self._dense)
        parts = [batch_loss(self.run.model, batch, self._kind) for batch in self.held_out]
        count = sum(number for _, number in parts)
        if not count:
            raise CalibrationError("the held-out samples hold nothing to predict; give longer ones.")
        mean = sum(total for total, _ in parts) / count
        return mean if math.isfinite(mean) else math.inf

    def _outputs(self) -> list[torch.Tensor]:
        """The hidden states that each call of each block gives on the held-out samples."""
        found = []
        passes = [forward(self.run.model, batch.values) for batch in self.held_out]
        with closing(walk(self.run.inventory.blocks, passes, self.run.survey.order())) as turns:
            for calls in turns:
                with calls[0].block.loaded(self.run.config.device):
                    for call in calls:
                        call.output = call(self.run.config.device)
                        output = main_tensor(call.output)
                        found.append(torch.empty(0) if output is None else output.cpu())
        return found


def _misalignment(found: Sequence[torch.Tensor], dense: Sequence[torch.Tensor]) -> float:
    """Mean over blocks and batches of ||sparse - dense|| / ||dense||, after NeuronAL (arXiv 2411.07066)."""
    pairs = [(one, other) for one, other in zip(found, dense, strict=True) if other.numel() and norm(other)]
    total = sum(norm(one.float() - other.float()) / norm(other) for one, other in pairs)
    return total / len(pairs) if pairs and math.isfinite(total) else math.inf
