"""Loads what is verified: the class that was saved, from safetensors only, and what the files did not hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from hf_sparse.errors import CheckpointError
from hf_sparse.storage import is_compressed
from hf_sparse.text import one_line
from hf_sparse.verify.sizes import check_config, headers, no_larger_than

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Loaded:
    """A model, and the names of its tensors that the files did not hold or held in another shape."""

    model: Any
    folder: Path
    missing: frozenset[str]
    unexpected: frozenset[str]


def load(folder: Path, config: Any, *, trust_remote_code: bool = False) -> Loaded:
    """The model in a folder, of the class that its config names, in inference mode; no network, no pickles.

    Raises: what Transformers raises for weights that cannot be loaded.
    """
    return load_as(auto_class(config), folder, config=config, trust_remote_code=trust_remote_code)


def load_as(kind: Any, folder: Path, *, dtype: Any = "auto", **options: Any) -> Loaded:
    """The weights in a folder as a model of a class, or of what an Auto class makes of the config.

    Raises: TooLargeError for a config that asks for far more than the files hold, and what Transformers raises.
    """
    stored = headers(folder)
    check_config(folder, stored)
    with no_larger_than(stored):
        model, told = kind.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    wrong = {entry[0] for entry in told.get("mismatched_keys", ())}
    return Loaded(
        model.eval(), folder, frozenset(told["missing_keys"]) | wrong, frozenset(told["unexpected_keys"]) - wrong
    )


def model_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The config of the model in a folder; raises CheckpointError where Transformers knows none such, and for adapters and quantized ones."""
    # With an adapter beside it, Transformers would load whatever base model that names.
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{str(folder)!r} holds an adapter; merge it, save the model, and verify that.")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # each class of config has its own way to refuse
        why = one_line(str(error).splitlines()[0] if str(error) else type(error).__name__, 200)
        raise CheckpointError(
            f"the config.json is none of a model that Transformers can load ({why}); if it needs code of its own and you trust that, "
            "give --trust-remote-code."
        ) from error
    if getattr(config, "quantization_config", None) is not None and not is_compressed(config.to_dict()):
        raise CheckpointError("the weights are quantized, so neither zeros nor patterns can be counted in them.")
    return config


def auto_class(config: Any) -> Any:
    """The Auto class that knows the saved architecture for this kind of config, or AutoModel."""
    saved = set(getattr(config, "architectures", None) or ())
    remote = set(getattr(config, "auto_map", None) or ())
    for auto in _BaseAutoModelClass.__subclasses__():
        mapping: Mapping[type, Any] | None = auto._model_mapping
        if auto.__name__ in remote:
            return auto
        found = mapping[type(config)] if mapping is not None and type(config) in mapping else ()
        if saved & {known.__name__ for known in (found if isinstance(found, tuple) else (found,))}:
            return auto
    return AutoModel


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that a save writes, under the names that they have in the model."""
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}
