"""A small Hub on 127.0.0.1 that speaks the protocol of huggingface_hub: `python server.py --accounts '{"token": "name"}'`.

Two servers share its state, as on the Hub: one has repositories, the other (which must never see a token) has large files. The
first line of output is the port of the first. It ends when its standard input does.

Tests read and steer it under `/__hub/`: GET log, GET repository, POST edit, POST faults, DELETE faults, POST reset.
"""

import argparse
import base64
import json
import socket
import struct
import sys
import threading
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import reading  # noqa: F401 (reading and writing enter their functions into the table)
import writing  # noqa: F401
from faults import Fault, Faults, flipped
from repositories import HubError, State
from routing import Answer, Hub, Request, find

NOBODY = "1" * 64  # the hash of no file


class Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub
    faults: Faults
    log: list[dict[str, Any]]

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients may go away; anything else is a mistake in here
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def do_GET(self) -> None:
        if self.path.startswith("/__hub/"):
            return self._steer()
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_GET

    def log_message(self, format: str, *arguments: Any) -> None:
        """The log is kept, not printed."""

    # ------------------------------------------------------------------------------------------------ one request

    def _serve(self) -> None:
        take = self.server.faults.take
        order = take(self.command, self.path, "status", *(("cut", "reset") if self.command in ("POST", "PUT") else ()))
        if order and order.closes_after is not None:
            self.rfile.read(min(order.closes_after, int(self.headers.get("Content-Length") or 0)))
            return self._close(order, 0)
        body = self._body()
        if order:
            kind = {"Content-Type": "text/html" if order.text.startswith("<") else "application/json"}
            content = order.text if order.text.startswith("<") else json.dumps({"error": order.text})
            return self._send(Answer(order.status or 500, body=content.encode(), headers={**kind, **order.headers}))
        damage = take(self.command, self.path, "corrupt") if body else None
        answer = self._answer(flipped(body, damage.corrupt) if damage and damage.corrupt is not None else body)
        if take(self.command, self.path, "lost"):
            return self._close(None, answer.status, "lost")
        if "ETag" in answer.headers and take(self.command, self.path, "wrong_hash"):
            answer.headers.update({name: f'"{NOBODY}"' for name in ("ETag", "X-Linked-ETag") if name in answer.headers})
        swap = take(self.command, self.path, "swap")
        self._send(answer)
        if swap and swap.swap:
            self._edit(**swap.swap)

    def _answer(self, body: bytes) -> Answer:
        hub, request = self.server.hub, Request(self.command, self.path, self.headers, body)
        found = find(self.command, self.path)
        if found is None:
            return Answer(501, {"error": f"this Hub does not know {self.command} {self.path}"})
        try:
            with hub.state.lock:
                request.account = self._account()
                return found[0](hub, request, **found[1])
        except HubError as error:
            named = {"X-Error-Code": error.code, "X-Repo-Commit": error.commit, "X-Error-Message": error.text}
            return Answer(
                error.status, {"error": error.text}, headers={key: value for key, value in named.items() if value}
            )

    def _account(self) -> str | None:
        given = self.headers.get("Authorization")
        if given is None:
            return None
        if self.path.startswith("/store/"):
            raise HubError(400, "InvalidArgument: Only one auth mechanism allowed")  # a token that has left the Hub
        name = self.server.hub.state.accounts.get(given.removeprefix("Bearer "))
        if name is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return name

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    # ------------------------------------------------------------------------------------------------ the answer

    def _send(self, answer: Answer) -> None:
        body, fault = answer.body, None
        if body and self.command == "GET":
            damage = self.server.faults.take(self.command, self.path, "corrupt")
            body = flipped(body, damage.corrupt) if damage and damage.corrupt is not None else body
            fault = self.server.faults.take(self.command, self.path, "cut", "reset")
        self._note(answer.status, "cut" if fault else "")
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers_with(b"" if self.command == "HEAD" else body[: fault.closes_after] if fault else body)
        if fault:
            self._close(fault, None)

    def end_headers_with(self, body: bytes) -> None:
        """In one piece, or a delayed acknowledgement costs 40 ms."""
        head = b"".join(self._headers_buffer) + b"\r\n"
        self._headers_buffer = []
        self.wfile.write(head + body)

    def _close(self, fault: Fault | None, status: int | None, what: str = "cut") -> None:
        if status is not None:
            self._note(status, what)
        if fault and fault.reset is not None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.close_connection = True

    def _note(self, status: int, what: str = "") -> None:
        entry = {"method": self.command, "path": self.path, "status": status, "fault": what}
        self.server.log.append({**entry, "authorised": "Authorization" in self.headers})

    # ------------------------------------------------------------------------------------------------ the test's side

    def _steer(self) -> None:
        what, body = urlsplit(self.path).path.removeprefix("/__hub/"), self._body()
        hub, values, found = self.server.hub, json.loads(body or b"null"), None
        with hub.state.lock:
            if what == "log":
                found = self.server.log
            elif what == "repository":
                found = self._repository(
                    **{key: value[0] for key, value in parse_qs(urlsplit(self.path).query).items()}
                )
            elif what == "edit":
                found = self._edit(**values)
            elif what == "faults" and self.command == "POST":
                self.server.faults.order(values)
            else:  # the end of faults, or of everything
                self.server.faults.clear()
            if what == "reset":
                hub.state.clear()
                self.server.log.clear()
        content = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers_with(content)

    def _edit(self, repo: str, path: str, content: str | None, revision: str = "main", author: str = "somebody") -> str:
        state = self.server.hub.state
        with state.lock:
            repository = state.repositories.get(repo) or state.create(repo, False, author)
            files = dict(repository.commit_at(revision).files)
            files.pop(path, None)
            if content is not None:
                files[path] = state.file(base64.b64decode(content), path)
            return repository.add_commit(
                revision, files, f"{'Delete' if content is None else 'Edit'} {path}", author
            ).oid

    def _repository(self, name: str, revision: str = "main") -> dict[str, Any] | None:
        repository = self.server.hub.state.repositories.get(name)
        if repository is None:
            return None
        commits = repository.history(revision)
        listed = {path: base64.b64encode(file.content).decode() for path, file in commits[0].files.items()}
        history = [{key: value for key, value in asdict(commit).items() if key != "files"} for commit in commits]
        refs = {"branches": repository.branches, "tags": repository.tags}
        return {"private": repository.private, "files": listed, "commits": history, **refs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--accounts", type=json.loads, default={"hf_test": "user"}, help="JSON: token to name")
    parser.add_argument(
        "--part-size", type=int, default=1_000_000, help="larger files are uploaded in parts of so many bytes"
    )
    parser.add_argument("--page", type=int, default=50, help="entries of a tree per answer")
    given = parser.parse_args()
    servers = [Server(("127.0.0.1", port), Handler) for port in (given.port, 0)]
    # The client knows the Hub by name (and newer ones by port): another name makes the store a stranger to it.
    endpoint, store = (f"http://{host}:{one.server_port}" for host, one in zip(("127.0.0.1", "localhost"), servers))
    hub, faults, log = Hub(State(given.accounts), endpoint, store, given.part_size, given.page), Faults(), []
    for server in servers:
        server.hub, server.faults, server.log = hub, faults, log
        threading.Thread(target=server.serve_forever, daemon=True).start()
    print(servers[0].server_port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
