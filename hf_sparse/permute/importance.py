"""What N:M pruning would weigh against each other in the dense model: its metric's scores, after one pass over the data."""

from collections.abc import Mapping, Sequence

import torch

from hf_sparse.apply import on_rows
from hf_sparse.blockwise import Run
from hf_sparse.data import Batch
from hf_sparse.measure import dense_recorders
from hf_sparse.metrics import Inputs
from hf_sparse.plan import SitePlan
from hf_sparse.registry import METRICS
from hf_sparse.sites import read

Norms = Mapping[str, torch.Tensor]  # site name -> norm of its input


def measure_norms(run: Run, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
    """The norms of all inputs in the dense model; nothing is run for a metric that looks at no data."""
    plans = [plan for block in run.inventory.blocks for plan in run.plans(block)]
    if not any(plan.metric.needs or plan.metric.consumer_needs for plan in plans):
        return {}
    found: dict[str, torch.Tensor] = {}
    for block, recorder in dense_recorders(run, batches, run.inventory.sites, ("norm",)):
        for site in run.inventory.sites[block.index]:
            norm = recorder.own(site).get("norm")
            if norm is not None and bool(norm.any()):
                found[site.name] = norm
    return found


def importance(run: Run, plan: SitePlan, norms: Norms) -> torch.Tensor:
    """Scores (out, in) in the dense model.

    A metric that needs more than norms is stood in for by wanda, and one whose norms are missing by magnitude.
    """
    weight = read(run.model, plan.site).float()
    entry = plan.metric if plan.metric.needs | plan.metric.consumer_needs <= {"norm"} else METRICS["wanda"]
    own, consumer = norms.get(plan.site.name), norms.get(plan.feed.consumer) if plan.feed else None
    if (entry.needs and own is None) or (entry.consumer_needs and consumer is None):
        entry = METRICS["magnitude"]
    inputs = Inputs(
        {} if own is None else {"norm": own.to(weight.device)},
        {} if consumer is None else {"norm": on_rows(plan, consumer).to(weight.device)},
        run.config.options_of(entry.name),
    )
    scores: torch.Tensor = entry.function(weight, inputs)  # type: ignore[assignment]
    return scores
