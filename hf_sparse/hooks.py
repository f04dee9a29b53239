"""The plugin: `from_pretrained(..., sparsity_config=...)` prunes, and sparse models save what they know about themselves."""

import copy
import functools
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils import PushToHubMixin, logging

from hf_sparse import arrival, checkpoint, peft_hook, quantizer, trainer_hook
from hf_sparse.arrival import damage_told, find, hub_arguments
from hf_sparse.config import SparsityConfig
from hf_sparse.errors import ConfigError
from hf_sparse.execution import check_kernel_options, use_sparse_kernels_
from hf_sparse.prune import prune_
from hf_sparse.report import FILE_NAME as REPORT_FILE
from hf_sparse.save_hook import wrap_push, wrap_save_pretrained, wrap_upload
from hf_sparse.save_hook import wraps as _wraps
from hf_sparse.storage import is_compressed
from hf_sparse.storage.names import forget_format
from hf_sparse.text import shown
from hf_sparse.wraps import Wrap

_FROM_AUTO = "_hf_sparse_config"  # how our two wrappers pass the config on
_log = logging.get_logger(__name__)


# Arguments of from_pretrained that the tokenizer beside the model needs as well.
_SHARED = (
    "revision",
    "token",
    "cache_dir",
    "trust_remote_code",
    "local_files_only",
    "force_download",
    "subfolder",
    "proxies",
)


def _checked(value: Any, kwargs: dict[str, Any]) -> SparsityConfig:
    """The config to prune with; what can be refused is refused before weights are read."""
    config = SparsityConfig.of(value)
    if kwargs.get("quantization_config") is not None:
        raise ConfigError(
            "sparsity_config and quantization_config cannot be used together: prune first, save, then quantize the saved model."
        )
    config.check_calibration()
    return config


def _kernel_options(given: Any) -> dict[str, Any] | None:
    """The arguments of `use_sparse_kernels_` that `use_sparse_kernels=` stands for: True, False or a mapping of them."""
    if given is None or isinstance(given, bool):
        return {} if given else None
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"use_sparse_kernels is {shown(given)}; give True, False, or the arguments of use_sparse_kernels_, such as "
            '{"choose": "always"}.'
        )
    check_kernel_options(**given)
    return dict(given)


def _refuse_quantized(path: Any, kwargs: dict[str, Any]) -> None:
    """A quantized checkpoint may need libraries to load at all; that it cannot be pruned is said before that."""
    config = kwargs.get("config")
    try:
        values = (
            config.to_dict()
            if config is not None
            else PreTrainedConfig.get_config_dict(path, **hub_arguments(kwargs))[0]
        )
    except (OSError, ValueError, TypeError):
        return  # the original says what is wrong with the path
    if values.get("quantization_config") and not is_compressed(values):
        raise ConfigError(
            f"{str(path)!r} is quantized, and quantized weights cannot be pruned: prune the model that it was made from, save, "
            "then quantize."
        )


def _let_config_fit(path: Any, kwargs: dict[str, Any]) -> None:
    """A config that was read from a folder with compressed weights may be given for one with plain ones."""
    config = kwargs.get("config")
    told = getattr(config, "quantization_config", None)
    if not (isinstance(config, PreTrainedConfig) and isinstance(told, dict) and isinstance(path, str | os.PathLike)):
        return
    file = Path(path) / (kwargs.get("subfolder") or "") / str(told.get("weights"))
    if Path(path).is_dir() and is_compressed({"quantization_config": told}) and not file.is_file():
        kwargs["config"] = copy.deepcopy(config)
        forget_format(kwargs["config"])


def _wrap_from_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def from_pretrained(
        cls: type, *args: Any, sparsity_config: Any = None, use_sparse_kernels: Any = False, **kwargs: Any
    ) -> Any:
        if not _wraps.enabled:
            given = {} if sparsity_config is None else {"sparsity_config": sparsity_config}
            given |= {"use_sparse_kernels": use_sparse_kernels} if use_sparse_kernels else {}
            return original(cls, *args, **kwargs, **given)
        kernels = _kernel_options(use_sparse_kernels)
        wanted = kwargs.pop(_FROM_AUTO, sparsity_config)
        config = None if wanted is None else _checked(wanted, kwargs)
        if config is not None:
            _refuse_quantized(args[0] if args else kwargs.get("pretrained_model_name_or_path"), kwargs)
        path = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        _let_config_fit(path, kwargs)
        # What is going to be pruned has to be dense first.
        with damage_told(path, kwargs), quantizer.loading_for_kernels(kernels if config is None else None):
            result = original(cls, *args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        if path is not None and getattr(getattr(model, "config", None), checkpoint.CONFIG_KEY, None) is not None:
            commit = getattr(model.config, "_commit_hash", None)
            report = find(path, REPORT_FILE, kwargs, commit)
            arrival.check(path, kwargs, commit)
            checkpoint.read_side_files(model, report)
        if config is not None:
            prune_(
                model,
                config,
                tokenizer_options={name: kwargs[name] for name in _SHARED if kwargs.get(name) is not None},
            )
        if kernels is not None:
            _log.info("sparse kernels: %s", use_sparse_kernels_(model, **kernels))
        return result

    return from_pretrained


def _wrap_auto(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        if _wraps.enabled and kwargs.get("sparsity_config") is not None:
            # Auto classes deep-copy their arguments; a SparsityConfig shares its calibration data, a dict would not. And they
            # offer each argument to the model's config first, which takes what has the name of one of its own keys.
            kwargs[_FROM_AUTO] = _checked(kwargs.pop("sparsity_config"), kwargs)
        if not _wraps.enabled:
            return original(cls, *args, **kwargs)
        with damage_told(args[0] if args else kwargs.get("pretrained_model_name_or_path"), kwargs):
            return original(cls, *args, **kwargs)

    return from_pretrained


# ---------------------------------------------------------------------------------------------------- in and out


def _targets() -> list[tuple[type, str, Wrap]]:
    """The methods to wrap. Each Auto class has its own copy of the base's method; those made later copy our wrapper."""
    autos: list[type] = [_BaseAutoModelClass]
    for auto in autos:
        autos += auto.__subclasses__()
    return [
        (PreTrainedModel, "from_pretrained", _wrap_from_pretrained),
        (PreTrainedModel, "save_pretrained", wrap_save_pretrained),
        (PreTrainedModel, "push_to_hub", wrap_push),
        (PushToHubMixin, "_upload_modified_files", wrap_upload),
        *((auto, "from_pretrained", _wrap_auto) for auto in autos if "from_pretrained" in auto.__dict__),
    ]


def install() -> None:
    """Put the hooks into Transformers; installing twice changes nothing."""
    for owner, name, wrap in _targets():
        _wraps.put(owner, name, wrap)
    _wraps.enabled = True
    arrival.install()
    quantizer.install()
    peft_hook.install()
    trainer_hook.install()
    if (callbacks := _callbacks()) is not None:
        callbacks.install()


def uninstall() -> None:
    """Give Transformers its own methods back.

    Where another library has wrapped them since, its wrapper stays in place, and ours inside it only passes calls on.
    """
    _wraps.take_out()
    arrival.uninstall()
    quantizer.uninstall()
    peft_hook.uninstall()
    trainer_hook.uninstall()
    if (callbacks := _callbacks()) is not None:
        callbacks.uninstall()


def _callbacks() -> Any:
    """The module that wraps the Trainer's methods, if anybody has imported it; a user's own of that name is none of ours."""
    module = sys.modules.get("trainer_callbacks.base")
    return module if hasattr(module, "SparsityCallback") else None
