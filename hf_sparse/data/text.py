"""Texts and chats become windows and rows of token ids."""

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy
import torch

from hf_sparse.data.rows import Sample, Stream
from hf_sparse.errors import CalibrationError

# Columns of a data set that are understood. Token ids go first (whoever made them meant them), then chats, then texts.
_CHAT_COLUMNS, _TEXT_COLUMNS = ("messages", "conversations", "chat"), ("text", "content")
_ROLES = {"human": "user", "gpt": "assistant"}  # what ShareGPT files call them
# Text is read until there is this many times the windows asked for, so that a seed has something to choose from.
_CHOICE = 4
_TELLING = 64  # characters


def is_made_up(tokenizer: Any) -> bool:
    """Whether a tokenizer knows nothing but special tokens: Transformers makes such ones for models that come without a tokenizer."""
    try:
        return len(tokenizer.get_vocab()) <= len(set(tokenizer.all_special_tokens))
    except (AttributeError, NotImplementedError, TypeError):  # a processor, or one that works on bytes without a list
        return False


def kind_of(item: Any, name: str) -> str:
    """What an item is: "text", "chat", "stream" or "rows"; raises CalibrationError for anything else."""
    if isinstance(item, str):
        return "text"
    if isinstance(item, Stream):
        return "stream"
    if isinstance(item, torch.Tensor | numpy.ndarray) or (isinstance(item, Mapping) and _has_tokens(item)):
        return "rows"
    if chat_of(item):
        return "chat"
    if isinstance(_column(item, _TEXT_COLUMNS), str):
        return "text"
    if isinstance(item, Mapping | Sequence) and len(item):
        return "rows"
    raise CalibrationError(
        f"{name}: an item of type {type(item).__name__} is neither text, a chat, token ids nor a dict of tensors."
    )


def _has_tokens(item: Mapping[Any, Any]) -> bool:
    ids = _column(item, ("input_ids", "tokens"))
    words = isinstance(ids, list | tuple) and len(ids) > 0 and isinstance(ids[0], str)  # data sets of tagged words
    return ids is not None and not words


def _column(item: Any, names: Sequence[str]) -> Any:
    return next((item[key] for key in names if key in item), None) if isinstance(item, Mapping) else None


def chat_of(item: Any) -> list[Mapping[str, Any]] | None:
    """The turns of a conversation, each with role and content; None if the item is none."""
    turns = _column(item, _CHAT_COLUMNS) if isinstance(item, Mapping) else item
    if not isinstance(turns, list | tuple) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        return None
    if all("role" in turn for turn in turns):
        return list(turns)
    if all("from" in turn and "value" in turn for turn in turns):
        return [{"role": _ROLES.get(str(turn["from"]), str(turn["from"])), "content": turn["value"]} for turn in turns]
    return None


def chat_row(item: Any, tokenizer: Any, length: int, name: str) -> Sample:
    """One conversation through the tokenizer's chat template, cut at `length` tokens."""
    chat = chat_of(item)
    if chat is None:
        raise CalibrationError(
            f"{name}: after chats came an item of type {type(item).__name__} without turns; do not mix kinds, and leave "
            "empty ones out."
        )
    try:
        encoded = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    except Exception as error:  # templates raise what they like
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise CalibrationError(
            f"{name}: the tokenizer's chat template refused a conversation ({why}); give texts instead."
        ) from error
    return {"input_ids": torch.tensor([encoded[:length]], dtype=torch.long)}


def hashed(items: Iterable[Any], hashes: list[str]) -> Iterator[Any]:
    """The items as they are; `hashes` gets one for each text long enough to be told from others by chance."""
    for item in items:
        text = item if isinstance(item, str) else _column(item, _TEXT_COLUMNS)
        if isinstance(text, str) and len(text) >= _TELLING:
            hashes.append(hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16])
        yield item


def text_ids(items: Iterable[Any], tokenizer: Any, length: int, wanted: int | None, name: str) -> torch.Tensor:
    """Texts tokenised and joined behind their first-token marks, no more than a choice of `wanted` windows needs."""
    budget = None if wanted is None else _CHOICE * wanted * length
    ids: list[int] = []
    mark = [tokenizer.bos_token_id] if getattr(tokenizer, "bos_token_id", None) is not None else []
    for number, item in enumerate(items):
        text = item if isinstance(item, str) else _column(item, _TEXT_COLUMNS)
        if not isinstance(text, str):
            raise CalibrationError(
                f"{name}: after texts came an item of type {type(item).__name__} without text (number {number}); do not mix "
                "kinds, and leave empty ones out."
            )
        if encoded := tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]:
            ids += [*mark, *encoded]
        if budget is not None and len(ids) >= budget:
            break
    if not ids:
        raise CalibrationError(f"{name} is empty; give at least one text.")
    return torch.tensor(ids, dtype=torch.long)


def windows(ids: torch.Tensor, length: int, stride: int | None, wanted: int | None, seed: int) -> list[Sample]:
    """Full windows of a row of token ids, or a seeded choice of them in order; what is left at the end is dropped."""
    if ids.numel() < length:
        return []
    rows = [{"input_ids": window[None]} for window in ids.unfold(0, length, stride or length)]
    if wanted is None or len(rows) <= wanted:
        return rows
    return [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), wanted))]
