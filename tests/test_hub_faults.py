"""Whatever goes wrong between here and the Hub ends in a clear error or a clean retry, and never in a model that loads wrong."""

import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hub.client import Hub
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from models import llama
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import cli
from hf_sparse.errors import CheckpointError, HfSparseError

NAME = "user/sparse"
WEIGHTS = "model.safetensors"
SHARED = r"/store/"  # where large files go to and come from
HTTPError = HfHubHTTPError.__bases__[0]  # of the HTTP library that huggingface_hub uses
# What an error may be: ours, one of huggingface_hub or Transformers (OSError), or that of an upload (RuntimeError, names the file).
CLEAR = (HfSparseError, OSError, HTTPError, RuntimeError, ValueError)
pytestmark = [
    pytest.mark.usefixtures("no_pictures"),
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),  # huggingface_hub's own
    pytest.mark.timeout(30),
]


@dataclass(frozen=True)
class Made:
    model: Any
    folder: Path
    files: dict[str, bytes]

    def holds(self, other: nn.Module) -> bool:
        left, right = self.model.state_dict(), other.state_dict()
        return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def made() -> Iterator[Made]:
    """A pruned model, the folder it was saved to, and what a push of it leaves in a repository."""
    model = llama(layers=1)
    hf_sparse.prune_(model, {"metric": "magnitude", "pattern": "2:4"})
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place)
        files = {path.name: path.read_bytes() for path in Path(place).iterdir()}
        yield Made(model, Path(place), files)


# ------------------------------------------------------------------------------------------------ the operations


class Told(Exception):
    """The command line ended with an exit code other than 0, and said this."""


def _command(*words: str) -> None:
    if code := cli.main(list(words)):
        raise Told(code)


def push(made: Made, hub: Hub, place: Path) -> None:
    made.model.push_to_hub(NAME)


def save(made: Made, hub: Hub, place: Path) -> None:
    made.model.save_pretrained(place / "saved", push_to_hub=True, repo_id=NAME)


def adapter(made: Made, hub: Hub, place: Path) -> None:
    from peft import LoraConfig, get_peft_model

    inner = AutoModelForCausalLM.from_pretrained(made.folder)
    get_peft_model(inner, LoraConfig(target_modules=["q_proj"], r=2)).push_to_hub(NAME)


def command(made: Made, hub: Hub, place: Path) -> None:
    _command("push", str(made.folder), NAME)


def load(made: Made, hub: Hub, place: Path) -> None:
    assert made.holds(AutoModelForCausalLM.from_pretrained(NAME)), "a wrong model"


def snapshot(made: Made, hub: Hub, place: Path) -> None:
    folder = Path(snapshot_download(NAME))
    assert made.holds(AutoModelForCausalLM.from_pretrained(folder)), "a wrong model"


def inspect(made: Made, hub: Hub, place: Path) -> None:
    _command("inspect", NAME)


def verify(made: Made, hub: Hub, place: Path) -> None:
    _command("verify", NAME)


@cache
def tensors_of(content: bytes) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / WEIGHTS
        file.write_bytes(content)
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118 (no mapping)


def is_complete(name: str, files: dict[str, bytes], made: Made) -> bool:
    """Whether a repository has all that belongs to a model or adapter, readable."""
    weights = "adapter_model.safetensors" if name == "adapter" else WEIGHTS
    config = "adapter_config.json" if name == "adapter" else "config.json"
    if not {weights, config, "README.md", "hf_sparse_report.json"} <= set(files):
        return False
    json.loads(files[config])
    right = tensors_of(made.files[WEIGHTS])
    found = tensors_of(files[weights])
    return name == "adapter" or all(torch.equal(found[tensor], right[tensor]) for tensor in right)


SLOW = (save, adapter, snapshot, inspect)  # much like another one; all together take a minute


def cases(rows: dict[str, Any], *operations: Any) -> list[Any]:
    """Every row with every operation."""
    made = []
    for row in rows:
        for operation in operations:
            marks = [pytest.mark.slow] if operation in SLOW else []
            made.append(pytest.param(row, operation, id=f"{row}-{operation.__name__}", marks=marks))
    return made


# ------------------------------------------------------------------------------------------------ pushing

ALWAYS: dict[str, Any] = {"times": None}
CREATE, PREUPLOAD, COMMIT, BATCH = "/api/repos/create", "/preupload/", "/commit/main", "objects/batch"
GATEWAY = {"status": 502, "text": "<html>Bad Gateway</html>"}
WAIT = {"status": 429, "headers": {"Retry-After": "1"}}
BUSY = {"status": 409, "text": "Cannot create repo: another conflicting operation is in progress"}
OTHER = "# Somebody else's title\n"

# What goes wrong: the fault, what comes of a push ("works", or else "fails"), and what the repository then has more than before.
PUSHES: dict[str, tuple[str, str, dict[str, Any], str, str]] = {
    "create 401": ("POST", CREATE, {"status": 401, **ALWAYS}, "fails", "nothing"),
    "create 403": ("POST", CREATE, {"status": 403, **ALWAYS}, "fails", "nothing"),
    "create 409, for a moment": ("POST", CREATE, {**BUSY, "times": 2}, "works", "commit"),
    "create 500": ("POST", CREATE, {"status": 500, **ALWAYS}, "fails", "nothing"),
    "create cut": ("POST", CREATE, {"cut": 5}, "fails", "nothing"),
    "card check 502": ("POST", "validate-yaml", {**GATEWAY, **ALWAYS}, "fails", "nothing"),
    "preupload 429, waits": ("POST", PREUPLOAD, WAIT, "works", "commit"),
    "preupload 401": ("POST", PREUPLOAD, {"status": 401, **ALWAYS}, "fails", "nothing"),
    "preupload 404": ("POST", PREUPLOAD, {"status": 404, "headers": {"X-Error-Code": "RepoNotFound"}}, "fails", "nothing"),
    "batch 503, once": ("POST", BATCH, {"status": 503}, "works", "commit"),
    "batch 403": ("POST", BATCH, {"status": 403, **ALWAYS}, "fails", "nothing"),
    "upload 403, link expired": ("PUT", SHARED, {"status": 403, **ALWAYS}, "fails", "nothing"),
    "upload 500, twice": ("PUT", SHARED, {"status": 500, "times": 2}, "works", "commit"),
    "upload 504": ("PUT", SHARED, {"status": 504, **ALWAYS}, "fails", "nothing"),
    "upload cut, once": ("PUT", SHARED, {"cut": 100}, "works", "commit"),
    "upload torn down, once": ("PUT", SHARED, {"reset": 100}, "works", "commit"),
    "upload cut": ("PUT", SHARED, {"cut": 100, **ALWAYS}, "fails", "nothing"),
    "upload without an answer": ("PUT", SHARED, {"lost": True}, "works", "commit"),
    "upload damaged": ("PUT", SHARED, {"corrupt": 500, **ALWAYS}, "fails", "nothing"),
    "verification 404": ("POST", "lfs/verify", {"status": 404, **ALWAYS}, "fails", "nothing"),
    "commit 401": ("POST", COMMIT, {"status": 401, **ALWAYS}, "fails", "nothing"),
    "commit 403": ("POST", COMMIT, {"status": 403, **ALWAYS}, "fails", "nothing"),
    "commit 409, once": ("POST", COMMIT, {"status": 409}, "works", "commit"),
    "commit 412": ("POST", COMMIT, {"status": 412, **ALWAYS}, "fails", "nothing"),
    "commit 429": ("POST", COMMIT, {**WAIT, **ALWAYS}, "fails", "nothing"),
    "commit 500": ("POST", COMMIT, {"status": 500, **ALWAYS}, "fails", "nothing"),
    "commit 502 of a gateway": ("POST", COMMIT, {**GATEWAY, **ALWAYS}, "fails", "nothing"),
    "commit cut": ("POST", COMMIT, {"cut": 100}, "fails", "nothing"),
    "commit torn down": ("POST", COMMIT, {"reset": 100}, "fails", "nothing"),
    "commit without an answer": ("POST", COMMIT, {"lost": True}, "works", "commit"),
    "somebody commits before us": ("POST", PREUPLOAD, {"swap": (NAME, "README.md", OTHER)}, "works", "both"),
}  # fmt: skip


def outcome(operation: Callable[..., None], *arguments: Any, capsys: pytest.CaptureFixture[str]) -> str | None:
    """None where it works, else what the user is told: the messages in the traceback, or what the command printed."""
    try:
        operation(*arguments)
    except Told:
        printed = capsys.readouterr()
        return printed.out + printed.err
    except CLEAR as error:
        return "\n".join(map(str, chain(error)))
    return None


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from, as a traceback shows them."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def is_clear(told: str | None) -> bool:
    """Whether a message, if there is one, says what it is about: the repository, a file, or the status."""
    if told is None:
        return True
    return any(word in told for word in (NAME, ".safetensors", "README", "config.json", "hf_sparse_report")) or any(
        f"{status}" in told for status in (401, 403, 404, 409, 412, 429, 500, 502, 503, 504)
    )


def leaked(hub: Hub, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, *more: str) -> list[str]:
    printed = capsys.readouterr()
    inside = [f"{name} in the repository" for name, content in hub.files(NAME).items() if hub.token.encode() in content]
    return inside + hub.leaks(printed.out, printed.err, caplog.text, *more)


@pytest.mark.parametrize(("row", "operation"), cases(PUSHES, push, save, adapter, command))
def test_a_push_is_whole_or_not_at_all(
    row: str, operation: Any, made: Made, hub: Hub, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    method, path, what, expected, leaves = PUSHES[row]
    name = operation.__name__
    caplog.set_level(logging.DEBUG)
    hub.fault(method, path, **what)
    told = outcome(operation, made, hub, tmp_path, capsys=capsys)
    assert ("works" if told is None else "fails") == expected, told
    assert is_clear(told) or (row == "create cut" and operation is not command), f"says nothing: {told}"
    assert len(hub.commits(NAME)) == {"nothing": 0, "commit": 1, "both": 2}[leaves]
    assert (hub.files(NAME) == {}) if leaves == "nothing" else is_complete(name, hub.files(NAME), made)
    assert leaves != "both" or OTHER.strip() in hub.files(NAME)["README.md"].decode()

    hub.clear_faults()
    assert outcome(operation, made, hub, tmp_path, capsys=capsys) is None, "a second try must work"
    assert is_complete(name, hub.files(NAME), made)
    assert not leaked(hub, capsys, caplog, told or "")


# ------------------------------------------------------------------------------------------------ fetching

INFO, CONFIG = r"/api/models/user/sparse(\?|/revision|$)", "/resolve/.*/config.json"
HEAD_WEIGHTS, GET_WEIGHTS = f"/resolve/.*/{WEIGHTS}", f"{SHARED}.*file={WEIGHTS}"
ABSENT = {"status": 404, "headers": {"X-Error-Code": "EntryNotFound"}}
HIDDEN = {"status": 404, "headers": {"X-Error-Code": "RepoNotFound"}}
STALE = {"status": 404, "headers": {"X-Error-Code": "RevisionNotFound"}}

# What goes wrong, and what comes of it for those who load, take a snapshot, inspect and verify: w(orks) or f(ails).
FETCHES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "info 500, once": ("GET", INFO, {"status": 500}, "wfww"),
    "info 500": ("GET", INFO, {"status": 500, **ALWAYS}, "wfff"),
    "info 429, waits": ("GET", INFO, WAIT, "wfww"),
    "info 401": ("GET", INFO, {"status": 401, **ALWAYS}, "wfff"),
    "info cut": ("GET", INFO, {"cut": 10}, "wfww"),
    "all 401": ("*", "/user/sparse", {"status": 401, **ALWAYS}, "ffff"),
    "all 403": ("*", "/user/sparse", {"status": 403, **ALWAYS}, "ffff"),
    "all 404, no repository": ("*", "/user/sparse", {**HIDDEN, **ALWAYS}, "ffff"),
    "all 404, no revision": ("*", "/user/sparse", {**STALE, **ALWAYS}, "ffff"),
    "all 429": ("*", "/user/sparse", {**WAIT, **ALWAYS}, "ffff"),
    "all 502 of a gateway": ("*", "/user/sparse", {**GATEWAY, **ALWAYS}, "ffff"),
    "config 500, once": ("HEAD", CONFIG, {"status": 500}, "wwww"),
    "config absent": ("*", CONFIG, {**ABSENT, **ALWAYS}, "ffff"),
    "config cut, once": ("GET", CONFIG, {"cut": 10}, "wwww"),
    "config damaged": ("GET", CONFIG, {"corrupt": 200}, "ffff"),
    "config under a wrong hash": ("HEAD", CONFIG, {"wrong_hash": True}, "ffwf"),
    "config changes between HEAD and GET": ("HEAD", CONFIG, {"swap": (NAME, "config.json", "{}")}, "wwww"),
    "weights 503": ("HEAD", HEAD_WEIGHTS, {"status": 503, **ALWAYS}, "ffwf"),
    "weights absent": ("*", HEAD_WEIGHTS, {**ABSENT, **ALWAYS}, "ffff"),
    "weights under a wrong hash": ("HEAD", HEAD_WEIGHTS, {"wrong_hash": True}, "ffwf"),
    "weights change between HEAD and GET": ("HEAD", HEAD_WEIGHTS, {"swap": (NAME, WEIGHTS, b"other")}, "wwww"),
    "weights change after the config": ("GET", CONFIG, {"swap": (NAME, WEIGHTS, b"other")}, "wwww"),
    "weights 403, link expired": ("GET", GET_WEIGHTS, {"status": 403, **ALWAYS}, "ffff"),
    "weights 429, waits": ("GET", GET_WEIGHTS, WAIT, "wwww"),
    "weights 500": ("GET", GET_WEIGHTS, {"status": 500, **ALWAYS}, "ffff"),
    "weights cut, once": ("GET", GET_WEIGHTS, {"cut": 5000}, "wwww"),
    "weights cut": ("GET", GET_WEIGHTS, {"cut": 5, **ALWAYS}, "ffff"),
    "weights torn down": ("GET", GET_WEIGHTS, {"reset": 5, **ALWAYS}, "ffff"),
    "weights damaged at the end": ("GET", GET_WEIGHTS, {"corrupt": -1, **ALWAYS}, "ffwf"),
    "weights damaged in the middle": ("GET", GET_WEIGHTS, {"corrupt": 9000, **ALWAYS}, "ffwf"),
    "header damaged": ("GET", GET_WEIGHTS, {"corrupt": 30, **ALWAYS}, "ffwf"),
    "length of the header damaged": ("GET", GET_WEIGHTS, {"corrupt": 5, **ALWAYS}, "ffff"),
    "report absent": ("*", "hf_sparse_report.json", {**ABSENT, **ALWAYS}, "wfff"),
    "report damaged": ("GET", "hf_sparse_report.json", {"corrupt": 50, **ALWAYS}, "ffff"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "operation"), cases(FETCHES, load, snapshot, inspect, verify))
def test_what_is_fetched_is_right_or_refused(
    row: str, operation: Any, made: Made, hub: Hub, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    method, path, what, expected = FETCHES[row]
    caplog.set_level(logging.DEBUG)
    hub.put(NAME, made.files)
    hub.fault(method, path, **what)
    told = outcome(operation, made, hub, tmp_path, capsys=capsys)
    position = [load, snapshot, inspect, verify].index(operation)
    assert ("works" if told is None else "fails")[0] == expected[position], told
    assert is_clear(told) or operation is snapshot, f"says nothing: {told}"
    assert not leaked(hub, capsys, caplog, told or "")

    hub.clear_faults()
    if "swap" in what:
        hub.put(NAME, made.files)
    assert outcome(operation, made, hub, tmp_path, capsys=capsys) is None, "a second try must work"


@pytest.mark.parametrize("way", ["PeftModel", "Auto"])
def test_a_damaged_adapter_is_refused(way: str, made: Made, hub: Hub) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    hub.put(NAME, made.files)
    config = LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(NAME), config).push_to_hub("user/adapter")
    hub.fault("GET", r"/store/.*adapter_model", corrupt=-1)
    base = AutoModelForCausalLM.from_pretrained(NAME)
    with pytest.raises(CheckpointError, match="adapter_model"):
        PeftModel.from_pretrained(base, "user/adapter") if way == "PeftModel" else AutoModelForCausalLM.from_pretrained(
            "user/adapter"
        )


def test_a_command_does_not_tell_its_token(
    made: Made,
    hub: Hub,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.delenv("HF_TOKEN")
    for words in (["push", str(made.folder), NAME], ["inspect", NAME], ["verify", NAME]):
        for given in (hub.token, hub.other_token):
            monkeypatch.setenv("HF_SPARSE_TRACEBACK", "1")
            hub.fault("*", "/api/", status=403, times=None, text="You may not")
            assert cli.main([*words, "--token", given]) == 1
            hub.clear_faults()
    assert not leaked(hub, capsys, caplog)
