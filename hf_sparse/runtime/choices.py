"""Which form of a matrix is faster on this machine: measured once for each shape and sparsity, and remembered on disk."""

import json
import math
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from hf_sparse import environment
from hf_sparse.native import instruction_set, matmul, pack
from hf_sparse.runtime.sources import Source, matrix_shape
from hf_sparse.runtime.timing import interleaved

VARIABLE = "HF_SPARSE_CACHE"  # a folder; unset is the user's own folder for caches
GAIN = 1.05  # from here on a form counts as faster: less is lost in the noise of a short measurement
FORMAT = 1
_CACHES = 64 * 2**20  # bytes of copies, so that the caches do not hold what a model would read from memory
_COPIES = 64
_SECONDS = 0.03  # for each number of tokens
_LARGEST_FILE = 2**24

Speedups = dict[int, float]  # tokens -> time of the dense product over that of the packed one


def cache_file() -> Path:
    folder = os.environ.get(VARIABLE) or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hf_sparse"
    )
    return Path(folder) / "timings.json"


def machine() -> str:
    """What a time depends on beside the matrix: processor, instruction set, threads, versions."""
    versions = environment.versions()
    threads = f"{torch.get_num_threads()} threads"
    return ", ".join((processor(), instruction_set(), threads, f"torch {versions['torch']}", versions["hf_sparse"]))


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


class Choices:
    """The speedups known of this machine; those that are not known are measured, and written to disk by `save`."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file or cache_file()
        self._machine = machine()
        self._new: dict[str, float] = {}
        self._known = _read(self._file).get(self._machine, {})

    def speedups(self, source: Source, tokens: tuple[int, ...]) -> Speedups:
        """For a matrix with zeros, whose values are read only where something has to be measured."""
        rows, columns = matrix_shape(source)
        order, dtype = " transposed" if source.transposed else "", str(source.dtype).removeprefix("torch.")
        zeros, weight, found = round((source.zeros or 0) * 20) * 5, None, {}
        for count in tokens:
            key = f"{rows}x{columns}{order} {zeros}% {dtype} {count}"
            if key not in self._known:
                weight = source.matrix() if weight is None else weight
                self._known[key] = self._new[key] = measure(weight, count)
            found[count] = self._known[key]
        return found

    def save(self) -> None:
        """Adds what was measured to the file; a folder that cannot be written costs measuring again, nothing else."""
        if not self._new:
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
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def measure(weight: torch.Tensor, tokens: int) -> float:
    """How many times as fast as dense the packed product is for this many tokens."""
    copies = max(1, min(_COPIES, _CACHES // weight.nbytes))
    x = (
        torch.linspace(-1, 1, tokens * weight.shape[1]).view(tokens, -1).to(weight.dtype)
    )  # no random numbers are used up
    matrix = weight.to(torch.bfloat16)

    def dense(copy: torch.Tensor) -> Callable[[], object]:
        return lambda: F.linear(x, copy)

    def sparse() -> Callable[[], object]:
        packed = pack(matrix)
        return lambda: matmul(x, packed)

    ways = {
        "dense": [dense(weight.clone()) for _ in range(copies)],
        "sparse": [sparse() for _ in range(copies)],
    }
    times = interleaved(ways, _SECONDS)
    return times["dense"].median / max(times["sparse"].median, 1e-9)
