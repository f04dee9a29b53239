"""The test's side of the test Hub: it starts the server, points Hugging Face's libraries at it, and looks into it."""

import base64
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, unquote
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_SecretOfTheUserThatMustNotLeak"
OTHER_TOKEN = "hf_SecretOfTheOtherThatMustNotLeak"


@contextmanager
def serving() -> Iterator[str]:
    """A running server; gives its endpoint."""
    accounts = json.dumps({TOKEN: "user", OTHER_TOKEN: "other"})
    command = [sys.executable, str(Path(__file__).with_name("server.py")), "--accounts", accounts]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.stdin.close()  # tells it to end
        process.wait(timeout=10)
        process.stdout.close()


@dataclass
class Seen:
    """A request that the server got; status 0 stands for none, the connection was cut before."""

    method: str
    path: str  # with query, unquoted
    status: int
    fault: str
    authorised: bool


@dataclass
class Hub:
    """One test's view of the server. The user is logged in with `token`; `other_token` is another account's, named "other"."""

    endpoint: str
    home: Path  # HF_HOME
    token: str = TOKEN
    other_token: str = OTHER_TOKEN
    user: str = "user"
    sleeps: list[float] = field(default_factory=list)  # seconds that the client wanted to wait; it did not

    @property
    def cache(self) -> Path:
        return self.home / "hub"

    def _ask(self, method: str, path: str, values: Any = None) -> Any:
        body = None if values is None else json.dumps(values).encode()
        with urlopen(HttpRequest(f"{self.endpoint}/__hub/{path}", body, method=method)) as answer:
            return json.loads(answer.read())

    def edit(self, repository: str, path: str, content: bytes | str | None, revision: str = "main") -> str:
        """Commit one file as somebody else (None deletes it), in a new public repository if need be; gives the commit."""
        return self._ask(
            "POST", "edit", {"repo": repository, "path": path, "content": _text(content), "revision": revision}
        )

    def put(self, repository: str, files: dict[str, bytes]) -> str:
        """Commit several files as somebody else, one by one; gives the last commit."""
        return [self.edit(repository, path, content) for path, content in files.items()][-1]

    def _look(self, repository: str, revision: str = "main") -> dict[str, Any] | None:
        return self._ask("GET", f"repository?name={quote(repository)}&revision={quote(revision, safe='')}")

    def exists(self, repository: str) -> bool:
        return self._look(repository) is not None

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        """Path to content, without the .gitattributes that every repository starts with; nothing where there is no repository."""
        found = self._look(repository, revision) or {"files": {}}
        return {path: base64.b64decode(text) for path, text in found["files"].items() if path != ".gitattributes"}

    def commits(self, repository: str, revision: str = "main") -> list[dict[str, Any]]:
        """oid, parent, title, description, author and date of each commit, the newest first, without the initial one."""
        found = self._look(repository, revision)
        return found["commits"][:-1] if found else []

    def head(self, repository: str, revision: str = "main") -> str:
        return (self._look(repository, revision) or {})["commits"][0]["oid"]

    def branches(self, repository: str) -> dict[str, str]:
        """Branch to commit, pull requests (refs/pr/1) among them."""
        return (self._look(repository) or {"branches": {}})["branches"]

    def is_private(self, repository: str) -> bool:
        return bool((self._look(repository) or {})["private"])

    def requests(self, pattern: str = "") -> list[Seen]:
        """What was asked of the server, those whose "METHOD path" has the pattern in it."""
        seen = [Seen(**{**entry, "path": unquote(entry["path"])}) for entry in self._ask("GET", "log")]
        return [one for one in seen if re.search(pattern, f"{one.method} {one.path}")]

    def requests_unknown(self) -> list[Seen]:
        """Requests that the server had no answer for."""
        return [one for one in self.requests() if one.status == 501]

    def fault(self, method: str, path: str, **what: Any) -> None:
        """Order a fault; see faults.Fault. `swap` takes (repository, path, content)."""
        if "swap" in what:
            repository, changed, content = what["swap"]
            what["swap"] = {"repo": repository, "path": changed, "content": _text(content)}
        self._ask("POST", "faults", [{"method": method, "path": path, **what}])

    def clear_faults(self) -> None:
        self._ask("DELETE", "faults")

    def reset(self) -> None:
        """Take away all repositories, stored files, faults and the log."""
        self._ask("POST", "reset")

    def settings(self, token: str | None = TOKEN) -> dict[str, str]:
        """The variables that make Hugging Face's libraries use this server; no token, nobody logged in."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self.home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **({} if token is None else {"HF_TOKEN": token}),
        }

    def environment(self, token: str | None = TOKEN) -> dict[str, str]:
        """The whole environment of a fresh process that uses this server."""
        mine = ("HF_", "HUGGING_FACE", "HUGGINGFACE", "TRANSFORMERS_OFFLINE")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(mine)}
        paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
        return {**kept, **self.settings(token), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}

    def run(self, code: str, token: str | None = TOKEN, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run Python code in a fresh process that uses this server; with `check`, a failure shows its errors."""
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, env=self.environment(token), capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0 or not check, done.stderr
        return done

    def leaks(self, *texts: str) -> list[str]:
        """Where a token can be read: in these texts, in a file of the cache, or in a file of any commit's tree that is named."""
        secrets = (self.token.encode(), self.other_token.encode())
        found = [text for text in texts if any(secret in text.encode() for secret in secrets)]
        files = (path for path in self.home.rglob("*") if path.is_file())
        return found + [str(path) for path in files if any(secret in path.read_bytes() for secret in secrets)]


def _text(content: bytes | str | None) -> str | None:
    raw = content.encode() if isinstance(content, str) else content
    return None if raw is None else base64.b64encode(raw).decode()


# ---------------------------------------------------------------------------------------------------- pointing the libraries


LIBRARIES = ("huggingface_hub", "transformers", "peft", "accelerate", "datasets", "trl")


def _moved(name: str, value: Any, endpoint: str, home: Path) -> Any:
    """What a constant of huggingface_hub would be had the environment named this server and this folder."""
    from huggingface_hub import constants

    if name == "HF_URL_HOSTS":
        return value | {"127.0.0.1"}
    if name in ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE"):
        return name != "HF_HUB_OFFLINE"
    if isinstance(value, str) and value.startswith(constants.ENDPOINT):
        return endpoint + value.removeprefix(constants.ENDPOINT)
    if isinstance(value, str) and value.startswith(constants.HF_HOME):
        return str(home) + value.removeprefix(constants.HF_HOME)
    return value


def _exchange(changes: dict[str, tuple[Any, Any]], endpoints: tuple[str, str]) -> None:
    """Every module that has its own copy of a constant gets the new value, and every HfApi the new endpoint.

    Done back at the end of a test as well, for modules imported meanwhile.
    """
    from huggingface_hub import HfApi

    for module in [
        module for name, module in list(sys.modules.items()) if name.split(".")[0] in LIBRARIES and module is not None
    ]:
        kept = vars(module)
        for name, (old, new) in changes.items():
            if name in kept and kept[name] == old:
                kept[name] = new
        for value in list(kept.values()):
            if isinstance(value, HfApi) and value.endpoint == endpoints[0]:
                value.endpoint = endpoints[1]


def _forget() -> None:
    """Open connections, and what was cached about repositories."""
    from huggingface_hub import HfFileSystem
    from huggingface_hub.utils import _http

    _http.close_session()
    HfFileSystem.clear_instance_cache()
    agents = sys.modules.get("huggingface_hub.utils._detect_agent")  # not in all versions
    if agents is not None:
        vars(agents).update(_registry=None)


@contextmanager
def pointed_at(endpoint: str, home: Path, sleeps: list[float]) -> Iterator[None]:
    """Point Hugging Face's libraries in this process at the server, with a home of their own, and let them wait no time."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    moved = {
        name: (value, _moved(name, value, endpoint, home)) for name, value in vars(constants).items() if name.isupper()
    }
    changes = {name: pair for name, pair in moved.items() if pair[0] != pair[1]}
    modules = os.path.join(constants.HF_HOME, "modules")  # has a name in transformers only
    changes["HF_MODULES_CACHE"] = (modules, str(home / "modules"))
    endpoints = (constants.ENDPOINT, endpoint)
    waiting = {module: module.time for module in (_http, file_download) if hasattr(module, "time")}
    impatient = SimpleNamespace(**{**vars(time), "sleep": sleeps.append})
    try:
        _forget()
        _exchange(changes, endpoints)
        for module in waiting:
            module.time = impatient  # type: ignore[attr-defined]
        yield
    finally:
        for module, kept in waiting.items():
            module.time = kept  # type: ignore[attr-defined]
        _exchange({name: (new, old) for name, (old, new) in changes.items()}, (endpoints[1], endpoints[0]))
        _forget()
