"""Norm of a unit before the activation function, as the published code of ShadowLLM has it."""

from hf_sparse.predictors.criteria import Scores, Seen
from hf_sparse.registry import CRITERIA


@CRITERIA.register("l2_pre_activation", source="arXiv 2406.16635, section 4", needs=("pre_activation", "heads"))
def l2_pre_activation(seen: Seen) -> Scores:
    """Size of the neuron before the activation function (its gate where it has one); norm of the head's values.

    This is the published code's `l2norm`. Under SiLU or GELU a large negative value is an inactive neuron.
    """
    return Scores(seen.get("pre_activation").abs(), seen.get("heads").norm(dim=-1))
