"""Splits one stored matrix into the sites it is made of: fused q, k, v and fused gate, up."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from math import gcd
from typing import NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_sparse.errors import ConfigError, unknown
from hf_sparse.families.names import ends_with, role_of
from hf_sparse.sites import Rows


class Fused(NamedTuple):
    """A row of the table: modules whose path ends so, in an owner of such a class, hold these roles in this layout."""

    pattern: str
    roles: tuple[str | None, ...]
    layout: str
    owner: str = "*"


QKV = ("q", "k", "v")
# The first row that matches decides; a layout that does not fit the sizes leaves the matrix whole.
FUSED_PATTERNS: list[Fused] = [
    Fused("qkv_proj", ("q", "v", "k"), "four_shards", "CodeGen*"),
    Fused("qkv_proj", QKV, "per_head", "MiniMax*"),
    Fused("qkv_proj", QKV, "concatenated"),
    Fused("wqkv", QKV, "concatenated"),
    Fused("qkv", QKV, "concatenated"),
    Fused("c_attn", QKV, "head_sharing", "GPTBigCode*"),
    Fused("c_attn", QKV, "concatenated"),
    Fused("*att*.att_proj", QKV, "concatenated"),
    Fused("query_key_value", QKV, "head_sharing"),
    Fused("in_proj", QKV, "per_head", "DisentangledSelfAttention"),
    Fused("kv_proj", ("k", "v"), "concatenated", "JetMoe*"),
    Fused("to_kv", ("k", "v"), "concatenated"),
    Fused("kv_b_proj", ("k", "v"), "latent"),
    Fused("gate_up_proj", ("up", "gate"), "halves", "Phi4MultimodalAudio*"),
    Fused("gate_up_proj", ("gate", "up"), "halves"),
    Fused("wi", ("gate", "up"), "halves"),
    Fused("input_linear", ("gate", "up"), "halves"),
    Fused("weights_in", ("gate", "up"), "halves"),
    Fused("fc1", ("gate", "up"), "halves", "*GatingMLP"),
    Fused("fc1", ("up", "gate"), "halves", "Moonshine*"),
]
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "nheads")


def register_fused(pattern: str, roles: tuple[str | None, ...], layout: str, owner: str = "*") -> None:
    """Tell how modules of a path ending are fused, before all rows known so far; layouts are the keys of `LAYOUTS`."""
    if layout not in LAYOUTS:
        raise ConfigError(unknown("layout", layout, LAYOUTS))
    FUSED_PATTERNS.insert(0, Fused(pattern, roles, layout, owner))


def number(owner: nn.Module, names: tuple[str, ...]) -> int | None:
    """The first of some whole numbers that a module, or else its config, has as an attribute."""
    for holder in (owner, getattr(owner, "config", None)):
        for name in names:
            value: object = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _input_size(owner: nn.Module, role: str) -> int | None:
    """Columns of the sibling with a role: o reads as many as there are query rows, down as many as gate has rows."""
    for name, child in owner.named_children():
        child = getattr(child, "base_layer", child)  # PEFT puts the layer inside its own
        if role_of(f"{type(owner).__name__}.{name}") == role:
            if isinstance(child, nn.Linear):
                return child.in_features
            if isinstance(child, Conv1D):
                return int(child.weight.shape[0])
    return None


def _parts(sizes: list[int]) -> list[Rows]:
    inner = gcd(*sizes)
    parts, at, found = sum(sizes) // inner, 0, []
    for size in sizes:
        found.append(Rows(1, parts, inner, at, at + size // inner))
        at += size // inner
    return found


def _concatenated(shape: tuple[int, int], owner: nn.Module, count: int) -> list[Rows] | None:
    """q, then k and v of equal size (fewer heads than q under grouped heads); or k and v in halves."""
    rows, columns = shape
    query = _input_size(owner, "o") or (columns if rows == 3 * columns else rows)
    if count == 2:
        return _parts([rows // 2] * 2) if rows % 2 == 0 else None
    shared = (rows - query) // 2
    return _parts([query, shared, shared]) if 0 < query < rows and query + 2 * shared == rows else None


def _per_head(shape: tuple[int, int], owner: nn.Module, count: int) -> list[Rows] | None:
    """For every head its q, k and v rows, head after head."""
    heads = number(owner, _HEADS)
    return _repeated(shape[0], heads, count) if heads else None


def _four_shards(shape: tuple[int, int], owner: nn.Module, count: int) -> list[Rows] | None:
    """CodeGen keeps the four shards its weights were trained in."""
    return _repeated(shape[0], 4, count)


def _repeated(rows: int, times: int, count: int) -> list[Rows] | None:
    size, rest = divmod(rows, times * count)
    return None if rest else [Rows(times, count, size, part, part + 1) for part in range(count)]


def _head_sharing(shape: tuple[int, int], owner: nn.Module, count: int) -> list[Rows] | None:
    """As Falcon and GPT-BigCode have it: query heads in groups with their k and v; one k and v for all; or per head."""
    heads, shared = number(owner, _HEADS), number(owner, ("num_kv_heads",))
    if heads and shared and getattr(owner, "new_decoder_architecture", False):
        queries = heads // shared
        size = shape[0] // (shared * (queries + 2))
        bounds = [(0, queries), (queries, queries + 1), (queries + 1, queries + 2)]
        return [Rows(shared, queries + 2, size, start, stop) for start, stop in bounds]
    return (_concatenated if getattr(owner, "multi_query", False) else _per_head)(shape, owner, count)


def _latent(shape: tuple[int, int], owner: nn.Module, count: int) -> list[Rows] | None:
    """Multi-head latent attention: for every head the rows of k without position, then those of v."""
    key, value = number(owner, ("qk_nope_head_dim",)), number(owner, ("v_head_dim",))
    if key is None or value is None or shape[0] % (key + value):
        return None
    heads = shape[0] // (key + value)
    return [Rows(heads, key + value, 1, 0, key), Rows(heads, key + value, 1, key, key + value)]


def _halves(shape: tuple[int, int], owner: nn.Module, count: int) -> list[Rows] | None:
    """Gate and up one after the other, only if a down projection beside them reads half as many columns as there are rows."""
    return _parts([shape[0] // 2] * 2) if _input_size(owner, "down") == shape[0] / 2 else None


LAYOUTS: dict[str, Callable[[tuple[int, int], nn.Module, int], list[Rows] | None]] = {
    "concatenated": _concatenated,
    "per_head": _per_head,
    "head_sharing": _head_sharing,
    "four_shards": _four_shards,
    "latent": _latent,
    "halves": _halves,
}


def split(path: str, shape: tuple[int, int], owner: nn.Module) -> list[tuple[str | None, Rows]]:
    """(role, rows) of every site in the matrix at `path`; empty where the table says nothing or does not fit."""
    for entry in FUSED_PATTERNS:
        if ends_with(path, entry.pattern) and fnmatchcase(type(owner).__name__, entry.owner):
            roles = entry.roles
            if roles[:1] == ("q",) and _input_size(owner, "q") is not None:
                roles = roles[1:]  # cross-attention: q has its own matrix
            rows = LAYOUTS[entry.layout](shape, owner, len(roles))
            return list(zip(roles, rows, strict=True)) if rows else []
    return []
