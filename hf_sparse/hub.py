"""Files and a card become one commit on the Hub, and nothing that a person wrote there is lost."""

import logging
import re
from collections.abc import Callable, Mapping
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from hf_sparse.errors import HubError
from hf_sparse.remote import Repository, hub_hash, read_card
from hf_sparse.remote.hub import told

README = "README.md"
_ATTEMPTS = 3  # a commit is tried again where another one came between reading the card and writing it
_MOVED = (409, 412)
# Weights under the names of another sharding: left beside new ones they would be loaded in their place.
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
# What the client raises where no answer comes: the base of its own errors is that of the HTTP library it was built with.
HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
_log = logging.getLogger(__name__)


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

    `readme` gets the repository's README (None where there is none) and gives the one to write. Weights in the repository that this
    commit does not write are taken out by it. Should another commit come in between, the card is made again from the README as
    it is then.

    Raises: CheckpointError for a README that cannot be merged; HubError where the Hub does not take the commit.
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
    names = sorted(set(files) - {README})
    for attempt in range(1, _ATTEMPTS + 1):
        place = Repository(repository, revision=revision, token=token)
        operations: list[Any] = [CommitOperationAdd(name, files[name]) for name in names]
        text = readme(read_card(place) if README in place.files else None)
        operations.append(CommitOperationAdd(README, text.encode("utf-8")))
        if any(map(_WEIGHTS.fullmatch, names)):
            stale = (name for name in place.files if _WEIGHTS.fullmatch(name) and name not in files)
            operations += [CommitOperationDelete(name) for name in stale]
        try:
            return api.create_commit(
                repository, operations, commit_message=message, commit_description=description, revision=revision, create_pr=create_pr,
                parent_commit=place.commit,
            )  # fmt: skip
        except HfHubHTTPError as error:
            if error.response.status_code not in _MOVED or attempt == _ATTEMPTS:
                raise
            _log.info("%s has changed in the meantime; the card is made again.", repository)
        except HTTP_ERROR:
            # The answer got lost; the commit may be there all the same.
            done = None if create_pr else _arrived(files, text, repository, revision, token)
            if done is None:
                raise
            return CommitInfo(f"{api.endpoint}/{repository}/commit/{done}", message, description, done)
    raise HubError(f"{repository!r} changes all the time; push again later.")


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


def remote_readme(repository: str, *, token: Any = None, revision: str | None = None) -> str | None:
    """The README of a repository, or None where there is no such file, revision or repository.

    Raises: HubError where the Hub does not answer; CheckpointError for a README that is no text.
    """
    try:
        place = Repository(repository, revision=revision, token=token)
        return read_card(place) if README in place.files else None
    except HubError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError | RevisionNotFoundError):
            return None
        raise
