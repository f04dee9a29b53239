"""Prunes the sites of one block: scores, mask, updates, and what came of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from hf_sparse.blocks import Block
from hf_sparse.config import SparsityConfig
from hf_sparse.forwards import norm
from hf_sparse.metrics import Inputs
from hf_sparse.observe import Operand, operand_of
from hf_sparse.plan import SitePlan
from hf_sparse.record import Recorder
from hf_sparse.registry import METRICS, UPDATES
from hf_sparse.report import SiteReport
from hf_sparse.sites import Site, count_zeros, read, write_
from hf_sparse.updates import Part, Problem, Solution


@dataclass(frozen=True)
class BlockPlan:
    """A block with what shall happen to its sites; `sites` are all its sites by name, targeted or not."""

    block: Block
    plans: list[SitePlan]
    sites: dict[str, Site]


@dataclass
class _Chosen:
    """One site between its scores and its new weights."""

    plan: SitePlan
    stored: torch.Tensor  # (out, in) as the model holds it
    weight: torch.Tensor  # the same in at least fp32
    scores: torch.Tensor
    statistics: Mapping[str, torch.Tensor]
    notes: list[str] = field(default_factory=list)


def prune_block(
    model: nn.Module, config: SparsityConfig, block_plan: BlockPlan, recorder: Recorder | None
) -> list[SiteReport]:
    """Prune the targeted sites of a loaded block; the statistics are the dense block's, whatever order the sites come in."""
    reports: dict[str, SiteReport] = {}
    for plans in _by_input(block_plan.plans, recorder, config):
        # Scores are made of dense weights, so all of a group come before any is written.
        chosen = [_scored(model, config, block_plan, plan, recorder) for plan in plans]
        for one, (weight, mask) in zip(chosen, _updated(config, chosen), strict=True):
            reports[one.plan.site.name] = _written(model, config, block_plan.block, one, weight, mask, recorder)
    return [reports[plan.site.name] for plan in block_plan.plans]


def _by_input(plans: Sequence[SitePlan], recorder: Recorder | None, config: SparsityConfig) -> list[list[SitePlan]]:
    """Sites that share an input are solved together; without updates each is on its own, which takes less memory."""
    if recorder is None or config.update == ("none",):
        return [[plan] for plan in plans]
    groups: dict[Operand, list[SitePlan]] = {}
    for plan in plans:
        operand = operand_of(plan.site)
        groups.setdefault(recorder.input_of.get(operand, operand), []).append(plan)
    return list(groups.values())


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
    return replace(plan, metric=METRICS["magnitude"], feed=None, note=note), Inputs()


def _scored(
    model: nn.Module, config: SparsityConfig, block_plan: BlockPlan, plan: SitePlan, recorder: Recorder | None
) -> _Chosen:
    plan, inputs = _measured(plan, recorder, block_plan.sites)
    stored = read(model, plan.site)
    weight = stored if stored.dtype == torch.float64 else stored.float()
    inputs = Inputs(inputs.own, inputs.consumer, config.options_of(plan.metric.name))
    scores: torch.Tensor = plan.metric.function(weight, inputs)  # type: ignore[assignment]
    statistics = recorder.own(plan.site) if recorder else {}
    return _Chosen(plan, stored, weight, scores, statistics, [plan.note] if plan.note else [])


def _updated(config: SparsityConfig, chosen: list[_Chosen]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """New weights and masks of sites that share an input."""
    parts, row = [], 0
    for one in chosen:
        out = len(one.weight)
        rounding = config.options_of("unstructured")["rounding"]
        parts.append(Part(row, row + out, one.plan.pattern, one.plan.sparsity, one.plan.axis, rounding))
        row += out
    target = _stacked([one.weight for one in chosen])
    problem = Problem(
        target, target, _stacked([one.scores for one in chosen]), None, chosen[0].statistics, tuple(parts)
    )
    for number, name in enumerate(config.update):
        problem = _step(problem, name, config, first=number == 0)
    for one in chosen:
        one.notes += problem.notes
    mask = problem.mask if problem.mask is not None else problem.choose(problem.scores)
    return [(problem.weight[part.start : part.stop], mask[part.start : part.stop]) for part in parts]


def _stacked(matrices: list[torch.Tensor]) -> torch.Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices)


def _step(problem: Problem, name: str, config: SparsityConfig, first: bool) -> Problem:
    """The problem as one update leaves it."""
    entry = UPDATES[name]
    if entry.traits.get("runs_blocks"):
        return problem
    mask = problem.mask
    if mask is None and not (first and entry.traits.get("own_metric") == config.metric):
        mask = problem.choose(problem.scores)
    missing = {need for need in entry.needs if need not in problem.statistics or not problem.statistics[need].any()}
    if missing:
        problem.notes.append(f"no update by {name}: nothing was measured for its input")
        return replace(problem, mask=mask if mask is not None else problem.choose(problem.scores))
    solution: Solution = entry.function(replace(problem, mask=mask, options=config.options_of(name)))  # type: ignore[assignment]
    return replace(problem, weight=solution[0], mask=solution[1])


def _written(
    model: nn.Module,
    config: SparsityConfig,
    block: Block,
    one: _Chosen,
    weight: torch.Tensor,
    mask: torch.Tensor,
    recorder: Recorder | None,
) -> SiteReport:
    plan, site = one.plan, one.plan.site
    kept = one.stored if weight is one.weight else weight.to(one.stored.dtype)
    # Adding zero turns -0.0 into 0.0, so that one rule, weight != 0, tells what is kept.
    new = torch.where(mask, kept, 0) + 0.0
    error = _site_error(one.stored, new, recorder.sample(site) if recorder else None)
    write_(model, site, new)
    zeros = count_zeros(new)
    extra = zeros - (mask.numel() - int(mask.sum()))
    if extra:
        one.notes.append(f"{extra} kept weights are zero and count as dropped")
    return SiteReport(
        name=site.name, block=block.index, role=site.role, shape=site.shape, pattern=str(plan.pattern), axis=plan.axis,
        metric=plan.metric.name, zeros=zeros, sparsity=zeros / site.size, output_error=error,
        tokens=recorder.tokens(site) if recorder else None, note="; ".join(dict.fromkeys(one.notes)),
    )  # fmt: skip


def _site_error(dense: torch.Tensor, sparse: torch.Tensor, sample: torch.Tensor | None) -> float | None:
    if sample is None:
        return None
    sample = sample.to(dense.dtype)
    before = norm(sample @ dense.T)
    return norm(sample @ (dense - sparse).T) / before if before else None
