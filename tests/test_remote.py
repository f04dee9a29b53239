"""Looking at a model's files in a folder or on the Hub: what is asked for, how little is read, and how it fails."""

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hub.client import Hub
from models import llama
from safetensors.torch import save, save_file

from hf_sparse import SparsityConfig, embedded, prune_
from hf_sparse.errors import CheckpointError, HubError
from hf_sparse.remote import Folder, Repository, open_place, read_card, read_claim, read_config, read_report, tensors
from hf_sparse.remote import hub as remote_hub
from hf_sparse.remote.headers import LARGEST_HEADER, parse_header
from hf_sparse.report import Report

REPOSITORY = "user/sparse"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "sparse"
    model = llama()
    prune_(model, SparsityConfig(metric="magnitude"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_sparse.side_files.find_spec", lambda name: None)
        model.save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.fixture
def pushed(hub: Hub, saved: Path) -> Hub:
    for path in sorted(saved.iterdir()):
        hub.edit(REPOSITORY, path.name, path.read_bytes())
    return hub


# ------------------------------------------------------------------------------------------------ the same everywhere


def test_a_folder_and_a_repository_look_the_same(pushed: Hub, saved: Path) -> None:
    folder, repository = open_place(str(saved)), open_place(REPOSITORY)
    assert isinstance(folder, Folder)
    assert isinstance(repository, Repository)
    assert (folder.commit, repository.commit) == (None, pushed.head(REPOSITORY))
    assert {name: file.size for name, file in folder.files.items()} == {
        name: file.size for name, file in repository.files.items() if name != ".gitattributes"
    }
    assert tensors(folder) == tensors(repository)
    assert read_config(folder) == read_config(repository)
    assert read_claim(folder) == read_claim(repository) is not None
    assert read_report(folder) == read_report(repository) == Report.load(saved)
    assert read_card(folder) == read_card(repository)


def test_headers_are_those_of_the_weights(saved: Path) -> None:
    found = tensors(open_place(str(saved)))
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tuple(tensor.shape) for name, tensor in llama().state_dict().items()
    }
    assert {tensor.dtype for tensor in found.values()} == {"F32"}
    assert len({tensor.file for tensor in found.values()}) > 1


def test_the_embedded_model_is_a_place() -> None:
    place = open_place(embedded.NAME)
    assert isinstance(place, Folder)
    assert read_claim(place) is read_report(place) is None
    assert sum(tensor.size for tensor in tensors(place).values()) > 1000


def test_a_revision_is_resolved_once_and_all_is_read_there(pushed: Hub) -> None:
    first = pushed.head(REPOSITORY)
    place = open_place(REPOSITORY, revision="main")
    pushed.edit(REPOSITORY, "config.json", "{}")
    assert place.commit == first
    assert read_claim(place) is not None
    assert read_claim(open_place(REPOSITORY)) is None
    assert read_claim(open_place(REPOSITORY, revision=first)) is not None
    later = [seen.path for seen in pushed.requests("resolve|tree")]
    assert later
    assert all(first in path or pushed.head(REPOSITORY) in path for path in later)


# ------------------------------------------------------------------------------------------------ headers


def header_of(values: dict[str, Any], data: int) -> bytes:
    text = json.dumps(values).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


F32 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
LIES: dict[str, bytes] = {
    "nothing": b"",
    "a few bytes": b"\1\0\0",
    "longer than the file": struct.pack("<Q", 10**6) + b"{}",
    "longer than all": struct.pack("<Q", 2**63) + b"{}",
    "no JSON": struct.pack("<Q", 4) + b"{,,}",
    "a list": struct.pack("<Q", 2) + b"[]",
    "very deep": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "a tensor twice": struct.pack("<Q", 17) + b'{"a": 1, "a": 2} ',
    "more values than bytes": header_of({"a": {**F32, "shape": [2, 10**12]}}, 16),
    "more bytes than the file": header_of({"a": {**F32, "shape": [4, 2], "data_offsets": [0, 32]}}, 16),
    "fewer bytes than the file": header_of({"a": F32}, 32),
    "a gap": header_of({"a": F32, "b": {**F32, "data_offsets": [20, 36]}}, 36),
    "two in one place": header_of({"a": F32, "b": F32}, 16),
    "a shape of words": header_of({"a": {**F32, "shape": ["x", 10**9]}}, 16),
    "a negative shape": header_of({"a": {**F32, "shape": [-2, -2]}}, 16),
    "a shape of half numbers": header_of({"a": {**F32, "shape": [1.5, 2]}}, 16),
    "many dimensions": header_of({"a": {**F32, "shape": [1] * 40 + [4]}}, 16),
    "an unknown number format": header_of({"a": {**F32, "dtype": "F33"}}, 16),
    "no offsets": header_of({"a": {"dtype": "F32", "shape": [2, 2]}}, 16),
    "a tensor that is a word": header_of({"a": "x"}, 16),
}


@pytest.mark.parametrize("content", LIES.values(), ids=LIES)
def test_a_header_that_lies_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        tensors(open_place(str(tmp_path)))


def test_a_header_larger_than_the_limit_is_not_read(hub: Hub) -> None:
    hub.edit(REPOSITORY, "model.safetensors", struct.pack("<Q", LARGEST_HEADER + 1) + bytes(LARGEST_HEADER + 100))
    with pytest.raises(CheckpointError, match="at most"):
        tensors(open_place(REPOSITORY))
    assert len(hub.requests("GET /store/")) == 1


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.float8_e4m3fn, torch.complex64])
def test_every_number_format_is_understood(dtype: torch.dtype, tmp_path: Path) -> None:
    values = {
        "a": torch.zeros(3, 4).to(dtype),
        "nothing": torch.zeros(0, 4).to(dtype),
        "scalar": torch.zeros(()).to(dtype),
    }
    save_file(values, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert {name: tensor.shape for name, tensor in tensors(open_place(str(tmp_path))).items()} == {
        name: tuple(value.shape) for name, value in values.items()
    }


def test_a_header_is_what_safetensors_writes() -> None:
    content = save({"b": torch.ones(2, 3), "a": torch.ones(4)}, metadata={"format": "pt"})
    length = int.from_bytes(content[:8], "little")
    assert set(parse_header(content[8 : 8 + length], len(content), "file")) == {"a", "b"}


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("one.safetensors", "two.safetensors"):
        save_file({"a": torch.ones(2)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"one\.safetensors and in two\.safetensors"):
        tensors(open_place(str(tmp_path)))


def test_a_long_header_is_asked_for_once_more_and_nothing_of_the_weights(hub: Hub) -> None:
    many = {f"a.tensor.with.a.long.name.{index}": torch.ones(8, 512) for index in range(1500)}
    hub.edit(REPOSITORY, "model.safetensors", save(many))
    assert len(tensors(open_place(REPOSITORY))) == len(many)
    assert len(hub.requests("GET /store/")) == 2


# ------------------------------------------------------------------------------------------------ errors


def test_what_is_no_place_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name, message in {
        str(tmp_path / "file"): "is a file",
        str(tmp_path / "absent"): "no folder here",
        "a/b/c": "no folder here",
        "two words": "no folder here",
        "": "no folder here",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            open_place(name)


@pytest.mark.parametrize(
    ("files", "message"),
    [(["pytorch_model.bin"], "pickle can run code"), (["model.pt"], "pickle can run code"), (["a.txt"], "holds no .safetensors")],
)  # fmt: skip
def test_models_without_safetensors_are_not_read(files: list[str], message: str, tmp_path: Path, hub: Hub) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"\x80\x04.")
        hub.edit(REPOSITORY, name, b"\x80\x04.")
    for place in (open_place(str(tmp_path)), open_place(REPOSITORY)):
        with pytest.raises(CheckpointError, match=message):
            tensors(place)
    assert not hub.requests("resolve")


@pytest.mark.parametrize(
    ("name", "what", "reader"),
    [("config.json", "config.json", read_config), ("README.md", "README.md", read_card), ("hf_sparse_report.json", "report", read_report)],
)  # fmt: skip
def test_files_that_are_too_large_are_not_read(
    name: str, what: str, reader: Callable[[Any], object], tmp_path: Path
) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(2**29)  # takes no room on the disk
    with pytest.raises(CheckpointError, match=f"{what}.*at most"):
        reader(open_place(str(tmp_path)))


def private(hub: Hub) -> None:
    from huggingface_hub import HfApi

    HfApi(token=hub.other_token).create_repo("other/secret", private=True)


FAULTS: dict[str, tuple[Callable[[Hub], object], str, dict[str, Any], str]] = {
    # what happens, which repository with which options is looked at, and what the error says
    "absent": (lambda hub: None, "user/absent", {}, "no repository on the Hub"),
    "private": (private, "other/secret", {"token": False}, "--token"),
    "private, another's token": (private, "other/secret", {}, "--token"),
    "no such revision": (lambda hub: None, REPOSITORY, {"revision": "v9"}, "'v9' does not exist"),
    "no such commit": (lambda hub: None, REPOSITORY, {"revision": "0" * 40}, "does not exist"),
    "a bad token": (lambda hub: None, REPOSITORY, {"token": "hf_nobody"}, "--token"),
    "401": (lambda hub: hub.fault("GET", "tree", status=401), REPOSITORY, {}, "--token"),
    "403": (lambda hub: hub.fault("GET", "tree", status=403), REPOSITORY, {}, "403"),
    "404 of the tree": (lambda hub: hub.fault("GET", "tree", status=404), REPOSITORY, {}, "404|no repository"),
    "429 for ever": (
        lambda hub: hub.fault("GET", "revision", times=None, status=429, headers={"Retry-After": "0"}), REPOSITORY, {}, "429",
    ),
    "500 for ever": (lambda hub: hub.fault("GET", "revision", times=None, status=500), REPOSITORY, {}, "500.*try later"),
    "503 of the files": (lambda hub: hub.fault("GET", "/store/", times=None, status=503), REPOSITORY, {}, "503.*try later"),
    "another answer": (lambda hub: hub.fault("GET", "revision", status=200, text="x"), REPOSITORY, {}, "cannot be understood"),
    "cut for ever": (lambda hub: hub.fault("GET", "/store/", times=None, cut=5), REPOSITORY, {}, "cut|no answer"),
    "a damaged config": (lambda hub: hub.fault("GET", r"resolve/.*config\.json", corrupt=3), REPOSITORY, {}, "did not arrive"),
}  # fmt: skip


def look(name: str, **options: Any) -> None:
    place = open_place(name, **options)
    read_config(place)
    tensors(place)


@pytest.mark.parametrize(("happens", "name", "options", "message"), FAULTS.values(), ids=FAULTS)
def test_each_fault_ends_in_one_sentence(
    happens: Callable[[Hub], object], name: str, options: dict[str, Any], message: str, pushed: Hub,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    happens(pushed)
    with pytest.raises(HubError, match=message) as caught:
        look(name, **options)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)
    assert not pushed.leaks(str(caught.value), caplog.text)


def test_a_damaged_file_is_downloaded_again(pushed: Hub) -> None:
    pushed.fault("GET", r"resolve/.*config\.json", corrupt=3)
    with pytest.raises(HubError, match="removed from the cache"):
        read_config(open_place(REPOSITORY))
    assert read_config(open_place(REPOSITORY))


@pytest.mark.parametrize(
    "fault",
    [
        {"method": "GET", "path": "revision", "status": 503},
        {"method": "GET", "path": "revision", "status": 429, "headers": {"Retry-After": "0"}},
        {"method": "GET", "path": "revision", "cut": 5},
        {"method": "GET", "path": "tree", "status": 500},
        {"method": "GET", "path": "/store/", "status": 502},
        {"method": "GET", "path": "/store/", "cut": 5},
        {"method": "GET", "path": "/store/", "reset": 20},
    ],
    ids=lambda fault: f"{fault['path']} {next(key for key in fault if key not in ('method', 'path'))}",
)
def test_a_fault_that_passes_is_tried_again(fault: dict[str, Any], pushed: Hub, saved: Path) -> None:
    pushed.fault(**fault)
    assert tensors(open_place(REPOSITORY)) == tensors(open_place(str(saved)))


@pytest.mark.parametrize("sha", ["../x", "main", 5, None, "g" * 40])
def test_a_commit_that_is_none_is_refused(sha: object, hub: Hub) -> None:
    answer = SimpleNamespace(json=lambda: {"sha": sha}, raise_for_status=lambda: None, headers={}, status_code=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_sparse.remote.hub.http_backoff", lambda *_, **__: answer)
        with pytest.raises(HubError, match="no commit"):
            open_place(REPOSITORY)


def test_without_a_network(hub: Hub) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
            open_place(REPOSITORY)


def test_without_an_answer(hub: Hub) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(HubError, match="no answer from the Hub"):
            open_place(REPOSITORY)
    assert sum(hub.sleeps) < 10


def test_no_more_is_taken_than_was_asked_for_whatever_the_server_sends(pushed: Hub) -> None:
    place = open_place(REPOSITORY)
    name = next(name for name in place.files if name.endswith(".safetensors"))
    pushed.fault("GET", "/store/", status=200, text="x" * 1000)
    assert place.head(name, 10) == b'{"error": '

    def endless() -> Iterator[bytes]:
        yield from [b"x" * 100] * 3
        pytest.fail("more was taken than was asked for")

    assert remote_hub._at_most(SimpleNamespace(iter_raw=endless), 250) == b"x" * 250


@pytest.mark.parametrize("name", ["..", "a/b", "a\\b", ".", ""])
def test_names_that_lead_out_of_the_folder_are_not_listed(name: str) -> None:
    assert not remote_hub._is_plain(name)


def test_a_private_repository_is_read_with_its_token(hub: Hub, saved: Path) -> None:
    private(hub)
    from huggingface_hub import HfApi

    HfApi(token=hub.other_token).upload_folder(repo_id="other/secret", folder_path=saved)
    place = open_place("other/secret", token=hub.other_token)
    assert read_claim(place) is not None
    assert len(tensors(place)) > 10


def test_the_cache_is_where_it_was_asked_for(pushed: Hub, tmp_path: Path) -> None:
    read_config(open_place(REPOSITORY, cache_dir=str(tmp_path / "mine")))
    assert list((tmp_path / "mine").rglob("config.json"))
    assert not pushed.cache.exists() or not os.listdir(pushed.cache)
