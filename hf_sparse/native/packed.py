"""A matrix whose zeros are left out, in the layout that the kernels multiply with."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch

from hf_sparse.errors import KernelError
from hf_sparse.native import torch_path
from hf_sparse.native.addresses import address, address_of_spaced, state
from hf_sparse.native.binary import kernels
from hf_sparse.native.layout import LARGEST_SIDE, PAIR_WEIGHTS, SLACK, STRIPE_ROWS, sizes


@dataclass(frozen=True, eq=False)
class Packed:
    """Made by `pack` and `pack_stored`. Tensors from elsewhere are checked before they are read, and again after a write."""

    masks: torch.Tensor  # int32 (stripes, pairs)
    offsets: torch.Tensor  # int64 (stripes + 1)
    values: torch.Tensor  # bfloat16 (non-zeros + SLACK)
    shape: tuple[int, int]  # (out, in)
    _right: tuple[int, ...] = field(default=(), init=False, repr=False)  # the `state` in which the content was right

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", checked_shape(self.shape))
        self._check_parts()
        for name in ("masks", "offsets"):
            if getattr(self, name).is_inference():  # nothing would tell of a write
                object.__setattr__(self, name, _writable(getattr(self, name)))
        _living[id(self.values)] = self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_right"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    @classmethod
    def from_buffers(
        cls, masks: torch.Tensor, offsets: torch.Tensor, values: torch.Tensor, shape: Sequence[int]
    ) -> "Packed":
        """Takes buffers that come from elsewhere, after everything about them has been checked."""
        packed = cls(masks, offsets, values, checked_shape(shape))
        packed.addresses()
        return packed

    @classmethod
    def of(cls, masks: torch.Tensor, offsets: torch.Tensor, values: torch.Tensor, shape: Sequence[int]) -> "Packed":
        """The living `Packed` of these very buffers, which need not be checked again, or a new one."""
        found = _living.get(id(values))
        same = found is not None and found.masks is masks and found.offsets is offsets and found.values is values
        return (
            found
            if found is not None and same and found.shape == tuple(shape)
            else cls(masks, offsets, values, checked_shape(shape))
        )

    def addresses(self) -> tuple[int, int, int]:
        """Of masks, offsets and values, whose content is checked where that was not done since the last write."""
        now = state(self.masks, self.offsets, self.values)
        if now != self._right:
            self._check_parts()
            self._check_content()
            self.trust()
        return now[:3]

    def trust(self) -> "Packed":
        """Takes the content as right in the state that it has now."""
        object.__setattr__(self, "_right", state(self.masks, self.offsets, self.values))
        return self

    def _check_parts(self) -> None:
        stripes, pairs = sizes(self.shape)
        checked("masks", self.masks, torch.int32, (stripes, pairs))
        checked("offsets", self.offsets, torch.int64, (stripes + 1,))
        checked("values", self.values, torch.bfloat16, None)

    def _check_content(self) -> None:
        module = kernels()
        masks, offsets, _ = (address(part) for part in (self.masks, self.offsets, self.values))
        if module is None:
            wrong = torch_path.trouble(self.masks, self.offsets, self.shape, self.values.numel())
        else:
            wrong = module.check(masks, offsets, self.values.numel(), *self.shape, torch.get_num_threads())
        if wrong:
            raise KernelError(f"These buffers are no packed matrix: {wrong}. Pack the weights again.")

    @torch.inference_mode(False)
    def unpack(self) -> torch.Tensor:
        """The bfloat16 matrix (out, in), bit for bit, except that negative zeros have become positive ones."""
        module, addresses = kernels(), self.addresses()
        if module is None:
            return torch_path.unpack(self.masks, self.values, self.offsets, self.shape)
        weight = torch.empty(self.shape, dtype=torch.bfloat16, device="cpu")
        module.unpack_matrix(*addresses, *self.shape, address(weight), torch.get_num_threads())
        return weight

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.masks, self.offsets, self.values))


_living: WeakValueDictionary[int, Packed] = WeakValueDictionary()  # by the id of `values`, which a `Packed` keeps alive


@torch.inference_mode(False)
def _writable(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone()


@dataclass(frozen=True, eq=False)
class Arranged:
    """A dense matrix in the order of the kernels: what sparse products are compared with."""

    values: torch.Tensor  # bfloat16 (stripes, pairs, 32)
    shape: tuple[int, int]

    def address(self) -> int:
        stripes, pairs = sizes(checked_shape(self.shape))
        checked("values", self.values, torch.bfloat16, (stripes, pairs, PAIR_WEIGHTS))
        return address(self.values)


def checked_shape(shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) != 2 or not all(isinstance(side, int) and 1 <= side <= LARGEST_SIDE for side in shape):
        raise KernelError(
            f"A matrix (out, in) with sides from 1 to {LARGEST_SIDE} can be packed; the shape is {tuple(shape)}."
        )
    return shape[0], shape[1]


def checked(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...] | None) -> None:
    """Refuses a tensor whose memory is not what the kernels will read; None as shape is any length, but one dimension."""
    wanted = f"{dtype} on the CPU, contiguous, with shape {shape}" if shape else f"{dtype} on the CPU, contiguous, 1-D"
    fits = tensor.dim() == 1 if shape is None else tuple(tensor.shape) == shape
    plain = tensor.device.type == "cpu" and tensor.layout == torch.strided and tensor.is_contiguous()
    if tensor.dtype != dtype or not fits or not plain:
        given = f"{tensor.dtype} on {tensor.device}, {'contiguous, ' if plain else ''}with shape {tuple(tensor.shape)}"
        raise KernelError(f"{name} must be {wanted}; given is {given}.")


def checked_weight(weight: torch.Tensor) -> torch.Tensor:
    checked_shape(tuple(weight.shape))
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu" or weight.layout != torch.strided:
        raise KernelError(
            f"Weights are packed from bfloat16 on the CPU; this one is {weight.dtype} on {weight.device}, {weight.layout}. "
            "Convert it with .to('cpu', torch.bfloat16)."
        )
    address_of_spaced(weight)
    return weight.detach().resolve_neg()


def new(count: int, dtype: torch.dtype, large_pages: bool) -> torch.Tensor:
    """Memory that nothing was written to yet, which is when large pages are given."""
    tensor = torch.empty(count, dtype=dtype, device="cpu")
    if large_pages:
        kernels().advise_large_pages(address(tensor), tensor.nbytes)
    return tensor


@torch.inference_mode(False)
def pack(weight: torch.Tensor, large_pages: bool = True) -> Packed:
    """Packs a bfloat16 matrix (out, in) of any strides; `large_pages` asks Linux for them, which makes long scans faster."""
    weight = checked_weight(weight)
    rows, columns = weight.shape
    module, threads = kernels(), torch.get_num_threads()
    if module is None:
        return Packed(*torch_path.pack(weight), (rows, columns)).trust()
    stripes, pairs = sizes((rows, columns))
    source = address_of_spaced(weight), *weight.stride(), rows, columns
    offsets = torch.empty(stripes + 1, dtype=torch.int64, device="cpu")
    module.measure_matrix(*source, address(offsets), threads)
    masks = new(stripes * pairs, torch.int32, large_pages).view(stripes, pairs)
    values = new(int(offsets[-1]) + SLACK, torch.bfloat16, large_pages)
    addresses = address(masks), address(offsets), address(values)
    if not module.fill_matrix(*source, *addresses, threads):
        raise KernelError("The weight changed while it was packed; pack it again when nothing writes to it.")
    return Packed(masks, offsets, values, (rows, columns)).trust()


def checked_stored(values: torch.Tensor, bitmask: torch.Tensor, shape: tuple[int, int]) -> int:
    """Refuses what cannot be a stored matrix, before it is read; returns the bits from one row to the next."""
    rows, columns = shape
    checked("The stored values", values, torch.bfloat16, None)
    flat = bitmask.dim() == 1
    checked("The bitmask", bitmask, torch.uint8, (-(-rows * columns // 8),) if flat else (rows, -(-columns // 8)))
    used = (rows * columns if flat else columns) % 8
    if used and bool((bitmask[..., -1] >> used).any()):
        raise KernelError(f"The bitmask marks weights beyond the shape {shape}; the file is damaged.")
    return columns if flat else bitmask.shape[1] * 8


@torch.inference_mode(False)
def pack_stored(values: torch.Tensor, bitmask: torch.Tensor, shape: Sequence[int], large_pages: bool = True) -> Packed:
    """Packs what a compressed checkpoint holds, without the dense matrix in between.

    `values` are the non-zeros row after row, `bitmask` one bit per weight, the lowest bit of a byte first: either all rows
    after one another, or a matrix of bytes in which every row begins with a new one.
    """
    rows, columns = shape = checked_shape(shape)
    row_bits = checked_stored(values, bitmask, shape)
    module, threads = kernels(), torch.get_num_threads()
    if module is None:
        refuse_count(torch_path.count_stored(bitmask), values.numel())
        return pack(torch_path.spread_stored(values, bitmask, shape))
    starts = torch.empty(rows + 1, dtype=torch.int64, device="cpu")
    module.rows_of_stored(address(bitmask), row_bits, rows, columns, address(starts))
    refuse_count(int(starts[-1]), values.numel())
    stripes, pairs = sizes(shape)
    source = address(values), address(bitmask), row_bits, address(starts), rows, columns
    masks = new(stripes * pairs, torch.int32, large_pages).view(stripes, pairs)
    # Nearly always no stored value is a zero, and where stripes begin follows from the bits; else the zeros are counted, and left out.
    bounds = torch.arange(0, stripes + 1, device="cpu").mul_(STRIPE_ROWS).clamp_(max=rows)
    offsets = starts[bounds]
    for _ in range(2):
        packed = new(int(offsets[-1]) + SLACK, torch.bfloat16, large_pages)
        if module.fill_stored(*source, address(masks), address(offsets), address(packed), threads):
            return Packed(masks, offsets, packed, shape).trust()
        module.measure_stored(*source, address(offsets), threads)
    raise KernelError("The stored weights changed while they were packed; load them again.")


def refuse_count(marked: int, values: int) -> None:
    if marked != values:
        raise KernelError(f"The bitmask marks {marked} weights, but {values} values are stored; the file is damaged.")


@torch.inference_mode(False)
def arrange(weight: torch.Tensor, large_pages: bool = True) -> Arranged:
    """Brings a dense matrix into the order of the kernels, for `dense_matmul`."""
    weight = checked_weight(weight)
    rows, columns = weight.shape
    module = kernels()
    if module is None:
        return Arranged(torch_path.arrange(weight).view(torch.bfloat16), (rows, columns))
    stripes, pairs = sizes((rows, columns))
    values = new(stripes * pairs * PAIR_WEIGHTS, torch.bfloat16, large_pages)
    source = address_of_spaced(weight), *weight.stride(), rows, columns
    module.arrange_matrix(*source, address(values), torch.get_num_threads())
    return Arranged(values.view(stripes, pairs, PAIR_WEIGHTS), (rows, columns))
