"""ATP: sparsity rises from block to block by the same step (Huang et al., arXiv 2502.14770, section 3.3, equation 10).

The paper's blocks are of one size. Where they are not, the whole ramp is moved until the target holds over all weights; where a
share would then leave 0..1 it stays at that end. The ramp runs over the blocks that are pruned, in each stack for itself.
"""

from typing import Any

from hf_sparse.allocations import BlockSize, Shares, spread, stacks
from hf_sparse.errors import ConfigError
from hf_sparse.registry import ALLOCATIONS


@ALLOCATIONS.register(
    "atp",
    source="arXiv 2502.14770, equation 10",
    options={"step": None, "selector": "loss", "held_out": 0.25},
    ranges={"step": (-1.0, 1.0), "held_out": (0.01, 0.9)},
    choices={"selector": ("loss", "alignment")},
)
def atp(target: float, blocks: list[BlockSize], step: float | None = None, **_: Any) -> Shares:
    """A ramp over the depth: each block loses `step` more than the one before it; without a step the best is searched for.

    The search scores on a share `held_out` of the calibration samples: by the model's loss, or by how well the blocks' outputs agree
    with the dense model's (`selector`).
    """
    return ramp(target, blocks, step or 0.0)


def ramp(target: float, blocks: list[BlockSize], step: float) -> Shares:
    """The shares of one ramp in each stack; raises ConfigError for a step outside its bound."""
    found: Shares = {}
    for stack in stacks(blocks):
        limit = bound(target, len(stack))
        if abs(step) > limit * (1 + 1e-9):
            raise ConfigError(
                f"option atp.step={step!r} is outside its bound: with sparsity S={target:g} and the L={len(stack)} blocks of "
                f"{stack[0].stack} it may be at most min(2S/(L-1), 2(1-S)/(L-1)) = {limit:.6g}, upwards or downwards."
            )
        middle = (len(stack) - 1) / 2
        found |= spread(stack, [target + step * (index - middle) for index in range(len(stack))], target)
    return found


def bound(target: float, blocks: int) -> float:
    """The largest step that keeps all shares of a stack of blocks within 0..1."""
    return min(2 * target / (blocks - 1), 2 * (1 - target) / (blocks - 1)) if blocks > 1 else 1.0
