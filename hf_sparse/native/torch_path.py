"""The packed layout in plain torch: the same functions for where the compiled kernels are not there. Right, and slow."""

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F

from hf_sparse.native.layout import PAIR_WEIGHTS, SLACK, STRIPE_ROWS, sizes

CHUNK_WEIGHTS = 1 << 22  # a mask takes some bytes per weight while it is spread out


def spread(masks: torch.Tensor) -> torch.Tensor:
    """Masks (...) -> bool (..., 32)."""
    return ((masks[..., None] >> torch.arange(PAIR_WEIGHTS, dtype=torch.int32, device="cpu")) & 1).bool()


def chunks(stripes: int, pairs: int) -> Iterator[slice]:
    step = max(1, CHUNK_WEIGHTS // (pairs * PAIR_WEIGHTS))
    return (slice(start, min(start + step, stripes)) for start in range(0, stripes, step))


def counts(masks: torch.Tensor) -> torch.Tensor:
    """Number of weights that each stripe's masks mark: (stripes)."""
    return torch.cat([spread(masks[part]).sum((1, 2)) for part in chunks(*masks.shape)])


def arrange(weight: torch.Tensor) -> torch.Tensor:
    """A matrix in the order of the layout, as int16: (stripes, pairs, 32)."""
    (rows, columns), (stripes, pairs) = weight.shape, sizes(weight.shape)
    padded = torch.zeros(stripes * STRIPE_ROWS, pairs * 2, dtype=torch.int16, device="cpu")
    padded[:rows, :columns] = weight.view(torch.int16)
    return padded.view(stripes, STRIPE_ROWS, pairs, 2).transpose(1, 2).reshape(stripes, pairs, PAIR_WEIGHTS)


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Masks, offsets and values of a bfloat16 matrix."""
    blocks = arrange(weight)
    kept = (blocks & 0x7FFF) != 0
    powers = torch.ones(PAIR_WEIGHTS, dtype=torch.int64, device="cpu") << torch.arange(PAIR_WEIGHTS, device="cpu")
    masks = (kept.long() * powers).sum(-1).to(torch.int32)  # wraps: the highest bit becomes the sign
    offsets = torch.zeros(len(blocks) + 1, dtype=torch.int64, device="cpu")
    offsets[1:] = kept.sum((1, 2)).cumsum(0)
    values = torch.zeros(int(offsets[-1]) + SLACK, dtype=torch.int16, device="cpu")
    values[: int(offsets[-1])] = blocks[kept]
    return masks, offsets, values.view(torch.bfloat16)


def spread_stored(values: torch.Tensor, bitmask: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The matrix that a checkpoint's values and bits stand for; None of the bits beyond the matrix may be set."""
    bits = ((bitmask[..., None] >> torch.arange(8, dtype=torch.uint8, device="cpu")) & 1).bool().flatten(-2)
    kept = (bits[: shape[0] * shape[1]] if bits.dim() == 1 else bits[:, : shape[1]]).reshape(shape)
    weight = torch.zeros(shape, dtype=torch.int16, device="cpu")
    weight[kept] = values.view(torch.int16)
    return weight.view(torch.bfloat16)


def count_stored(bitmask: torch.Tensor) -> int:
    return int(((bitmask[..., None] >> torch.arange(8, dtype=torch.uint8, device="cpu")) & 1).sum())


def unpack(masks: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    stripes, pairs = masks.shape
    weight = torch.empty(stripes * STRIPE_ROWS, pairs * 2, dtype=torch.int16, device="cpu")
    for part in chunks(stripes, pairs):
        kept = spread(masks[part])
        blocks = torch.zeros(kept.shape, dtype=torch.int16, device="cpu")
        blocks[kept] = values[int(offsets[part.start]) : int(offsets[part.stop])].view(torch.int16)
        rows = blocks.view(-1, pairs, STRIPE_ROWS, 2).transpose(1, 2).reshape(-1, pairs * 2)
        weight[part.start * STRIPE_ROWS : part.stop * STRIPE_ROWS] = rows
    return weight[: shape[0], : shape[1]].contiguous().view(torch.bfloat16)


def trouble(masks: torch.Tensor, offsets: torch.Tensor, shape: tuple[int, int], values: int) -> str:
    """Empty where masks and offsets agree with one another and with the shape, else what is wrong."""
    needed = offsets.diff()
    if int(offsets[0]) != 0 or bool((needed < 0).any()) or int(offsets[-1]) > values - SLACK:
        return f"offsets must begin with 0, never fall, and end at most at {values - SLACK}, which leaves {SLACK} spare values"
    if not torch.equal(counts(masks), needed):
        return "the masks do not mark as many weights as there are values"
    inside = torch.zeros(masks.shape[0] * STRIPE_ROWS, masks.shape[1] * 2, dtype=torch.bfloat16, device="cpu")
    inside[: shape[0], : shape[1]] = 1
    return "" if bool(((masks & ~pack(inside)[0]) == 0).all()) else "the masks mark weights outside the matrix"


def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(inputs, weight.to(inputs.dtype), bias)


@cache
def say_slow(reason: str) -> None:
    """Says once that nothing is gained this way."""
    from transformers.utils import logging

    logging.get_logger(__name__).warning(
        f"Sparse weights are expanded for every product, which is slower than dense weights: {reason}"
    )
