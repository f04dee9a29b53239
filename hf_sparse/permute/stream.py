"""Chooses the one order of the residual stream's channels, by all sites of the model that compete along them."""

from collections.abc import Iterator

import torch

from hf_sparse.blockwise import Run
from hf_sparse.patterns import Pattern
from hf_sparse.permute.blocks import Tally, is_sparse
from hf_sparse.permute.importance import Norms, importance
from hf_sparse.permute.order import Part, best_order, kept_importance, sample_rows
from hf_sparse.permute.places import Channels
from hf_sparse.permute.residual import READS, WRITES, find_residual, unseen

_ROWS = 2048  # rows of all sites together that the search looks at, and some of each at least
_ROWS_EACH = 16


def residual_order(run: Run, norms: Norms, called: set[int], tally: Tally) -> tuple[Channels, torch.Tensor] | str:
    """The channels of the residual stream with the best order for them, or why they stay as they are."""
    group = Pattern.parse(run.config.pattern).group or 1
    channels = find_residual(run.model, run.inventory)
    if isinstance(channels, str):
        return channels
    if (module := unseen(run.model, channels, called)) is not None:
        return f"no sample ran {module}"
    if _bystander(run, channels.size):
        return "a site that is not pruned now is sparse already"
    sites = sum(len(sites) for sites in run.chosen.values())
    each = max(_ROWS_EACH, _ROWS // sites)
    sampled = [few for part in _parts(run, norms, channels.size) for few in sample_rows([part], each, channels.size)]
    if not sampled:
        return "no site competes along its channels"
    order = best_order(sampled, group, run.config.seed, rows=each * len(sampled))
    before = after = total = 0.0
    for part in _parts(run, norms, channels.size):
        before += kept_importance([part], None, group)
        after += kept_importance([part], order, group)
        total += float(part.scores.sum(dtype=torch.float64))
    if after <= before:
        return "no order was found that keeps more importance"
    tally.add(before, after, total)
    return channels, order


def _parts(run: Run, norms: Norms, width: int) -> Iterator[Part]:
    for block in run.inventory.blocks:
        with block.loaded():
            for plan in run.plans(block):
                keep = plan.pattern.keep or 0
                if plan.dense:
                    continue
                if plan.axis == "input" and plan.site.shape[1] == width and plan.site.role not in WRITES:
                    yield Part(importance(run, plan, norms), keep)
                if plan.axis == "output" and plan.site.shape[0] == width and plan.site.role not in READS:
                    yield Part(importance(run, plan, norms).T, keep)


def _bystander(run: Run, width: int) -> bool:
    now = {site.name for sites in run.chosen.values() for site in sites}
    for block in run.inventory.blocks:
        others = [site for site in run.inventory.sites[block.index] if site.name not in now and width in site.shape]
        if others:
            with block.loaded():
                if any(is_sparse(run, site) for site in others):
                    return True
    return False
