"""What the Hub answers to those who change something: repositories, branches, uploads, commits."""

import base64
import hashlib
import json
from typing import Any

from cards import check
from repositories import File, HubError, Repository, goes_to_store
from routing import Answer, Hub, Request, route


@route("POST", "/api/repos/create")
def create(hub: Hub, request: Request) -> Answer:
    wanted = request.values
    if request.account is None:
        raise HubError(401, "Invalid username or password.")
    name = f"{wanted.get('organization') or request.account}/{wanted['name']}"
    if not name.startswith(f"{request.account}/"):
        raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{name.split("/")[0]}"')
    there = {"url": f"{hub.endpoint}/{name}", "name": name, "id": name}
    if name in hub.state.repositories:
        return Answer(409, {**there, "error": "You already created this model repo"})
    hub.state.create(name, wanted.get("visibility") == "private" or wanted.get("private") is True, request.account)
    return Answer(values=there)


@route("POST", "{model}/(?P<kind>branch|tag)/(?P<revision>[^/]+)")
def point(hub: Hub, request: Request, name: str, kind: str, revision: str) -> Answer:
    repository = hub.state.writable(name, request.account)
    wanted = request.values
    new, start = (revision, wanted.get("startingPoint", "main")) if kind == "branch" else (wanted["tag"], revision)
    refs = repository.branches if kind == "branch" else repository.tags
    if new in refs:
        raise HubError(409, f"Reference already exists: {new}")
    refs[new] = repository.commit_at(start).oid
    return Answer(201, {})


def _target(hub: Hub, request: Request, name: str) -> Repository:
    """Anybody with an account may open a pull request where they may read."""
    if request.flag("create_pr") and request.account is not None:
        return hub.state.readable(name, request.account)
    return hub.state.writable(name, request.account)


@route("POST", "/api/validate-yaml")
def validate(hub: Hub, request: Request) -> Answer:
    errors, warnings = check(request.values["content"])
    if errors and request.headers.get("Accept") == "text/plain":
        return Answer(400, body="\n".join(errors).encode(), headers={"Content-Type": "text/plain"})
    listed = {
        "errors": [{"message": text} for text in errors],
        "warnings": [{"message": text} for text in warnings],
    }
    return Answer(400 if errors else 200, listed)


@route("POST", "{model}/preupload/(?P<revision>[^/]+)")
def preupload(hub: Hub, request: Request, name: str, revision: str) -> Answer:
    there = _target(hub, request, name).commit_at(revision).files
    files = []
    for asked in request.values["files"]:
        large = goes_to_store(asked["path"], asked["size"], base64.b64decode(asked["sample"]))
        known = {"oid": there[asked["path"]].etag} if asked["path"] in there else {}
        files.append(
            {"path": asked["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, **known}
        )
    return Answer(values={"files": files})


@route("POST", r"/{name}\.git/info/lfs/objects/batch")
def batch(hub: Hub, request: Request, name: str) -> Answer:
    if request.account is None or hub.state.readable(name, request.account) is None:
        raise HubError(401, "Invalid username or password.")
    objects = [{"oid": one["oid"], "size": one["size"], **_way(hub, one, name)} for one in request.values["objects"]]
    return Answer(
        values={
            "transfer": "multipart" if any(one["size"] > hub.part_size for one in objects) else "basic",
            "objects": objects,
        }
    )


def _way(hub: Hub, wanted: dict[str, Any], name: str) -> dict[str, Any]:
    """Where to upload an object; nowhere if it is in the store already."""
    oid, size = wanted["oid"], wanted["size"]
    if oid in hub.state.store:
        return {}
    verify = {"href": f"{hub.endpoint}/{name}.git/info/lfs/verify"}
    if size <= hub.part_size:
        return {"actions": {"upload": {"href": f"{hub.store}/store/{oid}?repository={name}"}, "verify": verify}}
    numbers = range(1, -(-size // hub.part_size) + 1)
    parts = {str(number): f"{hub.store}/store/{oid}/{number}?repository={name}" for number in numbers}
    complete = {
        "href": f"{hub.endpoint}/api/complete/{oid}?repository={name}",
        "header": {"chunk_size": str(hub.part_size), **parts},
    }
    return {"actions": {"upload": complete, "verify": verify}}


@route("PUT", "/store/(?P<oid>[0-9a-f]{64})")
def put(hub: Hub, request: Request, oid: str) -> Answer:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, f"XAmzContentSHA256Mismatch: what arrived does not have the SHA-256 {oid}")
    hub.state.store[oid] = request.body
    return Answer(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})


@route("PUT", "/store/(?P<oid>[0-9a-f]{64})/(?P<number>[0-9]+)")
def put_part(hub: Hub, request: Request, oid: str, number: str) -> Answer:
    hub.state.parts[oid, int(number)] = request.body
    return Answer(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})


@route("POST", "/api/complete/(?P<oid>[0-9a-f]{64})")
def complete(hub: Hub, request: Request, oid: str) -> Answer:
    parts = [hub.state.parts.pop((oid, part["partNumber"]), b"") for part in request.values["parts"]]
    tags = [f'"{hashlib.md5(part).hexdigest()}"' for part in parts]
    if tags != [part["etag"] for part in request.values["parts"]] or hashlib.sha256(b"".join(parts)).hexdigest() != oid:
        raise HubError(400, f"InvalidPart: the parts do not make up the object {oid}")
    hub.state.store[oid] = b"".join(parts)
    return Answer(values={"success": True})


@route("POST", r"/{name}\.git/info/lfs/verify")
def verify(hub: Hub, request: Request, name: str) -> Answer:
    content = hub.state.store.get(request.values["oid"])
    if content is None or len(content) != request.values["size"]:
        raise HubError(404, f"Object {request.values['oid']} is not in the store")
    return Answer(values={})


@route("POST", "{model}/commit/(?P<revision>[^/]+)")
def commit(hub: Hub, request: Request, name: str, revision: str) -> Answer:
    repository = _target(hub, request, name)
    lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    header = lines[0]["value"]
    head = repository.commit_at(revision)
    parent = header.get("parentCommit")
    if parent and not head.oid.startswith(parent):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = _changed(hub, dict(head.files), lines[1:])
    errors, _ = check(files["README.md"].content.decode()) if "README.md" in files else ([], [])
    if errors:
        raise HubError(400, "Invalid metadata in README.md: " + "; ".join(errors))
    pull = repository.open_pull_request() if request.flag("create_pr") else None
    made = repository.add_commit(
        pull or revision, files, header["summary"], request.account or "", header.get("description", "")
    )
    url = f"{hub.endpoint}/{name}/discussions/{pull.rsplit('/', 1)[1]}" if pull else None
    return Answer(
        values={
            "success": True,
            "commitOid": made.oid,
            "commitUrl": f"{hub.endpoint}/{name}/commit/{made.oid}",
            "pullRequestUrl": url,
        }
    )


def _changed(hub: Hub, files: dict[str, File], operations: list[dict[str, Any]]) -> dict[str, File]:
    for operation in operations:
        kind, value = operation["key"], operation["value"]
        path = value["path"]
        if kind == "file":
            files[path] = File(base64.b64decode(value["content"]), False)
        elif kind == "lfsFile":
            if value["oid"] not in hub.state.store:
                raise HubError(400, f'LFS pointer pointed to a file that does not exist: "{path}"')
            files[path] = File(hub.state.store[value["oid"]], True)
        else:
            gone = [
                one
                for one in files
                if one == path or (kind == "deletedFolder" and one.startswith(path.rstrip("/") + "/"))
            ]
            if not gone:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for one in gone:
                del files[one]
    return files
