"""The Trainer pushes report, picture and card of a sparse model with its weights; the Trainer is not imported for it."""

import functools
import inspect
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from huggingface_hub import HfApi

from hf_sparse import hub, publish
from hf_sparse.after_import import forget, when_imported
from hf_sparse.errors import HubError
from hf_sparse.hashes import model_files
from hf_sparse.replace import write_whole
from hf_sparse.report import FILE_NAME as REPORT_FILE
from hf_sparse.report import PICTURE_FILE
from hf_sparse.side_files import SPOILED
from hf_sparse.trainer_hook.readme import Readme
from hf_sparse.wraps import Wraps

_MODULE = "transformers.trainer"
_log = logging.getLogger(__name__)
_wraps = Wraps()


@dataclass(frozen=True)
class _Push:
    """A push of a Trainer's that is under way."""

    trainer: Any
    saved: Path  # where the weights were saved; the output folder that is pushed has the same ones
    token: Any
    revision: str | None

    @property
    def folder(self) -> Path:
        return Path(self.trainer.args.output_dir)


_push: ContextVar[_Push | None] = ContextVar("hf_sparse_trainer_push", default=None)
_readmes: WeakKeyDictionary[Any, Readme] = WeakKeyDictionary()


def install() -> None:
    """Wrap the Trainer's pushes, now or when the Trainer is imported; installing twice changes nothing."""
    _wraps.enabled = True
    when_imported(_MODULE, _wrap)


def uninstall() -> None:
    """Give the Trainer its own methods back."""
    forget(_MODULE)
    _wraps.take_out()


def _wrap(module: ModuleType) -> None:
    trainer = getattr(module, "Trainer", None)
    _wraps.put(trainer, "__init__", _at_the_start)
    _wraps.put(trainer, "save_model", _following(Readme.saved_over))
    _wraps.put(trainer, "_push_from_checkpoint", _while_training)
    _wraps.put(trainer, "push_to_hub", _at_the_end)
    _wraps.put(HfApi, "upload_folder", _uploading)


# ---------------------------------------------------------------------------------------------------- the Trainer's methods


def _at_the_start(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        _follow_cards(type(self))

    return __init__


def _follow_cards(kind: type) -> None:
    """Subclasses have a `create_model_card` of their own, and some call it at every save."""
    if _wraps.enabled:
        for owner in kind.__mro__:
            _wraps.put(owner, "create_model_card", _following(Readme.generated_over))


def _following(
    follow: Callable[[Readme], AbstractContextManager[None]],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Wraps a method that writes README.md."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            readme = _readme_of(self) if _is_ours(self) and self.is_world_process_zero() else None
            with nullcontext() if readme is None else follow(readme):
                return original(self, *args, **kwargs)

        return method

    return wrap


def _while_training(original: Callable[..., Any]) -> Callable[..., Any]:
    """The Trainer copies the weights of the checkpoint into its output folder, which it pushes."""

    @functools.wraps(original)
    def _push_from_checkpoint(self: Any, checkpoint_folder: str, *args: Any, **kwargs: Any) -> Any:
        if self.args.hub_always_push:  # otherwise the Trainer leaves a push out while another one is under way
            _finish_uploads(self)
        with _pushing(_Push(self, Path(checkpoint_folder), self.args.hub_token, self.args.hub_revision)):
            return original(self, checkpoint_folder, *args, **kwargs)

    return _push_from_checkpoint


def _at_the_end(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def push_to_hub(self: Any, *args: Any, **kwargs: Any) -> Any:
        _finish_uploads(self)
        given = signature.bind(self, *args, **kwargs).arguments
        token, revision = given.get("token"), given.get("revision")
        token = self.args.hub_token if token is None else token
        with _pushing(_Push(self, Path(self.args.output_dir), token, revision or self.args.hub_revision)):
            return original(self, *args, **kwargs)

    return push_to_hub


def _is_ours(trainer: Any) -> bool:
    return _wraps.enabled and publish.sparse_model(trainer.model) is not None


def _finish_uploads(trainer: Any) -> None:
    """Wait for an earlier upload from the folder that is about to change: it would take weights of one save and a card of another."""
    under_way = getattr(trainer, "push_in_progress", None)
    if _is_ours(trainer) and under_way is not None:
        under_way.wait_until_done()


@contextmanager
def _pushing(push: _Push) -> Iterator[None]:
    _follow_cards(type(push.trainer))
    token = _push.set(push if _is_ours(push.trainer) else None)
    try:
        yield
    finally:
        _push.reset(token)


def _readme_of(trainer: Any) -> Readme:
    file = Path(trainer.args.output_dir) / hub.README
    readme = _readmes.get(trainer)
    if readme is None or readme.file != file:
        readme = _readmes[trainer] = Readme(file)
    return readme


# ---------------------------------------------------------------------------------------------------- the upload


def _uploading(original: Callable[..., Any]) -> Callable[..., Any]:
    """The last step of a Trainer's push: what is in the folder now is uploaded, maybe in another thread."""

    @functools.wraps(original)
    def upload_folder(self: Any, *args: Any, **kwargs: Any) -> Any:
        push = _push.get()
        if push is not None and getattr(push.trainer.args, "hub_token", None) is not None:
            # The arguments of the training are pickled with the token in them.
            kwargs["ignore_patterns"] = [*_listed(kwargs.get("ignore_patterns")), "training_args.bin"]
        is_push = push is not None and not kwargs.get("path_in_repo")  # not that of a checkpoint in a folder of its own
        if push is not None and is_push and Path(kwargs.get("folder_path", "")) == push.folder:
            refusal = _refusal(push)
            if refusal is not None:
                return _refused(refusal, bool(kwargs.get("run_as_future")))
            _complete(push)
            kwargs |= _stale(push, kwargs)
        return original(self, *args, **kwargs)

    return upload_folder


def _refusal(push: _Push) -> HubError | None:
    """Why this must not be pushed there, where the Hub answers."""
    if not publish.is_adapter(publish.sparse_model(push.trainer.model)):
        return None
    repository = push.trainer.hub_model_id
    try:
        place = hub.look(repository, token=push.token, revision=push.revision)
    except HubError:  # the upload meets the same
        return None
    try:
        hub.check_adapter(place, repository)
    except HubError as error:
        return error
    return None


def _refused(error: HubError, in_future: bool) -> Future[Any]:
    """An upload that failed: while training it is a warning, as any that fails then goes unnoticed."""
    if not in_future:
        raise error
    _log.warning("not pushed: %s", error)
    failed: Future[Any] = Future()
    failed.set_exception(error)
    return failed


def _complete(push: _Push) -> None:
    """Put report, picture and card of what was saved into the folder that is pushed.

    A training must not end for the sake of a card: what goes wrong is told as a warning, and the push goes on.
    """
    model, folder, repository = publish.sparse_model(push.trainer.model), push.folder, push.trainer.hub_model_id
    try:
        there = hub.look(repository, token=push.token, revision=push.revision)
        if publish.is_adapter(model):
            with _adapter_alone(push.saved) as saved:
                publish.write_adapter_report(model, saved, folder)
                card = publish.card_for(model, saved, push.token)
        else:
            for name in (REPORT_FILE, PICTURE_FILE):
                if folder != push.saved and (push.saved / name).is_file():
                    write_whole(folder / name, (push.saved / name).read_bytes())
            card = publish.card_for(model, push.saved, push.token)
        _readme_of(push.trainer).to_push(card, hub.readme_of(there), repository)
    except SPOILED as error:
        _log.warning("this push goes without a new card: %s", error)


@contextmanager
def _adapter_alone(saved: Path) -> Iterator[Path]:
    """What of a folder is pushed with an adapter: not the weights of a model that was saved there before."""
    with tempfile.TemporaryDirectory() as place:
        for file in model_files(saved):
            if not hub.is_weights(file.name):
                shutil.copy(file, place)
        yield Path(place)


def _stale(push: _Push, given: dict[str, Any]) -> dict[str, list[str]]:
    """Arguments of the upload by which its commit takes out, and does not bring, files that would be loaded instead of what was saved."""
    ignored, deleted = (_listed(given.get(name)) for name in ("ignore_patterns", "delete_patterns"))
    ignored.append(".hf_sparse_*")  # files that we need for a moment
    saved = {path.name for path in push.saved.iterdir()}
    if publish.is_adapter(publish.sparse_model(push.trainer.model)):
        return {"ignore_patterns": [*ignored, *hub.MODEL_PATTERNS]}
    if not any(map(hub.is_weights, saved)):
        return {"ignore_patterns": ignored}
    for file in push.folder.iterdir():
        if hub.is_weights(file.name) and file.name not in saved:
            file.unlink()  # of a save before, in another number of files
    return {
        "ignore_patterns": [*ignored, *hub.ADAPTER_PATTERNS],
        "delete_patterns": [*deleted, *hub.MODEL_PATTERNS, *hub.ADAPTER_PATTERNS],
    }


def _listed(patterns: Any) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns or [])
