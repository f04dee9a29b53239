"""The header of a safetensors file: which tensors it says it holds, checked against the size of the file."""

import math
from dataclasses import dataclass
from typing import TypeGuard

from hf_sparse.errors import CheckpointError
from hf_sparse.schema import parse_json
from hf_sparse.storage.bitmask import MOST_DIMENSIONS
from hf_sparse.text import one_line

# A hundred thousand tensors have a header of about ten megabytes; huggingface_hub reads no more than this either.
LARGEST_HEADER = 25_000_000
LENGTH_BYTES = 8  # in front of the header, little-endian
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}


@dataclass(frozen=True)
class Tensor:
    """What a header says of one tensor."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors names it: "F32", "BF16", ...
    file: str
    offset: int = 0  # of its values in the file
    kept: int | None = None  # how many of its values are stored, where it is compressed

    @property
    def size(self) -> int:
        """The number of values."""
        return math.prod(self.shape)


def header_length(start: bytes, file_size: int, name: str) -> int:
    """How long the header is, in bytes, from the first eight of the file.

    Raises: CheckpointError for a length that is not possible.
    """
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if len(start) < LENGTH_BYTES or length > file_size - LENGTH_BYTES:
        raise _lies(name, f"its header would be {length} bytes long, in a file of {file_size}")
    if length > LARGEST_HEADER:
        raise _lies(name, f"its header is {length} bytes long; at most {LARGEST_HEADER} are read")
    return length


def parse_header(header: bytes, file_size: int, name: str) -> dict[str, Tensor]:
    """The tensors that a header names, in the order of their values in the file.

    Raises: CheckpointError where it is no header, or the tensors do not fill the file without gaps, as the format wants it.
    """
    values = parse_json(header, f"the header of {one_line(name, 120)}")
    if not isinstance(values, dict):
        raise _lies(name, "its header is no JSON object")
    values.pop("__metadata__", None)
    spans = {tensor: _span(name, tensor, entry, LENGTH_BYTES + len(header)) for tensor, entry in values.items()}
    end = 0
    for tensor, (start, stop, _) in sorted(spans.items(), key=lambda item: item[1][:2]):
        if start != end:
            raise _lies(name, f"{one_line(tensor, 120)!r} would begin at byte {start}, not at {end}")
        end = stop
    if end != file_size - LENGTH_BYTES - len(header):
        raise _lies(name, f"its tensors would be {end} bytes, in a file with {file_size - LENGTH_BYTES - len(header)}")
    return {tensor: found for tensor, (_, _, found) in sorted(spans.items(), key=lambda item: item[1][:2])}


def _span(file: str, tensor: str, entry: object, start: int) -> tuple[int, int, Tensor]:
    """Where the values of a tensor begin and end, and the tensor."""
    shown = one_line(tensor, 120)
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (_whole_numbers(shape) and _whole_numbers(offsets) and isinstance(dtype, str) and len(offsets) == 2):
        raise _lies(file, f"what its header says of {shown!r} cannot be understood")
    if len(shape) > MOST_DIMENSIONS:
        raise _lies(file, f"{shown!r} would have {len(shape)} dimensions")
    if dtype not in _BITS:
        raise _lies(
            file, f"{shown!r} is of the number format {one_line(dtype, 40)!r}, which this version does not know"
        )
    found = Tensor(tuple(shape), dtype, file, start + offsets[0])
    if (offsets[1] - offsets[0]) * 8 != found.size * _BITS[dtype]:
        raise _lies(
            file, f"{shown!r} would be {found.size} {dtype} values in {offsets[1] - offsets[0]} bytes, which do not fit"
        )
    return offsets[0], offsets[1], found


def _whole_numbers(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**53 for item in value)


def _lies(file: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{one_line(file, 120)} is no safetensors file that can be read: {why}. Was the save interrupted?"
    )
