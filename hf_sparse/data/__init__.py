"""Texts, chats, tensors, loaders and data sets become samples: dicts of tensors with one row each and no padding."""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_sparse.data.rows import Sample, Stream, rows_of, shortened
from hf_sparse.data.sources import open_source
from hf_sparse.data.text import chat_row, hashed, kind_of, text_ids, windows
from hf_sparse.errors import CalibrationError

__all__ = ["Batch", "Limits", "Sample", "Samples", "batches", "fingerprint", "read_samples", "tokens_of"]


@dataclass(frozen=True)
class Samples:
    """What was read: the rows, where from, and a fingerprint of every token in order."""

    rows: list[Sample]
    source: str
    fingerprint: str
    tokens: int
    kind: str = "rows"  # "text", "chat", "stream" or "rows"
    items: tuple[str, ...] = ()  # a hash of every text or row that was read, to tell whether two sources overlap


@dataclass(frozen=True)
class Limits:
    """What the model allows: longest sequence and number of token ids; None where it does not say."""

    length: int | None = None
    vocabulary: int | None = None
    encoder_decoder: bool = False  # labels then belong to the decoder, even if they are as long as the encoder's input


def read_samples(
    source: Any,
    *,
    tokenizer: Callable[[], Any],
    num_samples: int,
    sequence_length: int,
    seed: int = 0,
    limits: Limits | None = None,
    all_rows: bool = False,
    stride: int | None = None,
    fewer_allowed: bool = False,
) -> Samples:
    """The first or a seeded choice of `num_samples` samples, each at most `sequence_length` tokens long.

    Texts are joined, tokenised and cut into windows; chats go through the tokenizer's template, one sample a
    conversation; token rows and dicts are samples as they are, without their padding. `tokenizer` is only called when
    text is met. With `all_rows` every window of the source is taken, in order; `stride` makes the windows of a text
    start that many tokens apart. With `fewer_allowed` a source may give fewer samples than asked for.

    Raises: CalibrationError where there are no samples, fewer than asked for, or ones that do not fit the model.
    """
    limits = limits or Limits()
    length = min(sequence_length, limits.length or sequence_length)
    wanted = None if all_rows else num_samples
    name, items = open_source(source)
    first, items = _peek(items, name)
    kind = kind_of(first, name)
    hashes: list[str] = []
    if kind == "text":
        items = hashed(items, hashes)
        ids = text_ids(items, tokenizer(), length, wanted, name)
        rows = windows(ids, length, stride, wanted, seed)
    elif kind == "stream":
        rows = windows(first.ids, length, stride, wanted, seed)
    elif kind == "chat":
        rows = list(itertools.islice((chat_row(item, tokenizer(), length, name) for item in items), wanted))
    else:
        every = (row for item in items for row in rows_of(item, name, limits.encoder_decoder))
        rows = [shortened(row, sequence_length) for row in itertools.islice(every, wanted)]
    if len(rows) < (1 if fewer_allowed else wanted or 1):
        raise CalibrationError(_too_few(name, kind, len(rows), wanted or 1, length))
    for number, row in enumerate(rows):
        _check(row, number, limits)
    if kind != "text":
        hashes = [fingerprint([row]) for row in rows]
    return Samples(rows, name, fingerprint(rows), sum(tokens_of(row) for row in rows), kind, tuple(hashes))


def fingerprint(rows: Iterable[Sample]) -> str:
    """First 16 hexadecimal digits of the SHA-256 over the names, shapes and values of all tensors in order."""
    digest = hashlib.sha256()
    for row in rows:
        for key in sorted(row):
            value = row[key].detach().cpu().contiguous()
            # Token ids of any integer type are the same tokens.
            value = value.long() if not value.is_floating_point() else value
            digest.update(f"{key}{tuple(value.shape)}".encode() + value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def tokens_of(row: Sample) -> int:
    """The number of positions of a sample: its token ids, or 1 where it has none."""
    ids = row.get("input_ids", row.get("decoder_input_ids"))
    return ids.numel() if ids is not None else 1


@dataclass(frozen=True)
class Batch:
    """Samples of equal shapes, joined; `numbers` are their positions among all samples."""

    values: Sample
    numbers: tuple[int, ...]


def batches(rows: Sequence[Sample], size: int) -> list[Batch]:
    """Rows of equal shapes in batches of at most `size`, in order of first appearance; so nothing is ever padded."""
    groups: dict[object, list[int]] = {}
    for number, row in enumerate(rows):
        # A tensor whose first dimension is no batch (image patches, say) cannot be joined with another sample's.
        alone = any(value.ndim == 0 or len(value) != 1 for value in row.values())
        shape = tuple((key, tuple(row[key].shape[1:])) for key in sorted(row))
        groups.setdefault((shape, number if alone else None), []).append(number)
    joined = []
    for group in groups.values():
        for start in range(0, len(group), size):
            part = group[start : start + size]
            values = rows[part[0]]
            if len(part) > 1:
                values = {key: torch.cat([rows[number][key] for number in part]) for key in values}
            joined.append(Batch(values, tuple(part)))
    return joined


def _peek(items: Iterator[Any], name: str) -> tuple[Any, Iterator[Any]]:
    try:
        first = next(items)
    except StopIteration:
        raise CalibrationError(f"{name} is empty; give at least one sample.") from None
    if isinstance(first, Stream) and not first.ids.numel():
        raise CalibrationError(f"{name} is empty; give at least one sample.")
    return first, itertools.chain([first], items)


def _too_few(name: str, kind: str, found: int, wanted: int, length: int) -> str:
    cut = kind in ("text", "stream")
    remedies = [
        "give more data",
        f"set num_samples={found}" if found else "",
        "set a shorter sequence_length" if cut else "",
    ]
    return (
        f"{name} gives {found} {f'windows of {length} tokens' if cut else 'samples'}, {wanted} were asked for; "
        f"{', or '.join(remedy for remedy in remedies if remedy)}."
    )


def _check(row: Sample, number: int, limits: Limits) -> None:
    for key in ("input_ids", "decoder_input_ids"):
        ids = row.get(key)
        if ids is None:
            continue
        if ids.numel() == 0:
            raise CalibrationError(f"sample {number} has no tokens; drop it.")
        if limits.length and ids.shape[-1] > limits.length:
            raise CalibrationError(
                f"sample {number} has {ids.shape[-1]} tokens, the model allows {limits.length}; "
                f"set sequence_length={limits.length}."
            )
        if limits.vocabulary is not None:
            wrong = ids[(ids < 0) | (ids >= limits.vocabulary)]
            if len(wrong):
                raise CalibrationError(
                    f"sample {number} holds token id {int(wrong[0])}, the model knows 0 to {limits.vocabulary - 1}; "
                    "was the text made with another model's tokenizer?"
                )
