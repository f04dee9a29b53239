"""Files in the Hub's cache are compared with the hashes that they are stored under, once."""

import hashlib
from pathlib import Path

import pytest

from hf_sparse import downloads
from hf_sparse.downloads import check_downloads
from hf_sparse.errors import CheckpointError


def git(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


FILES = {"model.safetensors": sha256, "hf_sparse_report.json": sha256, "config.json": git}


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the Hub's client keeps it: links to files that bear their hash as name."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "snapshots" / "main"
    folder.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for name, hashed in FILES.items():
        content = name.encode()
        blob = tmp_path / "blobs" / hashed(content)
        blob.write_bytes(content)
        (folder / name).symlink_to(blob)
    return folder


def damage(snapshot: Path, name: str) -> Path:
    blob = (snapshot / name).resolve()
    content = bytearray(blob.read_bytes())
    content[0] ^= 1
    blob.write_bytes(bytes(content))
    return blob


def test_whole_files_pass(snapshot: Path) -> None:
    check_downloads(snapshot)
    assert all((snapshot / name).is_file() for name in FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_taken_out(name: str, snapshot: Path) -> None:
    blob = damage(snapshot, name)
    with pytest.raises(CheckpointError, match=rf"{name} did not arrive .* load the model again"):
        check_downloads(snapshot)
    assert not blob.exists()
    assert not (snapshot / name).is_symlink()
    assert {path.name for path in snapshot.iterdir()} == FILES.keys() - {name}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_damaged_after_it_was_checked_is_found_too(name: str, snapshot: Path) -> None:
    check_downloads(snapshot)
    damage(snapshot, name)
    with pytest.raises(CheckpointError, match=name):
        check_downloads(snapshot)


def test_large_files_are_hashed_once(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []
    monkeypatch.setattr(downloads, "sha256_of", lambda path: hashed.append(path) or path.name)
    check_downloads(snapshot)
    check_downloads(snapshot)
    assert len(hashed) == 2


def test_where_nothing_can_be_remembered_they_are_hashed_each_time(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").write_text("a file, so that no folder can be made")
    check_downloads(snapshot)
    check_downloads(snapshot)
    damage(snapshot, "model.safetensors")
    with pytest.raises(CheckpointError):
        check_downloads(snapshot)


def test_folders_of_plain_files_and_absent_ones_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    check_downloads(tmp_path)
    check_downloads(tmp_path / "absent")
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"


def test_in_a_cache_that_cannot_be_written_it_says_what_to_delete(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = damage(snapshot, "model.safetensors")

    def refuse(path: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(downloads, "forget", refuse)
    with pytest.raises(CheckpointError, match=f"delete '{blob}'"):
        check_downloads(snapshot)
