"""Gradient norm: how steeply the loss changes with a unit's values (ShadowLLM, arXiv 2406.16635, section 4)."""

from hf_sparse.predictors.criteria import Scores, Seen
from hf_sparse.registry import CRITERIA


@CRITERIA.register("gradnorm", source="arXiv 2406.16635, section 4", needs=("activation_gradient", "heads_gradient"))
def gradnorm(seen: Seen) -> Scores:
    """Norm of the loss's gradient at the unit: |dL/dz_i|, and ||dL/da_h|| for heads.

    The published code takes the gradient of a neuron's weights; here it is that of its activation.
    """
    return Scores(seen.get("activation_gradient").abs(), seen.get("heads_gradient").norm(dim=-1))
