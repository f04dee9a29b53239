"""Samples of a Trainer's own training data to calibrate on, the same on every process."""

import inspect
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy
import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import IterableDataset

from hf_sparse.config import SparsityConfig
from hf_sparse.data import Sample
from hf_sparse.errors import CalibrationError


class TrainingSamples(list[Sample]):
    """Rows of the training data; reports name the source of their calibration after this class."""


def training_samples(model: nn.Module, loader: Any, config: SparsityConfig) -> TrainingSamples:
    """A seeded choice of `config.num_samples` rows (the first of a stream), collated one by one, so without padding.

    Process 0 reads them for all, as streams and random collators would give each process others. The random state is
    left as it was; a stream is iterated from its beginning, once more than training does.

    Raises: CalibrationError where the data are empty, or a batch is no mapping; on the other processes also for whatever
    kept process 0 from reading.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rows = _read_for_all(model, loader, config) if distributed else _read(model, loader, config)
    if not rows:
        raise CalibrationError(
            "the training data are empty, so there is nothing to calibrate on; give calibration=... in the config."
        )
    return TrainingSamples(rows)


def _read(model: nn.Module, loader: Any, config: SparsityConfig) -> list[Sample]:
    with _seeded(config.seed, loader.collate_fn):
        return [_inputs(model, loader.collate_fn([item])) for item in _items(loader, config)]


def _read_for_all(model: nn.Module, loader: Any, config: SparsityConfig) -> list[Sample]:
    """What process 0 reads; where it cannot, all processes raise, as those that were left to wait would wait for ever."""
    rows: list[Sample] = []
    error: Exception | None = None
    if torch.distributed.get_rank() == 0:
        try:
            rows = _read(model, loader, config)
        except Exception as caught:  # of a data set or collator, so of any kind
            error = caught
    rows, told = broadcast_object_list([rows, f"{type(error).__name__}: {error}" if error else None])
    if error is not None:
        raise error
    if told is not None:
        raise CalibrationError(
            f"process 0 could not read the training data to calibrate on: {told}. Mend the data or the collator, or give "
            "calibration=... in the config."
        )
    return rows


@contextmanager
def _seeded(seed: int, collator: Any) -> Iterator[None]:
    """Random numbers of data sets and collators come from a seed, and go on behind as if they had not been drawn."""
    while (inner := getattr(collator, "data_collator", None)) is not None:  # the Trainer's, which drops columns
        collator = inner
    own = getattr(collator, "generator", None)  # made at the first call by collators that mask
    generator = own if isinstance(own, torch.Generator) else torch.Generator()
    kept = generator.get_state()
    plain, numbers = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(plain)
            numpy.random.set_state(numbers)
            generator.set_state(kept)
            if hasattr(collator, "generator"):
                collator.generator = own


def as_given(dataset: Any) -> Any:
    """A data set as the Trainer was given it, without the wrapper that gives this process its part of a stream."""
    return dataset.dataset if type(dataset).__name__ == "IterableDatasetShard" else dataset


def _items(loader: Any, config: SparsityConfig) -> Iterator[Any]:
    data = as_given(loader.dataset)
    if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
        return islice(iter(data), config.num_samples)
    number = min(config.num_samples, len(data))
    return (data[index] for index in sorted(random.Random(config.seed).sample(range(len(data)), number)))


def _inputs(model: nn.Module, batch: Any) -> Sample:
    """What the model's forward takes of a batch; labels only where the decoder's input is made of them."""
    if not isinstance(batch, Mapping):
        raise CalibrationError(
            f"the data collator makes a {type(batch).__name__} of a row, a mapping of names to tensors is needed to "
            "calibrate on the training data; give calibration=... in the config."
        )
    taken = set(inspect.signature(model.forward).parameters)
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        taken -= {"labels"}
    return {key: value.cpu() for key, value in batch.items() if key in taken and isinstance(value, torch.Tensor)}
