"""Prunes the sites of one block: scores, mask, updates, and what came of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from hf_sparse import division, ranks
from hf_sparse.blocks import Block
from hf_sparse.config import SparsityConfig
from hf_sparse.forwards import full_precision, norm
from hf_sparse.metrics import Inputs
from hf_sparse.observe import Operand, operand_of
from hf_sparse.plan import SitePlan
from hf_sparse.record import Recorder
from hf_sparse.registry import METRICS, UPDATES, Entry
from hf_sparse.report import SiteReport
from hf_sparse.sites import Site, count_zeros, read, write_
from hf_sparse.updates import Part, Problem, Solution


@dataclass(frozen=True)
class BlockPlan:
    """A block with what shall happen to its sites, and what was measured; `sites` are all its sites by name, targeted or not."""

    block: Block
    plans: list[SitePlan]
    sites: dict[str, Site]
    recorder: Recorder | None = None  # statistics of the sites' own inputs
    ahead: Recorder | None = None  # statistics of inputs that are not reached yet when a site is pruned; None: the same
    streams: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)  # site -> "drift" and "debt"


@dataclass
class _Chosen:
    """One site between its scores and its new weights."""

    plan: SitePlan
    stored: torch.Tensor  # (out, in) as the model holds it
    weight: torch.Tensor  # the same in at least fp32
    inputs: Inputs
    notes: list[str] = field(default_factory=list)


def prune_block(model: nn.Module, config: SparsityConfig, block_plan: BlockPlan) -> list[SiteReport]:
    """Prune the planned sites of a loaded block; the statistics are there before, so their order does not matter."""
    reports = {plan.site.name: _left_dense(model, block_plan, plan) for plan in block_plan.plans if plan.dense}
    groups = _by_input(block_plan, config)
    # Without data there is nothing to share, and what every process works out alike needs not be sent.
    divided = block_plan.recorder is not None
    owner = division.owners(groups, config.update != ("none",)) if divided else [ranks.rank()] * len(groups)
    for plans in (group for group, number in zip(groups, owner, strict=True) if number == ranks.rank()):
        # Scores are made of dense weights, so all of a group come before any is written.
        chosen = [_read(model, config, block_plan, plan) for plan in plans]
        with full_precision():
            solved = _updated(config, block_plan, chosen)
            for one, (weight, mask) in zip(chosen, solved, strict=True):
                reports[one.plan.site.name] = _written(model, block_plan, one, weight, mask)
    if divided:
        division.hand_out_(model, groups, owner, reports)
    return [reports[plan.site.name] for plan in block_plan.plans]


def _by_input(block_plan: BlockPlan, config: SparsityConfig) -> list[list[SitePlan]]:
    """Sites that share an input are solved together; without updates each is on its own, which takes less memory."""
    recorder = block_plan.recorder
    if recorder is None or config.update == ("none",):
        return [[plan] for plan in block_plan.plans if not plan.dense]
    groups: dict[Operand, list[SitePlan]] = {}
    for plan in (plan for plan in block_plan.plans if not plan.dense):
        operand = operand_of(plan.site)
        groups.setdefault(recorder.input_of.get(operand, operand), []).append(plan)
    return list(groups.values())


def on_rows(plan: SitePlan, value: torch.Tensor) -> torch.Tensor:
    """A norm of the consumer's input (in,) brought to the site's rows (out,); a row that several columns read counts with all."""
    rows = torch.tensor(plan.feed.rows if plan.feed else (), device=value.device)
    fed = rows >= 0
    target = value.new_zeros(plan.site.shape[0])
    if bool(fed.all()) and len(rows) == len(target) and len(torch.unique(rows)) == len(rows):
        return target.index_copy(0, rows, value)
    return target.index_add(0, rows[fed], value[fed] ** 2).sqrt()


def _consumer(plan: SitePlan, recorder: Recorder, sites: Mapping[str, Site]) -> dict[str, torch.Tensor]:
    """The statistics that the metric wants of the consumer's input, on the site's rows."""
    if plan.feed is None:
        return {}
    values = recorder.own(sites[plan.feed.consumer], plan.metric.consumer_needs)
    return {name: on_rows(plan, value) for name, value in values.items()}


def _measured(block_plan: BlockPlan, plan: SitePlan) -> tuple[SitePlan, Inputs]:
    """What the metric gets to see; a site that nothing was measured for is pruned by magnitude, and the plan says so."""
    recorder = block_plan.recorder
    if recorder is None:
        return plan, Inputs()
    own = recorder.own(plan.site, plan.metric.needs)
    consumer = _consumer(plan, block_plan.ahead or recorder, block_plan.sites)
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
    return replace(plan, metric=METRICS["magnitude"], feed=None, note=note), Inputs()


def _read(model: nn.Module, config: SparsityConfig, block_plan: BlockPlan, plan: SitePlan) -> _Chosen:
    plan, inputs = _measured(block_plan, plan)
    stored = read(model, plan.site)
    weight = stored if stored.dtype == torch.float64 else stored.float()
    inputs = Inputs(inputs.own, inputs.consumer, config.options_of(plan.metric.name))
    return _Chosen(plan, stored, weight, inputs, [plan.note] if plan.note else [])


def _scores(one: _Chosen, weight: torch.Tensor) -> torch.Tensor:
    scores: torch.Tensor = one.plan.metric.function(weight, one.inputs)  # type: ignore[assignment]
    return scores


def _updated(
    config: SparsityConfig, block_plan: BlockPlan, chosen: list[_Chosen]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """New weights and masks of sites that share an input."""
    parts, row = [], 0
    rounding = config.options_of("unstructured")["rounding"]
    for one in chosen:
        parts.append(Part(row, row + len(one.weight), one.plan.pattern, one.plan.sparsity, one.plan.axis, rounding))
        row += len(one.weight)
    target = _stacked([one.weight for one in chosen])
    statistics = _statistics(config, block_plan, chosen)
    problem = Problem(target, target, target[:0], None, statistics, tuple(parts))
    if not _chooses_itself(problem, config):
        problem = replace(problem, scores=_stacked([_scores(one, one.weight) for one in chosen]))
    for name in config.update:
        problem = _step(problem, name, config, chosen)
    for one in chosen:
        one.notes += problem.notes
    mask = problem.mask if problem.mask is not None else problem.choose(problem.scores)
    if problem.weight is target and len(chosen) == 1:
        return [(chosen[0].weight, mask)]
    return [(problem.weight[part.start : part.stop], mask[part.start : part.stop]) for part in parts]


def _chooses_itself(problem: Problem, config: SparsityConfig) -> bool:
    """Whether the first update that makes weights chooses the mask without scores, which then need not be worked out."""
    first = next((UPDATES[name] for name in config.update if not UPDATES[name].traits.get("sets_target")), None)
    return first is not None and first.traits.get("own_metric") == config.metric and not _missing(first, problem)


def _missing(entry: Entry[Any], problem: Problem) -> bool:
    """Whether something that an update needs was not measured."""
    return any(need not in problem.statistics or not problem.statistics[need].any() for need in entry.needs)


def _statistics(config: SparsityConfig, block_plan: BlockPlan, chosen: list[_Chosen]) -> dict[str, torch.Tensor]:
    """What was measured for the input that the sites share; what the rows of each shall make good stands one below the other."""
    needs = frozenset[str]().union(*(UPDATES[name].needs for name in config.update))
    if block_plan.recorder is None or not needs:
        return {}
    streams = [block_plan.streams.get(one.plan.site.name, {}) for one in chosen]
    found = {**block_plan.recorder.own(chosen[0].plan.site, needs), **streams[0]}
    if any("debt" in stream for stream in streams):
        none = [torch.zeros_like(one.weight, dtype=torch.float64) for one in chosen]
        found["debt"] = torch.cat([stream.get("debt", zero) for stream, zero in zip(streams, none, strict=True)])
    return found


def _stacked(matrices: list[torch.Tensor]) -> torch.Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices)


def _step(problem: Problem, name: str, config: SparsityConfig, chosen: list[_Chosen]) -> Problem:
    """The problem as one update leaves it."""
    entry = UPDATES[name]
    if entry.traits.get("runs_blocks"):
        return problem
    if _missing(entry, problem):
        problem.notes.append(f"no update by {name}: nothing was measured for its input")
        return problem
    own_choice = problem.mask is None and entry.traits.get("own_metric") == config.metric
    mask = problem.mask if problem.mask is not None or own_choice else problem.choose(problem.scores)
    solution: Solution = entry.function(replace(problem, mask=mask, options=config.options_of(name)))  # type: ignore[assignment]
    weight, mask = solution
    if not entry.traits.get("sets_target"):
        return replace(problem, weight=weight, mask=mask)
    problem = replace(problem, target=weight, weight=weight)
    if _chooses_itself(problem, config):
        return problem
    parts = zip(chosen, problem.parts, strict=True)
    return replace(problem, scores=_stacked([_scores(one, weight[part.start : part.stop]) for one, part in parts]))


def _written(
    model: nn.Module, block_plan: BlockPlan, one: _Chosen, weight: torch.Tensor, mask: torch.Tensor
) -> SiteReport:
    plan, site, recorder = one.plan, one.plan.site, block_plan.recorder
    kept = one.stored if weight is one.weight else weight.to(one.stored.dtype)
    if not bool(torch.isfinite(torch.where(mask, kept, 0)).all()):
        one.notes.append("the update gave values that are not finite here; the kept weights stay as they were")
        kept = one.stored
    # Adding zero turns -0.0 into 0.0, so that one rule, weight != 0, tells what is kept.
    new = torch.where(mask, kept, 0) + 0.0
    error = _site_error(one.stored, new, recorder.sample(site) if recorder else None)
    write_(model, site, new)
    zeros = count_zeros(new)
    extra = zeros - (mask.numel() - int(mask.sum()))
    if extra:
        one.notes.append(f"{extra} kept weights are zero and count as dropped")
    return SiteReport(
        name=site.name, block=block_plan.block.index, role=site.role, shape=site.shape, pattern=str(plan.pattern), axis=plan.axis,
        metric=plan.metric.name, zeros=zeros, sparsity=zeros / site.size, output_error=error,
        tokens=recorder.tokens(site) if recorder else None, note="; ".join(dict.fromkeys(one.notes)),
    )  # fmt: skip


def _left_dense(model: nn.Module, block_plan: BlockPlan, plan: SitePlan) -> SiteReport:
    """What the report says of a site that the allocation takes nothing from; its weights stay as they are."""
    site, recorder = plan.site, block_plan.recorder
    zeros = count_zeros(read(model, site))
    return SiteReport(
        name=site.name, block=block_plan.block.index, role=site.role, shape=site.shape, pattern="dense", axis=plan.axis,
        metric="none", zeros=zeros, sparsity=zeros / site.size, output_error=0.0 if recorder else None,
        tokens=recorder.tokens(site) if recorder else None, note="left dense by the allocation",
    )  # fmt: skip


def _site_error(dense: torch.Tensor, sparse: torch.Tensor, sample: torch.Tensor | None) -> float | None:
    if sample is None:
        return None
    sample = sample.to(dense.dtype)
    before = norm(sample @ dense.T)
    return norm(sample @ (dense - sparse).T) / before if before else None
