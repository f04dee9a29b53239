"""`hf-sparse inspect`: folders are counted, of a repository only config, report and headers are read, and claims are called claims."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hub.client import Hub
from models import llama
from safetensors.torch import save_file

from hf_sparse import SparsityConfig, prune_
from hf_sparse.cli import main
from hf_sparse.remote import hub as remote_hub
from hf_sparse.report import Report

REPOSITORY = "user/sparse"


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "sparse"
    model = llama(vocab_size=8192)  # weights that are much larger than all else
    prune_(model, SparsityConfig(metric="magnitude"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_sparse.side_files.find_spec", lambda name: None)
        model.save_pretrained(folder)
    return folder


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def pushed(hub: Hub, sparse: Path) -> Hub:
    for path in sorted(sparse.iterdir()):
        hub.edit(REPOSITORY, path.name, path.read_bytes())
    return hub


def run(*words: object) -> int:
    return main([str(word) for word in words])


def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


# ------------------------------------------------------------------------------------------------ folders


def test_a_folder_is_counted_and_compared_with_the_claim(
    sparse: Path, dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("inspect", sparse) == 0
    out = capsys.readouterr().out
    assert "they agree" in out
    assert "model.layers.1.mlp.down_proj.weight" in out
    assert run("inspect", sparse, "--json") == 0
    found = printed(capsys)
    assert sum(tensor["zeros"] for tensor in found["tensors"].values()) == found["claim"]["totals"]["zeros"]
    assert run("inspect", dense) == 0
    assert "does not say" in capsys.readouterr().out


def test_a_claim_that_is_not_true_is_called_so(
    sparse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "hf_sparse_report.json"):
        (tmp_path / name).write_bytes((sparse / name).read_bytes())
    save_file({"a": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    assert run("inspect", tmp_path) == 0
    assert "the claim is not true" in capsys.readouterr().out


@pytest.mark.parametrize("spoil", ["cut", "absent", "config", "claim", "pickles"])
def test_what_is_damaged_is_named(spoil: str, dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, config = dense / "model.safetensors", dense / "config.json"
    if spoil == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif spoil == "absent":
        weights.unlink()
    elif spoil == "pickles":
        weights.rename(dense / "pytorch_model.bin")
    else:
        config.write_text("{" if spoil == "config" else json.dumps({"hf_sparse": 5}))
    assert run("inspect", dense) == 1
    assert capsys.readouterr().err.count("\n") == 1


# ------------------------------------------------------------------------------------------------ repositories


def test_a_repository_is_looked_at_and_not_downloaded(
    pushed: Hub, sparse: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served: list[int] = []
    original = remote_hub._at_most

    def at_most(response: Any, size: int) -> bytes:
        served.append(int(response.headers["Content-Length"]))
        return original(response, size)

    monkeypatch.setattr(remote_hub, "_at_most", at_most)
    assert run("inspect", REPOSITORY, "--all") == 0
    out = capsys.readouterr().out
    assert (sparse / "model.safetensors").stat().st_size > 2**21
    assert 0 < sum(served) <= 2**16
    commit = pushed.head(REPOSITORY)
    asked = {
        seen.path.partition("?")[0] for seen in pushed.requests("^(GET|HEAD) ") if not seen.path.startswith("/store/")
    }
    assert asked == {
        f"/api/models/{REPOSITORY}/revision/main", f"/api/models/{REPOSITORY}/tree/{commit}",
        *(f"/{REPOSITORY}/resolve/{commit}/{name}" for name in ("config.json", "hf_sparse_report.json", "model.safetensors")),
    }  # fmt: skip
    assert not [path for path in pushed.cache.rglob("*") if path.name == "model.safetensors"]
    assert commit in out
    assert re.search(r"model\.layers\.1\.mlp\.down_proj\.weight +32x48  F32", out)


def test_figures_of_a_repository_are_called_claims(
    pushed: Hub, sparse: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("inspect", REPOSITORY) == 0
    out = capsys.readouterr().out
    zeros = Report.load(sparse).zeros
    assert f"claimed by config.json: {zeros:,} zeros in 14 sites" in out
    assert f"not verified: `hf-sparse verify {REPOSITORY}` downloads and counts" in out
    assert "a claim too until it is verified" in out
    assert "counted" not in out.partition("The report")[0]
    assert str(Report.load(sparse)) in out


def test_as_json(pushed: Hub, sparse: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", REPOSITORY, "--json") == 0
    found = printed(capsys)
    assert found["verified"] is False
    assert found["commit"] == pushed.head(REPOSITORY)
    assert found["claim"]["totals"]["zeros"] == Report.load(sparse).zeros
    assert found["report"] == Report.load(sparse).to_dict()
    assert found["tensors"]["model.norm.weight"] == {"shape": [32], "dtype": "F32", "file": "model.safetensors"}


def test_a_repository_without_a_claim_is_told_as_such(
    hub: Hub, dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in dense.iterdir():
        hub.edit("user/dense", path.name, path.read_bytes())
    assert run("inspect", "user/dense") == 0
    out = capsys.readouterr().out
    assert "does not say that hf_sparse pruned this model" in out
    assert "claimed" not in out


def test_a_revision_is_looked_at(pushed: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    first = pushed.head(REPOSITORY)
    pushed.edit(REPOSITORY, "config.json", "{}")
    assert run("inspect", REPOSITORY, "--revision", first, "--json") == 0
    assert printed(capsys)["claim"]["totals"]
    assert run("inspect", REPOSITORY, "--json") == 0
    assert printed(capsys)["claim"] is None


def test_text_of_a_repository_cannot_steer_the_terminal(
    pushed: Hub, sparse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b]0;owned\x07\u202e\n"
    report = json.loads((sparse / "hf_sparse_report.json").read_text())
    pushed.edit(REPOSITORY, "hf_sparse_report.json", json.dumps({**report, "model_class": evil, "notes": [evil]}))
    save_file({f"a{evil}": torch.ones(2, 2)}, tmp_path / "evil.safetensors")
    pushed.edit(REPOSITORY, "model.safetensors", (tmp_path / "evil.safetensors").read_bytes())
    assert run("inspect", REPOSITORY, "--all") == 0
    out = capsys.readouterr().out
    assert "owned" in out
    assert not {"\x1b", "\x07", "\u202e"} & set(out)


@pytest.mark.parametrize("name", ["user/absent", "no such/folder at all"])
def test_what_is_not_there_is_one_line(name: str, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", name, "--json") == 1
    captured = capsys.readouterr()
    assert set(json.loads(captured.out)) == {"error", "kind"}
    assert captured.err.count("\n") == 1
