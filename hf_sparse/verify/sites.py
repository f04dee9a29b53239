"""Recounts each site: its zeros, its pattern and its shape, against what the report says."""

import math
from collections.abc import Iterator

import torch

from hf_sparse.errors import ConfigError
from hf_sparse.patterns import Pattern
from hf_sparse.report import SiteReport
from hf_sparse.sites import count_zeros, read
from hf_sparse.verify.rows import AGREES, DIFFERS, Row, compared
from hf_sparse.verify.subject import Subject

_ROUNDED = 1e-9
_MORE_ZEROS = "training may make more weights zero, never fewer"


def check(subject: Subject) -> Iterator[Row]:
    """Rows for every site in the report; a site of the model that it does not name is not pruned and no claim."""
    seen: set[str] = set()
    for told in subject.report.sites if subject.report else ():
        site = subject.sites.get(told.name)
        if site is None or told.name in seen:
            found = "no such site in the model" if site is None else "named twice"
            yield Row("zeros", told.name, DIFFERS, told.zeros, found)
            continue
        seen.add(told.name)
        if site.shape != tuple(told.shape):
            yield compared("zeros", f"{told.name}: shape", list(told.shape), list(site.shape))
            continue
        weight = read(subject.model, site)
        yield from _zeros(told, count_zeros(weight), weight.numel(), subject.trained)
        yield from _pattern(told, weight)


def _zeros(told: SiteReport, zeros: int, size: int, trained: bool) -> Iterator[Row]:
    enough = zeros >= told.zeros if trained else zeros == told.zeros
    reason = _MORE_ZEROS if trained and zeros != told.zeros else ""
    yield Row("zeros", told.name, AGREES if enough else DIFFERS, told.zeros, zeros, reason)
    # The share is what the report shows; it must be that of its own count, which may be one from before a training.
    share = told.zeros / max(1, size)
    if not math.isclose(told.sparsity, share, rel_tol=_ROUNDED, abs_tol=_ROUNDED):
        yield Row("zeros", f"{told.name}: sparsity", DIFFERS, told.sparsity, share)


def _pattern(told: SiteReport, weight: torch.Tensor) -> Iterator[Row]:
    """N:M: at most N of each group of M are kept. Any other pattern allows what the count of zeros allows."""
    if told.pattern in ("dense", "unstructured"):
        return
    claimed = f"{told.pattern} along {told.axis}"
    if not (_is_pattern(told.pattern) and told.axis in ("input", "output")):
        yield Row("pattern", told.name, DIFFERS, claimed, None, "there is no such pattern along such an axis")
        return
    wrong = groups_with_more(weight if told.axis == "input" else weight.T, Pattern.parse(told.pattern))
    yield compared("pattern", told.name, claimed, f"{wrong} groups that keep more" if wrong else claimed)


def _is_pattern(text: str) -> bool:
    try:
        return Pattern.parse(text).group is not None
    except ConfigError:
        return False


def groups_with_more(matrix: torch.Tensor, pattern: Pattern) -> int:
    """How many groups along the last dimension keep more than the pattern's N of M; a tail of r may keep round(r * N / M).

    matrix: (rows, columns) with N:M groups along the columns.
    """
    keep, group = pattern.keep or 0, pattern.group or 1
    kept = matrix != 0
    whole = kept.shape[1] // group * group
    wrong = int((kept[:, :whole].unflatten(1, (-1, group)).sum(2) > keep).sum()) if whole else 0
    tail = kept.shape[1] - whole
    if tail:
        wrong += int((kept[:, whole:].sum(1) > round(tail * keep / group)).sum())
    return wrong
