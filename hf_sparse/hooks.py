"""The plugin: `from_pretrained(..., sparsity_config=...)` prunes, and sparse models save what they know about themselves."""

import functools
import inspect
import sys
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils import PushToHubMixin

from hf_sparse import arrival, checkpoint, peft_hook, publish, trainer_hook
from hf_sparse.arrival import damage_told, find, hub_arguments
from hf_sparse.config import SparsityConfig
from hf_sparse.errors import ConfigError
from hf_sparse.prune import prune_
from hf_sparse.replace import old_weights_aside, write_whole
from hf_sparse.report import FILE_NAME as REPORT_FILE
from hf_sparse.report import PICTURE_FILE
from hf_sparse.side_files import describe
from hf_sparse.wraps import Wrap, Wraps

_FROM_AUTO = "_hf_sparse_config"  # how our two wrappers pass the config on
_wraps = Wraps()


class _Saving(NamedTuple):
    """A `save_pretrained(push_to_hub=True)` that is under way."""

    readme: str  # that of the folder, as it was before
    aside: ExitStack  # closing it ends the local save: what an older save has left is let go


_saving: ContextVar[_Saving | None] = ContextVar("hf_sparse_saving", default=None)
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
    if values.get("quantization_config"):
        raise ConfigError(
            f"{str(path)!r} is quantized, and quantized weights cannot be pruned: prune the model that it was made from, save, "
            "then quantize."
        )


def _wrap_from_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def from_pretrained(cls: type, *args: Any, sparsity_config: Any = None, **kwargs: Any) -> Any:
        if not _wraps.enabled:
            given = {} if sparsity_config is None else {"sparsity_config": sparsity_config}
            return original(cls, *args, **kwargs, **given)
        wanted = kwargs.pop(_FROM_AUTO, sparsity_config)
        config = None if wanted is None else _checked(wanted, kwargs)
        if config is not None:
            _refuse_quantized(args[0] if args else kwargs.get("pretrained_model_name_or_path"), kwargs)
        path = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        with damage_told(path, kwargs):
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


def _wrap_save_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, sparse_format: str | None = None, **kwargs: Any) -> Any:
        if sparse_format not in (None, "dense"):
            raise ConfigError(
                f"sparse_format={sparse_format!r} is not available in this version; leave it out to save dense tensors with zeros."
            )
        if not _wraps.enabled or not _saves_weights(self):
            return original(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        folder = Path(given.arguments["save_directory"])
        if not given.arguments["is_main_process"] or folder.is_file():
            return original(self, *args, **kwargs)
        setattr(self.config, checkpoint.CONFIG_KEY, checkpoint.recounted(self, given.arguments["state_dict"]))
        folder.mkdir(parents=True, exist_ok=True)
        pushes = given.arguments["push_to_hub"]
        with ExitStack() as aside:
            token = _saving.set(_Saving(_read_readme(folder), aside) if pushes else None)
            aside.callback(_saving.reset, token)
            # The new config.json is written first; beside old weights it would make a model that lies if the save broke off.
            aside.enter_context(old_weights_aside(folder, given.arguments["variant"], (REPORT_FILE, PICTURE_FILE)))
            result = original(self, *args, **kwargs)
        if not pushes:
            describe(self, folder)
        return result

    return save_pretrained


def _saves_weights(model: Any) -> bool:
    """Whether a save writes the sparse model itself, not only an adapter on it."""
    claims = getattr(model.config, checkpoint.CONFIG_KEY, None) is not None
    return claims and not getattr(model, "_hf_peft_config_loaded", False)


def _wrap_upload(original: Callable[..., Any]) -> Callable[..., Any]:
    """The last step of every `push_to_hub` in Transformers and PEFT, which uploads what has just been saved."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def _upload_modified_files(self: Any, *args: Any, **kwargs: Any) -> Any:
        saving = _saving.get()
        if saving is not None:
            saving.aside.close()  # the folder is whole, whatever comes of the upload
        model = publish.sparse_model(self) if _wraps.enabled else None
        if model is None:
            return original(self, *args, **kwargs)
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        folder, before = Path(given["working_dir"]), given["files_timestamps"]
        if saving is not None:
            # Transformers has put the repository's README in the place of the user's.
            _put_readme(folder, saving.readme)
            describe(model, folder)
        kind = type(self).__name__
        return publish.push(
            self, folder, _modified(folder, before), given["repo_id"], local=saving.readme if saving else None,
            message=given.get("commit_message") or ("Upload model" if "Model" in kind else f"Upload {kind}"),
            description=given.get("commit_description"), token=given.get("token"), revision=given.get("revision"),
            create_pr=bool(given.get("create_pr")),
        )  # fmt: skip

    return _upload_modified_files


def _modified(folder: Path, before: dict[str, float]) -> list[str]:
    """The files of a folder, and of its folders, that are new or newer than they were."""
    changed = [path for path in folder.iterdir() if path.name not in before or path.stat().st_mtime > before[path.name]]
    found = [inner for path in changed for inner in ([path] if path.is_file() else path.iterdir())]
    return [path.relative_to(folder).as_posix() for path in found if path.is_file()]


def _read_readme(folder: Path) -> str:
    try:
        return (folder / "README.md").read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return ""


def _put_readme(folder: Path, text: str) -> None:
    if text:
        write_whole(folder / "README.md", text.encode("utf-8"))
    else:
        (folder / "README.md").unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------- in and out


def _targets() -> list[tuple[type, str, Wrap]]:
    """The methods to wrap. Each Auto class has its own copy of the base's method; those made later copy our wrapper."""
    autos: list[type] = [_BaseAutoModelClass]
    for auto in autos:
        autos += auto.__subclasses__()
    return [
        (PreTrainedModel, "from_pretrained", _wrap_from_pretrained),
        (PreTrainedModel, "save_pretrained", _wrap_save_pretrained),
        (PushToHubMixin, "_upload_modified_files", _wrap_upload),
        *((auto, "from_pretrained", _wrap_auto) for auto in autos if "from_pretrained" in auto.__dict__),
    ]


def install() -> None:
    """Put the hooks into Transformers; installing twice changes nothing."""
    for owner, name, wrap in _targets():
        _wraps.put(owner, name, wrap)
    _wraps.enabled = True
    arrival.install()
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
    peft_hook.uninstall()
    trainer_hook.uninstall()
    if (callbacks := _callbacks()) is not None:
        callbacks.uninstall()


def _callbacks() -> Any:
    """The module that wraps the Trainer's methods, if anybody has imported it; a user's own of that name is none of ours."""
    module = sys.modules.get("trainer_callbacks.base")
    return module if hasattr(module, "SparsityCallback") else None
