"""`hf-sparse recover`: a sparse model in, a better one out, with every zero and an account of the training."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import bert, llama, t5, tokenizer
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import hf_sparse
from hf_sparse import SparsityConfig, prune_
from hf_sparse.cli import FAILED, OK, main

TEXTS = [
    "the cat sat on a mat and the dog ran",
    "a dog sat on the mat and a cat ran",
    "the mat and the cat and the dog sat on a mat",
]


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """A pruned model with its tokenizer, made from a dense one that lies beside it."""
    return saved(tmp_path, llama())


def saved(folder: Path, model: Any, dtype: torch.dtype = torch.float32) -> Path:
    model.to(dtype).save_pretrained(folder / "dense")
    tokenizer().save_pretrained(folder / "dense")
    model = type(model).from_pretrained(folder / "dense")
    prune_(model, SparsityConfig(pattern="2:4", metric="magnitude"))
    model.save_pretrained(folder / "sparse")
    tokenizer().save_pretrained(folder / "sparse")
    return folder / "sparse"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "train.jsonl"
    file.write_text(
        "".join(
            json.dumps({"text": " ".join(TEXTS[index % 3] for index in range(start, start + 12))}) + "\n"
            for start in range(8)
        )
    )
    return file


def recover(*words: object, **settings: object) -> int:
    defaults = {"tokens": 512, "sequence_length": 16, "batch_size": 4, **settings}
    flags = [word for name, value in defaults.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return main(["recover", *map(str, words), *flags])


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--no-distillation"],
        ["--lora", "--rank", "2"],
        ["--accumulate", "2"],
        ["--bf16"],
        ["--gradient-checkpointing"],
    ],
)
def test_keeps_every_zero_and_tells(flags: list[str], sparse: Path, text: Path, tmp_path: Path) -> None:
    assert recover(sparse, tmp_path / "out", "--data", text, *flags) == OK
    before, after = AutoModelForCausalLM.from_pretrained(sparse), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    masks = hf_sparse.masks(before)
    for name, mask in hf_sparse.masks(after).items():
        assert not bool((mask & ~masks[name]).any()), name
    changed = [name for name, value in before.state_dict().items() if not torch.equal(value, after.state_dict()[name])]
    assert any("mlp" in name for name in changed), "nothing was trained"
    [told] = hf_sparse.report(after).recoveries  # type: ignore[union-attr]
    assert (told.zeros_lost, told.steps, told.tokens, told.data.endswith("rows")) == (0, 8, 512, True)
    assert ("distillation" in told.loss) == ("--no-distillation" not in flags)
    assert ("LoRA" in told.method) == ("--lora" in flags)
    assert "### Recovery" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_learns_from_the_dense_model(
    sparse: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(" ".join(reversed(" ".join(TEXTS).split())) * 20)
    assert (
        recover(
            sparse,
            tmp_path / "out",
            "--data",
            text,
            "--evaluate",
            other,
            "--window",
            16,
            "--json",
            tokens=8192,
            learning_rate=0.003,
        )
        == OK
    )
    found = json.loads(capsys.readouterr().out)
    figures = {name: figure["value"] for name, figure in found["figures"].items()}
    assert set(figures) == {"dense", "before", "after"}
    assert abs(figures["after"] - figures["dense"]) < abs(figures["before"] - figures["dense"])
    [evaluation] = found["report"]["evaluations"]
    assert (evaluation["dense"], evaluation["before_recovery"], evaluation["sparse"]) == (
        figures["dense"],
        figures["before"],
        figures["after"],
    )


def test_writes_the_type_that_it_read(text: Path, tmp_path: Path) -> None:
    sparse = saved(tmp_path, llama(), torch.bfloat16)
    assert recover(sparse, tmp_path / "out", "--data", text) == OK
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert hf_sparse.report(model).recoveries[0].zeros_lost == 0  # type: ignore[union-attr]


def test_goes_on_from_its_checkpoints(sparse: Path, text: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert recover(sparse, whole, "--data", text, "--checkpoints", tmp_path / "a", tokens=640) == OK
    assert recover(sparse, parts, "--data", text, "--checkpoints", tmp_path / "b", tokens=640) == OK
    last = max((tmp_path / "b").iterdir(), key=lambda folder: int(folder.name.partition("-")[2]))
    for file in last.iterdir():  # as if the run had been killed after the checkpoint before
        file.unlink()
    last.rmdir()
    assert recover(sparse, parts, "--overwrite", "--data", text, "--checkpoints", tmp_path / "b", tokens=640) == OK
    one, two = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (whole, parts))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_masked_language_models(text: Path, tmp_path: Path) -> None:
    sparse = saved(tmp_path, bert())
    assert recover(sparse, tmp_path / "out", "--data", text) == OK
    assert hf_sparse.is_sparse(AutoModelForMaskedLM.from_pretrained(tmp_path / "out"))


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        (["--tokens", "0"], {}, "tokens=0 is not allowed"),
        (["--learning-rate", "2"], {}, "learning_rate=2.0 is not allowed"),
        (["--accumulate", "3"], {}, "cannot be made in 3 equal parts"),
        (["--teacher", "nowhere"], {}, "'nowhere' cannot be loaded"),
        (["--teacher", "x", "--no-distillation"], {}, "contradict"),
        (["--sequence-length", "4096"], {}, "sequence_length=4096 is not allowed; the model takes 2 to 64"),
        (["--data", "missing.txt"], {}, "'missing.txt' does not exist"),
        (["--temperature", "-1"], {}, "temperature"),
    ],
)
def test_bad_input(
    words: list[str],
    settings: dict[str, Any],
    message: str,
    sparse: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {"--tokens": "64", "--sequence-length": "16", "--batch-size": "4", "--data": str(text)}
    given |= dict(zip(words[::2], words[1::2], strict=False)) if len(words) % 2 == 0 else {words[0]: words[1]}
    flags = [word for pair in given.items() for word in pair] + (words[2:] if len(words) == 3 else [])
    assert main(["recover", str(sparse), str(tmp_path / "out"), *flags]) == FAILED
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_refuses_what_it_cannot_train(
    sparse: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recover(sparse.parent / "dense", tmp_path / "out", "--data", text) == FAILED
    assert "is dense, so there is nothing to keep; prune it first" in capsys.readouterr().err
    t5().save_pretrained(tmp_path / "t5")
    assert recover(tmp_path / "t5", tmp_path / "out", "--data", text) == FAILED
    assert "trains causal and masked language models" in capsys.readouterr().err
    assert recover(sparse, tmp_path / "out", "--data", text, "--evaluate", text) == FAILED
    assert "measure on other text" in capsys.readouterr().err


def test_refuses_to_measure_on_what_it_trains_on(
    sparse: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(text.read_text())
    assert recover(sparse, tmp_path / "out", "--data", text, "--evaluate", other) == FAILED
    assert "would flatter; measure on other text" in capsys.readouterr().err


def test_needs_a_teacher(sparse: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sparse.parent / "dense").rename(sparse.parent / "moved")
    assert recover(sparse, tmp_path / "out", "--data", text) == FAILED
    assert "--no-distillation" in capsys.readouterr().err
    assert recover(sparse, tmp_path / "out", "--data", text, "--teacher", sparse.parent / "moved") == OK
