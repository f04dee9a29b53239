"""Lets `from_pretrained` read compressed checkpoints, as ordinary dense models or straight into sparse kernels.

Transformers calls whatever reads weights that are not plain a quantizer. Ours is only asked which file to load: the tensors are then
given to the ordinary loading under their plain names, so that conversions, dtypes, devices and shards are Transformers' own affair.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_sparse.errors import CheckpointError, ModelError
from hf_sparse.execution import hold_forms_, sparse_forms
from hf_sparse.runtime import Form
from hf_sparse.storage import QUANT_METHOD, StoredTensor, is_compressed_weights, open_tensors
from hf_sparse.storage.names import check_config
from hf_sparse.text import one_line
from hf_sparse.wraps import Wraps

_wraps = Wraps()
_kernels: ContextVar[Mapping[str, Any] | None] = ContextVar("hf_sparse_kernels", default=None)


@contextmanager
def loading_for_kernels(options: Mapping[str, Any] | None) -> Iterator[None]:
    """Inside, a compressed checkpoint stays compressed where that runs faster; `options` are those of `use_sparse_kernels_`."""
    token = _kernels.set(options)
    try:
        yield
    finally:
        _kernels.reset(token)


class CompressedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What config.json says of compressed weights; raises CheckpointError for what this version does not know."""

    dequantize = True  # the model in memory is an ordinary one, and does not claim to be quantized

    def __init__(self, quant_method: str = QUANT_METHOD, **told: Any) -> None:
        self.weights = check_config(told)
        self.quant_method = quant_method  # type: ignore[assignment]
        self.told = told

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method, **self.told}


class CompressedReader(HfQuantizer):  # type: ignore[misc]
    """Names the file to load, and puts sparse forms into the model once Transformers is done with it."""

    forms: Mapping[str, Form]

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if is_deepspeed_zero3_enabled():
            raise ModelError(
                "compressed weights cannot be loaded under DeepSpeed ZeRO-3; make the model plain first: hf-sparse convert."
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """The one call that comes before files are looked for. Transformers takes the name out again when the config is saved."""
        config.transformers_weights = self.quantization_config.weights
        return config

    def update_weight_conversions(self, weight_conversions: Any, *model: Any) -> Any:
        return weight_conversions  # the model is given by newer versions of Transformers

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        del model.config.transformers_weights
        hold_forms_(model, getattr(self, "forms", {}), **(_kernels.get() or {}))
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


# ---------------------------------------------------------------------------------------------------- loading


def _wrap_load(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Sequence[str] | None, load_config: Any, *rest: Any, **more: Any
    ) -> Any:
        reader = load_config.hf_quantizer
        if not isinstance(reader, CompressedReader):
            return original(model, state_dict, checkpoint_files, load_config, *rest, **more)
        plain = dataclasses.replace(load_config, hf_quantizer=None)
        if state_dict is not None or not checkpoint_files:  # only the config is that of compressed weights
            return original(model, state_dict, checkpoint_files, plain, *rest, **more)
        check_files(checkpoint_files)
        with open_tensors(checkpoint_files) as stored:
            names = _stay_compressed(model, stored, load_config)
            reader.forms = sparse_forms(
                model, {name: stored[key] for name, key in names.items()}, **(_kernels.get() or {})
            )
            others = {
                key: tensor for key, tensor in stored.items() if key not in {names[name] for name in reader.forms}
            }
            told, offloaded = original(model, others, checkpoint_files, plain, *rest, **more)
            for name in reader.forms:  # their parameters have no values, and need none
                told.missing_keys.discard(name)
                model.get_parameter(name)._is_hf_initialized = True
        return told, offloaded

    return _load_pretrained_model


def check_files(files: Sequence[str]) -> None:
    """An index may name any file, and only those of a compressed checkpoint, in one folder, are opened."""
    strange = next((file for file in files if not is_compressed_weights(Path(file).name)), None)
    if strange is not None or len({Path(file).parent for file in files}) > 1:
        raise CheckpointError(
            f"the index of the weights names {one_line(strange or files[-1], 200)!r}, which is no file of this checkpoint; save the model again."
        )


def _stay_compressed(model: nn.Module, stored: Mapping[str, Any], load_config: Any) -> dict[str, str]:
    """Parameters of the model -> tensors of the checkpoint, where the one is the other as it is stored, and kernels are wanted."""
    devices = {str(device) for device in (load_config.device_map or {}).values()}
    compressed = [key for key, tensor in stored.items() if isinstance(tensor, StoredTensor)]
    if _kernels.get() is None or devices - {"cpu"} or not compressed:
        return {}
    mapping = load_config.weight_mapping or []
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    expected: dict[str, Any] = dict(model.named_parameters())
    ties = getattr(model, "all_tied_weights_keys", None) or {}  # are made once all weights are there
    prefix, found = getattr(model, "base_model_prefix", ""), {}
    for key in compressed:
        name, converted = rename_source_key(key, renamings, converters, prefix, expected)
        fits = name in expected and converted is None and list(expected[name].shape) == stored[key].get_shape()
        if fits and name not in ties and name not in ties.values():
            found[name] = key
    return found


# ---------------------------------------------------------------------------------------------------- in and out


def install() -> None:
    """Let Transformers know the format; installing twice changes nothing."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, CompressedConfig)
    AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, CompressedReader)
    _wraps.put(PreTrainedModel, "_load_pretrained_model", _wrap_load)
    _wraps.enabled = True


def uninstall() -> None:
    """Take the format out of Transformers again; compressed checkpoints then do not load."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(QUANT_METHOD, None)
    AUTO_QUANTIZER_MAPPING.pop(QUANT_METHOD, None)
    _wraps.take_out()
