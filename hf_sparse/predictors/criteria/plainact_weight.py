"""plainact, weight form: a neuron's weights times their gradients (ShadowLLM's published code)."""

from hf_sparse.predictors.criteria import Scores, Seen
from hf_sparse.registry import CRITERIA


@CRITERIA.register(
    "plainact_weight",
    source="arXiv 2406.16635, published code",
    needs=("input", "heads", "up_gradient", "gate_gradient", "heads_gradient"),
)
def plainact_weight(seen: Seen) -> Scores:
    """Sum of |W_ij dL/dW_ij| over the neuron's rows of up and, where there is one, of gate; heads as in `plainact`.

    One token's gradient of W_ij is the product of the output's gradient and the input, so no gradient of a weight is formed.
    The published code knows plain feed-forwards only (the rows of fc1); for gated ones the rows of both are added.
    """
    size = seen.get("input").abs()
    neurons = seen.get("up_gradient").abs() * (size @ seen.weights.up_size.T)
    if seen.gate_gradient is not None:
        neurons = neurons + seen.gate_gradient.abs() * (size @ seen.weights.gate_size.T)
    return Scores(neurons, (seen.get("heads") * seen.get("heads_gradient")).sum(-1).abs())
