"""What `prune_checkpoint` does with a result that an interrupted run has completed, in its place or not yet."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from models import llama, token_rows

from hf_sparse import stream
from hf_sparse.errors import CheckpointError
from hf_sparse.streaming.work import Work, work_folder

ROWS = token_rows()
DATA = {"calibration": ROWS, "num_samples": len(ROWS), "update": "none"}

pytestmark = pytest.mark.usefixtures("no_pictures", "no_syncs")


def complete_but_not_in_place(source: Path, destination: Path, config: Any, **options: Any) -> None:
    """A run that ends before the last rename."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "put_in_place", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            stream.prune_checkpoint(source, destination, config, **options)


def test_a_complete_result_that_is_not_in_its_place(tmp_path: Path) -> None:
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    llama().save_pretrained(dense)
    shutil.copytree(dense, tmp_path / "other")
    complete_but_not_in_place(dense, sparse, DATA)
    for source, config, options, why in (
        (dense, {**DATA, "pattern": "4:8"}, {}, "pattern was"),
        (dense, {**DATA, "calibration": token_rows(seed=1)}, {}, "calibration was"),
        (dense, DATA, {"sparse_format": "bitmask"}, "sparse_format was"),
        (tmp_path / "other", DATA, {}, "source was"),
        (tmp_path / "nope", DATA, {}, "no folder here"),
    ):
        with pytest.raises(CheckpointError, match=why):
            stream.prune_checkpoint(source, sparse, config, **options)
    sparse.mkdir()
    (sparse / "mine.txt").write_text("mine")
    for overwrite, why in ((False, "not empty"), (True, "holds no model")):
        with pytest.raises(CheckpointError, match=why):
            stream.prune_checkpoint(dense, sparse, DATA, overwrite=overwrite)
    assert [path.name for path in sparse.iterdir()] == ["mine.txt"]
    shutil.rmtree(sparse)
    assert stream.prune_checkpoint(dense, sparse, DATA).config["pattern"] == "2:4"
    assert not work_folder(sparse).exists()


def test_a_result_in_its_place_is_taken_for_what_it_is(tmp_path: Path) -> None:
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    llama().save_pretrained(dense)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Work, "remove", lambda self: None)
        stream.prune_checkpoint(dense, sparse, DATA, sparse_format="bitmask")
    before = {path.name: path.read_bytes() for path in sparse.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Work, "remove", lambda self: None)
        stream.prune_checkpoint(dense, sparse, DATA, sparse_format="bitmask")
    assert {path.name: path.read_bytes() for path in sparse.iterdir()} == before
    shutil.rmtree(sparse)
    with pytest.raises(CheckpointError, match=r"complete result, which is not there.*--restart"):
        stream.prune_checkpoint(dense, sparse, DATA, sparse_format="bitmask")
    stream.prune_checkpoint(dense, sparse, DATA, sparse_format="bitmask", restart=True)
