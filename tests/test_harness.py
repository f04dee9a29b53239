"""Tasks of lm-eval: the figures are those of a plain loop and of lm-eval's own command line; nothing else changes."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import bert, llama, t5, tokenizer

from hf_sparse import prune_
from hf_sparse.errors import CalibrationError, ConfigError, HfSparseError, ModelError
from hf_sparse.evaluate import evaluate
from hf_sparse.harness import TaskFigure, as_evaluations, evaluate_tasks
from hf_sparse.harness.tasks import chosen
from model_cards.evaluation import Evaluation, measured_again

pytest.importorskip("lm_eval", reason="the extra `evaluation` is not installed")

TASKS = Path(__file__).with_name("tasks")
DOCUMENTS = [json.loads(line) for line in (TASKS / "questions.jsonl").read_text().splitlines()]
EXAMPLES, QUESTIONS = DOCUMENTS[:3], DOCUMENTS[3:]
TEXTS = [json.loads(line)["text"] for line in (TASKS / "texts.jsonl").read_text().splitlines()]


def measured(model: Any, *tasks: str, **options: Any) -> dict[str, TaskFigure]:
    found = evaluate_tasks(model, tokenizer(), tasks, include_path=TASKS, **options)
    return {f"{item.metric},{item.filter}": item for item in found}


# ------------------------------------------------------------------------------------------------ the figures


def log_likelihood(model: Any, start: str, end: str) -> float:
    encode = tokenizer()
    context, answer = (encode(words, add_special_tokens=False)["input_ids"] for words in (start, end))
    with torch.no_grad():
        scores = model(torch.tensor([context + answer])).logits[0].log_softmax(-1)
    return sum(float(scores[len(context) + place - 1, token]) for place, token in enumerate(answer))


def plain_accuracy(model: Any, shots: int, by_length: bool) -> tuple[float, float]:
    """Accuracy and its standard error over the questions, one sequence at a time."""
    prompt = "".join(f"{item['start']} {item['ends'][item['right']]}\n\n" for item in EXAMPLES[:shots])
    right = []
    for item in QUESTIONS:
        scores = [log_likelihood(model, prompt + item["start"], f" {end}") for end in item["ends"]]
        if by_length:
            scores = [score / len(end) for score, end in zip(scores, item["ends"])]
        right.append(float(scores.index(max(scores)) == item["right"]))
    mean = sum(right) / len(right)
    return mean, math.sqrt(sum((one - mean) ** 2 for one in right) / (len(right) - 1) / len(right))


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("shots", [0, 2])
def test_accuracy_is_that_of_a_plain_loop(shots: int, batch_size: int) -> None:
    model = llama()
    found = measured(model, "hf_sparse_choice", num_fewshot=shots, batch_size=batch_size)
    assert list(found) == ["acc,none", "acc_norm,none"]
    for figure, by_length in zip(found.values(), (False, True)):
        value, error = plain_accuracy(model, shots, by_length)
        assert (figure.value, figure.standard_error) == (pytest.approx(value), pytest.approx(error))
        assert (figure.few_shot, figure.samples, figure.limit) == (shots, len(QUESTIONS), None)
        assert (figure.task, figure.task_version, figure.dtype) == ("hf_sparse_choice", "1.0", "float32")
        assert figure.harness.startswith("lm-eval 0.")
    assert 0 < found["acc,none"].value < found["acc_norm,none"].value  # each metric could have been wrong


def test_the_sparse_model_has_figures_of_its_own() -> None:
    dense, sparse = llama(), llama()
    prune_(sparse, {"metric": "magnitude", "pattern": "unstructured", "sparsity": 0.9})
    values = [measured(model, "hf_sparse_text")["byte_perplexity,none"].value for model in (dense, sparse)]
    assert values[0] != values[1]


def test_the_perplexity_of_whole_windows_is_ours() -> None:
    """lm-eval predicts every token of a text, the first from the token that begins it, in windows that share one token.

    With `window` one token more than lm-eval's length, and `stride` that length, ours are the same windows.
    """
    model, encode = llama(), tokenizer()
    streams = [[encode.bos_token_id, *encode(text, add_special_tokens=False)["input_ids"]] for text in TEXTS]
    ours = [evaluate(model, torch.tensor(ids), window=64, stride=63) for ids in streams]
    tokens = sum(item.tokens for item in ours)
    assert tokens == sum(len(ids) - 1 for ids in streams)
    nats = sum(math.log(item.value) * item.tokens for item in ours)
    model.config.max_position_embeddings = 63  # what lm-eval takes as its length
    found = measured(model, "hf_sparse_text")
    letters, words = sum(len(text.encode()) for text in TEXTS), sum(len(text.split()) for text in TEXTS)
    assert found["byte_perplexity,none"].value == pytest.approx(math.exp(nats / letters), rel=1e-5)
    assert found["word_perplexity,none"].value == pytest.approx(math.exp(nats / words), rel=1e-5)
    assert found["byte_perplexity,none"].standard_error is None


def test_two_filters_give_two_figures() -> None:
    found = measured(llama(), "hf_sparse_write")
    assert list(found) == ["exact_match,whole", "exact_match,any-word"]


def test_an_encoder_decoder_is_measured_too() -> None:
    assert measured(t5(), "hf_sparse_choice")["acc,none"].samples == len(QUESTIONS)


def test_a_limit_is_told_where_it_cuts() -> None:
    assert [measured(llama(), "hf_sparse_choice", limit=limit)["acc,none"].limit for limit in (5, 12, 99)] == [
        5,
        None,
        None,
    ]


@pytest.mark.slow
def test_a_group_has_the_figure_of_its_tasks() -> None:
    found = evaluate_tasks(llama(), tokenizer(), ["hf_sparse_group"], include_path=TASKS)
    one, group = (next(item for item in found if (item.task, item.metric) == (name, "acc")) for name in ("hf_sparse_choice", "hf_sparse_group"))  # fmt: skip
    assert (group.value, group.samples, group.task_version) == (one.value, len(QUESTIONS), "3.0")


@pytest.mark.slow
@pytest.mark.parametrize("words", [["-m", "lm_eval"], ["-m", "lm_eval", "run"]], ids=["lm_eval", "lm-eval run"])
def test_lm_evals_own_command_line_gives_the_same_figures(words: list[str], tmp_path: Path) -> None:
    model = llama()
    prune_(model, {"metric": "magnitude", "pattern": "2:4"})
    model.save_pretrained(tmp_path / "sparse")
    tokenizer().save_pretrained(tmp_path / "sparse")
    kept = ("PATH", "HOME", "HF_HOME", "LD_LIBRARY_PATH")
    environment = {name: os.environ[name] for name in kept if name in os.environ} | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run(
        [sys.executable, *words, "--model", "hf", "--model_args", f"pretrained={tmp_path / 'sparse'}", "--device", "cpu", "--batch_size", "1",
         "--tasks", "hf_sparse_choice,hf_sparse_text", "--include_path", TASKS, "--num_fewshot", "1", "--output_path", tmp_path / "out.json"],
        env=environment, cwd=tmp_path, check=True, capture_output=True, text=True,
    )  # fmt: skip
    (file,) = tmp_path.glob("out*.json")
    theirs = json.loads(file.read_text())["results"]
    ours = evaluate_tasks(model, tokenizer(), ["hf_sparse_choice", "hf_sparse_text"], include_path=TASKS, num_fewshot=1)
    assert len(ours) == 4
    for item in ours:
        assert item.value == theirs[item.task][f"{item.metric},{item.filter}"]
        if item.standard_error is not None:
            assert item.standard_error == theirs[item.task][f"{item.metric}_stderr,{item.filter}"]


# ------------------------------------------------------------------------------------------------ what stays as it was


def test_model_tokenizer_and_random_states_stay_as_they_were() -> None:
    model, processor = llama().train(), tokenizer()
    processor.pad_token = None
    random.seed(1)
    torch.manual_seed(1)
    before = (
        random.getstate(),
        torch.get_rng_state(),
        {name: value.clone() for name, value in model.state_dict().items()},
    )
    evaluate_tasks(model, processor, ["hf_sparse_choice"], include_path=TASKS, limit=1, seed=7)
    assert model.training
    assert processor.pad_token is None
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert all(torch.equal(value, before[2][name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("shown", [False, True])
def test_progress_bars_are_those_of_transformers(
    shown: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # no repository, of which git would complain
    (tmp_path / "rows.jsonl").write_text(json.dumps(QUESTIONS[0]))
    choice = (
        (TASKS / "choice.yaml").read_text().replace("custom_dataset: !function local.questions", "dataset_path: json")
    )
    data = f"dataset_kwargs:\n  data_files: {tmp_path}/rows.jsonl\n  cache_dir: {tmp_path}\n"
    (tmp_path / "own.yaml").write_text(choice.replace("test_split: test", f"{data}test_split: train"))
    switch = transformers.utils.logging
    (switch.enable_progress_bar if shown else switch.disable_progress_bar)()
    try:
        evaluate_tasks(llama(), tokenizer(), ["hf_sparse_choice"], include_path=tmp_path)
    finally:
        switch.disable_progress_bar()
    out, errors = capfd.readouterr()
    assert out == ""
    assert ("loglikelihood" in errors, "Generating" in errors) == (shown, shown)
    assert shown or errors == ""


# ------------------------------------------------------------------------------------------------ errors


def broken() -> Any:
    model = llama()
    model.model.embed_tokens.weight.data[:] = float("nan")
    return model


BAD: list[tuple[Any, list[str], dict[str, Any], type[HfSparseError], str]] = [
    (llama, ["hf_sparse_remote"], {}, CalibrationError, "hf_sparse_remote.*hf-sparse-tests/nowhere.*HF_HUB_OFFLINE"),
    (llama, ["hf_sparse_choice"], {"include_path": "/nowhere"}, ConfigError, "'/nowhere' is no folder"),
    (llama, [], {}, ConfigError, "no task is given"),
    (llama, ["hf_sparse_choice"], {"num_fewshot": -1}, ConfigError, "num_fewshot=-1"),
    (llama, ["hf_sparse_choice"], {"limit": 0}, ConfigError, "limit=0"),
    (llama, ["hf_sparse_choice"], {"batch_size": 0}, ConfigError, "batch_size=0"),
    (bert, ["hf_sparse_choice"], {}, ModelError, "BertForMaskedLM does not"),
    (broken, ["hf_sparse_choice"], {}, ModelError, "NaN"),
]


@pytest.mark.parametrize(("make", "tasks", "options", "error", "message"), BAD)
def test_bad_input(
    make: Any, tasks: list[str], options: dict[str, Any], error: type[HfSparseError], message: str
) -> None:
    with pytest.raises(error, match=message):
        evaluate_tasks(make(), tokenizer(), tasks, **{"include_path": TASKS, **options})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("task: own\noutput_type: multiple_choice\ncustom_dataset: !function absent.rows\n", "absent"),
        ("task: own\ndataset_path: json\ndataset_kwargs:\n  data_files: /nowhere.json\n", "nowhere"),
    ],
)
def test_a_task_that_cannot_be_loaded(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(content)
    with pytest.raises(HfSparseError, match=f"task 'own'.*{message}"):
        evaluate_tasks(llama(), tokenizer(), ["own"], include_path=tmp_path)


def test_tasks_that_run_what_the_model_writes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": "x", "b": "y"}\n')
    (tmp_path / "own.yaml").write_text(
        f"task: own\nunsafe_code: true\ndataset_path: json\ndataset_kwargs:\n  data_files: {tmp_path}/rows.jsonl\n  cache_dir: {tmp_path}\ntest_split: train\n"
        "output_type: generate_until\ndoc_to_text: a\ndoc_to_target: b\n"
    )
    with pytest.raises(ConfigError, match="'own' runs what the model writes"):
        evaluate_tasks(llama(), tokenizer(), ["own"], include_path=tmp_path)


KNOWN = ["arc_challenge", "arc_easy", "hellaswag", "mmlu"]


def test_names_and_globs_choose_tasks() -> None:
    assert chosen(["mmlu", "arc_*", "mmlu"], KNOWN) == ["mmlu", "arc_challenge", "arc_easy"]


@pytest.mark.parametrize(
    ("name", "near"), [("hellaswagg", "Near: 'hellaswag'"), ("arc_eazy", "'arc_easy'"), ("xyz", "does not exist. `lm")]
)
def test_an_unknown_task_is_answered_with_near_ones_and_the_way_to_own_ones(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        chosen([name], KNOWN)
    assert near in str(caught.value)
    assert "--include-path" in str(caught.value)


@pytest.mark.slow
def test_lm_evals_own_tasks_are_known() -> None:
    with pytest.raises(ConfigError, match="Near: 'arc_easy'"):
        evaluate_tasks(llama(), tokenizer(), ["arc_eazy"])
    with pytest.raises(CalibrationError, match="'arc_easy'"):
        evaluate_tasks(llama(), tokenizer(), ["arc_easy"], include_path=TASKS)


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'hf-sparse\[evaluation\]'"):
        evaluate_tasks(llama(), tokenizer(), ["hf_sparse_choice"], include_path=TASKS)


# ------------------------------------------------------------------------------------------------ in the report


def figure(**changes: Any) -> TaskFigure:
    values: dict[str, Any] = {
        "task": "quiz", "task_version": "1.0", "metric": "acc", "filter": "none", "few_shot": 0, "value": 0.25, "standard_error": 0.1,
        "samples": 12, "limit": None, "seed": None, "dtype": "float32", "harness": "lm-eval 0.4.13",
    }  # fmt: skip
    return TaskFigure(**{**values, **changes})


def test_figures_of_both_models_stand_together() -> None:
    sparse = [figure(), figure(metric="acc_norm", value=0.5, standard_error=None)]
    dense = [figure(metric="acc_norm", value=0.75), figure(value=0.5, standard_error=0.2)]
    told = [Evaluation.from_dict(values) for values in as_evaluations(sparse, dense)]
    assert [(item.metric, item.dense, item.sparse) for item in told] == [("acc", 0.5, 0.25), ("acc_norm", 0.75, 0.5)]
    assert [(item.dense_standard_error, item.standard_error) for item in told] == [(0.2, 0.1), (0.1, None)]
    assert told[0].harness == "lm-eval 0.4.13"
    assert "torch" in told[0].versions
    assert as_evaluations(sparse)[0]["dense"] is None


def test_a_value_that_is_not_finite_is_none_in_json() -> None:
    assert figure(value=math.inf).to_dict()["value"] is None


BEFORE = {
    "dense": 10.0,
    "sparse": 12.0,
    "metric": "perplexity",
    "window": 64,
    "stride": 64,
    "text": "x",
    "fingerprint": "f",
    "tokens": 9,
}
QUIZ = as_evaluations([figure()], [figure(value=0.5)])[0]


@pytest.mark.parametrize(
    ("known", "new", "dense", "rows"),
    [
        ([BEFORE], {**BEFORE, "dense": None, "sparse": 11.0, "dtype": "float32"}, 10.0, 1),  # the dense figure stays
        ([BEFORE], {**BEFORE, "dense": 9.0, "sparse": 11.0}, 9.0, 1),
        ([{**BEFORE, "sparse": None, "before_recovery": 12.0}], {**BEFORE, "dense": None, "sparse": 11.0}, 10.0, 1),
        ([BEFORE], {**BEFORE, "sparse": 11.0, "stride": 8}, 10.0, 2),
        ([BEFORE], {**BEFORE, "sparse": 11.0, "fingerprint": "g"}, 10.0, 2),
        ([{**BEFORE, "dtype": "bfloat16"}], {**BEFORE, "sparse": 11.0, "dtype": "float32"}, 10.0, 2),
        ([QUIZ], {**QUIZ, "sparse": 11.0}, 0.5, 1),
        ([QUIZ], {**QUIZ, "sparse": 11.0, "filter": "strict"}, 0.5, 2),
        ([QUIZ], {**QUIZ, "sparse": 11.0, "few_shot": 5}, 0.5, 2),
        ([QUIZ], {**QUIZ, "sparse": 11.0, "task_version": "2.0"}, 0.5, 2),
        ([QUIZ], {**QUIZ, "sparse": 11.0, "task": "exam"}, 0.5, 2),
        ([QUIZ], {**QUIZ, "sparse": 11.0, "limit": 3}, 0.5, 2),
    ],
)  # fmt: skip
def test_the_same_measurement_is_replaced(known: list[Any], new: dict[str, Any], dense: float, rows: int) -> None:
    found = measured_again(known, new)
    assert len(found) == rows
    assert (found[-1]["sparse"], found[-1]["dense"]) == (11.0, dense)
    assert found[-1].get("before_recovery") == known[0].get("before_recovery")


def test_the_error_of_an_earlier_figure_does_not_stay_with_a_new_one() -> None:
    found = measured_again([QUIZ], {**QUIZ, "dense": None, "sparse": 0.5, "standard_error": None})
    assert (found[0]["standard_error"], found[0]["dense_standard_error"]) == (None, 0.1)
