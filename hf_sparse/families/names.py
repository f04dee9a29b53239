"""Which role a matrix has, told by the end of its module's path."""

from fnmatch import fnmatchcase

from hf_sparse.errors import ConfigError, unknown

ROLES = ("q", "k", "v", "o", "gate", "up", "down")

# Role and ends of module paths: compared component by component from the end, without case, `*` within a component.
# The first end that matches decides, so the more particular stand first.
_TABLE = (
    ("o", "*att*.output.dense *att*.output"),  # BERT has two modules called output.dense
    ("q", "q_proj query_proj q_lin linear_q to_q q_attn wq q_b_proj *att*.query *att*.q self.query self.q"),
    ("k", "k_proj key_proj k_lin linear_k to_k wk *att*.key *att*.k self.key self.k"),
    ("v", "v_proj value_proj v_lin linear_v to_v wv *att*.value *att*.v self.value self.v"),
    ("o", "o_proj out_lin linear_out to_out *att*.out_proj *att*.output_proj *att*.dense *att*.proj *att*.c_proj"),
    ("o", "*att*.wo *att*.o *att*.projection *att*.projection_layer *att*.final_linear *att*.to_out.0"),
    # gated feed-forward
    ("gate", "gate_proj wi_0 gate_linear ffn.proj_up_gate *feed_forward*.w1 *mlp*.w1 *expert*.w1 *ffn*.w1"),
    ("up", "up_proj wi_1 up_linear ffn.proj_up *feed_forward*.w3 *mlp*.w3 *expert*.w3 *ffn*.w3"),
    ("down", "down_proj down_linear ffn.proj_down *feed_forward*.w2 *mlp*.w2 *expert*.w2 *ffn*.w2"),
    # plain feed-forward
    ("up", "fc1 linear_fc1 fc_in c_fc lin1 wi dense_h_to_4h intermediate_dense intermediate.dense"),
    ("down", "fc2 linear_fc2 fc_out lin2 wo dense_4h_to_h output_dense output.dense"),
    ("up", "linear1 linear_1 dense1 input_linear ffn intermediate_query.dense ffw_layer_1 feed_forward.intermediate"),
    ("down", "linear2 linear_2 dense2 output_linear ffn_output output_query.dense ffw_layer_2 feed_forward.output"),
    ("up", "*ff*.layer_1 *mlp*.proj_in *mlp*.in_proj *mlp*.layers.0 mlp.0 ff.0 ffn.0"),
    ("down", "*ff*.layer_2 *mlp*.proj_out *mlp*.out_proj *mlp*.layers.1 mlp.2 ff.2 ff.3 ffn.2"),
    ("down", "*mlp*.c_proj *ffn*.c_proj weights_out"),
)
ROLE_PATTERNS: list[tuple[str, str]] = [(pattern, role) for role, patterns in _TABLE for pattern in patterns.split()]


def ends_with(path: str, pattern: str) -> bool:
    """Whether the last components of a dotted path match those of a pattern."""
    wanted = pattern.lower().split(".")
    given = path.lower().split(".")[-len(wanted) :]
    return len(given) == len(wanted) and all(map(fnmatchcase, given, wanted))


def register_role(pattern: str, role: str) -> None:
    """Let a path ending name a role, before all patterns known so far."""
    if role not in ROLES:
        raise ConfigError(unknown("role", role, ROLES))
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
