"""The state of the test Hub: accounts, stored files, repositories with their commits, branches and tags."""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

PLAIN_TEXT_UP_TO = 10_000_000  # bytes; larger files go to the file store, as on the Hub
STORED = (".safetensors", ".bin", ".pt", ".pth", ".npz", ".npy", ".h5", ".gz", ".zip", ".parquet", ".arrow", ".msgpack")
ATTRIBUTES = "".join(f"*{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in STORED)


class HubError(Exception):
    """An answer other than success: status, text and, as X-Error-Code, what the client tells errors apart by."""

    def __init__(self, status: int, text: str, code: str | None = None, commit: str | None = None) -> None:
        super().__init__(text)
        self.status, self.text, self.code, self.commit = status, text, code, commit


@dataclass(frozen=True)
class File:
    """One file of a commit; a large one is a pointer in git, and its content is in the file store."""

    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()
        )

    @property
    def git_oid(self) -> str:
        inside = self.pointer if self.large else self.content
        return hashlib.sha1(b"blob %d\0" % len(inside) + inside).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.git_oid

    def about(self, path: str) -> dict[str, Any]:
        """How tree and paths-info describe it."""
        size = len(self.content)
        large = {"lfs": {"oid": self.sha256, "size": size, "pointerSize": len(self.pointer)}} if self.large else {}
        return {"type": "file", "oid": self.git_oid, "size": size, "path": path, **large}


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    description: str
    author: str
    date: str
    files: dict[str, File]


@dataclass
class Repository:
    name: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)  # with refs/pr/1 and so on
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.name.split("/")[0]

    def commit_at(self, revision: str) -> Commit:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def file_at(self, revision: str, path: str) -> tuple[Commit, File]:
        commit = self.commit_at(revision)
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", commit.oid)
        return commit, commit.files[path]

    def history(self, revision: str) -> list[Commit]:
        found, commit = [], self.commits.get(self.commit_at(revision).oid)
        while commit is not None:
            found.append(commit)
            commit = self.commits.get(commit.parent or "")
        return found

    def add_commit(self, branch: str, files: dict[str, File], title: str, author: str, description: str = "") -> Commit:
        """A new head of the branch, with these files and no others."""
        parent = self.branches.get(branch)
        tree = sorted((path, file.git_oid) for path, file in files.items())
        oid = hashlib.sha1(json.dumps([parent, title, author, tree, len(self.commits)]).encode()).hexdigest()
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        self.commits[oid] = Commit(oid, parent, title, description, author, date, files)
        self.branches[branch] = oid
        return self.commits[oid]

    def open_pull_request(self) -> str:
        """A new branch refs/pr/N at the head of main."""
        number = 1 + sum(name.startswith("refs/pr/") for name in self.branches)
        self.branches[f"refs/pr/{number}"] = self.branches["main"]
        return f"refs/pr/{number}"


@dataclass
class State:
    """Everything the Hub knows. Whoever changes it holds the lock."""

    accounts: dict[str, str]  # token -> name
    repositories: dict[str, Repository] = field(default_factory=dict)
    store: dict[str, bytes] = field(default_factory=dict)  # sha256 -> content
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)  # of uploads in several parts
    lock: threading.RLock = field(default_factory=threading.RLock)

    def clear(self) -> None:
        for kept in (self.repositories, self.store, self.parts):
            kept.clear()

    def create(self, name: str, private: bool, author: str) -> Repository:
        made = self.repositories[name] = Repository(name, private)
        made.add_commit("main", {".gitattributes": File(ATTRIBUTES.encode(), False)}, "initial commit", author)
        return made

    def readable(self, name: str, account: str | None) -> Repository:
        """The repository, if this account may know of it: a private one of somebody else does not exist."""
        found = self.repositories.get(name)
        if found is None or (found.private and found.owner != account):
            if account is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        return found

    def writable(self, name: str, account: str | None) -> Repository:
        if account is None:
            raise HubError(401, "Invalid username or password.")
        found = self.readable(name, account)
        if found.owner != account:
            raise HubError(403, f"Forbidden: {account} has no right to write to {name}")
        return found

    def file(self, content: bytes, path: str) -> File:
        """A file as the Hub would keep it, put into the store if it belongs there."""
        large = goes_to_store(path, len(content), content[:512])
        if large:
            self.store[hashlib.sha256(content).hexdigest()] = content
        return File(content, large)


def goes_to_store(path: str, size: int, sample: bytes) -> bool:
    """Empty files cannot be stored; large ones, binary ones and those of known endings are."""
    return size > 0 and (path.endswith(STORED) or size > PLAIN_TEXT_UP_TO or b"\0" in sample)
