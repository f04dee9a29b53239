"""Which of many scores are the largest: places in ascending order, without sorting."""

import torch

from hf_sparse.errors import KernelError
from hf_sparse.native.addresses import address
from hf_sparse.native.binary import kernels


def largest(scores: torch.Tensor, count: int, size: int = 1) -> torch.Tensor:
    """Places (rows, count * size) of the `count` largest of each row of `scores` (rows, units), ascending, int64.

    Of equal scores the first are taken. Each place stands for `size` neighbours, which are named one by one.

    Raises: KernelError for a count that a row does not have, and anything but a float32 matrix.
    """
    if scores.dim() != 2 or scores.dtype != torch.float32 or not 1 <= count <= scores.shape[1] or size < 1:
        raise KernelError(
            f"From 1 to all of the scores in each row of a float32 matrix can be chosen; given are {count} of {scores.dtype} "
            f"{tuple(scores.shape)}, standing for {size} each."
        )
    return _outside_graphs(scores, count, size) if torch.compiler.is_compiling() else _largest(scores, count, size)


def _largest(scores: torch.Tensor, count: int, size: int) -> torch.Tensor:
    module = kernels()
    if module is None or not scores.is_cpu:
        found = scores.sort(dim=-1, descending=True, stable=True).indices[:, :count].sort(-1).values
        return found if size == 1 else (found.unsqueeze(-1) * size + torch.arange(size, device=found.device)).flatten(1)
    scores = scores if scores.is_contiguous() else scores.contiguous()
    rows, units = scores.shape
    chosen = torch.empty(rows, count * size, dtype=torch.int64, device="cpu")
    module.largest(address(scores), rows, units, count, size, address(chosen))
    return chosen


_outside_graphs = torch.compiler.disable(_largest)  # asking for it in every call takes longer than the choice
