"""Keeps the weights of a model's blocks, so that they can be put back after a trial."""

from collections.abc import Sequence

import torch

from hf_sparse.blocks import Block


class Snapshot:
    """Copies of all parameters and buffers of blocks, on the CPU: as much memory again as the blocks take.

    Where the source of a block's weights still has them, it is asked instead.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = [block for block in blocks if not block.source.elsewhere]
        self._elsewhere = [block for block in blocks if block.source.elsewhere]
        self._kept: list[dict[str, torch.Tensor]] = []
        for block in self._blocks:
            with block.loaded():
                state = {**dict(block.module.named_parameters()), **dict(block.module.named_buffers())}
                self._kept.append({name: tensor.detach().cpu().clone() for name, tensor in state.items()})

    def restore(self) -> None:
        """Put every block back, bit for bit."""
        for block in self._elsewhere:
            block.source.revert()
        for block, kept in zip(self._blocks, self._kept, strict=True):
            with block.loaded(), torch.no_grad():
                state = {**dict(block.module.named_parameters()), **dict(block.module.named_buffers())}
                for name, tensor in kept.items():
                    state[name].copy_(tensor)
                block.commit()
