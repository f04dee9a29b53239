"""`hf-sparse predictor`: trains predictors into a folder, and measures kinds of them."""

import json
from pathlib import Path
from typing import Any

import pytest
from models import llama, tokenizer
from transformers import AutoModelForCausalLM

from hf_sparse.cli import main
from hf_sparse.contextual import carried_by

WORDS = "the cat sat on a mat and the dog ran on a mat and sat"
QUICK = [
    "--num-samples",
    "8",
    "--sequence-length",
    "16",
    "--option",
    "training.epochs=1",
    "--option",
    "training.batch_size=32",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "train.txt").write_text("\n".join([WORDS] * 40))
    (tmp_path / "other.txt").write_text("\n".join([f"a dog {WORDS}"] * 20))
    return tmp_path


def test_trained_into_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "predictor",
        "train",
        str(folder / "model"),
        str(folder / "made"),
        "--calibration",
        str(folder / "train.txt"),
        *QUICK,
    ]
    assert main([*words, "--keep-neurons", "0.75", "--keep-heads", "0.5", "--neuron-block", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)  # a bar or a line of a log would not be JSON
    assert told["config"]["keep_neurons"] == 0.75
    assert told["share_of_weights"] > 0
    carried = carried_by(AutoModelForCausalLM.from_pretrained(folder / "made"))
    assert carried.config.to_dict() == told["config"]
    assert (folder / "made" / "tokenizer.json").is_file()
    assert main(words) == 1
    assert "not empty" in capsys.readouterr().err


def test_kinds_are_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["predictor", "evaluate", str(folder / "model"), "--calibration", str(folder / "train.txt"), *QUICK]
    words += ["--text", str(folder / "other.txt"), "--window", "16", "--max-windows", "4", "--keep", "0.75", "0.5"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {(row["kind"], row["keep_neurons"]) for row in told["rows"]} == {
        (kind, keep) for kind in ("shadow", "dejavu", "gate_first", "static", "oracle") for keep in (0.75, 0.5)
    }
    assert main([*words, "--kinds", "static"]) == 0
    assert "static" in capsys.readouterr().out


def test_its_own_predictors_are_measured_and_recorded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = str(folder / "made")
    train = ["predictor", "train", str(folder / "model"), made, "--calibration", str(folder / "train.txt"), *QUICK]
    assert main([*train, "--keep-neurons", "0.5", "--neuron-block", "1"]) == 0
    measure = [
        "predictor",
        "evaluate",
        made,
        "--text",
        str(folder / "other.txt"),
        "--window",
        "16",
        "--max-windows",
        "4",
    ]
    picture = folder / "picture.svg"
    words = [*measure, "--record", "--new-tokens", "3", "--plot", str(picture), "--json"]
    capsys.readouterr()
    assert main(words) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["name"], row["keep_neurons"], row["keep_heads"]) == ("own", 0.5, 1.0)
    (figure,) = carried_by(AutoModelForCausalLM.from_pretrained(made)).figures
    assert (figure.loss, figure.speed) == (row["losses"][0], row["tokens_per_second"])
    assert "tokens a second" in (folder / "made" / "README.md").read_text()
    assert picture.stat().st_size > 0
    assert main([*measure, "--record", "--keep", "0.75"]) == 0
    found = carried_by(AutoModelForCausalLM.from_pretrained(made)).figures
    assert [one.neurons for one in found] == ["50 %", "75 %"]


def test_what_was_measured_is_told_though_it_cannot_be_recorded(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "file").write_text("no folder")
    words = [
        "predictor",
        "evaluate",
        str(folder / "model"),
        "--kinds",
        "static",
        "--calibration",
        str(folder / "train.txt"),
        *QUICK,
    ]
    words += ["--text", str(folder / "other.txt"), "--window", "16", "--max-windows", "2", "--json"]
    assert main([*words, "--plot", str(folder / "file" / "picture.svg")]) == 1
    told = capsys.readouterr()
    assert json.loads(told.out)["rows"]
    assert json.loads(told.out)["about"]["window"] == 16


def test_criteria_and_seeds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["predictor", "evaluate", str(folder / "model"), "--calibration", str(folder / "train.txt"), *QUICK]
    words += ["--text", str(folder / "other.txt"), "--window", "16", "--max-windows", "2", "--keep", "0.5", "--json"]
    assert main([*words, "--kinds", "static", "shadow", "--criterion", "magnitude", "fisher", "--seeds", "2"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {(row["name"], len(row["losses"])) for row in rows} == {
        (f"{kind} {criterion}", seeds)
        for kind, seeds in (("static", 1), ("shadow", 2))
        for criterion in ("magnitude", "fisher")
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kinds", "own"], "carries no predictors"),
        (["--record"], "holds no hf_sparse_predictors"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--new-tokens", "-1"], "--new-tokens is -1"),
        (["--criterion", "magnitud"], "Did you mean 'magnitude'"),
        (["--plot", "picture.xyz"], "xyz"),
        (["--plot", "."], "is a folder"),
        (["--text", "no-such-file.txt"], "no-such-file.txt"),
        (["--new-tokens", "100000"], "positions"),
        (["--option", "training.foo=1"], "foo"),
    ],
)
def test_wrong_measurements_are_refused(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("hf_sparse.cli.predictor.record", never)  # all of it is seen before minutes of work
    words = ["--text", str(folder / "other.txt"), *words]
    assert main(["predictor", "evaluate", str(folder / "model"), *words]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--option", "training.epoch=1"], "epoch"),
        (["--option", "dass.exponent=1"], "training.KEY=VALUE"),
        (["--kind", "shadows"], "Did you mean 'shadow'"),
        (["--keep-neurons", "1.5"], "keep_neurons"),
        (["--kind", "oracle"], "oracle"),
    ],
)
def test_wrong_words_are_refused(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = [
        "predictor",
        "train",
        str(folder / "model"),
        str(folder / "made"),
        "--calibration",
        str(folder / "train.txt"),
        *QUICK,
    ]
    assert main([*start, *words]) == 1
    assert message in capsys.readouterr().err
    assert not (folder / "made").exists()


def test_the_same_text_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = str(folder / "train.txt")
    assert main(["predictor", "evaluate", str(folder / "model"), "--calibration", text, "--text", text]) == 1
    assert "measure on other text" in capsys.readouterr().err
