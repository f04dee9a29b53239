"""What a push of a sparse model sends: what was saved, its report, picture and card and, where it is known, what reads its input."""

import dataclasses
import logging
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from torch import nn
from transformers.utils import cached_file

from hf_sparse import checkpoint, hub
from hf_sparse.errors import HfSparseError, HubError
from hf_sparse.hashes import hashes_of
from hf_sparse.remote import Repository
from hf_sparse.report import FILE_NAME as REPORT_FILE
from hf_sparse.report import PICTURE_FILE
from hf_sparse.side_files import card_of, draw

# What reads a model's input: the file that tells of it, and the class that loads it.
_PROCESSORS = {
    "processor_config.json": "AutoProcessor",
    "preprocessor_config.json": "AutoProcessor",
    "tokenizer_config.json": "AutoTokenizer",
}
_log = logging.getLogger(__name__)


def sparse_model(pushed: Any) -> Any | None:
    """The sparse model with a report that a push is about: a model, that of a pipeline, or one below adapters; None otherwise."""
    for model in (pushed, getattr(pushed, "model", None)):
        claim = getattr(getattr(model, "config", None), checkpoint.CONFIG_KEY, None)
        if isinstance(model, nn.Module) and isinstance(claim, dict) and checkpoint.report(model) is not None:
            return model
    return None


def is_adapter(model: Any) -> bool:
    """Whether saving the model writes adapters only."""
    return bool(getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_type"))


def push(
    pushed: Any,
    folder: Path,
    names: Iterable[str],
    repository: str,
    *,
    local: str | None = None,
    token: Any = None,
    **commit_arguments: Any,
) -> CommitInfo:
    """Push files that `save_pretrained` has just written into a folder, and what stands beside them.

    pushed: what `push_to_hub` was called on; `names` the files; `local` a README to start from where the repository has none.
    Further arguments are those of `hub.commit`.

    Raises: as `hub.commit`; CheckpointError for a report that no card can be made of.
    """
    model = sparse_model(pushed)
    with tempfile.TemporaryDirectory() as place:
        beside = Path(place)
        files = {name: folder / name for name in names}
        if is_adapter(model):
            write_adapter_report(model, folder, beside)
            files |= {path.name: path for path in beside.iterdir()}
        files |= {name: folder / name for name in (REPORT_FILE, PICTURE_FILE) if (folder / name).is_file()}
        files |= _processors(model, files, beside, repository, token, commit_arguments.get("revision"))
        card = card_for(model, folder, token)
        return hub.commit(
            files, repository, lambda there: merged(card, there or local, folder), token=token, **commit_arguments
        )


def merged(card: Any, existing: str | None, folder: Path) -> str:
    """A README with the card in it, and what is to be said of predictors in the folder: what a person wrote there stays."""
    from model_cards.predictors import with_predictors

    text = card.merged_into(existing) if existing and existing.strip() else str(card.content)
    return with_predictors(text, folder)


def card_for(model: Any, folder: Path, token: Any = None) -> Any:
    """The card of what was saved into a folder, with the model's own tags."""
    from model_cards import SparseAdapterCard

    if is_adapter(model):
        return SparseAdapterCard.of_model(model, file_hashes=hashes_of(folder))
    report: Any = checkpoint.report(model)
    picture = PICTURE_FILE if (folder / PICTURE_FILE).is_file() else None
    return card_of(model, report, picture, base_card(report.model, token))


def base_card(base: str, token: Any = None) -> str | None:
    """The card of the base model, where its name is that of a repository that can be read; a license is inherited from it."""
    from model_cards import is_repository

    if not is_repository(base):
        return None
    with suppress(HfSparseError):  # a card can do without
        return hub.remote_readme(base, token=token)
    return None


def write_adapter_report(model: Any, saved: Path, folder: Path) -> None:
    """Write the report of an adapter's base, which tells of the adapter's training too, with the hashes of the adapter's files."""
    report: Any = checkpoint.report(model)
    dataclasses.replace(report, files=hashes_of(saved)).save(folder)
    draw(report, folder)


def _processors(
    model: Any, files: dict[str, Path], beside: Path, repository: str, token: Any, revision: str | None
) -> dict[str, Path]:
    """The tokenizer or processor of the model that this one was loaded from, unless the push or the repository has one."""
    from transformers import AutoProcessor, AutoTokenizer

    if is_adapter(model) or any(name in files for name in _PROCESSORS):
        return {}
    source = str(getattr(model.config, "name_or_path", "") or checkpoint.report(model).model)  # type: ignore[union-attr]
    found = next((kind for name, kind in _PROCESSORS.items() if _is_at_hand(source, name)), None)
    if found is None or _has_one(repository, token, revision):
        return {}
    place = beside / "processor"
    try:
        loaded = {"AutoProcessor": AutoProcessor, "AutoTokenizer": AutoTokenizer}[found].from_pretrained(
            source, local_files_only=True, trust_remote_code=False
        )
        loaded.save_pretrained(place)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        _log.warning("the %s of %s is not pushed: it cannot be loaded (%s).", found[4:].lower(), source, error)
        return {}
    added = {path.relative_to(place).as_posix(): path for path in place.rglob("*") if path.is_file()}
    return {name: path for name, path in added.items() if name not in files}


def _is_at_hand(source: str, name: str) -> bool:
    """Whether a file lies in a local folder or in the cache; the network is not asked."""
    with suppress(OSError, ValueError):
        return (
            cached_file(
                source, name, local_files_only=True, _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
            )
            is not None
        )  # fmt: skip
    return False


def _has_one(repository: str, token: Any, revision: str | None) -> bool:
    with suppress(HubError):  # a branch that is still to be made; anything else comes up again with the commit
        return not _PROCESSORS.keys().isdisjoint(Repository(repository, revision=revision, token=token).files)
    return False
