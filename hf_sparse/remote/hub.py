"""A repository on the Hub, looked at without a download: its files at one commit, and pieces of them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    hf_raise_for_status,
    http_backoff,
    http_stream_backoff,
)

from hf_sparse.errors import HubError
from hf_sparse.hashes import git_hash_of, sha256_of
from hf_sparse.remote.files import File
from hf_sparse.text import one_line

# What the client raises where no answer comes: the base of its own errors is that of the HTTP library it was built with.
HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
_MOST_FILES = 20_000
_RETRIES = 3  # of one request, with 1, 2 and 4 seconds between them
_CUT = 3  # times that a piece is asked for again when the connection is cut in the middle


class Repository:
    """The files of a repository at the commit that a revision means now; nothing is read at any other.

    Raises: HubError where it cannot be looked at: absent, private, offline, no answer; each with the way out.
    """

    def __init__(
        self, name: str, *, revision: str | None = None, token: str | bool | None = None, cache_dir: str | None = None
    ) -> None:
        self.name, self.revision, self._token, self._cache = name, revision, token, cache_dir
        with told(name, revision):
            self.commit = _resolve(name, revision, token)

    @cached_property
    def files(self) -> dict[str, File]:
        """The files at the root, by name."""
        with told(self.name, self.commit):
            entries = HfApi(token=self._token).list_repo_tree(self.name, revision=self.commit)
            listed = [entry for entry in islice(entries, _MOST_FILES + 1) if isinstance(entry, RepoFile)]
        if len(listed) > _MOST_FILES:
            raise HubError(f"{self.name!r} has more than {_MOST_FILES} files at its root; that is no model.")
        return {entry.path: _file(entry) for entry in listed if _is_plain(entry.path)}

    def local(self, name: str) -> Path:
        """One small file, downloaded (or found in the cache) and compared with the hash that the Hub has of it."""
        with told(self.name, self.commit, name):
            path = hf_hub_download(self.name, name, revision=self.commit, token=self._token, cache_dir=self._cache)
        found = Path(path)
        if hub_hash(found, self.files[name]) != self.files[name].hash:
            forget(found)
            raise HubError(
                f"{name} of {self.name!r} did not arrive as the Hub has it; it has been removed from the cache, so try again."
            )
        return found

    def head(self, name: str, size: int) -> bytes:
        """The first bytes of a file, or all of a smaller one; no more are taken, whatever the server sends."""
        wanted = min(size, self.files[name].size)
        if not wanted:
            return b""
        headers = build_hf_headers(token=self._token) | {
            "Range": f"bytes=0-{wanted - 1}",
            "Accept-Encoding": "identity",
        }
        url = hf_hub_url(self.name, name, revision=self.commit)
        with told(self.name, self.commit, name):
            for _ in range(_CUT):
                with http_stream_backoff(
                    "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, max_retries=_RETRIES
                ) as response:
                    hf_raise_for_status(response)
                    content = _at_most(response, wanted)
                if len(content) == wanted:
                    return content
        raise HubError(
            f"the connection was cut while the first {wanted} bytes of {name} of {self.name!r} were read; try again."
        )

    def download(self, names: Iterable[str]) -> Path:
        """The folder with these files, downloaded or from the cache. Their content is not compared with anything here."""
        escaped = ["".join(f"[{letter}]" if letter in "[*?" else letter for letter in name) for name in names]
        with told(self.name, self.commit):
            folder = snapshot_download(
                self.name, revision=self.commit, token=self._token, cache_dir=self._cache, allow_patterns=escaped
            )
        return Path(folder)


def hub_hash(path: Path, file: File) -> str:
    """The hash of a file on disk in the way in which the Hub has it: SHA-256, or git's for what lies in git itself."""
    return git_hash_of(path) if file.sha256 is None else sha256_of(path)


def forget(path: Path) -> None:
    """Take a file out of the cache, where it is a link, so that it is downloaded again."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _resolve(name: str, revision: str | None, token: str | bool | None) -> str:
    path = f"{constants.ENDPOINT}/api/models/{name}/revision/{quote(revision or 'main', safe='')}"
    response = http_backoff(
        "GET",
        path,
        headers=build_hf_headers(token=token),
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        max_retries=_RETRIES,
    )
    hf_raise_for_status(response)
    try:
        commit = response.json()["sha"]
    except (ValueError, KeyError, TypeError) as error:
        raise HubError(f"the Hub's answer about {name!r} cannot be understood; try again.") from error
    if not (isinstance(commit, str) and len(commit) in (40, 64) and set(commit) <= set("0123456789abcdef")):
        raise HubError(f"the Hub names no commit for {name!r}; try again.")
    return commit


def _file(entry: RepoFile) -> File:
    lfs = entry.lfs
    return File(entry.path, entry.size, sha256=lfs.sha256 if lfs else None, git=None if lfs else entry.blob_id)


def _is_plain(name: str) -> bool:
    return bool(name) and name not in (".", "..") and not set(name) & set("/\\\0")


def _at_most(response: Any, size: int) -> bytes:
    content = bytearray()
    try:
        for piece in response.iter_raw():
            content += piece
            if len(content) >= size:
                break
    except HTTP_ERROR:
        return bytes(content)  # too short, which the caller sees; inside, the client would take it for a failed request
    return bytes(content[:size])


@contextmanager
def told(name: str, revision: str | None, file: str | None = None, doing: str = "looked at") -> Iterator[None]:
    """Errors of the client as one sentence that says what to do, without address or token.

    `doing` is what "cannot be ..." to the repository: "looked at", "pushed to".
    """
    what = f"{one_line(name, 120)!r}" + (f" at revision {one_line(revision, 120)!r}" if revision else "")
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise HubError(
            f"{what} cannot be {doing} while HF_HUB_OFFLINE is set; unset it, or give the path of a downloaded folder."
        ) from error
    except HfHubHTTPError as error:
        raise HubError(f"{what} {_refusal(error, file, doing)}.") from error
    except LocalEntryNotFoundError as error:
        raise HubError(
            f"{what} cannot be {doing}: no answer from the Hub, and the cache does not hold it; try again."
        ) from error
    except HTTP_ERROR as error:
        raise HubError(
            f"{what} cannot be {doing}: no answer from the Hub ({type(error).__name__}); check the connection and try again."
        ) from error
    except OSError as error:  # the disk, or a download that is not as long as was said
        raise HubError(f"{what} cannot be {doing}: {one_line(error)}") from error


def _refusal(error: HfHubHTTPError, file: str | None, doing: str) -> str:
    if isinstance(error, GatedRepoError):
        return "is gated: ask for access on its page, then give a token that has it (--token)"
    if isinstance(error, RepositoryNotFoundError):
        return (
            "is no folder here and no repository on the Hub that can be seen; correct the name, or give a token that may read it "
            "(--token) if it is private"
        )
    if isinstance(error, RevisionNotFoundError):
        return "does not exist; give a branch, tag or commit of the repository"
    if isinstance(error, RemoteEntryNotFoundError):
        return f"has no file {one_line(file or '', 120)!r}"
    status, said = error.response.status_code, one_line(error.server_message or "", 200)
    reasons = {
        401: "the Hub does not accept the token (401); log in again, or give another one (--token)",
        403: "the token may not do that (403); give one that may (--token)",
        429: "the Hub refuses so many requests (429); wait, then try again",
    }
    refused = (
        f"the Hub refuses it ({status})"
        if status < 500
        else f"the Hub answers with an error ({status}), also when asked again; try later"
    )
    return f"cannot be {doing}: {reasons.get(status, refused)}" + (
        f": {said}" if said and status not in reasons and status < 500 else ""
    )
