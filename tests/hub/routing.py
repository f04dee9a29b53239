"""Requests, answers, and the table that finds the function for a request."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from repositories import State


@dataclass
class Request:
    method: str
    target: str
    headers: Any
    body: bytes
    account: str | None = None

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.target).query)

    @property
    def values(self) -> Any:
        return json.loads(self.body)

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["false"])[0].lower() in ("1", "true")


@dataclass
class Answer:
    status: int = 200
    values: Any = None
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.values is not None:
            self.body = json.dumps(self.values).encode()
            self.headers = {"Content-Type": "application/json", **self.headers}


@dataclass
class Hub:
    state: State
    endpoint: str
    store: str  # where large files are, on a host of its own that must never see a token
    part_size: int  # larger uploads come in parts of this many bytes
    page: int  # entries of a tree per answer


Handler = Callable[..., Answer]
ROUTES: list[tuple[str, re.Pattern[str], Handler]] = []
REPOSITORY = r"(?P<name>[^/]+/[^/]+)"


def route(method: str, path: str) -> Callable[[Handler], Handler]:
    pattern = re.compile(path.replace("{model}", f"/api/models/{REPOSITORY}").replace("{name}", REPOSITORY))

    def enter(handler: Handler) -> Handler:
        ROUTES.append((method, pattern, handler))
        return handler

    return enter


def find(method: str, target: str) -> tuple[Handler, dict[str, str]] | None:
    """The handler of a request and what its path names; parts are split before they are unquoted, as branches have slashes."""
    path = urlsplit(target).path
    for wanted, pattern, handler in ROUTES:
        found = pattern.fullmatch(path)
        if found and wanted == ("GET" if method == "HEAD" else method):
            return handler, {key: unquote(value) for key, value in found.groupdict(default="").items()}
    return None
