"""Opens a model without its blocks: the stock loading makes it and reads all else, the blocks stay on the meta device."""

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_sparse.errors import CheckpointError, ModelError
from hf_sparse.quantizer import CompressedReader, check_files
from hf_sparse.streaming.conversion import Conversion
from hf_sparse.streaming.files import Inputs
from hf_sparse.streaming.weights import Weights
from hf_sparse.text import one_line
from hf_sparse.wraps import Wraps

_wraps = Wraps()
_lock = threading.Lock()
_opening: ContextVar["_Opening | None"] = ContextVar("hf_sparse_opening", default=None)


class _Opening:
    """One model on its way."""

    def __init__(self, keep_head: bool) -> None:
        self._keep_head = keep_head
        self.weights: Weights | None = None

    def load(
        self,
        original: Callable[..., Any],
        model: Any,
        state_dict: Any,
        files: Any,
        load_config: Any,
        *rest: Any,
        **more: Any,
    ) -> Any:
        """What Transformers does to load a model, for all that is outside of its blocks."""
        reader = load_config.hf_quantizer
        if reader is not None and not isinstance(reader, CompressedReader):
            raise ModelError("the model is quantized; prune the model that it was made from, save, then quantize.")
        strange = next((str(file) for file in files or () if not str(file).endswith(".safetensors")), None)
        if strange is not None or not files or state_dict is not None:
            raise CheckpointError(
                f"only .safetensors files are streamed, and the weights are {one_line(strange or 'elsewhere', 200)!r}; load the model and "
                "save it again."
            )
        if reader is not None:
            check_files(files)
        config = dataclasses.replace(load_config, hf_quantizer=None)
        inputs = Inputs([Path(file) for file in files])
        try:
            conversion = Conversion(model, inputs.tensors, config.weight_mapping)

            def load(tensors: Mapping[str, Any]) -> None:
                with _quiet():
                    told, _ = original(model, dict(tensors), None, config)
                conversion.restore()
                _check(told)

            self.weights = Weights(model, inputs, conversion, load, self._keep_head)
            outside = {key: inputs.tensors[key] for key in self.weights.outside.keys}
            told, offloaded = original(model, outside, None, config, *rest, **more)
        except BaseException:
            inputs.close()
            raise
        conversion.restore()
        for group in self.weights.groups.values():
            for full, _, _, meta in group.slots:  # values come when it is their turn
                told.missing_keys.discard(full)
                meta._is_hf_initialized = True  # type: ignore[attr-defined]
        return told, offloaded


def _check(told: Any) -> None:
    """Refuse a block that was not loaded as its checkpoint has it."""
    wrong = [entry[0] for entry in told.mismatched_keys] or list(told.conversion_errors)
    if wrong or told.error_msgs:
        what = one_line(str(wrong[0] if wrong else told.error_msgs[0]), 200)
        raise CheckpointError(
            f"the checkpoint does not fit its config.json: {what} cannot be loaded. Save the model again."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar for each block's loading; those that are under way go on."""
    before = transformers_logging._tqdm_active
    transformers_logging._tqdm_active = False
    try:
        yield
    finally:
        transformers_logging._tqdm_active = before


def open_model(load: Callable[[], Any], keep_head: bool) -> tuple[Any, Weights]:
    """The model that `load` gives, a call of `from_pretrained`, with its blocks left on disk, and where they come from.

    `keep_head`: an output layer of its own is in memory too.

    Raises: ModelError and CheckpointError for what cannot be streamed: quantized weights, pickles, blocks that share tensors.
    """
    opening = _Opening(keep_head)
    with _lock:
        _wraps.put(PreTrainedModel, "_load_pretrained_model", _wrap)
        token = _opening.set(opening)
        try:
            model = load()
        except BaseException:
            if opening.weights is not None:
                opening.weights.close()
            raise
        finally:
            _opening.reset(token)
            _wraps.take_out()
    if opening.weights is None or opening.weights.model is not model:
        raise ModelError(
            f"a {type(model).__name__} does not load its weights as Transformers' models do; prune it in memory."
        )
    opening.weights.install()
    return model, opening.weights


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _load_pretrained_model(*args: Any, **kwargs: Any) -> Any:
        opening = _opening.get()
        return original(*args, **kwargs) if opening is None else opening.load(original, *args, **kwargs)

    return _load_pretrained_model
