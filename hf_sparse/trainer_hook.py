"""The Trainer pushes report, picture and card of a sparse model with its weights; the Trainer is not imported for it."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from huggingface_hub import ModelCard

from hf_sparse import hub, publish
from hf_sparse.after_import import forget, when_imported
from hf_sparse.replace import write_whole
from hf_sparse.report import FILE_NAME as REPORT_FILE
from hf_sparse.report import PICTURE_FILE
from hf_sparse.side_files import SPOILED
from hf_sparse.wraps import Wraps

_MODULE = "transformers.trainer"
_log = logging.getLogger(__name__)
_wraps = Wraps()


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
    _wraps.put(trainer, "_push_from_checkpoint", _while_training)
    _wraps.put(trainer, "push_to_hub", _at_the_end)


def _while_training(original: Callable[..., Any]) -> Callable[..., Any]:
    """The Trainer copies the weights of the checkpoint into its output folder, which it pushes; the rest goes with them."""

    @functools.wraps(original)
    def _push_from_checkpoint(self: Any, checkpoint_folder: str, *args: Any, **kwargs: Any) -> Any:
        # It is called once the Trainer has decided to push.
        def complete() -> None:
            _finish_uploads(self)
            _complete(self, Path(checkpoint_folder))

        with _followed(self.callback_handler, "on_push_begin", complete):
            return original(self, checkpoint_folder, *args, **kwargs)

    return _push_from_checkpoint


def _at_the_end(original: Callable[..., Any]) -> Callable[..., Any]:
    """The card goes into what `create_model_card`, the Trainer's own or a subclass's, has written."""

    @functools.wraps(original)
    def push_to_hub(self: Any, *args: Any, **kwargs: Any) -> Any:
        _finish_uploads(self)
        where = {name: kwargs.get(name) for name in ("token", "revision")}
        with _followed(self, "create_model_card", lambda: _complete(self, Path(self.args.output_dir), **where)):
            return original(self, *args, **kwargs)

    return push_to_hub


def _finish_uploads(trainer: Any) -> None:
    """Wait for an earlier upload from the folder that is about to change: it would take weights of one save and a card of another."""
    under_way = getattr(trainer, "push_in_progress", None)
    if _wraps.enabled and publish.sparse_model(trainer.model) is not None and under_way is not None:
        under_way.wait_until_done()


@contextmanager
def _followed(owner: Any, name: str, action: Callable[[], None]) -> Iterator[None]:
    """Inside, a method of this one object is followed by an action."""
    own, instances_own = getattr(owner, name), vars(owner).get(name)

    @functools.wraps(own)
    def method(*args: Any, **kwargs: Any) -> Any:
        result = own(*args, **kwargs)
        action()
        return result

    setattr(owner, name, method)
    try:
        yield
    finally:
        if instances_own is not None:
            setattr(owner, name, instances_own)
        else:
            delattr(owner, name)


def _complete(trainer: Any, saved: Path, token: Any = None, revision: str | None = None) -> None:
    """Put report, picture and card of what was saved into the folder that is pushed.

    A training must not end for the sake of a card: what goes wrong is told as a warning, and the push goes on.
    """
    model = publish.sparse_model(trainer.model) if _wraps.enabled else None
    if model is None or not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir)
    try:
        for name in (REPORT_FILE, PICTURE_FILE):
            if folder != saved and (saved / name).is_file():
                write_whole(folder / name, (saved / name).read_bytes())
        if publish.is_adapter(model):
            publish.write_adapter_report(model, saved, folder)
        token = trainer.args.hub_token if token is None else token
        there = hub.remote_readme(trainer.hub_model_id, token=token, revision=revision or trainer.args.hub_revision)
        text = _with_card(publish.card_for(model, saved, token), folder / hub.README, there)
        write_whole(folder / hub.README, text.encode("utf-8"))
    except SPOILED as error:
        _log.warning("this push goes without a new card: %s", error)


def _with_card(card: Any, file: Path, there: str | None) -> str:
    """The README to push: the repository's, with what the Trainer has written renewed in it, and the card."""
    from model_cards.merge import merge, merge_trainer
    from model_cards.parts import TRAINER, part_of

    written = file.read_bytes().decode("utf-8-sig") if file.is_file() else ""
    if not written or part_of(written):  # no new text of the Trainer's, but what an earlier push has left
        return publish.merged(card, written if there is None else there)
    # What the Trainer wrote into the header gives way to ours, but not what a person wrote, be it the same.
    is_trainers = not there or part_of(there, TRAINER)
    generated = ModelCard(written, ignore_metadata_errors=True).data.to_dict() if is_trainers else None
    return merge(merge_trainer(there or "", written), str(card.content), generated=generated)
