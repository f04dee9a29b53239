"""Local reconstruction of whole blocks (arXiv 2510.14444); the work is done in `hf_sparse/reconstruct.py`, which may run blocks."""

from hf_sparse.registry import UPDATES
from hf_sparse.updates import Problem, Solution


@UPDATES.register(
    "reconstruct",
    source="arXiv 2510.14444",
    options={"steps": 100, "learning_rate": 0.02, "batch_tokens": 1024},
    ranges={"steps": (1, 100_000), "learning_rate": (1e-9, 10), "batch_tokens": (1, 10**9)},
    second_stream=True,
    runs_blocks=True,
)
def reconstruct(problem: Problem) -> Solution:
    """Train each pruned block's kept weights and norms towards the dense model's hidden states, masks fixed.

    `learning_rate` is relative: each parameter's own is that times the root mean square of its kept weights. `batch_tokens` is what
    batch_size="auto" fills a batch with; each batch is one step.
    """
    return problem.weight, problem.mask
