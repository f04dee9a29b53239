"""Texts, chats, tensors, loaders and data sets become samples: dicts of tensors with one row each and no padding."""

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from hf_sparse import stdlib_text
from hf_sparse.errors import CalibrationError

Sample = dict[str, torch.Tensor]
# Columns of a data set that are understood, in the order in which they are looked for.
_CHAT_COLUMNS, _TEXT_COLUMNS, _TOKEN_COLUMNS = ("messages", "conversations", "chat"), ("text", "content"), ("input_ids", "tokens")
# Text is read until there is this many times the windows asked for, so that a seed has something to choose from.
_CHOICE = 4


@dataclass(frozen=True)
class Samples:
    """What was read: the rows, where from, and a fingerprint of every token in order."""

    rows: list[Sample]
    source: str
    fingerprint: str
    tokens: int


@dataclass(frozen=True)
class Limits:
    """What the model allows: longest sequence and number of token ids; None where it does not say."""

    length: int | None = None
    vocabulary: int | None = None


@dataclass(frozen=True)
class _Stream:
    """One long row of token ids, to be cut into windows (a row in a list is a sample as it is)."""

    ids: torch.Tensor


def read_samples(
    source: Any,
    *,
    tokenizer: Callable[[], Any],
    num_samples: int,
    sequence_length: int,
    seed: int = 0,
    limits: Limits | None = None,
    all_rows: bool = False,
) -> Samples:
    """The first or a seeded choice of `num_samples` samples, each at most `sequence_length` tokens long.

    Texts are joined, tokenised and cut into windows; chats go through the tokenizer's template, one sample a conversation; token
    rows and dicts are samples as they are, without their padding. `tokenizer` is only called when text is met. With `all_rows`
    every window of the source is taken, in order.

    Raises: CalibrationError where there are no samples, fewer than asked for, or ones that do not fit the model.
    """
    limits = limits or Limits()
    length = min(sequence_length, limits.length or sequence_length)
    wanted = None if all_rows else num_samples
    name, items = _open(source)
    first, items = _peek(items, name)
    kind = _kind(first, name)
    if kind == "text":
        rows = _windows(items, tokenizer(), length, wanted, seed, name)
    elif kind == "chat":
        rows = _taken((_chat_row(item, tokenizer(), length) for item in items), wanted)
    elif kind == "stream":
        rows = _cut(first.ids, length)
        rows = rows if wanted is None else _chosen(rows, wanted, seed)
    else:
        rows = _taken((row for item in items for row in _rows(item, name)), wanted)
        rows = [_shortened(row, sequence_length) for row in rows]
    if wanted is not None and len(rows) < wanted:
        raise CalibrationError(
            f"{name} gives {len(rows)} samples of {length} tokens, {wanted} were asked for; give more data, or set "
            f"num_samples={len(rows)}{' or a shorter sequence_length' if kind in ('text', 'stream') else ''}."
        )
    if not rows:
        raise CalibrationError(f"{name} is empty; give at least one sample.")
    for number, row in enumerate(rows):
        _check(row, number, limits)
    return Samples(rows, name, fingerprint(rows), sum(tokens_of(row) for row in rows))


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
            first = rows[part[0]]
            values = first if len(part) == 1 else {key: torch.cat([rows[number][key] for number in part]) for key in first}
            joined.append(Batch(values, tuple(part)))
    return joined


# ---------------------------------------------------------------------------------------------------- where data come from


def _open(source: Any) -> tuple[str, Iterator[Any]]:
    if source is None:
        raise CalibrationError("no data given.")
    if isinstance(source, str | Path):
        return _open_named(str(source))
    if isinstance(source, torch.Tensor | numpy.ndarray):
        rows = torch.as_tensor(source)
        if rows.ndim not in (1, 2) or rows.is_floating_point():
            raise CalibrationError(f"a tensor of shape {tuple(rows.shape)} and type {rows.dtype} is no (samples, tokens) of whole numbers.")
        return f"a tensor of {tuple(rows.shape)} token ids", iter([_Stream(rows) if rows.ndim == 1 else rows])
    if isinstance(source, Mapping):
        return "a dict of tensors", iter([source])
    if isinstance(source, Iterable):
        size = f" of {len(source)}" if hasattr(source, "__len__") else ""
        return f"{type(source).__name__}{size}", iter(source)
    raise CalibrationError(f"data cannot be a {type(source).__name__}; give texts, chats, tensors, dicts, a DataLoader, a Dataset or a path.")


def _open_named(name: str) -> tuple[str, Iterator[Any]]:
    if name.startswith("stdlib:"):
        return name, iter(stdlib_text.texts(name.removeprefix("stdlib:")))
    path = Path(name)
    suffix = path.suffix.lower()
    if suffix in (".txt", ".jsonl", ".npy") and not path.is_file():
        raise CalibrationError(f"the file {name!r} does not exist.")
    if suffix == ".txt":
        return path.name, iter([path.read_text(encoding="utf-8")])
    if suffix == ".jsonl":
        return path.name, _json_lines(path)
    if suffix == ".npy":
        try:
            rows = numpy.load(path, allow_pickle=False)
        except ValueError as error:
            raise CalibrationError(f"{name!r} is no plain array of token ids: {error}.") from error
        return path.name, _open(rows)[1]
    if path.exists():
        raise CalibrationError(f"{name!r} is not a .txt, .jsonl or .npy file.")
    return _open_hub(name)


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise CalibrationError(f"{path.name}, line {number}: not valid JSON ({error}).") from error


def _open_hub(name: str) -> tuple[str, Iterator[Any]]:
    """A Hub data set `user/name`, `user/name:subset` or `user/name:subset:split`, streamed."""
    from datasets import load_dataset  # heavy, and only needed here

    identifier, _, rest = name.partition(":")
    subset, _, split = rest.partition(":")
    try:
        return name, iter(load_dataset(identifier, subset or None, split=split or "train", streaming=True))
    except Exception as error:  # whatever the library or the network raises, the user needs one sentence
        raise CalibrationError(
            f"{name!r} is neither a file nor a data set that could be opened ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "give a .txt, .jsonl or .npy path, or a Hub id as user/name:subset:split."
        ) from error


def _peek(items: Iterator[Any], name: str) -> tuple[Any, Iterator[Any]]:
    try:
        first = next(items)
    except StopIteration:
        raise CalibrationError(f"{name} is empty; give at least one sample.") from None
    return first, itertools.chain([first], items)


def _column(item: Any, names: Sequence[str]) -> Any:
    return next((item[key] for key in names if key in item), None) if isinstance(item, Mapping) else None


def _is_chat(item: Any) -> bool:
    return isinstance(item, Sequence) and len(item) > 0 and all(isinstance(turn, Mapping) and "role" in turn for turn in item)


def _kind(item: Any, name: str) -> str:
    if isinstance(item, str) or isinstance(_column(item, _TEXT_COLUMNS), str):
        return "text"
    if _is_chat(item) or _is_chat(_column(item, _CHAT_COLUMNS)):
        return "chat"
    if isinstance(item, _Stream):
        return "stream"
    if isinstance(item, torch.Tensor | numpy.ndarray) or (isinstance(item, Mapping | Sequence) and len(item)):
        return "rows"
    raise CalibrationError(f"{name}: an item of type {type(item).__name__} is neither text, a chat, token ids nor a dict of tensors.")


# ---------------------------------------------------------------------------------------------------- text and chats


def _text_of(item: Any, name: str) -> str:
    text = item if isinstance(item, str) else _column(item, _TEXT_COLUMNS)
    if not isinstance(text, str):
        raise CalibrationError(f"{name}: after texts came an item of type {type(item).__name__}; do not mix kinds.")
    return text


def _windows(items: Iterable[Any], tokenizer: Any, length: int, wanted: int | None, seed: int, name: str) -> list[Sample]:
    """Texts tokenised, joined behind their first-token marks and cut into full windows."""
    budget = None if wanted is None else _CHOICE * wanted * length
    ids: list[int] = []
    mark = [tokenizer.bos_token_id] if getattr(tokenizer, "bos_token_id", None) is not None else []
    for item in items:
        encoded = tokenizer(_text_of(item, name), add_special_tokens=False, verbose=False)["input_ids"]
        ids += [*mark, *encoded]
        if budget is not None and len(ids) >= budget:
            break
    rows = _cut(torch.tensor(ids, dtype=torch.long), length)
    if not rows and ids and wanted in (None, 1):
        rows = [{"input_ids": torch.tensor([ids])}]
    return rows if wanted is None else _chosen(rows, wanted, seed)


def _chat_row(item: Any, tokenizer: Any, length: int) -> Sample:
    chat = item if _is_chat(item) else _column(item, _CHAT_COLUMNS)
    if not _is_chat(chat):
        raise CalibrationError(f"after chats came an item of type {type(item).__name__}; do not mix kinds.")
    try:
        encoded = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    except Exception as error:  # templates raise what they like
        raise CalibrationError(f"the tokenizer's chat template refused a conversation ({str(error).splitlines()[0]}); give texts instead.") from error
    return {"input_ids": torch.tensor([encoded[:length]], dtype=torch.long)}


def _cut(ids: torch.Tensor, length: int) -> list[Sample]:
    whole = ids.numel() // length * length
    return [{"input_ids": window[None]} for window in ids.flatten()[:whole].long().split(length)] if whole else []


def _chosen(rows: list[Sample], wanted: int, seed: int) -> list[Sample]:
    if len(rows) <= wanted:
        return rows
    return [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), wanted))]


def _taken(rows: Iterable[Sample], wanted: int | None) -> list[Sample]:
    return list(itertools.islice(rows, wanted))


# ---------------------------------------------------------------------------------------------------- token rows and dicts


def _rows(item: Any, name: str) -> Iterator[Sample]:
    """The samples of one item: a batch gives its rows, a row gives itself."""
    if isinstance(item, Mapping):
        tokens = _column(item, _TOKEN_COLUMNS)
        values = {key: value for key, value in item.items() if isinstance(value, torch.Tensor | numpy.ndarray)}
        if not values and tokens is not None:
            values = {key: numpy.asarray(item[key]) for key in ("input_ids", "attention_mask", "labels") if key in item}
        if not values:
            raise CalibrationError(f"{name}: a dict with the keys {sorted(map(str, item))} holds no tensors and no known column.")
        yield from _dict_rows({key: torch.as_tensor(value) for key, value in values.items()})
        return
    if isinstance(item, tuple) and item and isinstance(item[0], torch.Tensor):
        item = item[0]  # a TensorDataset gives tuples
    try:
        ids = torch.as_tensor(item)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CalibrationError(f"{name}: an item of type {type(item).__name__} is no row of token ids ({error}).") from error
    if ids.is_floating_point() or ids.ndim not in (1, 2):
        raise CalibrationError(f"{name}: a tensor of shape {tuple(ids.shape)} and type {ids.dtype} is no row of token ids.")
    for row in ids.reshape(-1, ids.shape[-1]):
        yield {"input_ids": row[None].long()}


def _dict_rows(values: Sample) -> Iterator[Sample]:
    ids = values.get("input_ids")
    if ids is not None and ids.ndim == 1:
        values = {key: value[None] for key, value in values.items()}
        ids = values["input_ids"]
    number = len(ids) if ids is not None else len(next(iter(values.values())))
    if any(value.ndim == 0 or len(value) != number for value in values.values()):
        if "attention_mask" in values and not values["attention_mask"].bool().all():
            raise CalibrationError("a padded batch whose tensors have different first dimensions cannot be taken apart; give one sample a dict.")
        yield values
        return
    for index in range(number):
        yield _unpadded({key: value[index : index + 1] for key, value in values.items()})


def _unpadded(row: Sample) -> Sample:
    """Drop the positions that the attention masks leave out, so that padding is never seen, let alone counted."""
    row = {key: value.long() if key.endswith("input_ids") else value for key, value in row.items()}
    for ids_key, mask_key in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
        mask = row.get(mask_key)
        if mask is None or mask.ndim != 2 or bool(mask.all()):
            continue
        kept = mask[0].bool()
        if not bool(kept.any()):
            raise CalibrationError("a sample's attention mask leaves out every position; drop that sample.")
        own = {key for key, value in row.items() if value.shape == mask.shape and (key.startswith("decoder_") == mask_key.startswith("decoder_"))}
        # Labels of an encoder-decoder belong to the decoder, whose length only by chance equals the encoder's.
        if "decoder_input_ids" in row and ids_key == "input_ids":
            own.discard("labels")
        row = {key: value[:, kept] if key in own else value for key, value in row.items()}
    return row


def _shortened(row: Sample, length: int) -> Sample:
    ids = row.get("input_ids")
    if ids is None or ids.ndim != 2 or ids.shape[1] <= length:
        return row
    return {key: value[:, :length] if value.shape == ids.shape else value for key, value in row.items()}


def _check(row: Sample, number: int, limits: Limits) -> None:
    for key in ("input_ids", "decoder_input_ids"):
        ids = row.get(key)
        if ids is None:
            continue
        if ids.numel() == 0:
            raise CalibrationError(f"sample {number} has no tokens; drop it.")
        if limits.length and ids.shape[-1] > limits.length:
            raise CalibrationError(
                f"sample {number} has {ids.shape[-1]} tokens, the model allows {limits.length}; set sequence_length={limits.length}."
            )
        if limits.vocabulary is not None:
            wrong = ids[(ids < 0) | (ids >= limits.vocabulary)]
            if len(wrong):
                raise CalibrationError(
                    f"sample {number} holds token id {int(wrong[0])}, the model knows 0 to {limits.vocabulary - 1}; "
                    "was the text made with another model's tokenizer?"
                )
