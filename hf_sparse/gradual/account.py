"""The report of a gradual pruning: what holds in the weights when it is made."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from hf_sparse.config import SparsityConfig
from hf_sparse.gradual.engine import Gradual
from hf_sparse.plan import SitePlan
from hf_sparse.prune_report import add_earlier_, block_reports, make_report
from hf_sparse.report import BlockReport, Report, SiteReport
from hf_sparse.report_text import percent


def report_of(
    gradual: Gradual, unmet: Collection[str], notes: list[str], calibration: dict[str, Any] | None = None
) -> Report:
    """The report of a model, its zeros counted now; all processes have to call it.

    Sites in `unmet` do not hold their target, so no pattern is claimed for them, nor for the model as a whole.
    """
    counts = gradual.count()
    done: dict[int, BlockReport] = {}
    for index, sites in gradual.chosen.items():
        block = gradual.inventory.blocks[index]
        reports = [_site(gradual, gradual.plans[site.name], index, counts[site.name], unmet) for site in sites]
        zeros, size = sum(site.zeros for site in reports), sum(site.size for site in sites)
        done[index] = BlockReport(block.index, block.name, block.stack, zeros, size, 0, None, 0.0, reports)
    config, notes = gradual.config, list(notes)
    if unmet:
        zeros, size = sum(block.zeros for block in done.values()), sum(block.size for block in done.values())
        notes.append(
            f"{len(unmet)} of {len(gradual.plans)} sites do not hold their target {config.pattern}; {percent(zeros / size)} zeros were counted"
        )
        config = _as_counted(config, zeros / size)
    blocks = block_reports(gradual.inventory, done)
    kept = add_earlier_(blocks, gradual.inventory, gradual.earlier, set(gradual.plans), lambda site: counts[site.name])
    if kept:
        notes.append(f"{kept} sites were pruned before and left as they are now")
    left = {**gradual.inventory.left_out, **gradual.left}
    report = make_report(gradual.model, config, blocks, left, notes, calibration, gradual.seconds)
    if gradual.earlier is not None:
        report.permutations, report.permuted = gradual.earlier.permutations, gradual.earlier.permuted
    return report


def _site(gradual: Gradual, plan: SitePlan, block: int, zeros: int, unmet: Collection[str]) -> SiteReport:
    site = plan.site
    pattern, metric, note = str(plan.pattern), plan.metric.name, plan.note
    if plan.dense:
        pattern, metric, note = "dense", "none", "left dense by the allocation"
    elif site.name in gradual.fell_back:
        metric, note = "magnitude", f"magnitude instead of {metric}: no token of the last update's batches reached it"
    if site.name in unmet:
        pattern = "unstructured"
    return SiteReport(
        name=site.name, block=block, role=site.role, shape=site.shape, pattern=pattern, axis=plan.axis, metric=metric, zeros=zeros,
        sparsity=zeros / site.size, tokens=gradual.tokens.get(site.name), note=note,
    )  # fmt: skip


def _as_counted(config: SparsityConfig, sparsity: float) -> SparsityConfig:
    """A configuration that claims no more than a share of zeros."""
    share = min(max(sparsity, 1e-9), 1 - 1e-9)
    return replace(config, pattern="unstructured", sparsity=share, allocation="uniform", axis="site")
