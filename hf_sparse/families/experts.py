"""Sites inside the parameters that hold all experts of a block: three-dimensional, or stacked one below the other."""

from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn

from hf_sparse.families.names import ends_with
from hf_sparse.sites import Rows, Site, plain_name


class Experts(NamedTuple):
    """A row of the table: a parameter of this name, in such a class, at a path that ends so, holds these roles per expert."""

    parameter: str
    roles: tuple[str, ...]
    owner: str = "*"
    pattern: str = "*"
    transposed: bool = False  # (expert, in, out); the module's own `is_transposed` goes first where it has one
    stacked_by: str | None = None  # for a matrix: the attribute that tells how many experts are stacked in it


EXPERT_PATTERNS: list[Experts] = [
    Experts("gate_up_proj", ("gate", "up"), "Llama4*", transposed=True),
    Experts("down_proj", ("down",), "Llama4*", transposed=True),
    Experts("gate_up_proj", ("gate", "up")),
    Experts("gate_proj", ("gate",)),
    Experts("up_proj", ("up",)),
    Experts("down_proj", ("down",)),
    Experts("weight", ("gate", "up"), "*ParallelExperts", "mlp.input_linear"),
    Experts("weight", ("down",), "*ParallelExperts", "mlp.output_linear"),
    Experts("weight", ("gate", "up"), "*ParallelExperts", "*moe*.input_linear"),
    Experts("weight", ("down",), "*ParallelExperts", "*moe*.output_linear"),
    Experts("weight", ("q",), "*ParallelExperts", "*att*.experts.input_linear"),
    Experts("weight", ("o",), "*ParallelExperts", "*att*.experts.output_linear"),
    Experts("w1", ("gate",), "DbrxExpertGLU", stacked_by="moe_num_experts"),
    Experts("v1", ("up",), "DbrxExpertGLU", stacked_by="moe_num_experts"),
    Experts("w2", ("down",), "DbrxExpertGLU", transposed=True, stacked_by="moe_num_experts"),
]


def register_experts(entry: Experts) -> None:
    """Tell how a parameter holds its experts, before all rows known so far."""
    EXPERT_PATTERNS.insert(0, entry)


def _entry(path: str, module: nn.Module, name: str, ndim: int) -> Experts | None:
    for entry in EXPERT_PATTERNS:
        if (
            entry.parameter == name
            and (ndim == 2) == (entry.stacked_by is not None)
            and fnmatchcase(type(module).__name__, entry.owner)
            and ends_with(path, entry.pattern)
        ):
            return entry
    return None


def _fused_rows(rows: int, part: int, interleaved: bool) -> Rows:
    return Rows(rows // 2, 2, 1, part, part + 1) if interleaved else Rows(1, 2, rows // 2, part, part + 1)


def sites_of_experts(path: str, module: nn.Module, name: str, parameter: torch.Tensor) -> list[Site]:
    """One site for every expert and role of a parameter; empty where the table does not know the parameter."""
    plain = plain_name(path)
    entry = _entry(plain, module, name, parameter.ndim)
    if entry is None:
        return []
    transposed = bool(getattr(module, "is_transposed", entry.transposed))
    interleaved = not getattr(module, "is_concatenated", True)
    stacked = getattr(module, entry.stacked_by) if entry.stacked_by else None
    shape = (stacked, parameter.shape[0] // stacked, parameter.shape[1]) if stacked else parameter.shape
    count, rows, columns = (shape[0], shape[2], shape[1]) if transposed else shape
    fused = len(entry.roles) == 2
    return [
        Site(
            name=f"{plain}.{expert}.{name}" + (f".{role}" if fused else ""),
            module=path,
            parameter=name,
            shape=(rows // 2 if fused else rows, columns),
            role=role,
            expert=expert,
            transposed=transposed,
            rows=_fused_rows(rows, part, interleaved) if fused else None,
            stacked=stacked,
        )
        for expert in range(count)
        for part, role in enumerate(entry.roles)
    ]
