"""Saving and pushing: sparse models write what they know about themselves beside their weights, and may be compressed."""

import functools
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from hf_sparse import checkpoint, contextual, publish
from hf_sparse.errors import ConfigError, unknown
from hf_sparse.predictors.saving import FILE as PREDICTORS
from hf_sparse.replace import finish_compressed, old_weights_aside, write_whole
from hf_sparse.report import FILE_NAME as REPORT_FILE
from hf_sparse.report import PICTURE_FILE
from hf_sparse.side_files import describe
from hf_sparse.storage import FORMATS, compressed_state, is_compressed_weights
from hf_sparse.storage.names import VARIANT, forget_format
from hf_sparse.wraps import Wraps

wraps = Wraps()  # what `hooks` has put into Transformers


class _Saving(NamedTuple):
    """A `save_pretrained(push_to_hub=True)` that is under way."""

    readme: str  # that of the folder, as it was before
    aside: ExitStack  # closing it ends the local save: what an older save has left is let go
    compresses: bool


_format: ContextVar[str] = ContextVar("hf_sparse_format", default="dense")  # of a push that is under way
_saving: ContextVar[_Saving | None] = ContextVar("hf_sparse_saving", default=None)


def wrap_save_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, sparse_format: str | None = None, **kwargs: Any) -> Any:
        compresses = _checked_format(sparse_format or _format.get()) != "dense"
        if not wraps.enabled:
            if compresses:
                raise ConfigError("sparse_format needs hf_sparse; call hf_sparse.install() first.")
            return original(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        told = given.arguments
        folder, variant = Path(told["save_directory"]), told["variant"]
        forget_format(self.config)  # of the folder whose config.json it was read from
        if not told["is_main_process"] or folder.is_file() or not (compresses or _concerns_us(self, folder)):
            return original(self, *args, **kwargs)
        if _saves_weights(self):
            setattr(self.config, checkpoint.CONFIG_KEY, checkpoint.recounted(self, told["state_dict"]))
        with ExitStack() as aside:
            if compresses:
                _compress(self, told)
            folder.mkdir(parents=True, exist_ok=True)
            token = _saving.set(_Saving(_read_readme(folder), aside, compresses) if told["push_to_hub"] else None)
            aside.callback(_saving.reset, token)
            # The new config.json is written first; beside old weights it would make a model that lies if the save broke off.
            aside.enter_context(old_weights_aside(folder, variant, (REPORT_FILE, PICTURE_FILE)))
            result = original(*given.args, **given.kwargs)
            if compresses:
                finish_compressed(folder)
            contextual.write_beside(self, folder)
        if not told["push_to_hub"]:
            describe(self, folder)
        return result

    return save_pretrained


def _checked_format(given: str) -> str:
    if given not in FORMATS:
        raise ConfigError(unknown("sparse_format", given, FORMATS))
    return given


def _compress(model: Any, told: dict[str, Any]) -> None:
    """Turns the arguments of a save into those of a compressed one."""
    if told["variant"] is not None or _saves_adapter(model):
        what = f"variant={told['variant']!r}" if told["variant"] is not None else "adapters"
        raise ConfigError(f"{what} and sparse_format cannot go together; save one without the other.")
    if not told["save_original_format"]:
        raise ConfigError("sparse_format saves the original names and layouts; leave save_original_format out.")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ConfigError(
            "the model is quantized, and only plain weights are saved compressed; leave sparse_format out."
        )
    told["state_dict"] = compressed_state(model, told["state_dict"])
    told["variant"], told["save_original_format"] = VARIANT, False


def _saves_adapter(model: Any) -> bool:
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def _saves_weights(model: Any) -> bool:
    """Whether a save writes the sparse model itself, not only an adapter on it."""
    claims = getattr(model.config, checkpoint.CONFIG_KEY, None) is not None
    return claims and not _saves_adapter(model)


def _concerns_us(model: Any, folder: Path) -> bool:
    """Whether a plain save is one of a sparse model, or takes the place of what we have saved there."""
    if _saves_adapter(model):
        return False
    ours = folder.is_dir() and any(
        is_compressed_weights(path.name) or path.name in (REPORT_FILE, PREDICTORS) for path in folder.iterdir()
    )
    return _saves_weights(model) or ours or contextual.carried_by(model) is not None


def wrap_push(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def push_to_hub(self: Any, *args: Any, sparse_format: str | None = None, **kwargs: Any) -> Any:
        token = _format.set(_checked_format(sparse_format or _format.get()))  # it saves without arguments of ours
        try:
            return original(self, *args, **kwargs)
        finally:
            _format.reset(token)

    return push_to_hub


def wrap_upload(original: Callable[..., Any]) -> Callable[..., Any]:
    """The last step of every `push_to_hub` in Transformers and PEFT, which uploads what has just been saved."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def _upload_modified_files(self: Any, *args: Any, **kwargs: Any) -> Any:
        saving = _saving.get()
        if saving is not None:
            contextual.write_beside(self, Path(signature.bind(self, *args, **kwargs).arguments["working_dir"]))
            if saving.compresses:
                finish_compressed(Path(signature.bind(self, *args, **kwargs).arguments["working_dir"]))
            saving.aside.close()  # the folder is whole, whatever comes of the upload
        model = publish.sparse_model(self) if wraps.enabled else None
        if model is None:
            if wraps.enabled and isinstance(self, nn.Module) and contextual.carried_by(self) is not None:
                _tell_of_predictors(Path(signature.bind(self, *args, **kwargs).arguments["working_dir"]))
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


def _tell_of_predictors(folder: Path) -> None:
    """Put the part about predictors into the README that Transformers has got from the repository, or made."""
    from model_cards.predictors import with_predictors

    write_whole(folder / "README.md", with_predictors(_read_readme(folder), folder).encode("utf-8"))


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
