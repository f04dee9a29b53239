"""`hf-sparse push`: a folder as it lies there becomes one commit, or an error that says what to do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub.client import Hub
from models import llama
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_publish import REPOSITORY, pruned, told

from hf_sparse.cli import main
from model_cards.parts import part_of

Answer = Callable[..., tuple[int, str, str]]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    pruned().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def push(capsys: pytest.CaptureFixture[str]) -> Answer:
    """Runs the command; exit code, what it printed, and its errors."""

    def run(folder: Path | str, *words: str, repository: str = REPOSITORY) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["push", str(folder), repository, *words])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def test_it_says_what_it_did(saved: Path, push: Answer, hub: Hub) -> None:
    code, out, _ = push(saved)
    assert code == 0
    assert f"pushed 6 files (0.1 MiB) to {REPOSITORY}: {hub.endpoint}/{REPOSITORY}/commit/{hub.head(REPOSITORY)}" in out
    assert [commit["title"] for commit in hub.commits(REPOSITORY)] == ["Upload sparse model"]


def test_json_says_all_of_it(saved: Path, push: Answer, hub: Hub) -> None:
    found = json.loads(push(saved, "--json", "--message", "First")[1])
    assert found["commit"] == hub.head(REPOSITORY)
    assert set(found["files"]) == set(hub.files(REPOSITORY))
    assert hub.commits(REPOSITORY)[0]["title"] == "First"


def test_a_name_alone_is_a_repository_of_ones_own(saved: Path, push: Answer, hub: Hub) -> None:
    assert json.loads(push(saved, "--json", repository="mine")[1])["repository"] == "user/mine"
    assert hub.exists("user/mine")


def test_pushed_again_nothing_changes(saved: Path, push: Answer, hub: Hub) -> None:
    push(saved)
    head = hub.head(REPOSITORY)
    assert push(saved)[0] == 0
    assert hub.head(REPOSITORY) == head


def test_what_is_no_part_of_the_model_is_left_out(saved: Path, push: Answer, hub: Hub) -> None:
    others = [
        "optimizer.pt",
        "training_args.bin",
        "checkpoint-5/config.json",
        "runs/x/events",
        "notes.tmp",
        ".git/config",
        "_private",
    ]
    for name in [*others, "modeling_mine.py", "figures/loss.svg"]:
        (saved / name).parent.mkdir(parents=True, exist_ok=True)
        (saved / name).write_text("{}")
    found = json.loads(push(saved, "--json")[1])
    files = hub.files(REPOSITORY)
    assert not set(others) & set(files)
    assert {"modeling_mine.py", "figures/loss.svg"} <= set(files)
    assert found["left_out"] == sorted(name for name in others if name[0] not in "._")
    assert "left out, as no part of the model: checkpoint-5/config.json" in push(saved)[1]


def test_private(saved: Path, push: Answer, hub: Hub) -> None:
    assert push(saved, "--private")[0] == 0
    assert hub.is_private(REPOSITORY)


def test_private_changes_nothing_that_is_public_and_says_so(saved: Path, push: Answer, hub: Hub) -> None:
    push(saved)
    assert "public" in push(saved, "--private")[1]
    assert not hub.is_private(REPOSITORY)


def test_an_edited_config_is_pushed_with_its_new_hash(saved: Path, push: Answer, hub: Hub) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "note": "mine"}))
    assert push(saved)[0] == 0
    assert json.loads(told(hub)[0]["config.json"])["note"] == "mine"


# ---------------------------------------------------------------------------------------------------- whose text


def edited(file: Path, text: str) -> None:
    readme = file.read_text()
    file.write_text(readme.replace(part_of(readme), f"{text}\n\n{part_of(readme)}"))


def test_a_persons_text_in_the_folder_is_published(saved: Path, push: Answer, hub: Hub) -> None:
    edited(saved / "README.md", "My words.")
    push(saved)
    assert "My words." in told(hub)[0]["README.md"].decode()


@pytest.mark.parametrize(("whose", "kept"), [("folder", "My words."), ("repository", "Their words.")])
def test_of_two_texts_one_is_chosen(whose: str, kept: str, saved: Path, push: Answer, hub: Hub) -> None:
    push(saved)
    readme = hub.files(REPOSITORY)["README.md"].decode()
    hub.edit(REPOSITORY, "README.md", readme.replace(part_of(readme), f"Their words.\n\n{part_of(readme)}"))
    edited(saved / "README.md", "My words.")
    head = hub.head(REPOSITORY)
    code, _, errors = push(saved)
    assert code == 1
    assert "--readme folder or --readme repository" in errors
    assert hub.head(REPOSITORY) == head
    assert push(saved, "--readme", whose)[0] == 0
    now = told(hub)[0]["README.md"].decode()
    assert [words in now for words in ("My words.", "Their words.")] == [kept == "My words.", kept == "Their words."]


def test_the_same_text_on_both_sides_is_no_choice(saved: Path, push: Answer, hub: Hub) -> None:
    edited(saved / "README.md", "My words.")
    push(saved)
    assert push(saved)[0] == 0


# ---------------------------------------------------------------------------------------------------- what cannot be pushed


def absent(folder: Path) -> Any:
    return folder / "absent"


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def dense(folder: Path) -> Any:
    llama().save_pretrained(folder / "dense")
    return folder / "dense"


def adapter(folder: Path) -> Any:
    get_peft_model(pruned(), LoraConfig(r=2, target_modules="all-linear")).save_pretrained(folder / "adapter")
    return folder / "adapter"


def no_report(folder: Path) -> None:
    (folder / "hf_sparse_report.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def other_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def lost_shard(folder: Path) -> Any:
    pruned().save_pretrained(folder / "shards", max_shard_size="10KB")
    sorted((folder / "shards").glob("model-*.safetensors"))[1].unlink()
    return folder / "shards"


def odd_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (absent, "is no folder"),
        (no_config, "no config.json"),
        (broken_config, "JSON"),
        (dense, "prune it first"),
        (adapter, "merge_and_unload"),
        (no_report, "save it again"),
        (no_weights, "no model.safetensors"),
        (other_weights, "model.safetensors in .* is not what was saved"),
        (lost_shard, "is missing"),
        (odd_index, "no index of shards"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_before_anything_is_sent(
    spoil: Callable[[Path], Any], words: str, saved: Path, push: Answer, hub: Hub
) -> None:
    import re

    code, out, errors = push(spoil(saved) or saved)
    assert code == 1
    assert out == ""
    assert re.search(words, errors)
    assert len(errors.splitlines()) == 1
    assert not hub.requests()


@pytest.mark.parametrize(
    ("repository", "words"),
    [("no good name", "USER/NAME"), ("other/sparse", "403"), ("a/b/c", "USER/NAME"), ("embedded", "USER/NAME")],
)
def test_a_repository_that_cannot_be(repository: str, words: str, saved: Path, push: Answer, hub: Hub) -> None:
    code, _, errors = push(saved, repository=repository)
    assert code == 1
    assert words in errors
    assert hub.token not in errors


def test_the_token_that_is_typed_is_used_and_shown_nowhere(
    saved: Path, push: Answer, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, errors = push(saved, "--token", hub.other_token, repository="other/sparse")
    assert code == 0
    assert hub.exists("other/sparse")
    assert not hub.leaks(out, errors)
    assert all(hub.other_token.encode() not in content for content in hub.files("other/sparse").values())


def test_weights_that_were_counted_are_those_that_arrive(saved: Path, push: Answer, hub: Hub) -> None:
    push(saved)
    (saved / "there").write_bytes(told(hub)[0]["model.safetensors"])
    there, here = load_file(saved / "there"), load_file(saved / "model.safetensors")
    assert all(torch.equal(there[name], here[name]) for name in here)
