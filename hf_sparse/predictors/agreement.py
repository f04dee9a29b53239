"""How well a predictor tells the true criterion: share of the right units found, and rank correlation, in every block."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from hf_sparse.calibrate import forward, ready
from hf_sparse.data import Batch
from hf_sparse.predictors.criteria import Scores, criterion_of, sees_labels
from hf_sparse.predictors.masked import Masked, masked
from hf_sparse.predictors.networks import Predictor
from hf_sparse.predictors.select import Selection, top
from hf_sparse.predictors.watch import NO_LABEL, Scorer, next_labels


@dataclass(frozen=True)
class Agreement:
    """One figure for each block that skips, averaged over tokens; None for units that the predictor does not tell.

    Both sides are taken from the dense model, so a predictor's inputs are better here than among its own choices.
    """

    recall_neurons: tuple[float | None, ...]  # share of the truly best units that are among those chosen
    recall_heads: tuple[float | None, ...]
    correlation_neurons: tuple[float | None, ...]  # Spearman's, over the units of one token
    correlation_heads: tuple[float | None, ...]

    def to_dict(self) -> dict[str, Any]:
        return {name: list(values) for name, values in asdict(self).items()}


def agreement(model: nn.Module, predictor: Predictor, batches: Sequence[Batch], selection: Selection) -> Agreement:
    """Compare a predictor's scores with the criterion on the same tokens, at the shares of a selection."""
    layout = predictor.layout
    scorer = Scorer(model, layout.units(model), criterion_of(predictor.criterion))
    sums = torch.zeros(4, len(layout.blocks), dtype=torch.float64)
    tokens = 0
    for batch in batches:
        true: dict[int, Scores] = {}
        with ready(model):
            scorer(batch.values, lambda index, scores, true=true: true.__setitem__(layout.blocks.index(index), scores))  # type: ignore[misc]
            with masked(model, predictor, Selection(keep_neurons=1.0, keep_heads=1.0), prompt="masked") as running:
                forward(model, {name: value for name, value in batch.values.items() if name != "labels"})()
        keep = (next_labels(batch.values) != NO_LABEL).flatten()
        keep = keep if sees_labels(scorer.criterion) else torch.ones_like(keep)
        sums += torch.stack([_compare(running, true[at], at, keep, selection) for at in range(len(layout.blocks))], 1)
        tokens += int(keep.sum())
    rows = [tuple(None if value != value else value for value in row) for row in (sums / tokens).tolist()]
    return Agreement(*rows)


def _compare(running: Masked, true: Scores, position: int, keep: torch.Tensor, selection: Selection) -> torch.Tensor:
    """Recall and correlation of one block, neurons before heads, summed over tokens; NaN where nothing is told."""
    layout, told = running.layout, running.scores.get(position, Scores(None, None))
    wanted = (layout.group(true.neurons), true.heads)  # type: ignore[arg-type]
    counts = [selection.kept(layout, kind)[position] for kind in ("neurons", "heads")]
    recalls, correlations = [], []
    for scores, truth, count in zip(told, wanted, counts):
        if scores is None or truth is None:
            recalls.append(float("nan"))
            correlations.append(float("nan"))
            continue
        scores, truth = scores.reshape(-1, scores.shape[-1])[keep], truth[keep]
        recalls.append(float((top(scores, count) & top(truth, count)).sum()) / count)
        correlations.append(float(spearman(scores, truth).sum()))
    return torch.tensor(recalls + correlations, dtype=torch.float64)


def spearman(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Rank correlation along the last dimension; equal values are ranked as they stand."""
    ranks = [values.argsort(-1).argsort(-1).float() for values in (one, other)]
    centred = [rank - rank.mean(-1, keepdim=True) for rank in ranks]
    lengths = centred[0].norm(dim=-1) * centred[1].norm(dim=-1)
    return (centred[0] * centred[1]).sum(-1) / lengths.clamp_min(1e-9)
