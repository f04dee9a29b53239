"""Which role a matrix has, told by the end of its module's path."""

from fnmatch import fnmatchcase

ROLES = ("q", "k", "v", "o", "gate", "up", "down")

# (end of the module path, role): components are compared from the end, without case, `*` within a component; first match wins.
ROLE_PATTERNS: list[tuple[str, str]] = [
    # attention, most particular first: BERT's two modules called `output.dense`
    ("*att*.output.dense", "o"),
    ("*att*.output", "o"),
    *((f"{name}", "q") for name in ("q_proj", "query_proj", "q_lin", "linear_q", "to_q", "q_attn", "wq", "q_b_proj")),
    *((f"{name}", "k") for name in ("k_proj", "key_proj", "k_lin", "linear_k", "to_k", "wk")),
    *((f"{name}", "v") for name in ("v_proj", "value_proj", "v_lin", "linear_v", "to_v", "wv")),
    *((f"{parent}.{name}", "q") for parent in ("*att*", "self") for name in ("query", "q")),
    *((f"{parent}.{name}", "k") for parent in ("*att*", "self") for name in ("key", "k")),
    *((f"{parent}.{name}", "v") for parent in ("*att*", "self") for name in ("value", "v")),
    ("o_proj", "o"),
    ("out_lin", "o"),
    ("linear_out", "o"),
    ("to_out", "o"),
    *((f"*att*.{name}", "o") for name in ("out_proj", "dense", "proj", "c_proj", "wo", "o", "projection", "output_proj", "to_out.0")),
    *((f"*att*.{name}", "o") for name in ("projection_layer", "final_linear")),
    # gated feed-forward
    *((name, "gate") for name in ("gate_proj", "wi_0", "gate_linear")),
    *((name, "up") for name in ("up_proj", "wi_1", "up_linear")),
    *((name, "down") for name in ("down_proj", "down_linear")),
    *((f"{parent}.w1", "gate") for parent in ("*feed_forward*", "*mlp*", "*expert*", "*ffn*")),
    *((f"{parent}.w3", "up") for parent in ("*feed_forward*", "*mlp*", "*expert*", "*ffn*")),
    *((f"{parent}.w2", "down") for parent in ("*feed_forward*", "*mlp*", "*expert*", "*ffn*")),
    # plain feed-forward
    *((name, "up") for name in ("fc1", "linear_fc1", "fc_in", "c_fc", "lin1", "wi", "dense_h_to_4h", "intermediate_dense")),
    *((name, "down") for name in ("fc2", "linear_fc2", "fc_out", "lin2", "wo", "dense_4h_to_h", "output_dense", "weights_out")),
    *((name, "up") for name in ("intermediate.dense", "*ff*.layer_1", "linear1", "linear_1", "dense1", "input_linear", "ffn")),
    *((name, "down") for name in ("output.dense", "*ff*.layer_2", "linear2", "linear_2", "dense2", "output_linear", "ffn_output")),
    *((f"*{parent}*.c_proj", "down") for parent in ("mlp", "ffn")),
    *((f"*{parent}*.{name}", "up") for parent in ("mlp", "ff") for name in ("proj_in", "in_proj", "layers.0", "0")),
    *((f"*{parent}*.{name}", "down") for parent in ("mlp", "ff") for name in ("proj_out", "out_proj", "layers.1", "2", "3")),
    *((name, "up") for name in ("intermediate_query.dense", "ffw_layer_1", "feed_forward.intermediate")),
    *((name, "down") for name in ("output_query.dense", "ffw_layer_2", "feed_forward.output")),
    ("ffn.proj_up_gate", "gate"),
    ("ffn.proj_up", "up"),
    ("ffn.proj_down", "down"),
]


def ends_with(path: str, pattern: str) -> bool:
    """Whether the last components of a dotted path match those of a pattern."""
    wanted = pattern.lower().split(".")
    given = path.lower().split(".")[-len(wanted) :]
    return len(given) == len(wanted) and all(map(fnmatchcase, given, wanted))


def register_role(pattern: str, role: str) -> None:
    """Let a path ending name a role, before all patterns known so far."""
    if role not in ROLES:
        raise ValueError(f"Role {role!r} does not exist; allowed: {', '.join(ROLES)}.")
    ROLE_PATTERNS.insert(0, (pattern, role))


def role_of(path: str) -> str | None:
    """The role that the name table gives to a module path without wrappers, or None."""
    path = path.removesuffix(".linear")  # some models keep the matrix inside a small module of their own
    for pattern, role in ROLE_PATTERNS:
        if ends_with(path, pattern):
            return role if _plausible(path, role) else None
    return None


def _plausible(path: str, role: str) -> bool:
    """An attention module may have a `gate_proj` too, which gates the heads and not a feed-forward."""
    parent = path.lower().split(".")[-2:-1]
    return role not in ("gate", "up", "down") or not parent or "att" not in parent[0]
