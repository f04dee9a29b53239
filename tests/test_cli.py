"""The command line: what it writes, what it prints, how it fails."""

import argparse
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from models import bert, llama, text, token_rows, tokenizer
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.cli import main, output, prune
from hf_sparse.destination import complete_folder
from hf_sparse.errors import ConfigError
from hf_sparse.report_text import recipe_words

ROOT = Path(__file__).parents[1]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "calibration.txt").write_text(text(600))
    (tmp_path / "evaluation.txt").write_text(text(301)[4:])
    return tmp_path / "dense"


def old_model(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "old").write_text("old")


def run(*words: object) -> int:
    return main([str(word) for word in words])


def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


# ------------------------------------------------------------------------------------------------ prune


def test_prune_writes_a_folder_that_loads_and_tells_what_was_done(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(
        "prune", saved, tmp_path / "out", "--pattern", "4:8", "--metric", "dass", "--calibration", tmp_path / "calibration.txt",
        "--num-samples", 4, "--sequence-length", 32, "--option", "dass.exponent=0.75", "--exclude", "*.layers.0.*", "--batch-size", 2,
        "--evaluate", tmp_path / "evaluation.txt", "--window", 16,
    )  # fmt: skip
    assert code == 0
    out = capsys.readouterr().out
    assert "perplexity on evaluation.txt" in out
    assert "written to" in out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    report = hf_sparse.report(model)
    assert report is not None
    assert report.config == SparsityConfig(
        pattern="4:8", metric="dass", calibration=str(tmp_path / "calibration.txt"), num_samples=4, sequence_length=32,
        options={"dass": {"exponent": 0.75}}, exclude=("*.layers.0.*",), batch_size=2,
    ).resolved().to_dict()  # fmt: skip
    assert report.evaluations[0]["dense"] != report.evaluations[0]["sparse"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "README.md",
        "hf_sparse_report.json",
        "hf_sparse_report.png",
        "tokenizer.json",
    } <= names
    assert f"{report.evaluations[0]['sparse']:.2f}"[:3] in (tmp_path / "out" / "README.md").read_text()
    assert not list(tmp_path.glob(".out*"))


def test_fields_override_the_file(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prune.yaml").write_text('metric: magnitude\npattern: "1:4"\ntargets: mlp\n')
    assert run("prune", saved, tmp_path / "out", "--config", tmp_path / "prune.yaml", "--pattern", "2:4", "--json") == 0
    config = printed(capsys)["report"]["config"]
    assert (config["metric"], config["pattern"], config["targets"]) == ("magnitude", "2:4", "mlp")


def config_of(*words: object) -> SparsityConfig:
    parser = argparse.ArgumentParser()
    prune.add(parser)
    return prune.build_config(parser.parse_args(["model", "destination", *map(str, words)]))


def test_permute_can_be_switched_on_and_off(tmp_path: Path) -> None:
    (tmp_path / "on.yaml").write_text("permute: true\n")
    assert config_of("--permute").permute
    assert config_of("--config", tmp_path / "on.yaml").permute
    assert not config_of("--config", tmp_path / "on.yaml", "--no-permute").permute


def test_options_are_numbers_as_people_write_them_and_go_on_top_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text("options: {reconstruct: {learning_rate: 1e-3, steps: 3}}\n")
    config = config_of(
        "--config", tmp_path / "file.yaml", "--option", "reconstruct.learning_rate=2e-4", "--option", "dass.exponent=.5"
    )
    assert config.options == {"reconstruct": {"learning_rate": 2e-4, "steps": 3}, "dass": {"exponent": 0.5}}


@pytest.mark.parametrize("content", ["options:", "options: {dass: }", "options: 5", "options: {dass: 0.5}"])
def test_options_of_a_file_that_are_no_mapping_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"options.* give a mapping"):
        config_of("--config", tmp_path / "file.yaml", "--option", "dass.exponent=1")


def test_a_masked_model_is_measured_by_its_masked_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bert().save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    (tmp_path / "text.txt").write_text(text(300))
    assert (
        run(
            "prune",
            tmp_path / "bert",
            tmp_path / "out",
            "--metric",
            "magnitude",
            "--evaluate",
            tmp_path / "text.txt",
            "--window",
            32,
            "--json",
        )
        == 0
    )
    assert printed(capsys)["report"]["evaluations"][0]["metric"] == "masked loss"


BAD: list[tuple[list[str], str]] = [
    (["--metric", "wnda"], "Did you mean 'wanda'"),
    (["--metric", "wanda"], "needs calibration"),
    (["--pattern", "5:4"], "5:4"),
    (["--metric", "magnitude", "--dtype", "int3"], "int3"),
    (["--metric", "magnitude", "--targets", "*.nothing"], "nothing"),
    (["--metric", "magnitude", "--option", "dass"], "NAME.KEY=VALUE"),
    (["--metric", "magnitude", "--option", "dass.exponent=2024-13-45"], "2024-13-45"),
    (["--metric", "magnitude", "--option", "dass.exp=1"], "Did you mean 'exponent'"),
    (["--metric", "magnitude", "--config", "absent.json"], "absent.json"),
    (["--metric", "wanda", "--calibration", "absent.txt"], "absent.txt"),
    (["--metric", "magnitude", "--allocation", "atp"], "atp"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(case[0]) for case in BAD])
def test_errors_are_one_line_without_a_traceback(
    words: list[str], message: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("prune", saved, tmp_path / "out", *words) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("hf-sparse prune: error: ")
    assert not (tmp_path / "out").exists()


def test_errors_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("prune", tmp_path / "absent", tmp_path / "out", "--metric", "magnitude", "--json") == 1
    assert set(printed(capsys)) == {"error", "kind"}


def test_words_that_are_not_understood_end_with_2() -> None:
    for words in (["prun"], [], ["prune", "x"], ["prune", "x", "y", "--patern", "2:4"]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2


def test_the_same_text_for_both_is_refused_unless_told(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prune", saved, tmp_path / "out", "--calibration", tmp_path / "calibration.txt", "--num-samples", 4, "--sequence-length", 32,
             "--evaluate", tmp_path / "calibration.txt", "--window", 16]  # fmt: skip
    assert run(*words) == 1
    assert "--allow-same-text" in capsys.readouterr().err
    assert run(*words, "--allow-same-text") == 0


# ------------------------------------------------------------------------------------------------ the destination


def test_a_non_empty_destination_is_refused_without_overwrite(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old_model(tmp_path / "out")
    assert run("prune", saved, tmp_path / "out", "--metric", "magnitude") == 1
    assert "--overwrite" in capsys.readouterr().err
    assert run("prune", saved, tmp_path / "out", "--metric", "magnitude", "--overwrite") == 0
    assert not (tmp_path / "out" / "old").exists()
    assert hf_sparse.is_sparse(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))


def test_a_full_disk_keeps_the_old_destination(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old_model(tmp_path / "out")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    assert run("prune", saved, tmp_path / "out", "--metric", "magnitude", "--overwrite") == 1
    assert "No space" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "old"]
    assert not list(tmp_path.glob(".out*"))


def test_a_rename_that_fails_brings_the_old_destination_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    destination = tmp_path / "out"
    old_model(destination)
    original = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if ".partial-" in self.name and not self.name.endswith("-old"):
            raise OSError(5, "Input/output error")
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Input/output"), complete_folder(destination, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert sorted(path.name for path in destination.iterdir()) == ["config.json", "old"]


def test_killed_while_saving_leaves_the_old_destination_and_nothing_that_loads(saved: Path, tmp_path: Path) -> None:
    old_model(tmp_path / "out")
    code = f"""
import os, signal, transformers.modeling_utils as m
def killed(*a, **k): os.kill(os.getpid(), signal.SIGKILL)
m.safe_save_file = killed
from hf_sparse.cli import main
main(["prune", {str(saved)!r}, {str(tmp_path / "out")!r}, "--metric", "magnitude", "--overwrite"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "old"]
    for left in tmp_path.glob(".out*"):
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(left)


def test_overwrite_never_takes_something_else_with_it(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "dense")
    monkeypatch.chdir(tmp_path / "photos")
    for destination, words in {
        tmp_path: "would be lost",  # holds the source
        tmp_path / "photos": "holds no model",
        Path("."): "holds no model",
        tmp_path / "link": "is a link",
        tmp_path / "calibration.txt": "is a file",
        tmp_path / "calibration.txt" / "inner": "cannot be made",
    }.items():
        assert run("prune", saved, destination, "--metric", "magnitude", "--overwrite") == 1
        assert words in capsys.readouterr().err, destination
    assert (tmp_path / "photos" / "one").read_text() == "mine"
    assert (saved / "model.safetensors").is_file()


def test_what_a_kill_before_the_last_rename_leaves_does_not_load(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise KeyboardInterrupt
        return original(self, target)

    original = Path.rename
    monkeypatch.setattr(Path, "rename", killed)
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # a killed process cleans nothing up
    assert run("prune", saved, tmp_path / "out", "--metric", "magnitude") == 130
    left = list(tmp_path.glob(".out.partial-*"))
    assert len(left) == 1
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(left[0])


@pytest.mark.parametrize("spoil", ["cut", "shapes", "config", "nested"])
def test_a_damaged_model_is_one_line(
    spoil: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((saved / "config.json").read_text())
    if spoil == "cut":
        (saved / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:-100])
    elif spoil == "nested":
        (saved / "config.json").write_text("[" * 100000)
    else:
        changed = {"hidden_size": 64} if spoil == "shapes" else {"num_hidden_layers": "two"}
        (saved / "config.json").write_text(json.dumps({**config, **changed}))
    capsys.readouterr()
    assert run("prune", saved, tmp_path / "out", "--metric", "magnitude", "--json") == 1
    captured = capsys.readouterr()
    assert set(json.loads(captured.out)) == {"error", "kind"}
    assert captured.err.splitlines()[-1].startswith("hf-sparse prune: error: ")
    assert "Traceback" not in captured.err
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ the other commands


def test_evaluate(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", saved, "--text", tmp_path / "evaluation.txt", "--window", 16, "--stride", 8, "--json") == 0
    found = printed(capsys)
    assert found["metric"] == "perplexity"
    assert (found["window"], found["stride"]) == (16, 8)
    assert run("evaluate", saved, "--text", tmp_path / "evaluation.txt", "--window", 16) == 0
    assert "perplexity" in capsys.readouterr().out


def test_methods_lists_every_metric(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("methods", "--json") == 0
    found = printed(capsys)
    assert {"magnitude", "wanda", "ria", "dass"} <= {entry["name"] for entry in found["metrics"]}
    assert all(entry["summary"] and entry["source"] for entry in found["metrics"])
    assert run("methods") == 0
    assert "exponent=0.5" in capsys.readouterr().out


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hf_sparse", "methods"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "wanda" in done.stdout


def test_the_demo_runs_end_to_end_on_little_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    assert run("demo", "--output", tmp_path / "demo", "--windows", 4, "--num-samples", 4, "--json") == 0
    found = printed(capsys)
    values = {row["name"]: row["perplexity"] for row in found["rows"]}
    assert set(values) == {"dense", "magnitude", "wanda", "dass", "sparsegpt", "default"}
    assert values["dense"] < min(value for name, value in values.items() if name != "dense")
    assert values["default"] < min(values[name] for name in ("magnitude", "wanda", "dass"))
    assert found["seconds"] <= time.monotonic() - start
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "demo")
    assert recipe_words(hf_sparse.report(model).config) == found["best"]["recipe"]
    assert model.dtype == torch.bfloat16
    assert all(len(generated) > 20 for generated in found["generated"])
    assert {"README.md", "hf_sparse_report.png"} <= set(os.listdir(tmp_path / "demo"))


def test_calibration_and_evaluation_text_of_the_demo_differ() -> None:
    from hf_sparse import stdlib_text

    assert stdlib_text.fingerprint("calibration") != stdlib_text.fingerprint("evaluation")
    assert not set(stdlib_text.files("calibration")) & set(stdlib_text.files("evaluation"))


def test_rows_as_numpy_file(saved: Path, tmp_path: Path) -> None:
    import numpy

    numpy.save(tmp_path / "rows.npy", token_rows(4, 16).clamp_max(12).numpy())
    assert (
        run(
            "prune",
            saved,
            tmp_path / "out",
            "--metric",
            "wanda",
            "--calibration",
            tmp_path / "rows.npy",
            "--num-samples",
            4,
        )
        == 0
    )


@pytest.mark.parametrize(
    ("kind", "name", "needs"),
    [
        ("metrics", "magnitude", False),
        ("metrics", "sparsegpt", True),
        ("allocations", "uniform", False),
        ("allocations", "atp", True),  # unless its step is given
        ("allocations", "owl", True),
        ("updates", "none", False),
        ("updates", "reconstruct", True),
    ],
)
def test_methods_tell_what_needs_calibration(
    kind: str, name: str, needs: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("methods", "--json") == 0
    assert next(entry for entry in printed(capsys)[kind] if entry["name"] == name)["needs_calibration"] is needs


# ------------------------------------------------------------------------------------------------ what reaches the terminal

SECRET = "hf_SECRET"


def quoting(error: type[Exception], message: str) -> Any:
    """A function that fails with a message in which the token stands."""

    def fail(arguments: argparse.Namespace, *_: object) -> None:
        logging.getLogger("transformers").warning("a log line with %s", arguments.token)
        raise error(message.format(token=arguments.token))

    return fail


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize("traceback", ["", "1"], ids=["line", "traceback"])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError, "401 for {token}"),
        (OSError, "no answer of https://user:{token}@huggingface.co/api?token={token}"),
        (ValueError, "Illegal header value b'Bearer {token}\\n'"),
        (ConfigError, "\x1b[31m{token} is not allowed"),
        (KeyError, "{token}"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_no_secret_is_shown(
    error: type[Exception], message: str, traceback: str, more: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_SPARSE_TRACEBACK", traceback)
    monkeypatch.setattr(prune, "load_model", quoting(error, message))
    words = ["prune", "user/model", tmp_path / "out", "--metric", "magnitude", "--token", SECRET, *more]
    assert run(*words) == 1
    out, shown = capsys.readouterr()
    assert SECRET not in out + shown
    assert "hf-sparse prune: error: " in shown
    assert "\x1b" not in out + shown
    assert ("Traceback" in shown) == bool(traceback and error is not ConfigError)
    assert "***" in (json.loads(out)["error"] if more else shown.splitlines()[-1])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [["methods", "--token", SECRET], ["prune", "a", "b", "--tokn", SECRET], ["prune", "a", "b", "--tok", SECRET, "c"],
     ["prune", "a", "b", f"--token={SECRET}", f"--nothing={SECRET}"], ["prune", "a", "b", "--hub-token", SECRET]],
)  # fmt: skip
def test_words_that_are_not_understood_show_no_secret(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(*words)
    out, error = capsys.readouterr()
    assert SECRET not in out + error
    assert "unrecognized arguments: " in error


@pytest.mark.slow  # the client tries again and again
def test_a_refused_connection_shows_no_secret(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    environment = {
        **os.environ, "HF_ENDPOINT": f"http://me:{SECRET}@127.0.0.1:{port}", "HF_TOKEN": SECRET, "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0", "HF_SPARSE_TRACEBACK": "1", "HF_HUB_VERBOSITY": "debug", "TRANSFORMERS_VERBOSITY": "debug",
    }  # fmt: skip
    words = ["prune", "user/model", str(tmp_path / "out"), "--metric", "magnitude", "--token", SECRET, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "hf_sparse", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "http://***@127.0.0.1" in json.loads(done.stdout)["error"]
    assert "Traceback" in done.stderr
    assert SECRET not in done.stdout + done.stderr


def test_no_secret_is_written(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = "hf_" + "aB3" * 12
    calibration = tmp_path / secret
    calibration.mkdir()
    (calibration / "text.txt").write_text(text(600))
    done = run("prune", saved, tmp_path / "out", "--metric", "wanda", "--calibration", calibration / "text.txt", "--num-samples", 2,
               "--sequence-length", 16, "--evaluate", tmp_path / "evaluation.txt", "--window", 16, "--token", secret)  # fmt: skip
    assert done == 0
    written = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert {"config.json", "README.md", "hf_sparse_report.json"} <= {file.name for file in written}
    assert [file.name for file in written if secret.encode() in file.read_bytes()] == []
    assert secret not in "".join(capsys.readouterr())


def test_control_characters_of_any_command_are_replaced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hf_sparse.cli import methods

    def noisy(_: argparse.Namespace) -> None:
        print("a\x1b[31m\tb\r\n\x07", end="\n")
        sys.stdout.writelines(["c\u202e\n", "d\ud800"])
        print("\r 50 %\x1b[A", end="", file=sys.stderr)
        assert (sys.stdout.encoding, sys.stdout.isatty()) == (before[0].encoding, False)

    monkeypatch.setattr(methods, "run", noisy)
    before = (sys.stdout, sys.stderr)
    assert run("methods") == 0
    assert (sys.stdout, sys.stderr) == before
    out, error = capsys.readouterr()
    assert out == "a\ufffd[31m\tb\ufffd\n\ufffd\nc\ufffd\nd\ufffd"
    assert error == "\r 50 %\x1b[A"  # a progress bar


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("\r 50 %|\u2588\u258c| 1/2\x1b[A\x1b[K\n\t", None),
        ("\x1b[31mred\x1b[0m \x1b[38;2;255;0;0mred\x1b[m", None),
        ("\x1b[2J\x1b[1;1H", "\ufffd[2J\ufffd[1;1H"),
        ("\x1b]0;title\x07\x9b2J\x1bc", "\ufffd]0;title\ufffd\ufffd2J\ufffdc"),
        ("\x1b[?25l\x1b[\x1b", "\ufffd[?25l\ufffd[\ufffd"),
        ("a\x08\x0b\x0c\u202e\ud800", "a" + "\ufffd" * 5),
        (f"\x1b[{'1' * 25}m", f"\ufffd[{'1' * 25}m"),
    ],
    ids=["progress bar", "colours", "clear", "title", "parts", "others", "long"],
)
def test_of_control_sequences_only_those_of_progress_bars_and_colours_reach_stderr(
    written: str, shown: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hf_sparse.cli import methods

    monkeypatch.setattr(methods, "run", lambda _: print(written, end="", file=sys.stderr))
    assert run("methods") == 0
    assert capsys.readouterr().err == (written if shown is None else shown)


@pytest.mark.parametrize("option", ["--t", "--to", "--tok", "--token", "--tokn", "--hub-token", "-token"])
def test_a_token_is_hidden_however_its_option_is_shortened(option: str) -> None:
    for words in ([option, SECRET], [f"{option}={SECRET}"]):
        assert SECRET in output._forms(output._tokens(words))


@pytest.mark.parametrize("option", ["--tolerance", "--tol", "--total", "--text", "--trust-remote-code", "--targets"])
def test_the_value_of_another_option_is_no_secret(option: str) -> None:
    for words in ([option, "0.0001"], [f"{option}=0.0001"]):
        assert output._forms(output._tokens(words)) == []


def test_letters_that_a_terminal_does_not_have_are_no_failure(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from hf_sparse.cli import methods

    monkeypatch.setattr(methods, "run", lambda _: print("größe \x1b"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert run("methods") == 0
    assert sys.stdout.buffer.getvalue() == b"gr\\xf6\\xdfe \\ufffd\n"


def test_output_that_nobody_reads_ends_quietly(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert run("methods") == 141
        print("nowhere")
        monkeypatch.undo()
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_pipe_that_is_cut_short_ends_quietly() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "hf_sparse", "methods"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:  # fmt: skip
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 141
