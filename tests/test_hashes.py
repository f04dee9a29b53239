"""Hashes of a saved model are those of the files' bytes, and name all the files that hold it."""

import hashlib
from pathlib import Path

import pytest
from hub.client import Hub
from models import llama

from hf_sparse import SparsityConfig, prune_
from hf_sparse.errors import CheckpointError
from hf_sparse.hashes import hashes_of, misfit, model_files, sha256_of

EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize(
    ("content", "digest"),
    [
        (b"", EMPTY),
        (b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),  # FIPS 180-2, appendix B.1
    ],
)
def test_sha256(content: bytes, digest: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == sha256_of(str(tmp_path / "file")) == digest


def test_a_file_of_more_than_one_piece(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000 + b"tail"
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()


NAMES = {
    "config.json": True,
    "model.safetensors": True,
    "model-00001-of-00002.safetensors": True,
    "model.fp16.safetensors": True,
    "model.safetensors.index.json": True,
    "model.safetensors.index.fp16.json": True,
    "adapter_model.safetensors": True,
    ".hf_sparse_old-model.safetensors": False,  # what an interrupted save has put aside
    ".safetensors": False,
    "generation_config.json": False,
    "hf_sparse_report.json": False,
    "README.md": False,
    "model.safetensors.bak": False,
    "tokenizer.json": False,
}


def test_what_makes_up_a_model(tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / name).touch()
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "model.safetensors").touch()
    expected = sorted(name for name, counts in NAMES.items() if counts)
    assert [path.name for path in model_files(tmp_path)] == expected
    assert hashes_of(str(tmp_path)) == dict.fromkeys(expected, EMPTY)


def test_linked_files_are_those_of_the_cache(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "blob")
    (tmp_path / "snapshot" / "config.json").symlink_to(tmp_path / "missing")
    assert hashes_of(tmp_path / "snapshot") == {"model.safetensors": EMPTY}


@pytest.mark.parametrize("function", [model_files, hashes_of, sha256_of])
def test_what_cannot_be_read(function: object, tmp_path: Path) -> None:
    assert callable(function)
    with pytest.raises(CheckpointError, match=r"cannot read .*missing.*No such file"):
        function(tmp_path / "missing")


@pytest.mark.parametrize(
    ("name", "digest", "wrong"),
    [
        ("model.safetensors", EMPTY, None),
        ("a b|`é.safetensors", EMPTY, None),
        ("", EMPTY, "no name"),
        ("..", EMPTY, "no name"),
        ("../model.safetensors", EMPTY, "no name"),
        ("a\\b", EMPTY, "no name"),
        ("a\0", EMPTY, "no name"),
        ("a" * 256, EMPTY, "no name"),
        ("a", EMPTY.upper(), "no SHA-256"),
        ("a", EMPTY[1:], "no SHA-256"),
        ("a", EMPTY + "\n", "no SHA-256"),
        ("a", "", "no SHA-256"),
    ],
)
def test_misfits(name: str, digest: str, wrong: str | None) -> None:
    found = misfit(name, digest)
    assert found is None if wrong is None else wrong in str(found)


def test_the_hub_names_weights_by_the_same(hub: Hub, tmp_path: Path) -> None:
    from huggingface_hub import HfApi

    model = llama()
    prune_(model, SparsityConfig(pattern="2:4", metric="magnitude"))
    model.save_pretrained(tmp_path)
    api = HfApi()
    api.create_repo("user/hashed")
    api.upload_folder(repo_id="user/hashed", folder_path=tmp_path)
    (entry,) = api.get_paths_info("user/hashed", ["model.safetensors"])
    assert entry.lfs.sha256 == hashes_of(tmp_path)["model.safetensors"]
