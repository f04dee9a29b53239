"""Which form of a matrix is faster on this machine: measured once for each shape and sparsity, and remembered on disk."""

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from hf_sparse import environment
from hf_sparse.native import Packed, instruction_set, pack
from hf_sparse.native.binary import load
from hf_sparse.runtime.copies import in_modules, works
from hf_sparse.runtime.forms import Form, PackedForm
from hf_sparse.runtime.sources import Source, matrix_shape, sample
from hf_sparse.runtime.timing import clock_name, interleaved

VARIABLE = "HF_SPARSE_CACHE"  # a folder; unset is the user's own folder for caches
GAIN = 1.05  # from here on a form counts as faster: less is lost in the noise of a short measurement
FORMAT = 1
_SECONDS = 0.03  # for each number of tokens
_LARGEST_FILE = 2**24
_LARGEST = 1e9  # of a speedup


class Speedup(NamedTuple):
    """Time of the dense product over that of the packed one, in the two ways that there are."""

    kernels: float
    expanded: float  # the matrix is made dense for each product


Speedups = dict[int, Speedup]  # by number of tokens


def expands_from(speedups: Speedups) -> int | None:
    """The number of tokens from which on expanding was faster, for all measured ones."""
    found = None
    for count, speedup in sorted(speedups.items(), reverse=True):
        if speedup.expanded < speedup.kernels * GAIN:
            break
        found = count
    return found


def cache_file() -> Path | None:
    """None where the user has no folder for it: then everything is measured again."""
    named = os.environ.get(VARIABLE) or os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(named) if named else Path.home() / ".cache"
    except RuntimeError:
        return None
    return (folder if os.environ.get(VARIABLE) else folder / "hf_sparse") / "timings.json"


def machine() -> str:
    """What a time depends on beside the matrix: processor, instruction set, threads, versions, settings and clock."""
    versions, mkldnn = environment.versions(), torch.backends.mkldnn
    onednn = mkldnn.is_available() and bool(getattr(mkldnn, "enabled", True))
    settings = f"float32 {torch.get_float32_matmul_precision()}, mkldnn {'on' if onednn else 'off'}"
    return ", ".join(
        (
            processor(), *_flags(), instruction_set(), f"{torch.get_num_threads()} threads", f"torch {versions['torch']}",
            f"{versions['hf_sparse']} {_build()}".strip(), settings, clock_name(),
        )
    )  # fmt: skip


def processor() -> str:
    return _in_cpuinfo("model name") or platform.processor() or platform.machine()


def _flags() -> list[str]:
    """Those by which processors of one name differ in virtual machines, and on which torch's own product depends."""
    flags = set(_in_cpuinfo("flags").split())
    return [name for name in ("amx_bf16", "avx512_bf16") if name in flags]


def _in_cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


@cache
def _build() -> str:
    """Tells builds of the kernels apart that have one version."""
    module, _ = load()
    try:
        return "" if module is None else hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()[:12]
    except OSError:
        return ""


class Choices:
    """The speedups known of this machine; those that are not known are measured, and written to disk by `save`."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file or cache_file()
        self._machine = machine()
        self._new: dict[str, float] = {}
        self._known = {} if self._file is None else _read(self._file).get(self._machine, {})

    def speedups(self, source: Source, tokens: tuple[int, ...], bias: bool = False) -> Speedups:
        """For a matrix with zeros, whose values are read only where something has to be measured."""
        rows, columns = matrix_shape(source)[-2:]
        order, dtype = " transposed" if source.transposed else "", str(source.dtype).removeprefix("torch.")
        zeros = round((source.zeros or 0) * 20) * 5
        kind = f"{rows}x{columns}{order}{' bias' if bias else ''} {zeros}% {dtype}"
        keys = {count: [f"{kind} {count} {way}" for way in Speedup._fields] for count in tokens}
        missing = [count for count in tokens if not all(key in self._known for key in keys[count])]
        if missing:
            measured = measure(sample(source), missing, source.transposed, bias)
            new = {key: speedup for count in missing for key, speedup in zip(keys[count], measured[count])}
            self._known |= new
            self._new |= new
        return {count: Speedup(*(self._known[key] for key in keys[count])) for count in tokens}

    def save(self) -> None:
        """Adds what was measured to the file; a folder that cannot be written costs measuring again, nothing else."""
        if not self._new or self._file is None:
            return
        whole = _read(self._file)  # another process may have written meanwhile
        whole[self._machine] = {**whole.get(self._machine, {}), **self._new}
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._file.parent, delete=False, encoding="utf-8") as file:
                json.dump({"format": FORMAT, "machines": whole}, file, indent=1, sort_keys=True)
            os.replace(file.name, self._file)
        except OSError:
            return
        self._new = {}


def _read(file: Path) -> dict[str, dict[str, float]]:
    """Only what is as it should be; a damaged or foreign file counts as empty."""
    try:
        if file.stat().st_size > _LARGEST_FILE:
            return {}
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if (
        not isinstance(content, dict)
        or content.get("format") != FORMAT
        or not isinstance(content.get("machines"), dict)
    ):
        return {}
    return {
        machine: {key: float(value) for key, value in times.items() if _is_speedup(value)}
        for machine, times in content["machines"].items()
        if isinstance(times, dict)
    }


def _is_speedup(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _LARGEST


def measure(matrix: torch.Tensor, tokens: Sequence[int], transposed: bool = False, bias: bool = False) -> Speedups:
    """How many times as fast as dense modules packed ones are in either way, for each number of tokens."""
    rounded, packs = matrix.to(torch.bfloat16), list[Packed]()

    def packed() -> Form:
        packs.append(pack(rounded))
        return PackedForm(packs[-1])

    forms: dict[str, Callable[[], Form | None]] = {
        "dense": lambda: None,
        "kernels": packed,
        "expanded": lambda: PackedForm(packs.pop(), expands_from=1),  # backwards: none that the kernels have just read
    }
    modules, found = in_modules(matrix, forms, transposed=transposed, bias=bias), {}
    for count in tokens:
        times = interleaved(works(modules, matrix, count), _SECONDS)
        dense, kernels, expanded = (max(times[way].median, 1e-9) for way in forms)
        found[count] = Speedup(dense / kernels, dense / expanded)
    return found
