"""`hf-sparse recover`: a sparse model in, a better one out, with every zero and an account of the training."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from models import bert, llama, mixtral, t5, token_rows, tokenizer
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

import hf_sparse
from hf_sparse import SparsityConfig, prune_
from hf_sparse.cli import FAILED, INTERRUPTED, OK, main
from hf_sparse.cli.sequences import padded
from hf_sparse.cli.teaching import base_name, typed_name
from hf_sparse.cli.training import restore_, training_device, widen_
from hf_sparse.embedded import model_path
from hf_sparse.errors import ConfigError

TEXTS = [
    "the cat sat on a mat and the dog ran",
    "a dog sat on the mat and a cat ran",
    "the mat and the cat and the dog sat on a mat",
]


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """A pruned model with its tokenizer, made from a dense one that lies beside it."""
    return saved(tmp_path, llama())


def saved(folder: Path, model: Any, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    model.to(dtype).save_pretrained(folder / "dense")
    tokenizer().save_pretrained(folder / "dense")
    model = type(model).from_pretrained(folder / "dense")
    prune_(model, SparsityConfig(**{"pattern": "2:4", "metric": "magnitude", **settings}), tokenizer())
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
    [told] = found["report"]["recoveries"]
    assert (told["metric"], told["before"], told["after"]) == ("perplexity", figures["before"], figures["after"])
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


@pytest.mark.parametrize("flags", [[], ["--lora", "--rank", "2"]])
def test_goes_on_from_its_checkpoints(
    flags: list[str], sparse: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts, once_more = ([sparse, tmp_path / name, "--data", text, *flags] for name in ("w", "p", "o"))
    torch.manual_seed(1)
    assert recover(*whole, "--checkpoints", tmp_path / "a", tokens=160, batch_size=2) == OK
    torch.manual_seed(2)  # what ran before makes no difference
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoint-5")
    (tmp_path / "b" / "checkpoint-5").mkdir()  # as if the run had been killed while it wrote the last one
    assert recover(*parts, "--checkpoints", tmp_path / "b", tokens=160, batch_size=2) == OK
    assert "nothing is left to train" not in capsys.readouterr().err
    assert recover(*once_more, "--checkpoints", tmp_path / "b", tokens=160, batch_size=2) == OK
    assert "nothing is left to train" in capsys.readouterr().err
    torch.manual_seed(3)
    assert recover(sparse, tmp_path / "f", "--data", text, *flags, tokens=160, batch_size=2) == OK
    one, *others = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("w", "p", "o", "f"))
    for other in others:
        assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        (["--lora"], {}, "lora was False, now it is True"),
        ([], {"seed": 1}, "seed was 0, now it is 1"),
        ([], {"learning_rate": 0.01}, "learning_rate was 0.00625, now it is 0.01"),
        ([], {"tokens": 384}, "tokens was 64, now it is 384"),
        (["--no-distillation"], {}, "distillation was True, now it is False"),
    ],
)
def test_goes_on_with_nothing_else(
    words: list[str],
    settings: dict[str, Any],
    message: str,
    trained: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    again = [trained / "sparse", trained / "again", "--data", text, "--checkpoints", trained / "runs", *words]
    assert recover(*again, **{"tokens": 64, **settings}) == FAILED
    assert message in capsys.readouterr().err


@pytest.fixture
def trained(sparse: Path, text: Path, tmp_path: Path) -> Path:
    """The folder in which a model was recovered with checkpoints, in `runs`."""
    assert recover(sparse, tmp_path / "out", "--data", text, "--checkpoints", tmp_path / "runs", tokens=64) == OK
    return tmp_path


def test_goes_on_with_no_other_model(trained: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = [trained / "sparse", trained / "again", "--data", text, "--checkpoints", trained / "runs"]
    model = AutoModelForCausalLM.from_pretrained(trained / "dense")
    prune_(model, SparsityConfig(pattern="2:4", metric="magnitude", axis="output"))
    model.save_pretrained(trained / "sparse")
    assert recover(*again, tokens=64) == FAILED
    assert "model_fingerprint was" in capsys.readouterr().err
    (trained / "runs" / "recover.json").unlink()
    assert recover(*again, tokens=64) == FAILED
    assert "holds checkpoints and no recover.json" in capsys.readouterr().err


@pytest.mark.parametrize(("destination", "checkpoints"), [("out", "out"), ("out", "out/runs"), ("runs/out", "runs")])
def test_checkpoints_lie_elsewhere(
    destination: str, checkpoints: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["nowhere", tmp_path / destination, "--data", text, "--checkpoints", tmp_path / checkpoints]
    assert recover(*words) == FAILED
    assert "lie one in the other" in capsys.readouterr().err


def test_tells_how_to_go_on(
    trained: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_sparse.cli.recover.tune", interrupt)
    words = [trained / "sparse", trained / "again", "--data", text, "--checkpoints", trained / "runs"]
    assert recover(*words, tokens=64) == INTERRUPTED
    assert "the same command goes on from" in capsys.readouterr().err


@pytest.mark.parametrize("make", [llama, bert])
def test_sequences_of_any_length(make: Any, tmp_path: Path) -> None:
    sparse, rows = saved(tmp_path, make()), tmp_path / "rows.jsonl"
    lines = [
        {"input_ids": token_rows(1, length, seed=length)[0].tolist()} for length in (4, 16, 7, 40, 9, 12, 3, 5) * 4
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    without = tokenizer()
    without.pad_token = None
    without.save_pretrained(sparse)
    assert recover(sparse, tmp_path / "out", "--data", rows, tokens=200) == OK
    [told] = hf_sparse.report(type(make()).from_pretrained(tmp_path / "out")).recoveries  # type: ignore[union-attr]
    assert 120 <= told.tokens <= 280, "padding counts as tokens, or the plan took short rows for long ones"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token is None


def test_one_step_trains(sparse: Path, text: Path, tmp_path: Path) -> None:
    assert recover(sparse, tmp_path / "out", "--data", text, tokens=64) == OK
    one, two = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (sparse, tmp_path / "out"))
    assert any(not torch.equal(value, two[name]) for name, value in one.items())


def test_padding_changes_no_loss() -> None:
    model, rows = llama(), [{"input_ids": token_rows(1, length)[0]} for length in (5, 9)]
    with torch.no_grad():
        whole = model(**padded(rows)).loss
        each = [model(**padded([row])).loss * (len(row["input_ids"]) - 1) for row in rows]
    torch.testing.assert_close(whole, sum(each) / 12)


def test_token_ids_need_no_tokenizer(sparse: Path, tmp_path: Path) -> None:
    for file in sparse.glob("*token*"):
        file.unlink()
    numpy.save(tmp_path / "rows.npy", token_rows(16).numpy())
    assert recover(sparse, tmp_path / "out", "--data", tmp_path / "rows.npy", tokens=64) == OK


def test_masked_models_need_a_mask_token(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sparse, without = saved(tmp_path, bert()), tokenizer()
    without.mask_token = None
    without.save_pretrained(sparse)
    assert recover(sparse, tmp_path / "out", "--data", text) == FAILED
    assert "no tokenizer with a mask token" in capsys.readouterr().err


def test_keeps_the_type_of_each_parameter(text: Path, tmp_path: Path) -> None:
    model = llama().to(torch.bfloat16)
    model.model.norm.float()
    model.model.layers[0].mlp.half()
    buffers = {name: value.dtype for name, value in model.named_buffers()}
    types = {name: value.dtype for name, value in model.named_parameters()}
    for lora, widened in ((False, {torch.float32}), (True, {torch.float32, torch.bfloat16})):
        had = widen_(model, lora)
        assert {value.dtype for value in model.parameters()} == widened
        assert {name: value.dtype for name, value in model.named_buffers()} == buffers
        restore_(model, had)
        assert {name: value.dtype for name, value in model.named_parameters()} == types


def test_lora_reaches_experts(text: Path, tmp_path: Path) -> None:
    sparse = saved(tmp_path, mixtral())
    assert recover(sparse, tmp_path / "out", "--data", text, "--lora", "--rank", "2") == OK
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (sparse, tmp_path / "out"))
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert {name.rpartition(".")[2] for name in changed} >= {"gate_up_proj", "down_proj"}, (
        "the experts were not trained"
    )
    assert any("q_proj" in name for name in changed)
    assert hf_sparse.report(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).recoveries[0].zeros_lost == 0  # type: ignore[union-attr]


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
        (["--temperature", "-1"], {}, "temperature=-1.0 is not allowed"),
        (["--tokens", "63"], {}, "fewer than one step takes (4 sequences of 16 tokens); give --tokens 64"),
        (["--device", "meta"], {}, "computes nothing"),
        (["--device", "nothing:3"], {}, "device='nothing:3' cannot be used here"),
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


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("sparse", "is the sparse model itself"),
        ("copy", "is sparse itself"),
        ("damaged", "cannot be loaded"),
        ("deeper", "it lacks weights"),
    ],
)
def test_a_teacher_is_dense_and_whole(
    teacher: str, message: str, sparse: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(sparse, tmp_path / "copy")
    for name, changes in (("damaged", {"hidden_size": 16}), ("deeper", {"num_hidden_layers": 3})):
        shutil.copytree(tmp_path / "dense", tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **changes}))
    words = [sparse, tmp_path / "out", "--data", text, "--teacher", tmp_path / teacher]
    assert recover(*words) == FAILED
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("teacher", "role"), [("dense", "dense"), ("other", "teacher")])
def test_only_the_base_is_the_dense_model(
    teacher: str, role: str, sparse: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tmp_path / "dense", tmp_path / "other")
    measured = tmp_path / "measured.txt"
    measured.write_text(" ".join(reversed(" ".join(TEXTS).split())) * 4)
    words = ["--data", text, "--evaluate", measured, "--window", 16, "--teacher", tmp_path / teacher, "--json"]
    assert recover(sparse, tmp_path / "out", *words, tokens=64) == OK
    [line] = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert set(found["figures"]) == {role, "before", "after"}
    assert (found["report"]["evaluations"][0]["dense"] is None) == (role == "teacher")


def test_finds_the_embedded_model_anywhere() -> None:
    class Known:
        model = "/somewhere/else/hf_sparse/embedded/model"

    assert base_name(Known) == str(model_path())
    assert base_name(None) is None
    given = argparse.Namespace(model="nowhere", teacher="embedded")
    assert typed_name(given) == str(model_path())


def test_the_hub_is_reached_for_the_teacher_as_for_the_model(
    sparse: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        return str(tmp_path / "dense")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    words = ["--data", text, "--teacher", "user/dense", "--token", "t", "--revision", "r", "--trust-remote-code"]
    assert recover(sparse, tmp_path / "out", *words, tokens=64) == OK
    [found] = asked
    assert (found["name"], found["token"], "revision" in found) == ("user/dense", "t", False)
    [told] = hf_sparse.report(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).recoveries  # type: ignore[union-attr]
    assert "distillation from user/dense" in told.loss


def test_trains_in_one_process_on_one_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert recover("nowhere", tmp_path / "out", "--data", "nothing") == FAILED
    assert "accelerate launch" in capsys.readouterr().err
    monkeypatch.setattr("hf_sparse.prune.check_device", lambda device: None)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cuda"))
    assert training_device(None) == training_device("cuda") == torch.device("cuda", 0)
    assert training_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"CUDA_VISIBLE_DEVICES=1 hf-sparse recover \.\.\. --device cuda"):
        training_device("cuda:1")
    with pytest.raises(ConfigError, match="give cuda or cpu"):
        training_device("mps")


def test_only_what_is_measured_must_be_other_text(sparse: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    first = json.dumps({"text": " ".join(reversed(" ".join(TEXTS * 4).split()))})
    other.write_text(first + "\n" + text.read_text())
    words = ["--data", text, "--evaluate", other, "--window", 16, "--max-windows"]
    assert recover(sparse, tmp_path / "out", *words, 2, tokens=64) == OK
    assert recover(sparse, tmp_path / "no", *words, 64, tokens=64) == FAILED


def test_refuses_to_measure_on_the_calibration_text(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(" ".join(reversed(" ".join(TEXTS).split())) * 4)
    sparse = saved(tmp_path, llama(), calibration=str(other), num_samples=2, sequence_length=16, metric="wanda")
    assert recover(sparse, tmp_path / "out", "--data", text, "--evaluate", other, "--window", 16) == FAILED
    assert "was calibrated on 1 of the texts" in (told := capsys.readouterr().err)
    assert "allow it" not in told


def test_a_teacher_that_only_is_measured_may_be_missing(
    sparse: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dense").rename(tmp_path / "moved")
    other = tmp_path / "other.txt"
    other.write_text(" ".join(reversed(" ".join(TEXTS).split())) * 4)
    words = ["--data", text, "--evaluate", other, "--window", 16, "--no-distillation", "--json"]
    assert recover(sparse, tmp_path / "out", *words, tokens=64) == OK
    told = capsys.readouterr()
    assert set(json.loads(told.out)["figures"]) == {"before", "after"}
    assert "the dense model is not measured" in told.err
