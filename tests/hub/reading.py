"""What the Hub answers to those who look: accounts, repositories, trees, files."""

import hashlib
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from cards import header_of
from repositories import Commit, File, HubError
from routing import Answer, Hub, Request, route


@route("GET", "/api/whoami-v2")
def whoami(hub: Hub, request: Request) -> Answer:
    if request.account is None:
        raise HubError(401, "Invalid username or password.")
    token = {"accessToken": {"displayName": "test", "role": "write"}}
    return Answer(
        values={"type": "user", "id": "1", "name": request.account, "fullname": "", "orgs": [], "auth": token}
    )


@route("GET", "/api/agent-harnesses")
def harnesses(hub: Hub, request: Request) -> Answer:
    return Answer(values={"standardEnvVars": [], "harnesses": {}})


@route("GET", "{model}(/revision/(?P<revision>[^/]+))?")
def info(hub: Hub, request: Request, name: str, revision: str) -> Answer:
    repository = hub.state.readable(name, request.account)
    commit = repository.commit_at(revision or "main")
    readme = commit.files.get("README.md")
    try:
        card = header_of(readme.content.decode()) if readme else {}
    except ValueError:
        card = {}
    siblings = [_sibling(path, file, request.flag("blobs")) for path, file in sorted(commit.files.items())]
    values = {
        "id": name, "modelId": name, "author": repository.owner, "sha": commit.oid, "private": repository.private, "gated": False,
        "disabled": False, "lastModified": commit.date, "createdAt": commit.date, "downloads": 0, "likes": 0, "siblings": siblings,
        "cardData": card, "tags": card.get("tags", []), "library_name": card.get("library_name"),
        "pipeline_tag": card.get("pipeline_tag"), "usedStorage": sum(len(file.content) for file in commit.files.values()),
    }  # fmt: skip
    wanted = request.query.get("expand")
    return Answer(values={key: value for key, value in values.items() if not wanted or key in {"id", "sha", *wanted}})


def _sibling(path: str, file: File, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": path}
    about = file.about(path)
    large = (
        {"lfs": {"sha256": file.sha256, "size": about["size"], "pointerSize": len(file.pointer)}} if file.large else {}
    )
    return {"rfilename": path, "size": about["size"], "blobId": about["oid"], **large}


@route("GET", "{model}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?")
def tree(hub: Hub, request: Request, name: str, revision: str, folder: str) -> Answer:
    commit = hub.state.readable(name, request.account).commit_at(revision)
    entries = list(_entries(commit, folder, request.flag("recursive"), request.flag("expand")))
    if folder and not entries:
        raise HubError(404, "Entry not found", "EntryNotFound", commit.oid)
    start = int(request.query.get("cursor", ["0"])[0])
    stop = start + int(request.query.get("limit", [str(hub.page)])[0])
    options = "".join(
        f"&{key}={request.query[key][0]}" for key in ("recursive", "expand", "limit") if key in request.query
    )
    more = {"Link": f'<{hub.endpoint}{urlsplit(request.target).path}?cursor={stop}{options}>; rel="next"'}
    return Answer(values=entries[start:stop], headers=more if stop < len(entries) else {})


def _entries(commit: Commit, folder: str, recursive: bool, expand: bool) -> Iterator[dict[str, Any]]:
    inside = f"{folder}/" if folder else ""
    folders = set()
    last = {"lastCommit": {"id": commit.oid, "title": commit.title, "date": commit.date}} if expand else {}
    for path, file in sorted(commit.files.items()):
        steps = path.removeprefix(inside).split("/")
        if not path.startswith(inside):
            continue
        for depth in range(1, len(steps)):
            parent = inside + "/".join(steps[:depth])
            if parent not in folders and (recursive or depth == 1):
                folders.add(parent)
                yield {
                    "type": "directory",
                    "oid": hashlib.sha1(parent.encode()).hexdigest(),
                    "size": 0,
                    "path": parent,
                    **last,
                }
        if recursive or len(steps) == 1:
            yield {**file.about(path), **last}


@route("POST", "{model}/paths-info/(?P<revision>[^/]+)")
def paths(hub: Hub, request: Request, name: str, revision: str) -> Answer:
    commit = hub.state.readable(name, request.account).commit_at(revision)
    asked = parse_qs(request.body.decode()).get("paths", [])
    folders = {entry["path"]: entry for entry in _entries(commit, "", True, False) if entry["type"] == "directory"}
    known = {path: commit.files[path].about(path) if path in commit.files else folders.get(path) for path in asked}
    return Answer(values=[about for about in known.values() if about])


@route("GET", "{model}/refs")
def refs(hub: Hub, request: Request, name: str) -> Answer:
    repository = hub.state.readable(name, request.account)
    pulls = {ref: oid for ref, oid in repository.branches.items() if ref.startswith("refs/pr/")}
    heads = {ref: oid for ref, oid in repository.branches.items() if ref not in pulls}

    def listed(refs: dict[str, str], prefix: str) -> list[dict[str, str]]:
        return [{"name": ref, "ref": prefix + ref, "targetCommit": oid} for ref, oid in refs.items()]

    values = {
        "branches": listed(heads, "refs/heads/"),
        "tags": listed(repository.tags, "refs/tags/"),
        "converts": [],
    }
    return Answer(values={**values, **({"pullRequests": listed(pulls, "")} if request.flag("include_prs") else {})})


@route("GET", "{model}/commits/(?P<revision>[^/]+)")
def commits(hub: Hub, request: Request, name: str, revision: str) -> Answer:
    history = hub.state.readable(name, request.account).history(revision)
    return Answer(values=[
        {"id": one.oid, "title": one.title, "message": one.description, "date": one.date, "authors": [{"user": one.author}]}
        for one in history
    ])  # fmt: skip


def in_range(content: bytes, asked: str | None, headers: dict[str, str]) -> Answer:
    """The whole content, or the part that a Range header asks for."""
    wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", asked or "")
    if wanted is None or wanted.groups() == ("", ""):
        return Answer(200, body=content, headers=headers)
    first, last = wanted.groups()
    start = int(first) if first else max(0, len(content) - int(last))
    stop = min(len(content), int(last) + 1) if first and last else len(content)
    if start >= len(content) or start >= stop:
        return Answer(416, body=b"", headers={**headers, "Content-Range": f"bytes */{len(content)}"})
    return Answer(
        206, body=content[start:stop], headers={**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
    )


@route("GET", "/{name}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(hub: Hub, request: Request, name: str, revision: str, path: str) -> Answer:
    commit, file = hub.state.readable(name, request.account).file_at(revision, path)
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
    if not file.large:
        return in_range(file.content, request.headers.get("Range"), headers)
    linked = {"X-Linked-Size": str(len(file.content)), "X-Linked-ETag": f'"{file.sha256}"'}
    place = f"{hub.store}/store/{file.sha256}?repository={name}&file={quote(path)}"
    return Answer(302, headers={**headers, **linked, "Location": place})


@route("GET", "/store/(?P<oid>[0-9a-f]{64})")
def get(hub: Hub, request: Request, oid: str) -> Answer:
    if oid not in hub.state.store:
        raise HubError(404, "NoSuchKey")
    return in_range(
        hub.state.store[oid], request.headers.get("Range"), {"ETag": f'"{oid[:32]}"', "Accept-Ranges": "bytes"}
    )
