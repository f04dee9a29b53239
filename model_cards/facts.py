"""What a card says about a report: every name made harmless, every figure counted from the report."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from hf_sparse.errors import CheckpointError, ConfigError
from hf_sparse.patterns import Pattern
from hf_sparse.report import BlockReport, Report, SiteReport
from hf_sparse.report_text import percent
from model_cards.escape import code, plain
from model_cards.evaluation import NOT_MEASURED

# Longer tables and lists are folded or cut; every figure stands in the report beside the card.
FOLD_FROM = 13
_LIST_AT_MOST = 20
_NAMES_AT_MOST = 3
_AXES = {"input": "within a row", "output": "within a column", "site": "over the whole matrix"}  # where weights compete


def check(report: Report) -> None:
    """Raise CheckpointError where the report, which may come from a file of unknown origin, holds no numbers."""
    for block in report.blocks:
        optional = [block.output_error, *(site.output_error for site in block.sites)]
        counted = [block.zeros, block.size, block.all_matrices, block.seconds, *(site.zeros for site in block.sites)]
        if not all(map(_is_number, [*counted, *(value for value in optional if value is not None)])):
            raise CheckpointError(f"the report of block {block.name!r} holds something else than numbers; prune again.")
    sizes_known = report.calibration is None or isinstance(report.calibration, Mapping)
    if not (
        _is_number(report.parameters)
        and _is_number(report.seconds)
        and sizes_known
        and isinstance(report.config, Mapping)
    ):
        raise CheckpointError("the report's totals, calibration or config are damaged; prune again.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def short_name(model: str) -> str:
    """The last part of a repository id or a path: a published card need not show somebody's folders."""
    return PurePath(model.replace("\\", "/")).name


def pattern_of(report: Report) -> Pattern | None:
    """The pattern of the config; None where it cannot be read."""
    try:
        return Pattern.parse(report.config.get("pattern"))
    except ConfigError:
        return None


def pattern_name(report: Report) -> str:
    """The pattern in one word, "N:8" where every site has an N of its own; empty where it cannot be read."""
    pattern = pattern_of(report)
    if pattern is None or pattern.group is None or not _differs(report):
        return str(pattern or "")
    return f"N:{pattern.group}"


def _differs(report: Report) -> bool:
    return len({site.pattern for site in report.sites}) > 1


def pattern_words(report: Report) -> str:
    """What the pattern means."""
    pattern = pattern_of(report)
    if pattern is None:
        return "a pattern that this version does not know"
    if pattern.group is None:
        return "no fixed places, the lowest scores go"
    if _differs(report):
        return (
            f"of every {pattern.group} consecutive weights as many are kept as the site's own pattern says: "
            + counts(site.pattern for site in report.sites)
        )
    return f"of every {pattern.group} consecutive weights {pattern.keep} {'is' if pattern.keep == 1 else 'are'} kept"


def share(zeros: int, size: int) -> str:
    """A count and what share it is."""
    return f"{zeros:,} of {size:,} ({percent(zeros / size)})" if size else "none"


def counts(values: Iterable[str]) -> str:
    """Each value, with the number of sites that have it where there are several values."""
    found: dict[str, int] = {}
    for value in values:
        found[value] = found.get(value, 0) + 1
    if len(found) == 1:
        return code(*found)
    return ", ".join(f"{code(value)} ({number} {_sites(number)})" for value, number in found.items()) or "none"


def _sites(number: int) -> str:
    return "site" if number == 1 else "sites"


def axes(sites: Sequence[SiteReport]) -> str:
    """Along which axes the weights competed, in numbers of sites."""
    words = []
    for axis in dict.fromkeys(site.axis for site in sites):
        number = sum(site.axis == axis for site in sites)
        words.append(f"{code(axis)}: {number} {_sites(number)}" + (f" ({_AXES[axis]})" if axis in _AXES else ""))
    return ", ".join(words) or "none"


def listed(value: Any) -> str:
    """A config value for people: names as code."""
    items = list(value) if isinstance(value, list | tuple) else [value]
    if isinstance(value, Mapping):
        items = [f"{key}: {item}" for key, item in value.items()]
    return ", ".join(code(item) for item in items) or "none"


def block_rows(blocks: Sequence[BlockReport]) -> list[str]:
    """One Markdown table row for each block."""
    return [
        f"| {code(block.name)} | {len(block.sites)} | {percent(block.sparsity)} | {error(block.output_error)} | "
        f"{counts(site.axis for site in block.sites)} | {counts(site.metric for site in block.sites)} |"
        for block in blocks
    ]


def error(value: float | None) -> str:
    """A relative error for people to read."""
    return NOT_MEASURED if value is None else f"{value:.4f}"


def calibration(report: Report) -> list[tuple[str, str]]:
    """Name and value of what is known of the calibration data."""
    data = report.calibration
    if data is None:
        return [("Calibration", "none: the metric does not look at data")]
    return [
        ("Calibration text", plain(data.get("source", NOT_MEASURED))),
        ("Its fingerprint", code(data.get("fingerprint", NOT_MEASURED))),
        ("Samples, tokens", f"{plain(data.get('samples', NOT_MEASURED))}, {plain(data.get('tokens', NOT_MEASURED))}"),
        ("Sequences in a batch", plain(data.get("batch_size", NOT_MEASURED))),
    ]


def remarks(report: Report) -> list[str]:
    """The report's notes, and the notes of sites grouped by what they say."""
    by_note: dict[str, list[str]] = {}
    for site in report.sites:
        if site.note:
            by_note.setdefault(site.note, []).append(site.name)
    said = set(by_note)
    # The report repeats the notes of its sites as "<count> sites: <note>"; here they come with names.
    general = [plain(note) for note in report.notes if note.partition(" sites: ")[2] not in said]
    return cut([*general, *(f"{plain(note)} ({_named(names)})" for note, names in by_note.items())])


def left_out(report: Report) -> list[str]:
    """Matrices that were not pruned, grouped by the reason."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in report.left_out.items():
        by_reason.setdefault(reason, []).append(name)
    return cut([f"{plain(reason)} ({_named(names)})" for reason, names in by_reason.items()])


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(code(name) for name in names[:_NAMES_AT_MOST])
    more = len(names) - _NAMES_AT_MOST
    return f"{shown} and {more} more" if more > 0 else shown


def cut(items: list[str]) -> list[str]:
    """The first items of a list and how many were left away."""
    more = len(items) - _LIST_AT_MOST
    return items if more <= 0 else [*items[:_LIST_AT_MOST], f"and {more} more, see `hf_sparse_report.json`"]


def recounted(report: Report, model_config: Mapping[str, Any] | None) -> str | None:
    """A sentence where the zeros counted at the last save, or else after training, are no longer those counted after pruning."""
    claim = (model_config or {}).get("hf_sparse")
    totals = claim.get("totals") if isinstance(claim, Mapping) else None
    if not isinstance(totals, Mapping):
        return _recounted_by_training(report)
    zeros, sparsity = totals.get("zeros"), totals.get("sparsity")
    if zeros == report.zeros or not (_is_number(zeros) and _is_number(sparsity)):
        return None
    return f"The model was changed after pruning: when it was saved, {zeros:,} zeros were counted in the sites ({percent(sparsity)})."


def _recounted_by_training(report: Report) -> str | None:
    last = report.recoveries[-1] if report.recoveries else None
    if last is None or last.zeros_after == report.zeros:
        return None
    return f"The model was changed after pruning: after the last training {share(last.zeros_after, last.size)} weights in the sites were zero."
