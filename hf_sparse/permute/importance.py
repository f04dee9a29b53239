"""What N:M pruning would weigh against each other in the dense model: its metric's scores, after one pass over the data."""

from collections.abc import Mapping, Sequence
from contextlib import closing

import torch
from transformers.utils import logging as transformers_logging

from hf_sparse.blocks import Block
from hf_sparse.blockwise import Run
from hf_sparse.calibrate import forward
from hf_sparse.data import Batch
from hf_sparse.forwards import walk
from hf_sparse.metrics import Inputs
from hf_sparse.observe import Operand, operand_of
from hf_sparse.plan import SitePlan
from hf_sparse.record import Recorder
from hf_sparse.registry import METRICS
from hf_sparse.sites import read

Norms = Mapping[str, torch.Tensor]  # site name -> norm of its input


def measure_norms(run: Run, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
    """The norms of all inputs in the dense model; nothing is run for a metric that looks at no data."""
    plans = [plan for block in run.inventory.blocks for plan in run.plans(block)]
    if not any(plan.metric.needs or plan.metric.consumer_needs for plan in plans):
        return {}
    recorders: dict[int, Recorder] = {}
    norms: dict[str, torch.Tensor] = {}
    left = {index: run.survey.expected(index, batches) for index in run.chosen}
    passes = [forward(run.model, batch.values) for batch in batches]
    with (
        transformers_logging.tqdm(total=len(left), desc="Measuring", unit="block") as bar,
        closing(walk(run.inventory.blocks, passes, run.survey.order())) as turns,
    ):
        for calls in turns:
            block = calls[0].block
            recorder = recorders.setdefault(block.index, _recorder(run, block))
            with block.loaded(run.config.device):
                for call in calls:
                    with recorder.listening(run.model, run.inventory.sites[block.index], batches[call.batch]):
                        call.output = call(run.config.device)
            left[block.index] = left.get(block.index, 0) - len(calls)
            if left[block.index] <= 0:
                norms |= _closed(run, block, recorders.pop(block.index))
                bar.update(int(block.index in run.chosen))
            del calls
            if all(count <= 0 for count in left.values()):
                break
    return norms


def _recorder(run: Run, block: Block) -> Recorder:
    wanted: dict[Operand, set[str]] = {operand_of(site): {"norm"} for site in run.inventory.sites[block.index]}
    return Recorder(run.inventory.sites[block.index], wanted, 1)


def _closed(run: Run, block: Block, recorder: Recorder) -> dict[str, torch.Tensor]:
    owned = {site.name: recorder.own(site).get("norm") for site in run.inventory.sites[block.index]}
    return {name: norm for name, norm in owned.items() if norm is not None and bool(norm.any())}


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
        {} if consumer is None else {"norm": _on_rows(plan, consumer).to(weight.device)},
        run.config.options_of(entry.name),
    )
    scores: torch.Tensor = entry.function(weight, inputs)  # type: ignore[assignment]
    return scores


def _on_rows(plan: SitePlan, norm: torch.Tensor) -> torch.Tensor:
    rows = torch.tensor(plan.feed.rows if plan.feed else (), device=norm.device)
    fed = rows >= 0
    return norm.new_zeros(plan.site.shape[0]).index_add(0, rows[fed], norm[fed] ** 2).sqrt()
