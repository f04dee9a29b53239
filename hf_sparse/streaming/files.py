"""Safetensors files read and written tensor by tensor, at their places, without mapping them into memory.

A mapped file counts against limits of a process's memory in whole, and its pages stay as long as the mapping; what is read here is
the process's own and goes when it is let go.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_sparse.errors import CheckpointError
from hf_sparse.remote.headers import LENGTH_BYTES, Tensor, header_length, parse_header
from hf_sparse.storage import StoredTensor, plain_tensors
from hf_sparse.storage.names import VALUES
from hf_sparse.text import one_line

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PIECE = 2**24  # bytes copied at a time


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _read_into(handle: int, view: memoryview, offset: int, name: str) -> None:
    while view:
        count = os.preadv(handle, [view], offset)
        if not count:
            raise CheckpointError(f"{name} ends in the middle of a tensor; was it changed meanwhile?")
        view, offset = view[count:], offset + count


def _write_from(handle: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count


class FileTensor:
    """One tensor in an open file, with the methods of safetensors' own slices: indexing reads it."""

    def __init__(self, handle: int, tensor: Tensor) -> None:
        self.handle, self.tensor = handle, tensor
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{one_line(tensor.file, 120)} holds numbers of the format {tensor.dtype}, which are not read here."
            )

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return self.tensor.dtype

    @property
    def bytes(self) -> int:
        return self.tensor.size * DTYPES[self.tensor.dtype].itemsize

    def __getitem__(self, index: Any) -> torch.Tensor:
        made = torch.empty(self.tensor.shape, dtype=DTYPES[self.tensor.dtype])
        _read_into(self.handle, _bytes_of(made), self.tensor.offset, self.tensor.file)
        return made[index]


@dataclass(frozen=True)
class Header:
    """The header of a file, and what it says."""

    content: bytes  # with the length before it
    tensors: dict[str, Tensor]

    @property
    def file_size(self) -> int:
        last = max(self.tensors.values(), key=lambda tensor: tensor.offset, default=None)
        return len(self.content) if last is None else last.offset + last.size * DTYPES[last.dtype].itemsize


def read_header(handle: int, name: str) -> Header:
    """The header of an open file; raises CheckpointError where it is none."""
    size = os.fstat(handle).st_size
    start = os.pread(handle, LENGTH_BYTES, 0)
    length = header_length(start, size, name)
    content = os.pread(handle, length, LENGTH_BYTES)
    return Header(start + content, parse_header(content, size, name))


def make_header(tensors: Sequence[tuple[str, str, Sequence[int]]], file: str) -> Header:
    """The header of a file with tensors (name, dtype, shape), the widest numbers first, as safetensors orders them."""
    ordered = sorted(tensors, key=lambda item: (-DTYPES[item[1]].itemsize, item[0]))
    told: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in ordered:
        size = DTYPES[dtype].itemsize
        for side in shape:
            size *= side
        told[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    content = json.dumps(told, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    content += b" " * (-len(content) % 8)
    found = parse_header(content, LENGTH_BYTES + len(content) + end, file)
    return Header(len(content).to_bytes(LENGTH_BYTES, "little") + content, found)


class Inputs:
    """The weight files of a model, open for reading; `tensors` by plain name, also where they are compressed."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self.headers: dict[str, Header] = {}
        self._handles: list[int] = []
        slices: dict[str, Any] = {}
        try:
            for path in self.paths:
                handle = os.open(path, os.O_RDONLY)
                self._handles.append(handle)
                header = self.headers[path.name] = read_header(handle, path.name)
                if twice := slices.keys() & header.tensors.keys():
                    raise CheckpointError(f"{one_line(min(twice), 120)!r} is in two files; save the model again.")
                slices |= {name: FileTensor(handle, tensor) for name, tensor in header.tensors.items()}
            self.file_of = {name: stored.tensor.file for name, stored in slices.items()}  # the name of a tensor's file

            def join(name: str, parts: Mapping[str, FileTensor]) -> StoredTensor:
                self.file_of[name] = parts[VALUES].tensor.file
                return StoredTensor(name, parts)

            self.tensors: dict[str, FileTensor | StoredTensor] = plain_tensors(slices, join)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for handle in self._handles:
            os.close(handle)
        self._handles.clear()


class Outputs:
    """Weight files of a known layout, with room for every tensor, into which tensors are written in any order."""

    def __init__(self, folder: Path, headers: Mapping[str, Header]) -> None:
        """Make the files that are not there yet; room is taken now, so that a full disk shows before any work is done."""
        self._handles: dict[str, int] = {}
        self._places = {name: tensor for header in headers.values() for name, tensor in header.tensors.items()}
        try:
            for name, header in headers.items():
                path = folder / name
                known = path.is_file() and path.stat().st_size == header.file_size
                handle = self._handles[name] = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
                if not known or os.pread(handle, len(header.content), 0) != header.content:
                    _take_room(handle, header.file_size, path)
                    _write_from(handle, memoryview(header.content), 0)
            self.sync()
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> FileTensor:
        """A tensor as it is written now."""
        place = self._places[name]
        return FileTensor(self._handles[place.file], place)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the values of a tensor in the number format of its place."""
        place = self._places[name]
        if tuple(tensor.shape) != place.shape:
            raise CheckpointError(
                f"{one_line(name, 120)!r} would change its shape from {place.shape} to {tuple(tensor.shape)}."
            )
        made = tensor.detach().cpu().to(DTYPES[place.dtype]).contiguous()
        _write_from(self._handles[place.file], _bytes_of(made), place.offset)

    def copy(self, name: str, stored: FileTensor | StoredTensor) -> None:
        """Write a tensor as it is stored elsewhere, byte for byte where the number format is the same."""
        place = self._places[name]
        if not isinstance(stored, FileTensor) or stored.get_dtype() != place.dtype:
            self.write(name, stored[...])
            return
        source, target, left = stored.tensor.offset, place.offset, stored.bytes
        buffer = memoryview(bytearray(min(left, _PIECE)))
        while left:
            piece = buffer[: min(left, _PIECE)]
            _read_into(stored.handle, piece, source, stored.tensor.file)
            _write_from(self._handles[place.file], piece, target)
            source, target, left = source + len(piece), target + len(piece), left - len(piece)

    def sync(self) -> None:
        """What was written stays, whatever happens to the machine."""
        for handle in self._handles.values():
            os.fsync(handle)

    def close(self) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()


def _take_room(handle: int, size: int, path: Path) -> None:
    try:
        os.ftruncate(handle, 0)
        os.posix_fallocate(handle, 0, max(1, size))
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} needs {size} bytes on the disk: {error.strerror}.") from error
