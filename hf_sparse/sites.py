"""A site: one (out, in) weight matrix of a model, whatever tensor holds it."""

from dataclasses import dataclass

import torch
from torch import nn

from hf_sparse.errors import ModelError

_CHUNK = 2**16  # weights counted at a time
# Path components that wrappers put in: torch.compile, DataParallel, FSDP, PEFT's model and PEFT's layers.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}


def plain_name(path: str) -> str:
    """A module path without what wrappers added: `base_model.model.model.layers.0...` -> `model.layers.0...`."""
    path = path.removeprefix("base_model.model.")
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


@dataclass(frozen=True)
class Rows:
    """The rows of a fused matrix that belong to one site: all rows seen as (outer, parts, inner), parts [start, stop) taken.

    Concatenated gate and up: `Rows(1, 2, I, 0, 1)` and `Rows(1, 2, I, 1, 2)`; interleaved gate and up: `Rows(I, 2, 1, 0, 1)`;
    q of a per-head interleaved qkv: `Rows(heads, 3, head_dim, 0, 1)`; q of concatenated q, k, v under grouped heads:
    `Rows(1, query + 2 * key_value, head_dim, 0, query)`.
    """

    outer: int
    parts: int
    inner: int
    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.outer * (self.stop - self.start) * self.inner


@dataclass(frozen=True)
class Site:
    """Where one (out, in) matrix lies, and what is known about it by name."""

    name: str  # module path, then expert index, then role; unique in the model
    module: str  # path of the module that owns the parameter, as `model.get_submodule` takes it
    parameter: str  # name of the parameter in that module
    shape: tuple[int, int]  # (out, in) of the matrix as read
    role: str | None = None  # "q" "k" "v" "o" "gate" "up" "down", or None where the name table knows nothing
    expert: int | None = None  # index along the first dimension of a 3-D parameter
    transposed: bool = False  # stored as (in, out): Conv1D and some expert parameters
    rows: Rows | None = None  # None: all rows
    stacked: int | None = None  # a matrix that holds this many experts one below the other, as DBRX does

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]


def parameter_of(model: nn.Module, site: Site) -> nn.Parameter:
    """The parameter that holds the site (shared by the sites of a fused or 3-D tensor)."""
    parameter = getattr(model.get_submodule(site.module), site.parameter)
    if not isinstance(parameter, torch.Tensor):
        raise ModelError(f"{site.name}: {site.module}.{site.parameter} is no tensor any more; was the model changed?")
    return parameter  # type: ignore[return-value]


def view(tensor: torch.Tensor, site: Site) -> torch.Tensor:
    """The site inside its stored tensor, as (out, in) or, for fused rows, (outer, parts, inner, in); never a copy."""
    if site.stacked is not None:
        tensor = tensor.unflatten(0, (site.stacked, -1))
    matrix = tensor if site.expert is None else tensor[site.expert]
    if site.transposed:
        matrix = matrix.T
    if site.rows is None:
        return matrix
    fused = matrix.unflatten(0, (site.rows.outer, site.rows.parts, site.rows.inner))
    return fused[:, site.rows.start : site.rows.stop]


def read(model: nn.Module, site: Site) -> torch.Tensor:
    """The site's matrix, (out, in); do not write into it, it may or may not share memory with the model."""
    return view(parameter_of(model, site).detach(), site).reshape(site.shape)


def write_(model: nn.Module, site: Site, matrix: torch.Tensor) -> None:
    """Put a matrix (out, in) back where `read` took it from, in the model's dtype and on its device."""
    if tuple(matrix.shape) != site.shape:
        raise ModelError(f"{site.name} has shape {site.shape}, the matrix to write has {tuple(matrix.shape)}.")
    target = view(parameter_of(model, site).detach(), site)
    target.copy_(matrix.reshape(target.shape))


def stored_rows(site: Site) -> torch.Tensor:
    """Which row of the stored matrix (output channel of the module's product) each row of the site is, as int64."""
    if site.rows is None:
        return torch.arange(site.shape[0])
    rows = site.rows
    every = torch.arange(rows.outer * rows.parts * rows.inner).view(rows.outer, rows.parts, rows.inner)
    return every[:, rows.start : rows.stop].reshape(-1)


def count_zeros(matrix: torch.Tensor) -> int:
    """How many weights are zero, which is what dropped means."""
    if matrix.device.type != "cpu" or not matrix.is_contiguous() or not matrix.is_floating_point():
        return matrix.numel() - int(torch.count_nonzero(matrix))
    # On a CPU a piece that stays in the cache is compared and summed as float32, which is exact up to 2**24, in a tenth of the time.
    flags = torch.empty(min(_CHUNK, matrix.numel()), dtype=torch.float32)
    parts = matrix.detach().view(-1).split(_CHUNK)
    return sum(int(torch.eq(part, 0, out=flags[: part.numel()]).sum()) for part in parts if part.numel())
