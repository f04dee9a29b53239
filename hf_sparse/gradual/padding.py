"""Tells which rows of the inputs of a training pass are padding, also where tokens were sorted to experts."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from hf_sparse.forwards import main_tensor

_CHUNK = 256  # rows
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_SEED = 20  # of the factors in the rows' keys


class Padding:
    """Which rows of an input count, as the model's `attention_mask` (and `decoder_attention_mask`) of shape (batch, length) say.

    An input that has no row for each position of the batch counts whole, such as the patches of a vision tower.
    """

    def __init__(self, kwargs: Mapping[str, Any]) -> None:
        self._mask = _padded(kwargs.get("attention_mask"))
        self._decoder_mask = _padded(kwargs.get("decoder_attention_mask"))
        self._own: torch.Tensor | None = None  # of the block that runs
        self._across: torch.Tensor | None = None  # of what its cross-attention reads
        self._foreign: set[int] = set()
        self._reference: torch.Tensor | None = None  # an input with a row for each position, before tokens were sorted
        self._keys: tuple[torch.Tensor, torch.Tensor] | None = None
        self._sorted: torch.Tensor | None = None

    def enter(self, in_decoder: bool, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A block of an encoder-decoder's second half, or any other, begins with these arguments."""
        self._own, self._across = (self._decoder_mask, self._mask) if in_decoder else (self._mask, None)
        self._reference = self._keys = self._sorted = None
        main = main_tensor((args, kwargs))
        if self._own is not None and (main is None or main.shape[:-1] != self._own.shape):
            self._own = None
        others = [
            leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, torch.Tensor) and leaf is not main
        ]
        self._foreign = {leaf.data_ptr() for leaf in others} if self._across is not None else set()

    def remember(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """What goes into a module that sorts its tokens, to recognise them by."""
        given = main_tensor((args, kwargs))
        if self._own is not None and given is not None and given.shape[:-1].numel() == self._own.numel():
            self._reference, self._keys = given.detach().reshape(-1, given.shape[-1]), None

    def counted(self, x: torch.Tensor, sorted_tokens: bool) -> torch.Tensor | None:
        """Which rows of an input, all but its last dimension flattened, count; None: all of them."""
        mask = self._across if x.data_ptr() in self._foreign else self._own
        if mask is None:
            return None
        if sorted_tokens:
            found = self._counted_by_key(x.detach().reshape(-1, x.shape[-1]))
            if found is not None:
                return found
        same = x.shape[:-1] == mask.shape or (x.ndim == 2 and len(x) == mask.numel())
        return mask.flatten() if same else None

    def _counted_by_key(self, rows: torch.Tensor) -> torch.Tensor | None:
        """Sorted tokens are copies of rows seen before, or were made of such in the same order."""
        reference = self._reference
        if reference is not None and reference.shape[1] == rows.shape[1] and reference.dtype == rows.dtype:
            if self._keys is None:
                keys, counts = _keys(reference), self._own.flatten()  # type: ignore[union-attr]
                self._keys = keys[counts], keys[~counts]
            own = _keys(rows)
            counts, padding = (torch.isin(own, keys) for keys in self._keys)
            if bool((counts | padding).all()):
                self._sorted = counts
                return counts
        return self._sorted if self._sorted is not None and len(self._sorted) == len(rows) else None


def _padded(mask: object) -> torch.Tensor | None:
    """A mask over positions as bool, if it leaves any out."""
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        return None
    counts = mask.detach().bool()
    return None if bool(counts.all()) else counts


def _keys(rows: torch.Tensor) -> torch.Tensor:
    """One whole number for each row, the same for the same bits: sums that wrap around do not depend on an order."""
    generator = torch.Generator().manual_seed(_SEED)
    factors = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=generator).to(rows.device)
    bits = rows.contiguous().view(_INTEGERS[rows.element_size()])
    return torch.cat([(part.long() * factors).sum(1) for part in bits.split(_CHUNK)]) if len(rows) else factors[:0]
