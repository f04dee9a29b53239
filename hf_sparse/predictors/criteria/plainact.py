"""plainact, activation form: activation times gradient (ShadowLLM, arXiv 2406.16635, section 4)."""

from hf_sparse.predictors.criteria import Scores, Seen
from hf_sparse.registry import CRITERIA


@CRITERIA.register(
    "plainact",
    source="arXiv 2406.16635, section 4",
    needs=("activation", "heads", "activation_gradient", "heads_gradient"),
)
def plainact(seen: Seen) -> Scores:
    """First-order change of the loss without the unit: |z_i dL/dz_i|, and |<a_h, dL/da_h>| for heads.

    The published code has this form for heads only and multiplies neurons' weights with their gradients (`plainact_weight`).
    """
    neurons = seen.get("activation") * seen.get("activation_gradient")
    heads = seen.get("heads") * seen.get("heads_gradient")
    return Scores(neurons.abs(), heads.sum(-1).abs())
