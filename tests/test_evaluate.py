"""Perplexity and the models' own losses, equal to what a few plain lines compute; the command, and what it records."""

import json
import math
import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from models import VOCABULARY, bert, llama, t5, text, token_rows, tokenizer
from torch import nn
from transformers import AutoModelForImageClassification, ViTConfig

import hf_sparse.cli.evaluate as command
import model_cards
from hf_sparse import prune_
from hf_sparse.cli import main
from hf_sparse.errors import CalibrationError, ConfigError, ModelError
from hf_sparse.evaluate import as_evaluation, evaluate
from hf_sparse.harness import TaskFigure
from hf_sparse.report import Report
from model_cards import Evaluation

STREAM = token_rows(1, 300)[0]


def plain_perplexity(model: nn.Module, stream: torch.Tensor, window: int, stride: int) -> tuple[float, int]:
    total, count, predicted_to = 0.0, 0, 0
    for start in range(0, len(stream) - window + 1, stride):
        ids = stream[None, start : start + window]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].log_softmax(-1)
        for position in range(1, window):
            if start + position > predicted_to:
                total -= float(logits[position - 1, ids[0, position]])
                count += 1
        predicted_to = start + window - 1
    return math.exp(total / count), count


@pytest.mark.parametrize(("window", "stride"), [(16, None), (16, 16), (16, 8), (20, 7), (64, 1), (2, 2)])
def test_token_perplexity(window: int, stride: int | None) -> None:
    model = llama()
    found = evaluate(model, STREAM, window=window, stride=stride)
    value, tokens = plain_perplexity(model, STREAM, window, stride or window)
    assert found.metric == "perplexity"
    assert found.tokens == tokens
    assert found.value == pytest.approx(value, rel=1e-4)
    assert (found.window, found.stride) == (window, stride or window)


def test_max_windows_and_text() -> None:
    model = llama()
    found = evaluate(model, [text(300)], tokenizer=tokenizer(), window=16, max_windows=3)
    assert found.tokens == 3 * 15
    assert (
        found.fingerprint
        != evaluate(model, [text(301)[4:]], tokenizer=tokenizer(), window=16, max_windows=3).fingerprint
    )


def test_a_masked_model_gets_its_loss_on_masked_tokens() -> None:
    found = [evaluate(bert(), [text(400)], tokenizer=tokenizer(), window=32, seed=seed) for seed in (0, 0, 1)]
    assert found[0].metric == "masked loss"
    assert found[0].value == found[1].value != found[2].value
    assert found[0].value == pytest.approx(math.log(VOCABULARY), abs=0.5)  # a random model guesses


def test_other_models_get_the_loss_that_they_compute() -> None:
    rows = token_rows(4, 8)
    found = evaluate(t5(), [{"input_ids": row[None], "labels": row[None]} for row in rows])
    with torch.no_grad():
        expected = t5()(input_ids=rows, labels=rows).loss
    assert found.metric == "loss"
    assert found.value == pytest.approx(float(expected), rel=1e-5)
    torch.manual_seed(0)
    vit = AutoModelForImageClassification.from_config(
        ViTConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4, num_labels=3)
    )  # fmt: skip
    images = {"pixel_values": torch.rand(4, 3, 8, 8), "labels": torch.tensor([0, 1, 2, 0])}
    assert evaluate(vit, images).value == pytest.approx(float(vit.eval()(**images).loss), rel=1e-5)


def test_the_model_keeps_its_mode() -> None:
    model = llama().train()
    evaluate(model, STREAM, window=16)
    assert model.training


BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (STREAM, {"window": 65}, ConfigError, "window=65.*64"),
    (STREAM, {"window": 1}, ConfigError, "window=1"),
    (STREAM, {"window": 16, "stride": 17}, ConfigError, "stride=17"),
    (STREAM, {"window": 16, "stride": 0}, ConfigError, "stride=0"),
    ([], {}, CalibrationError, "empty"),
    (STREAM, {"window": 16, "max_windows": -1}, ConfigError, "max_windows=-1"),
    (token_rows(8, 16), {"window": 16, "stride": 4}, ConfigError, "stride=4"),
    (STREAM[:5], {"window": 16}, CalibrationError, "empty|longer|window"),
]


@pytest.mark.parametrize(("data", "options", "error", "message"), BAD)
def test_bad_input(data: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        evaluate(llama(), data, **options)


def test_an_encoder_decoder_needs_labels() -> None:
    with pytest.raises(CalibrationError, match="labels"):
        evaluate(t5(), [{"input_ids": row[None], "decoder_input_ids": row[None]} for row in token_rows(2, 8)])


def test_the_text_that_was_calibrated_on_is_refused_unless_told() -> None:
    model = llama()
    rows = token_rows(8, 16)
    prune_(model, {"metric": "wanda", "calibration": rows, "num_samples": 8})
    with pytest.raises(CalibrationError, match="calibrated on 8 of the texts"):
        evaluate(model, rows, window=16)
    assert evaluate(model, rows, window=16, same_text_allowed=True).value > 1
    assert evaluate(model, token_rows(8, 16, seed=1), window=16).value > 1


def test_the_same_text_is_found_however_it_is_cut() -> None:
    model = llama()
    prune_(model, {"metric": "wanda", "calibration": [text(600)], "num_samples": 4, "sequence_length": 32}, tokenizer())
    with pytest.raises(CalibrationError, match="calibrated on 1 of the texts"):
        evaluate(model, [text(20), text(600)], tokenizer=tokenizer(), window=16)
    assert evaluate(model, [text(500)], tokenizer=tokenizer(), window=16).value > 1


def test_a_figure_of_the_models_own_loss_does_not_depend_on_the_batches() -> None:
    rows = [{"input_ids": row[None, :8], "labels": row[None, : 3 + 2 * i]} for i, row in enumerate(token_rows(3, 8))]
    model = t5()
    found = evaluate(model, rows)
    with torch.no_grad():
        losses = [model(**row).loss.item() * row["labels"].numel() for row in rows]
    assert found.tokens == sum(row["labels"].numel() for row in rows)
    assert found.value == pytest.approx(sum(losses) / found.tokens, rel=1e-5)


def test_a_broken_model_gives_no_figure() -> None:
    model = llama()
    model.model.embed_tokens.weight.data[:] = float("nan")
    with pytest.raises(ModelError, match="nan"):
        evaluate(model, STREAM, window=16)


def test_a_measurement_tells_what_it_takes_to_measure_again() -> None:
    model = llama().bfloat16()
    told = [
        evaluate(model, STREAM, window=16, max_windows=windows) for windows in (None, 3, 18, 99)
    ]  # the text gives 18
    assert [item.max_windows for item in told] == [None, 3, None, None]
    assert {(item.dtype, item.seed) for item in told} == {("bfloat16", None)}
    assert evaluate(bert(), [text(400)], tokenizer=tokenizer(), window=32, seed=3).seed == 3


def test_measurements_become_an_evaluation_of_the_card() -> None:
    dense, sparse = (evaluate(llama(layers), STREAM, window=16, stride=8, max_windows=4) for layers in (2, 1))
    told = Evaluation.from_dict(as_evaluation(sparse, dense))
    assert (told.dense, told.sparse, told.before_recovery) == (dense.value, sparse.value, None)
    for name in ("metric", "window", "stride", "text", "fingerprint", "tokens", "max_windows", "dtype", "seed"):
        assert getattr(told, name) == getattr(sparse, name)
    assert told.versions == f"torch {version('torch')}, transformers {version('transformers')}"
    assert Evaluation.from_dict(as_evaluation(sparse, before_recovery=dense)).before_recovery == dense.value


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model and the same pruned, with a text to measure on."""
    place = tmp_path_factory.mktemp("evaluate")
    llama().save_pretrained(place / "dense")
    tokenizer().save_pretrained(place / "dense")
    (place / "text.txt").write_text(text(301)[4:])
    words = ["prune", place / "dense", place / "sparse", "--metric", "magnitude", "--pattern", "2:4"]
    assert run(*words, "--evaluate", place / "text.txt", "--window", 16) == 0
    return place


@pytest.fixture
def place(pruned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pruned, tmp_path / "place"))


def run(*words: object) -> int:
    return main([str(word) for word in words])


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def quiz(value: float) -> list[TaskFigure]:
    told = {
        "filter": "none",
        "few_shot": 5,
        "samples": 12,
        "limit": None,
        "seed": None,
        "dtype": "float32",
        "harness": "lm-eval 0.4.13",
    }
    figures = [("acc", value, 0.1), ("acc_norm", value / 2, None)]
    return [TaskFigure(task="quiz", task_version="1.0", metric=metric, value=one, standard_error=error, **told) for metric, one, error in figures]  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the harness was asked for; what it answers needs no lm-eval: 0.5 for the first model, 0.75 for the next."""
    calls: list[dict[str, Any]] = []

    def answer(model: Any, processor: Any, names: list[str], **options: Any) -> list[TaskFigure]:
        calls.append(
            {"names": names, "zeros": float((model.model.layers[0].mlp.up_proj.weight == 0).float().mean()), **options}
        )
        return quiz(0.5 if len(calls) == 1 else 0.75)

    monkeypatch.setattr(command, "evaluate_tasks", answer)
    return calls


def test_without_tasks_perplexity_is_measured(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", place / "sparse", "--text", place / "text.txt", "--window", 16, "--stride", 8, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["metric"], found["window"], found["stride"], found["dtype"]) == ("perplexity", 16, 8, "float32")
    assert "tasks" not in found


def test_tasks_are_measured_instead_of_a_text_or_beside_it(
    place: Path, asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "evaluate",
        place / "sparse",
        "--tasks",
        "quiz, other",
        "--num-fewshot",
        5,
        "--limit",
        3,
        "--batch-size",
        2,
    ]
    assert run(*words, "--include-path", place, "--seed", 4, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert "metric" not in found
    assert [item["value"] for item in found["tasks"]] == [0.5, 0.25]
    zeros = asked[0].pop("zeros")
    assert asked == [
        {
            "names": ["quiz", "other"],
            "num_fewshot": 5,
            "limit": 3,
            "batch_size": 2,
            "include_path": str(place),
            "seed": 4,
        }
    ]
    assert zeros == 0.5
    assert run("evaluate", place / "sparse", "--tasks", "quiz", "--text", place / "text.txt", "--window", 16) == 0
    out = capsys.readouterr().out
    assert "perplexity" in out
    assert [line.split() for line in out.splitlines() if line.startswith("quiz")] == [
        ["quiz", "1.0", "acc", "5", "0.7500", "0.1000", "12"],
        ["quiz", "1.0", "acc_norm", "5", "0.3750", "not", "told", "12"],
    ]


@pytest.mark.parametrize(
    ("words", "measured"),
    [
        ([], ["stdlib:evaluation"]),
        (["--text", "x.txt"], ["x.txt"]),
        (["--tasks", "quiz"], []),
        (["--tasks", "quiz", "--text", "x.txt"], ["x.txt"]),
    ],
)
def test_what_is_measured_where_it_is_not_said(
    words: list[str], measured: list[str], place: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []

    def answer(model: Any, name: str, **options: Any) -> Any:
        texts.append(name)
        return evaluate(model, STREAM, window=16)

    monkeypatch.setattr(command, "evaluate", answer)
    assert run("evaluate", place / "sparse", *words) == 0
    assert (texts, len(asked)) == (measured, int("--tasks" in words))


def test_no_task_is_an_error(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", place / "sparse", "--tasks", " , ") == 1
    assert "names no task" in capsys.readouterr().err


@pytest.mark.parametrize("named", [False, True])
def test_the_dense_model_is_measured_in_the_same_run(
    named: bool, place: Path, asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report.load(place / "sparse")
    report.model = "nobody/knows" if named else str(place / "dense")
    report.save(place / "sparse")
    words = [
        "evaluate",
        place / "sparse",
        "--text",
        place / "text.txt",
        "--window",
        16,
        "--tasks",
        "quiz",
        "--json",
        "--dense",
    ]
    assert run(*words, *([place / "dense"] if named else [])) == 0
    found = json.loads(capsys.readouterr().out)
    known = report.evaluations[0]
    assert (found["value"], found["dense"]["value"]) == (pytest.approx(known["sparse"]), pytest.approx(known["dense"]))
    assert (found["tasks"][0]["value"], found["dense"]["tasks"][0]["value"]) == (0.5, 0.75)
    assert found["dense"]["model"] == str(place / "dense")
    assert [call["zeros"] for call in asked] == [0.5, 0.0]
    assert run(*words[:-2], *(["--dense", place / "dense"])) == 0
    assert [line[:7] for line in capsys.readouterr().out.splitlines() if "perplexity" in line] == ["dense: ", "sparse:"]


@pytest.mark.parametrize(
    ("dense", "message"),
    [
        ("sparse", "is the measured model itself"),
        ("other", "is sparse itself"),
        ("absent", "cannot be loaded"),
        (None, "cannot be loaded"),
    ],
)
def test_a_dense_model_that_is_none(
    dense: str | None, message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "sparse", place / "other")
    report = Report.load(place / "sparse")
    report.model = "nobody/knows"
    report.save(place / "sparse")
    words = ["evaluate", place / "sparse", "--text", place / "text.txt", "--window", 16, "--dense"]
    assert run(*words, *([] if dense is None else [place / dense])) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "--dense MODEL" in error


# ------------------------------------------------------------------------------------------------ recorded


def test_a_figure_is_recorded_in_report_and_card_and_nowhere_else(place: Path) -> None:
    before = content(place / "sparse")
    words = ["evaluate", place / "sparse", "--text", place / "text.txt", "--window", 16, "--record"]
    assert run(*words, "--stride", 8, "--max-windows", 5) == 0
    after = content(place / "sparse")
    assert {name for name in after if after[name] != before.get(name)} == {"hf_sparse_report.json", "README.md"}
    assert set(after) == set(before)
    report = Report.load(place / "sparse")
    told = Evaluation.from_dict(report.evaluations[1])
    found = evaluate_saved(place, stride=8, max_windows=5)
    assert told == Evaluation.from_dict(as_evaluation(found))
    results = ModelCard(after["README.md"].decode()).data.eval_results
    assert [(item.metric_args["stride"], item.metric_args.get("max_windows")) for item in results] == [
        (16, None),
        (8, 5),
    ]
    assert results[1].metric_value == told.sparse
    assert f"| {told.sparse:,.4f} | 16 | 8 | text.txt |" in after["README.md"].decode()


def evaluate_saved(place: Path, **options: Any) -> Any:
    model = type(llama()).from_pretrained(place / "sparse")
    return evaluate(model, str(place / "text.txt"), tokenizer=tokenizer(), window=16, **options)


def test_a_figure_that_was_there_is_replaced_and_keeps_its_dense_one(place: Path) -> None:
    (known,) = Report.load(place / "sparse").evaluations
    for _ in range(2):
        assert run("evaluate", place / "sparse", "--text", place / "text.txt", "--window", 16, "--record") == 0
        (found,) = Report.load(place / "sparse").evaluations
        assert found["dense"] == known["dense"]
        assert found["sparse"] == pytest.approx(known["sparse"])
        assert found["dtype"] == "float32"


def test_tasks_are_recorded_with_all_that_they_depend_on(place: Path, asked: list[dict[str, Any]]) -> None:
    words = ["evaluate", place / "sparse", "--tasks", "quiz", "--record", "--dense", place / "dense"]
    assert run(*words) == 0
    told = [Evaluation.from_dict(values) for values in Report.load(place / "sparse").evaluations[1:]]
    assert [(item.metric, item.dense, item.sparse, item.standard_error) for item in told] == [
        ("acc", 0.75, 0.5, 0.1), ("acc_norm", 0.375, 0.25, None),
    ]  # fmt: skip
    readme = (place / "sparse" / "README.md").read_text()
    assert "| `quiz` | 1.0 | 5 | acc | 0.7500 ± 0.1000 | 0.5000 ± 0.1000 | 12 | lm-eval 0.4.13 |" in readme
    assert "| `quiz` | 1.0 | 5 | acc_norm | 0.3750 | 0.2500 | 12 | lm-eval 0.4.13 |" in readme
    assert (
        "| Task | Version | Few-shot | Metric | Dense ± standard error | Sparse ± standard error | Samples | Measured with |"
        in readme
    )
    result = next(item for item in ModelCard(readme).data.eval_results if item.metric_type == "acc")
    assert (result.dataset_name, result.dataset_type, result.task_type, result.metric_value) == (
        "quiz",
        "quiz",
        "text-generation",
        0.5,
    )
    assert result.metric_args == {
        "tool": "hf_sparse", "harness": "lm-eval 0.4.13", "task_version": "1.0", "num_few_shot": 5, "filter": "none", "samples": 12,
        "standard_error": 0.1, "dense": 0.75, "dense_standard_error": 0.1, "dtype": "float32", "versions": told[0].versions,
    }  # fmt: skip


def test_a_readme_of_a_person_stays(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "sparse" / "README.md").write_text("# Mine\n")
    assert run("evaluate", place / "sparse", "--text", place / "text.txt", "--window", 8, "--record") == 0
    assert (place / "sparse" / "README.md").read_text() == "# Mine\n"
    assert len(Report.load(place / "sparse").evaluations) == 2


@pytest.mark.parametrize("readme", [True, False])
@pytest.mark.parametrize("at", ["measuring", "the report", "the card"])
def test_an_interrupted_run_leaves_the_folder_as_it_was(
    at: str, readme: bool, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    if not readme:
        (place / "sparse" / "README.md").unlink()
    before = content(place / "sparse")
    if at == "measuring":
        monkeypatch.setattr(command, "evaluate", interrupt)
    elif at == "the report":
        monkeypatch.setattr(Report, "save", interrupt)
    else:
        write = model_cards.write_card
        monkeypatch.setattr(model_cards, "write_card", lambda *given: interrupt(write(*given)))
    assert run("evaluate", place / "sparse", "--text", place / "text.txt", "--window", 8, "--record") == 130
    assert content(place / "sparse") == before


REFUSED = [
    ("somebody/model", [], "--record writes into a local folder.*hf download somebody/model"),
    ("dense", [], "holds no hf_sparse_report.json.*leave --record out"),
    (
        "sparse",
        ["--dtype", "bfloat16"],
        "bfloat16 is not the number format of the saved weights .float32.*leave --dtype out",
    ),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_where_nothing_can_be_recorded_nothing_is_measured(
    name: str,
    options: list[str],
    message: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "load_model", None)
    model = name if "/" in name else place / name
    assert run("evaluate", model, "--text", place / "text.txt", "--record", *options) == 1
    assert re.search(message, capsys.readouterr().err)


def test_a_report_that_cannot_be_read_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "sparse" / "hf_sparse_report.json").write_text("{")
    assert run("evaluate", place / "sparse", "--text", place / "text.txt", "--record") == 1
    assert "not valid JSON" in capsys.readouterr().err


def test_the_saved_number_format_may_be_named(place: Path) -> None:
    assert (
        run("evaluate", place / "sparse", "--text", place / "text.txt", "--window", 8, "--record", "--dtype", "float32")
        == 0
    )
