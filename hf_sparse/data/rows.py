"""Token rows and dicts of tensors become samples: one row each, without the padding."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from hf_sparse.errors import CalibrationError

Sample = dict[str, torch.Tensor]
# Lists are only taken under these names (data sets have other columns too); tensors under any.
_LISTS = (
    "input_ids", "attention_mask", "token_type_ids", "position_ids", "labels",
    "decoder_input_ids", "decoder_attention_mask",
)  # fmt: skip
_IGNORED = -100  # the label that losses leave out


@dataclass(frozen=True)
class Stream:
    """One long row of token ids, to be cut into windows (a row in a list is a sample as it is)."""

    ids: torch.Tensor


def is_whole(values: torch.Tensor) -> bool:
    """Whether a tensor holds whole numbers."""
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)


def tensor_of(value: Any, name: str) -> torch.Tensor:
    """Numbers in any form as a tensor; raises CalibrationError for what is no array of numbers."""
    try:
        if isinstance(value, numpy.ndarray):
            # torch refuses foreign byte orders and warns about arrays that cannot be written to.
            value = numpy.array(value, dtype=value.dtype.newbyteorder("="))
        return torch.as_tensor(value)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        kind = type(value).__name__
        raise CalibrationError(f"{name}: an item of type {kind} is no row of token ids ({error}).") from error


def rows_of(item: Any, name: str, encoder_decoder: bool = False) -> Iterator[Sample]:
    """The samples of one item: a batch gives its rows, a row gives itself."""
    if isinstance(item, Mapping):
        for values in _taken_apart(item, name):
            yield from _dict_rows(values, name, encoder_decoder)
        return
    if isinstance(item, list | tuple) and item and isinstance(item[0], torch.Tensor):
        # A TensorDataset gives tuples, a DataLoader over one gives lists of batches; the first holds the token ids.
        item = item[0] if isinstance(item, tuple) or item[0].ndim == 2 else item
    ids = tensor_of(item, name)
    if not is_whole(ids) or ids.ndim not in (1, 2):
        raise CalibrationError(
            f"{name}: a tensor of shape {tuple(ids.shape)} and type {ids.dtype} is no row of token ids."
        )
    for row in ids[None] if ids.ndim == 1 else ids:
        yield {"input_ids": row[None].long()}


def _is_array(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, numpy.ndarray) and value.dtype.kind in "biuf")


def _taken_apart(item: Mapping[Any, Any], name: str) -> Iterator[Sample]:
    """The tensors of a dict; a dict of lists of rows, which may differ in length, gives one dict a row."""
    if "input_ids" not in item and "tokens" in item:
        item = {"input_ids": item["tokens"], **{key: value for key, value in item.items() if key != "tokens"}}
    given = {str(key): value for key, value in item.items() if _is_array(value)}
    given |= {key: item[key] for key in _LISTS if isinstance(item.get(key), list | tuple | int | numpy.integer)}
    if not given:
        raise CalibrationError(
            f"{name}: a dict with the keys {sorted(map(str, item))} holds no tensors and no known column."
        )
    ids = given.get("input_ids")
    if isinstance(ids, list | tuple) and ids and isinstance(ids[0], list | tuple | torch.Tensor | numpy.ndarray):
        if any(not hasattr(value, "__len__") or len(value) != len(ids) for value in given.values()):
            raise CalibrationError(f"{name}: the columns {sorted(given)} of a batch differ in their number of rows.")
        for index in range(len(ids)):
            yield {key: tensor_of(value[index], name) for key, value in given.items()}
    else:
        yield {key: tensor_of(value, name) for key, value in given.items()}


def _dict_rows(values: Sample, name: str, encoder_decoder: bool) -> Iterator[Sample]:
    for key in ("input_ids", "decoder_input_ids"):
        if key in values:
            if not is_whole(values[key]) or values[key].ndim == 0:
                raise CalibrationError(
                    f"{name}: {key} of shape {tuple(values[key].shape)} and type {values[key].dtype} "
                    "is no row of token ids."
                )
            values = {**values, key: values[key].long()}
    if "input_ids" in values and values["input_ids"].ndim == 1:
        values = {key: value[None] for key, value in values.items()}
    first = values.get("input_ids", next(iter(values.values())))
    number = len(first) if first.ndim else 0
    if not number or any(value.ndim == 0 or len(value) != number for value in values.values()):
        if "attention_mask" in values and not values["attention_mask"].bool().all():
            raise CalibrationError(
                f"{name}: a padded batch whose tensors have different first dimensions cannot be taken apart; "
                "give one sample a dict."
            )
        yield values
        return
    for index in range(number):
        yield _unpadded({key: value[index : index + 1] for key, value in values.items()}, name, encoder_decoder)


def _unpadded(row: Sample, name: str, encoder_decoder: bool) -> Sample:
    """Drop the positions that the attention masks leave out, so that padding is never seen, let alone counted."""
    ids, labels = row.get("input_ids"), row.get("labels")
    # Labels of an encoder-decoder belong to the decoder, whose length only by chance equals the encoder's.
    decoders = {key for key in row if key.startswith("decoder_")}
    if labels is not None and (encoder_decoder or decoders or ids is None or labels.shape != ids.shape):
        decoders.add("labels")
        row = _without_ignored_end(row)
    for mask_key, side in (("attention_mask", set(row) - decoders), ("decoder_attention_mask", decoders)):
        mask = row.get(mask_key)
        if mask is None or bool(mask.all()):
            continue
        if mask.ndim != 2:
            if ids is not None and mask.shape == ids.shape:
                raise CalibrationError(
                    f"{name}: padding in {mask.ndim}-dimensional token ids cannot be dropped; give unpadded samples."
                )
            continue
        kept = mask[0].bool()
        if not bool(kept.any()):
            raise CalibrationError(f"{name}: a sample's {mask_key} leaves out every position; drop that sample.")
        along = {key for key in side if row[key].shape == mask.shape or _is_embedded(row[key], mask)}
        if along != {mask_key}:  # spectrograms have their time elsewhere: then nothing can be dropped
            row = {key: value[:, kept] if key in along else value for key, value in row.items()}
    return row


def _is_embedded(value: torch.Tensor, mask: torch.Tensor) -> bool:
    """Whether a tensor is (1, tokens, features) to the mask's (1, tokens)."""
    return value.ndim == 3 and value.shape[:2] == mask.shape


def _without_ignored_end(row: Sample) -> Sample:
    """Labels, and decoder inputs as long as they are, without the ignored labels at their end, which are padding."""
    labels = row["labels"]
    if labels.ndim != 2 or not is_whole(labels):
        return row
    counted = (labels[0] != _IGNORED).nonzero()
    if not len(counted):
        return row
    end = int(counted[-1]) + 1
    beside = {"labels", "decoder_input_ids", "decoder_attention_mask"}
    return {
        key: value[:, :end] if key in beside and value.shape == labels.shape else value for key, value in row.items()
    }


def shortened(row: Sample, length: int) -> Sample:
    """A sample of at most `length` tokens on either side; tensors that lie beside the token ids are cut with them."""
    for key in ("input_ids", "decoder_input_ids"):
        ids = row.get(key)
        if ids is not None and ids.ndim == 2 and ids.shape[1] > length:
            row = {key: value[:, :length] if value.shape == ids.shape else value for key, value in row.items()}
    return row
