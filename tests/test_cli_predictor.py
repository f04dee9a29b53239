"""`hf-sparse predictor`: trains predictors into a folder, and measures kinds of them."""

import json
from pathlib import Path

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
    told = json.loads(capsys.readouterr().out)
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
