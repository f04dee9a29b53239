"""Fisher information of a unit's activation (ShadowLLM, arXiv 2406.16635, section 4)."""

from hf_sparse.predictors.criteria import Scores, Seen
from hf_sparse.registry import CRITERIA


@CRITERIA.register(
    "fisher",
    source="arXiv 2406.16635, section 4",
    needs=("activation", "heads", "activation_gradient", "heads_gradient"),
)
def fisher(seen: Seen) -> Scores:
    """Squares of activation times gradient, summed over a head's values.

    The published code takes neurons before the activation function; here they are what `down` reads, in gated models too.
    """
    neurons = seen.get("activation") * seen.get("activation_gradient")
    heads = seen.get("heads") * seen.get("heads_gradient")
    return Scores(neurons.square(), heads.square().sum(-1))
