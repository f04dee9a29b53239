"""ATP: sparsity rises from block to block by the same step (Huang et al., arXiv 2502.14770, section 3.3, equation 10).

The paper's blocks are of one size. Where they are not, the whole ramp is moved until the target holds over all weights; where a
share would then leave 0..1 it stays at that end. The ramp runs over the blocks that are pruned, in each stack for itself.
"""

from hf_sparse.allocations import BlockSize, Shares, spread, stacks
from hf_sparse.errors import ConfigError
from hf_sparse.registry import ALLOCATIONS


@ALLOCATIONS.register(
    "atp", source="arXiv 2502.14770, equation 10", options={"step": None}, ranges={"step": (-1.0, 1.0)}
)
def atp(target: float, blocks: list[BlockSize], step: float | None = None) -> Shares:
    """A ramp over the depth: each block loses `step` more than the one before it, or less where it is negative."""
    if step is None:
        raise ConfigError(
            'allocation "atp" without a step, which means searching for the best one, is not available in this version; '
            'give options={"atp": {"step": ...}}, such as 0.01.'
        )
    found: Shares = {}
    for stack in stacks(blocks):
        _check(step, target, stack)
        middle = (len(stack) - 1) / 2
        found |= spread(stack, [target + step * (index - middle) for index in range(len(stack))], target)
    return found


def _check(step: float, target: float, stack: list[BlockSize]) -> None:
    """Refuse a step that takes the ramp's ends out of 0..1."""
    intervals = len(stack) - 1
    bound = min(2 * target / intervals, 2 * (1 - target) / intervals) if intervals else 1.0
    if abs(step) > bound * (1 + 1e-9):
        raise ConfigError(
            f"option atp.step={step!r} is outside its bound: with sparsity S={target:g} and the L={len(stack)} blocks of "
            f"{stack[0].stack} it may be at most min(2S/(L-1), 2(1-S)/(L-1)) = {bound:.6g}, upwards or downwards."
        )
