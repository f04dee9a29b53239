"""Speeds that were measured stand in the report and the card, each with its machine."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import llama

from hf_sparse import SparsityConfig, prune_
from hf_sparse.cli import main
from hf_sparse.errors import CheckpointError
from hf_sparse.report import FILE_NAME, Report
from hf_sparse.speed import Speed, measured_again, read_speeds
from hf_sparse.verify import DIFFERS, verify

WORDS = ["--tokens", "1", "--prompt", "4", "--new-tokens", "2", "--prefill", "8", "--seconds", "0"]
SPEED = Speed(
    work="generate", tokens=1, way="sparse", milliseconds=2.5, low=2.0, high=3.0, rounds=5, speedup=1.9,
    machine="processor Little, threads 1", whole_model=True,
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_sparse.runtime.copies.copies_bytes", lambda: 1)
    monkeypatch.setattr("hf_sparse.bench.read_bandwidth", lambda: 1e9)


def saved(folder: Path, **given: Any) -> Path:
    model = llama().to(torch.bfloat16)
    prune_(model, SparsityConfig(pattern="2:4", metric="magnitude"))
    model.save_pretrained(folder, **given)
    return folder


@pytest.mark.parametrize("format", ["dense", "bitmask"])
def test_recorded(format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path, sparse_format=format)
    assert main(["bench", str(folder), *WORDS, "--record", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    report = Report.load(folder)
    assert len(report.speeds) == len(found["kernels"]) + len(found["end_to_end"])
    card = (folder / "README.md").read_text()
    for row in found["end_to_end"]:
        assert f"| {row['speedup']:.2f} |" in card
    assert f"Measured with `hf-sparse bench` on processor {found['machine']['processor']}".split("(")[0] in card
    assert [row for row in verify(folder).rows if row.status == DIFFERS] == []


def test_a_second_measurement_takes_the_place_of_the_first() -> None:
    faster = Speed(**{**SPEED.to_dict(), "speedup": 2.1})
    elsewhere = Speed(**{**SPEED.to_dict(), "machine": "processor Large, threads 2"})
    once = measured_again([], [SPEED, elsewhere])
    assert read_speeds(measured_again(once, [faster])) == [elsewhere, faster]


@pytest.mark.parametrize("changed", [["--pattern", "1:4"], ["--random-weights"], ["--sparsity", "0.9"]])
def test_only_the_saved_model_is_recorded(
    changed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path)
    before = (folder / FILE_NAME).read_bytes()
    assert main(["bench", str(folder), *WORDS, *changed, "--record"]) == 1
    assert "--record tells of the saved model" in capsys.readouterr().err
    assert (folder / FILE_NAME).read_bytes() == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"speedup": "very"}, {"speedup": float("nan")}, {"tokens": -1}, {"tokens": True}, {"rounds": 2.5}, {"work": 3},
        {"whole_model": 1}, {"extra": 1},
    ],
    ids=str,
)  # fmt: skip
def test_speeds_of_unknown_origin_are_checked(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="speed in the report"):
        Speed.from_dict({**SPEED.to_dict(), **wrong})


def test_names_cannot_act_in_the_card(tmp_path: Path) -> None:
    from model_cards import SparseModelCard

    folder = saved(tmp_path)
    report = Report.load(folder)
    evil = Speed(**{**SPEED.to_dict(), "work": "<script>|x|</script>", "machine": "a\n\n# Heading"})
    report.speeds = [evil.to_dict()]
    text = str(SparseModelCard.from_report(report))
    assert "<script>" not in text
    assert "\n# Heading" not in text
