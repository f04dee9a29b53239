"""Sites of the modules that hold one matrix: Linear, Conv1D and torch's own multi-head attention."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_sparse.families.fused import split
from hf_sparse.families.names import role_of
from hf_sparse.sites import Rows, Site, plain_name

_PROJECTIONS = {"q_proj_weight": "q", "k_proj_weight": "k", "v_proj_weight": "v"}


def _sites(path: str, name: str, whole: Site, parts: list[tuple[str | None, Rows]]) -> list[Site]:
    return [
        Site(f"{name}.{role}", path, whole.parameter, (rows.count, whole.shape[1]), role, None, whole.transposed, rows)
        for role, rows in parts
    ]


def _attention_sites(path: str, name: str, parameter: torch.Tensor) -> list[Site]:
    """torch.nn.MultiheadAttention keeps bare parameters: q, k and v in one, or one each where their inputs differ in width."""
    plain = f"{plain_name(path)}.{name}"
    rows, columns = parameter.shape
    whole = Site(plain, path, name, (rows, columns), _PROJECTIONS.get(name))
    if name in _PROJECTIONS:
        return [whole]
    thirds = [Rows(1, 3, rows // 3, part, part + 1) for part in range(3)]
    return _sites(path, plain, whole, list(zip("qkv", thirds, strict=True)))


def sites_of_linear(path: str, module: nn.Module, owner: nn.Module, name: str, parameter: torch.Tensor) -> list[Site]:
    """The sites of one two-dimensional parameter; empty where the module is none that multiplies with it."""
    if isinstance(module, nn.MultiheadAttention) and name.endswith("proj_weight") and parameter.ndim == 2:
        return _attention_sites(path, name, parameter)
    if name != "weight" or parameter.ndim != 2 or not isinstance(module, (nn.Linear, Conv1D)):
        return []
    plain = plain_name(path)
    transposed = isinstance(module, Conv1D)
    shape = (parameter.shape[1], parameter.shape[0]) if transposed else (parameter.shape[0], parameter.shape[1])
    whole = Site(plain, path, name, shape, role_of(plain), None, transposed)
    return _sites(path, plain, whole, split(plain, shape, owner)) or [whole]
