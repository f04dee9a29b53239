"""Output magnitude: how long the vector is that a unit adds to the residual stream for this token."""

import torch

from hf_sparse.predictors.criteria import Scores, Seen
from hf_sparse.registry import CRITERIA


@CRITERIA.register("magnitude", needs=("activation", "heads"))
def magnitude(seen: Seen) -> Scores:
    """Length of what the unit adds to the residual stream: |z_i| ||D_i||, and ||W_h a_h|| for heads."""
    heads = seen.get("heads")
    squared = torch.einsum("thi,hij,thj->th", heads, seen.weights.head_gram, heads)
    return Scores(seen.get("activation").abs() * seen.weights.down_norm, squared.clamp_min(0).sqrt())
