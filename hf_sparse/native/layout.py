"""Sizes of the packed layout, which hf_sparse/native/layout.h describes."""

from collections.abc import Sequence

STRIPE_ROWS = 16
PAIR_WEIGHTS = 32  # 16 rows of 2 inputs: one mask
PADDED_INPUTS = 32
SLACK = 32  # spare values at the end, because vector loads read whole registers
LARGEST_SIDE = 1 << 30


def sizes(shape: Sequence[int]) -> tuple[int, int]:
    """Stripes and pairs of inputs of a matrix (out, in); the masks have this shape."""
    rows, columns = shape
    return -(-rows // STRIPE_ROWS), -(-columns // PADDED_INPUTS) * PADDED_INPUTS // 2
