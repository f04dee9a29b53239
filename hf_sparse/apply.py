"""Prunes the sites of one block: scores, mask, update, and what came of it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from hf_sparse.blocks import Block
from hf_sparse.config import SparsityConfig
from hf_sparse.forwards import norm
from hf_sparse.metrics import Inputs
from hf_sparse.patterns import Pattern
from hf_sparse.plan import SitePlan
from hf_sparse.record import Recorder
from hf_sparse.registry import METRICS, UPDATES
from hf_sparse.report import SiteReport
from hf_sparse.sites import Site, count_zeros, read, write_


@dataclass(frozen=True)
class BlockPlan:
    """A block with what shall happen to its sites; `sites` are all its sites by name, targeted or not."""

    block: Block
    plans: list[SitePlan]
    sites: dict[str, Site]


def prune_block(
    model: nn.Module, config: SparsityConfig, block_plan: BlockPlan, recorder: Recorder | None
) -> list[SiteReport]:
    """Prune the targeted sites of a loaded block; the statistics are the dense block's, whatever order the sites come in."""
    return [_prune_site(model, config, block_plan, plan, recorder) for plan in block_plan.plans]


def _consumer(plan: SitePlan, recorder: Recorder, sites: Mapping[str, Site]) -> dict[str, torch.Tensor]:
    """The consumer's norm brought to the site's rows; a row that several columns read counts with all of them."""
    if plan.feed is None:
        return {}
    values = recorder.own(sites[plan.feed.consumer])
    rows = torch.tensor(plan.feed.rows, device=next(iter(values.values())).device) if values else torch.empty(0)
    fed = rows >= 0
    one_to_one = bool(fed.all()) and len(rows) == plan.site.shape[0] and len(torch.unique(rows)) == len(rows)
    found = {}
    for name, value in values.items():
        target = value.new_zeros(plan.site.shape[0])
        found[name] = (
            target.index_copy(0, rows, value) if one_to_one else target.index_add(0, rows[fed], value[fed] ** 2).sqrt()
        )
    return found


def _measured(plan: SitePlan, recorder: Recorder | None, sites: Mapping[str, Site]) -> tuple[SitePlan, Inputs]:
    """What the metric gets to see; a site that nothing was measured for is pruned by magnitude, and the plan says so."""
    if recorder is None:
        return plan, Inputs()
    own, consumer = recorder.own(plan.site), _consumer(plan, recorder, sites)
    measured = plan.metric.needs <= set(own) and plan.metric.consumer_needs <= set(consumer)
    # An input of nothing but zeros tells no weight from another; batched experts without tokens get such.
    if measured and all(bool(value.any()) for value in (*own.values(), *consumer.values())):
        return plan, Inputs(own, consumer)
    why = (
        "no calibration token reached this expert"
        if plan.site.expert is not None or "expert" in plan.site.module
        else "its input was not seen during calibration"
    )
    note = f"magnitude instead of {plan.metric.name}: {why}"
    return SitePlan(plan.site, METRICS["magnitude"], plan.axis, plan.sparsity, None, note), Inputs()


def _prune_site(
    model: nn.Module, config: SparsityConfig, block_plan: BlockPlan, plan: SitePlan, recorder: Recorder | None
) -> SiteReport:
    plan, inputs = _measured(plan, recorder, block_plan.sites)
    site, pattern = plan.site, Pattern.parse(config.pattern)
    stored = read(model, site)
    weight = stored if stored.dtype == torch.float64 else stored.float()
    inputs = Inputs(inputs.own, inputs.consumer, config.options_of(plan.metric.name))
    scores: torch.Tensor = plan.metric.function(weight, inputs)  # type: ignore[assignment]
    mask = pattern.mask(scores, plan.sparsity, plan.axis, config.options_of("unstructured")["rounding"])
    for name in config.update:
        weight, mask = UPDATES[name].function(weight, scores, mask, inputs.own, pattern, plan.sparsity, plan.axis)  # type: ignore[misc]
    kept = stored if config.update == ("none",) else weight.to(stored.dtype)
    # Adding zero turns -0.0 into 0.0, so that one rule, weight != 0, tells what is kept.
    new = torch.where(mask, kept, 0) + 0.0
    error = _site_error(stored, new, recorder.sample(site) if recorder else None)
    write_(model, site, new)
    zeros = count_zeros(new)
    extra = zeros - (mask.numel() - int(mask.sum()))
    notes = [plan.note] if plan.note else []
    if extra:
        notes.append(f"{extra} kept weights are zero and count as dropped")
    return SiteReport(
        name=site.name, block=block_plan.block.index, role=site.role, shape=site.shape, pattern=str(pattern), axis=plan.axis,
        metric=plan.metric.name, zeros=zeros, sparsity=zeros / site.size, output_error=error,
        tokens=recorder.tokens(site) if recorder else None, note="; ".join(notes),
    )  # fmt: skip


def _site_error(dense: torch.Tensor, sparse: torch.Tensor, sample: torch.Tensor | None) -> float | None:
    if sample is None:
        return None
    sample = sample.to(dense.dtype)
    before = norm(sample @ dense.T)
    return norm(sample @ (dense - sparse).T) / before if before else None
