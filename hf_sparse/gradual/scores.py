"""Scores of a site's weights from what the training shows."""

from collections.abc import Mapping

import torch

from hf_sparse.apply import on_rows
from hf_sparse.config import SparsityConfig
from hf_sparse.errors import ModelError
from hf_sparse.gradual.inputs import Measured
from hf_sparse.metrics import Inputs
from hf_sparse.observe import operand_of
from hf_sparse.plan import SitePlan
from hf_sparse.registry import METRICS
from hf_sparse.sites import Site


def scores_of(
    plan: SitePlan, weight: torch.Tensor, config: SparsityConfig, measured: Measured | None, sites: Mapping[str, Site]
) -> tuple[torch.Tensor, bool]:  # fmt: skip
    """Scores (out, in) of the planned metric, and whether they are those of magnitude as nothing was measured for the site.

    Raises: ModelError for weights that are not finite.
    """
    weight = weight if weight.dtype == torch.float64 else weight.float()
    inputs, entry = _inputs_of(plan, weight.device, config, measured, sites), plan.metric
    if inputs is None:
        entry = METRICS["magnitude"]
    scores: torch.Tensor = entry.function(weight, inputs or Inputs())
    if not bool(torch.isfinite(scores).all()):
        raise ModelError(
            f"{plan.site.name} holds NaN or infinite weights: the training has diverged. Go back to an earlier checkpoint, with a lower "
            "learning rate."
        )
    return scores, inputs is None


def _inputs_of(
    plan: SitePlan, device: torch.device, config: SparsityConfig, measured: Measured | None, sites: Mapping[str, Site]
) -> Inputs | None:  # fmt: skip
    """What the metric gets to see of a site; None where nothing was measured."""
    norms = measured.norms if measured is not None else {}
    own = [norms.get(operand_of(plan.site))] if plan.metric.needs else []
    consumer = [norms.get(operand_of(sites[plan.feed.consumer]))] if plan.feed is not None else []
    found = [norm.to(device) for norm in (*own, *consumer) if norm is not None and bool(norm.any())]
    if len(found) < len(own) + len(consumer):  # an input of nothing but zeros tells no weight from another
        return None
    return Inputs(
        {"norm": found[0]} if own else {},
        {"norm": on_rows(plan, found[-1])} if consumer else {},
        config.options_of(plan.metric.name),
    )
