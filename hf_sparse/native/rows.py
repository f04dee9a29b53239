"""A matrix whose zeros are left out row after row, so that products can read single rows of it; `rows.h` describes the layout."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_sparse.errors import KernelError
from hf_sparse.native import torch_path
from hf_sparse.native.addresses import address, address_of_spaced, state
from hf_sparse.native.binary import kernels
from hf_sparse.native.layout import SLACK
from hf_sparse.native.packed import checked, checked_shape, checked_weight, new

WORD_COLUMNS = 32


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Made by `pack_rows`. The content is checked before it is read, and again after a write."""

    masks: torch.Tensor  # int32 (rows, ceil(columns / 32)): bit i of a word marks its column i
    starts: torch.Tensor  # int64 (rows + 1): where the values of each row begin
    values: torch.Tensor  # bfloat16 (non-zeros + SLACK)
    shape: tuple[int, int]
    _right: tuple[int, ...] = field(default=(), init=False, repr=False)  # the `state` in which the content was right

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_right"} | {"_right": ()}

    def addresses(self) -> tuple[int, int, int]:
        """Of masks, starts and values.

        Raises: KernelError where they are no packed rows, which is looked at where it was not since the last write.
        """
        now = state(self.masks, self.starts, self.values)
        if now != self._right:
            self._check()
            object.__setattr__(self, "_right", state(self.masks, self.starts, self.values))
        return now[:3]

    def _check(self) -> None:
        rows, columns = checked_shape(self.shape)
        checked("masks", self.masks, torch.int32, (rows, words(columns)))
        checked("starts", self.starts, torch.int64, (rows + 1,))
        checked("values", self.values, torch.bfloat16, None)
        module = kernels()
        if module is None:
            wrong = _trouble(self)
        else:
            parts = address(self.masks), address(self.starts), self.values.numel()
            wrong = module.check_packed_rows(*parts, rows, columns, torch.get_num_threads())
        if wrong:
            raise KernelError(f"These buffers are no packed rows: {wrong}. Pack the weights again.")

    @torch.inference_mode(False)
    def unpack(self) -> torch.Tensor:
        """The bfloat16 matrix (rows, columns), bit for bit, except that negative zeros have become positive ones."""
        addresses, module = self.addresses(), kernels()
        if module is None:
            kept, weight = _spread(self.masks, self.shape), torch.zeros(self.shape, dtype=torch.int16, device="cpu")
            weight[kept] = self.values[: int(self.starts[-1])].view(torch.int16)
            return weight.view(torch.bfloat16)
        weight = torch.empty(self.shape, dtype=torch.bfloat16, device="cpu")
        module.unpack_packed_rows(*addresses, *self.shape, address(weight), torch.get_num_threads())
        return weight

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.masks, self.starts, self.values))


def words(columns: int) -> int:
    """Masks of a row."""
    return -(-columns // WORD_COLUMNS)


@torch.inference_mode(False)
def pack_rows(weight: torch.Tensor, large_pages: bool = True) -> PackedRows:
    """Packs a bfloat16 matrix of any strides row by row; `large_pages` asks Linux for them.

    Raises: KernelError for other weights.
    """
    weight = checked_weight(weight)
    rows, columns = weight.shape
    module, threads = kernels(), torch.get_num_threads()
    if module is None:
        return _packed_slowly(weight)
    source = address_of_spaced(weight), *weight.stride(), rows, columns
    starts = torch.empty(rows + 1, dtype=torch.int64, device="cpu")
    module.measure_packed_rows(*source, address(starts), threads)
    masks = new(rows * words(columns), torch.int32, large_pages).view(rows, -1)
    values = new(int(starts[-1]) + SLACK, torch.bfloat16, large_pages)
    if not module.fill_packed_rows(*source, address(masks), address(starts), address(values), threads):
        raise KernelError("The weight changed while it was packed; pack it again when nothing writes to it.")
    return PackedRows(masks, starts, values, (rows, columns))


def _packed_slowly(weight: torch.Tensor) -> PackedRows:
    rows, columns = weight.shape
    numbers = torch.zeros(rows, words(columns) * WORD_COLUMNS, dtype=torch.int16, device="cpu")
    numbers[:, :columns] = weight.contiguous().view(torch.int16)
    kept = (numbers & 0x7FFF) != 0
    powers = torch.ones(WORD_COLUMNS, dtype=torch.int64, device="cpu") << torch.arange(WORD_COLUMNS, device="cpu")
    masks = (kept.view(rows, -1, WORD_COLUMNS).long() * powers).sum(-1).to(torch.int32)  # wraps into the sign
    starts = torch.zeros(rows + 1, dtype=torch.int64, device="cpu")
    starts[1:] = kept.sum(1).cumsum(0)
    values = torch.zeros(int(starts[-1]) + SLACK, dtype=torch.int16, device="cpu")
    values[: int(starts[-1])] = numbers[kept]
    return PackedRows(masks, starts, values.view(torch.bfloat16), (rows, columns))


def _spread(masks: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return torch_path.spread(masks).flatten(1)[:, : shape[1]]


def _trouble(packed: PackedRows) -> str:
    marked, needed = torch_path.spread(packed.masks).flatten(1), packed.starts.diff()
    if int(packed.starts[0]) != 0 or bool((needed < 0).any()) or int(packed.starts[-1]) > packed.values.numel() - SLACK:
        return f"starts must begin with 0, never fall, and leave {SLACK} spare values"
    if not torch.equal(marked.sum(1), needed):
        return "the masks do not mark as many weights as there are values"
    return "the masks mark weights outside the matrix" if bool(marked[:, packed.shape[1] :].any()) else ""
