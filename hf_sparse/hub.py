"""Files and a card become one commit on the Hub, and nothing that a person wrote there is lost."""

import copy
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from hf_sparse.errors import HubError
from hf_sparse.remote import Repository, hub_hash, read_card
from hf_sparse.remote.hub import HTTP_ERROR, told
from hf_sparse.storage.names import COMPRESSED_PATTERNS

README = "README.md"
_ATTEMPTS = 3  # a commit is tried again where another one came between reading the card and writing it
_MOVED = (409, 412)
# Weights under the names of another sharding: left beside new ones they would be loaded in their place.
MODEL_PATTERNS = (
    "model.safetensors", "model-[0-9]*-of-[0-9]*.safetensors", "model.safetensors.index.json", *COMPRESSED_PATTERNS,
)  # fmt: skip
# Where these lie in a repository, Transformers loads the base that they name, and them: not the model beside them.
ADAPTER_PATTERNS = ("adapter_config.json", "adapter_model.*")
_log = logging.getLogger(__name__)


class Unchanged(CommitInfo):
    """What a push gives that found all of it there already: the commit that was there."""


def is_weights(name: str) -> bool:
    """Whether a file at the root of a folder or repository is a model's own weights, a shard of them, or their index."""
    return any(fnmatchcase(name, pattern) for pattern in MODEL_PATTERNS)


def stale_files(there: Iterable[str], written: Collection[str]) -> list[str]:
    """Files at a repository's root that would be loaded in the place of a model that is written."""
    patterns = (*MODEL_PATTERNS, *ADAPTER_PATTERNS) if any(map(is_weights, written)) else ()
    return [name for name in there if name not in written and any(fnmatchcase(name, pattern) for pattern in patterns)]


def check_adapter(place: Repository | None, repository: str) -> None:
    """An adapter and a whole model have one card, one report and one `config.json` between them.

    Raises: HubError where the repository holds a model.
    """
    if place is not None and any(map(is_weights, place.files)):
        raise HubError(
            f"{repository!r} holds a whole model, and whoever loads it would get the base of the adapter with the adapter instead; "
            "push the adapter to a repository of its own."
        )


def commit(
    files: Mapping[str, Path],
    repository: str,
    readme: Callable[[str | None], str],
    *,
    message: str,
    description: str | None = None,
    token: Any = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Put files (path in the repository -> where it lies), and the card, into a repository as one commit.

    `readme` gets the repository's README (None where there is none) and gives the one to write. Weights and adapters in the
    repository that would be loaded in the place of weights in this commit are taken out by it. Should another commit come in
    between, the card is made again from the README as it is then. The result is an `Unchanged` where there is nothing to write.

    Raises: CheckpointError for a README that cannot be merged; HubError where the Hub does not take the commit, and for an adapter
    that would go beside a whole model.
    """
    with told(repository, revision, doing="pushed to"):
        try:
            return _commit(files, repository, readme, message, description or "", token, revision, create_pr)
        except JSONDecodeError as error:  # the client reads the answer to its check of the card before its status
            raise HubError(
                f"{repository!r} cannot be pushed to: the Hub's answer is not understood; try later."
            ) from error


def _commit(
    files: Mapping[str, Path],
    repository: str,
    readme: Callable[[str | None], str],
    message: str,
    description: str,
    token: Any,
    revision: str | None,
    create_pr: bool,
) -> CommitInfo:
    api = HfApi(token=token)
    _make_branch(api, repository, revision, create_pr)
    # Making one reads the whole file for its hash. The client notes in them what it found out about the repository, which a commit
    # in between can change: each attempt gets copies.
    additions = [CommitOperationAdd(name, files[name]) for name in sorted(set(files) - {README})]
    for attempt in range(1, _ATTEMPTS + 1):
        place = Repository(repository, revision=revision, token=token)
        text = _readme(readme, readme_of(place))
        try:
            done = api.create_commit(
                repository, _operations(additions, text, place), commit_message=message, commit_description=description,
                revision=revision, create_pr=create_pr, parent_commit=place.commit,
            )  # fmt: skip
        except HfHubHTTPError as error:
            if error.response.status_code not in _MOVED or attempt == _ATTEMPTS:
                raise
            _log.info("%s has changed in the meantime; the card is made again.", repository)
        except HTTP_ERROR as error:
            # The answer got lost; the commit may be there all the same.
            if create_pr:
                raise HubError(
                    f"no answer from the Hub ({type(error).__name__}), and a pull request may be open already: look at "
                    f"{api.endpoint}/{repository}/discussions before you push again."
                ) from error
            arrived = _arrived(files, text, repository, revision, token)
            if arrived is None:
                raise
            return CommitInfo(f"{api.endpoint}/{repository}/commit/{arrived}", message, description, arrived)
        else:
            return Unchanged(done.commit_url, message, description, done.oid) if done.oid == place.commit else done
    raise HubError(f"{repository!r} changes all the time; push again later.")


def _operations(additions: list[CommitOperationAdd], text: str, place: Repository) -> list[Any]:
    written = {addition.path_in_repo for addition in additions}
    if "adapter_config.json" in written and not any(map(is_weights, written)):
        check_adapter(place, place.name)
    stale = stale_files(place.files, written)
    if stale:
        _log.info("taken out of %s, as they would be loaded with or instead of the new weights: %s", place.name, stale)
    readme = CommitOperationAdd(README, text.encode("utf-8"))
    return [*map(copy.copy, additions), readme, *map(CommitOperationDelete, stale)]


def _readme(readme: Callable[[str | None], str], there: str | None) -> str:
    """The README to write; a heading of ours from a push of something else, such as an adapter, is renewed with it."""
    from model_cards.own import own_text, with_title_of

    text = readme(there)
    return text if there is None or own_text(text).lines else with_title_of(readme(None), text)


def _arrived(files: Mapping[str, Path], text: str, repository: str, revision: str | None, token: Any) -> str | None:
    """The commit at the head of a branch if it holds all that was sent, else None."""
    place = Repository(repository, revision=revision, token=token)
    if README not in place.files or read_card(place) != text:
        return None
    whole = all(name in place.files and hub_hash(path, place.files[name]) == place.files[name].hash for name, path in files.items()
                if name != README)  # fmt: skip
    return place.commit if whole else None


def _make_branch(api: HfApi, repository: str, revision: str | None, create_pr: bool) -> None:
    """Make the branch to write to, as Transformers does; a pull request of somebody who may not write takes it for given."""
    if revision is None or revision.startswith("refs/pr"):
        return
    try:
        api.create_branch(repository, branch=revision, exist_ok=True)
    except HfHubHTTPError as error:
        if not (create_pr and error.response.status_code == 403):
            raise


def look(repository: str, *, token: Any = None, revision: str | None = None) -> Repository | None:
    """A repository as it is now, or None where there is no such repository or revision; raises HubError where the Hub does not answer."""
    try:
        return Repository(repository, revision=revision, token=token)
    except HubError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError | RevisionNotFoundError):
            return None
        raise


def readme_of(place: Repository | None) -> str | None:
    """The README of a repository, or None where there is none; raises CheckpointError for one that is no text."""
    return read_card(place) if place is not None and README in place.files else None


def remote_readme(repository: str, *, token: Any = None, revision: str | None = None) -> str | None:
    """The README of a repository, or None where there is no such file, revision or repository.

    Raises: HubError where the Hub does not answer; CheckpointError for a README that is no text.
    """
    return readme_of(look(repository, token=token, revision=revision))
