"""What a verification found: a row for each figure, what was claimed, what is there, and whether they agree."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from hf_sparse.recovery import writable
from hf_sparse.text import one_line

AGREES, DIFFERS, NOT_CHECKED = "agrees", "differs", "not checked"
_SHOWN = 20  # rows of one check that differ; JSON has all


@dataclass(frozen=True)
class Row:
    """One figure. `claimed` and `found` are plain data."""

    check: str  # "files", "claim", "zeros", "pattern", "weights", "card", "base" or "evaluation"
    item: str  # what was looked at: a file, a site, a tensor, a figure
    status: str  # AGREES, DIFFERS or NOT_CHECKED
    claimed: Any = None
    found: Any = None
    reason: str = ""  # why it was not checked, or what a difference means


def compared(check: str, item: str, claimed: Any, found: Any, reason: str = "") -> Row:
    """A row for two values that have to be equal; the reason stands only where they are not."""
    same = claimed == found and type(claimed) is type(found)
    return Row(check, item, AGREES if same else DIFFERS, claimed, found, "" if same else reason)


def skipped(check: str, item: str, reason: str, claimed: Any = None) -> Row:
    """A row for something that was not looked at."""
    return Row(check, item, NOT_CHECKED, claimed, None, reason)


@dataclass(frozen=True)
class Verification:
    """Every row, and what was looked at. `str()` is a table in which rows that agree are one line for each check."""

    model: str
    commit: str | None  # of the repository; None for a folder
    rows: list[Row]

    @property
    def agrees(self) -> bool:
        """Whether nothing that was checked differs."""
        return not any(row.status == DIFFERS for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with every row."""
        rows = [asdict(row) for row in self.rows]
        plain: dict[str, Any] = writable(
            {"model": self.model, "commit": self.commit, "agrees": self.agrees, "rows": rows}
        )
        return plain

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield one_line(self.model) + (f" at commit {self.commit}" if self.commit else "")
        checks = list(dict.fromkeys(row.check for row in self.rows))
        width = max(map(len, checks), default=0)
        for check in checks:
            for line in _of_check([row for row in self.rows if row.check == check]):
                yield f"{check:<{width}}  {line}"
        counts = {status: sum(row.status == status for row in self.rows) for status in (AGREES, DIFFERS, NOT_CHECKED)}
        figures = f"{counts[AGREES]} agree, {counts[DIFFERS]} differ, {counts[NOT_CHECKED]} not checked"
        verdict = "all that was checked agrees" if self.agrees else "the model is not what it says"
        yield f"{verdict}: {figures}."


def _of_check(rows: list[Row]) -> Iterator[str]:
    agreeing = [row for row in rows if row.status == AGREES]
    if agreeing:
        yield f"{AGREES:<11}  {_items(agreeing)}"
    differing = [row for row in rows if row.status == DIFFERS]
    for row in differing[:_SHOWN]:
        reason = f" ({one_line(row.reason)})" if row.reason else ""
        yield f"{DIFFERS:<11}  {one_line(row.item, 120)}: claimed {_value(row.claimed)}, found {_value(row.found)}{reason}"
    if len(differing) > _SHOWN:
        yield f"{DIFFERS:<11}  and {len(differing) - _SHOWN} more (--json has all)"
    left = [row for row in rows if row.status == NOT_CHECKED]
    for reason in dict.fromkeys(row.reason for row in left):
        yield f"{NOT_CHECKED:<11}  {_items([row for row in left if row.reason == reason])}: {one_line(reason)}"


def _items(rows: Iterable[Row]) -> str:
    items = [one_line(row.item, 120) for row in rows]
    return ", ".join(items) if len(items) <= 3 else f"{len(items)} figures, from {items[0]} to {items[-1]}"


def _value(value: Any) -> str:
    if value is None:
        return "nothing"
    return f"{value:.6g}" if isinstance(value, float) else one_line(value, 120)
