"""Which heads and neurons are skipped for the token at hand."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_sparse.config.serialise import Serialisable, known_version, mapping, share, whole
from hf_sparse.errors import ConfigError, unknown

_LONGEST = 2**31  # tokens


@dataclass(frozen=True, kw_only=True)
class PredictorConfig(Serialisable):
    """Contextual sparsity: which heads and neurons a predictor skips for the token at hand."""

    kind: str = "shadow"  # "shadow" | "dejavu" | "gate_first" | "static" | "oracle"
    criterion: str = "magnitude"  # importance of a head or neuron that the predictor learns
    keep_neurons: float = 0.5  # share of neurons computed
    keep_heads: float = 1.0  # share of heads computed
    neuron_block: int = 16  # neurons are chosen in blocks of 1, 16 or 32
    selection: str = "block"  # "block": the share holds in every block; "global": over all blocks
    dense_blocks: tuple[int, ...] = (0,)  # blocks that skip nothing
    refresh_every: int = 1  # tokens between two choices
    options: Mapping[str, Any] = field(default_factory=dict)
    version: int = 1

    def __post_init__(self) -> None:
        kinds = ("shadow", "dejavu", "gate_first", "static", "oracle")
        if self.kind not in kinds:
            raise ConfigError(unknown("predictor kind", self.kind, kinds))
        if self.selection not in ("block", "global"):
            raise ConfigError(unknown("selection", self.selection, ("block", "global")))
        for name in ("keep_neurons", "keep_heads"):
            if getattr(self, name) != 1:
                share(name, getattr(self, name))
        if self.neuron_block not in (1, 16, 32):
            raise ConfigError(f"neuron_block={self.neuron_block!r} is not allowed; give 1, 16 or 32.")
        whole("refresh_every", self.refresh_every, 1)
        if self.refresh_every > _LONGEST:
            raise ConfigError(f"refresh_every={self.refresh_every!r} is not allowed; give at most {_LONGEST} tokens.")
        if not isinstance(self.dense_blocks, list | tuple):
            raise ConfigError(f"dense_blocks={self.dense_blocks!r} is not allowed; give a list of block numbers.")
        for number in self.dense_blocks:
            whole("dense_blocks", number, 0)
        object.__setattr__(self, "dense_blocks", tuple(self.dense_blocks))
        object.__setattr__(self, "options", mapping("options", self.options))
        known_version(type(self).__name__, self.version)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "dense_blocks": list(self.dense_blocks), "options": dict(self.options)}
