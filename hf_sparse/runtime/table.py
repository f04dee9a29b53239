"""The table of what runs sparse and what stays dense, with the reason."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class KernelRow:
    """One matrix as the model stores it; a fused one holds several sites."""

    module: str
    parameter: str  # of the module
    sites: tuple[str, ...]
    shape: tuple[int, ...]  # (out, in), or (experts, out, in)
    sparsity: float | None  # None: not counted
    form: str  # "packed", "2:4 tensor cores" or "dense"
    reason: str
    dense_bytes: int
    bytes: int  # as it is held now
    speedups: dict[int, float] = field(default_factory=dict)  # tokens -> times as fast as dense, as measured

    @property
    def sparse(self) -> bool:
        return self.form != "dense"


@dataclass(frozen=True)
class KernelTable:
    """What `use_sparse_kernels_` did. `str(table)` is for people, `to_dict()` for machines."""

    rows: tuple[KernelRow, ...]
    left_out: dict[str, str]  # matrices of the blocks that are no sites, with the reason

    @property
    def sparse(self) -> tuple[KernelRow, ...]:
        return tuple(row for row in self.rows if row.sparse)

    @property
    def dense_bytes(self) -> int:
        """Of all matrices, were they dense."""
        return sum(row.dense_bytes for row in self.rows)

    @property
    def bytes(self) -> int:
        """Of all matrices as they are held now."""
        return sum(row.bytes for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        totals = {
            "sparse": len(self.sparse),
            "matrices": len(self.rows),
            "dense_bytes": self.dense_bytes,
            "bytes": self.bytes,
        }
        return {"totals": totals, "rows": [asdict(row) for row in self.rows], "left_out": dict(self.left_out)}

    def __str__(self) -> str:
        """One line for each kind of matrix, and one for each reason why something stays dense."""
        lines = [
            f"{len(self.sparse)} of {len(self.rows)} matrices run sparse; "
            f"they take {self.bytes / 2**20:.1f} MiB instead of {self.dense_bytes / 2**20:.1f} MiB dense."
        ]
        groups: dict[tuple[Any, ...], list[KernelRow]] = {}
        for row in self.rows:
            rounded = None if row.sparsity is None else round(100 * row.sparsity)
            groups.setdefault((row.shape, rounded, row.form, row.reason), []).append(row)
        lines += [_line(rows) for rows in groups.values()]
        reasons = Counter(self.left_out.values())
        lines += [f"dense: {count} x {reason}" for reason, count in reasons.items()]
        return "\n".join(lines)


def _line(rows: list[KernelRow]) -> str:
    row = rows[0]
    zeros = "" if row.sparsity is None else f", {100 * row.sparsity:.0f} % zeros"
    name = row.module if len(rows) == 1 else f"{row.module} and {len(rows) - 1} more"
    return f"{row.form}: {' x '.join(map(str, row.shape))}{zeros}: {row.reason} ({name})"
