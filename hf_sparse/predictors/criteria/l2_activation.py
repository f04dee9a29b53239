"""Norm of a unit's values after the activation function, without the weights behind it."""

from hf_sparse.predictors.criteria import Scores, Seen
from hf_sparse.registry import CRITERIA


@CRITERIA.register("l2_activation", needs=("activation", "heads"))
def l2_activation(seen: Seen) -> Scores:
    """Size of what the neuron gives to `down`; norm of the head's values."""
    return Scores(seen.get("activation").abs(), seen.get("heads").norm(dim=-1))
