"""Keeps hidden states in memory up to a limit, and in files mapped into memory beyond it."""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

from hf_sparse.replace import take_room

HIDDEN_MEMORY = "4GB"  # what hidden states may take where nothing else is said
_SMALLEST = 2**16  # bytes: masks and positions stay where they are


class Spill:
    """Tensors with the values of others, in files of a folder once those of one turn have taken half of `limit` bytes.

    Half, as what goes into a block is there beside what comes out. A file has no name any more when it is used: the system gives
    its room back with the tensor, or with the process.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._used = 0
        self.bytes_in_files = 0  # in all

    def turn(self) -> None:
        """The next block begins."""
        self._used = 0

    def kept(self, tree: Any) -> Any:
        """The same structure; its large tensors on the CPU are in files where there is no room."""
        return tree_map(self._one, tree)

    def _one(self, leaf: Any) -> Any:
        if (
            not isinstance(leaf, torch.Tensor)
            or leaf.device.type != "cpu"
            or leaf.requires_grad
            or leaf.nbytes < _SMALLEST
        ):
            return leaf
        self._used += leaf.nbytes
        return leaf if self._used <= self.limit // 2 else self.in_file(leaf)

    def in_file(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor in a file."""
        source = tensor.detach()
        if not source.nbytes:
            return source.clone()
        handle, name = tempfile.mkstemp(prefix=".hidden-", dir=self.folder)
        try:
            take_room(handle, source.nbytes)  # where there is none, a page that is written would be a bus error
            storage = torch.UntypedStorage.from_file(name, shared=True, nbytes=source.nbytes)
        finally:
            os.close(handle)
            os.unlink(name)
        self.bytes_in_files += source.nbytes
        # The strides are those of an ordinary copy, as sums over another layout may differ in their last bits.
        strides = torch.empty_like(source, device="meta").stride()
        copy = torch.empty(0, dtype=source.dtype).set_(storage, 0, source.shape, strides)  # type: ignore[arg-type]
        return copy.copy_(source)
