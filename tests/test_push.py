"""`hf-sparse push`: a folder as it lies there becomes one commit, or an error that says what to do."""

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hub.client import Hub
from huggingface_hub import ModelCard, snapshot_download
from models import llama
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_publish import REPOSITORY, pruned, told

from hf_sparse.cli import main
from hf_sparse.cli.recording import record
from hf_sparse.report import Report
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


@pytest.mark.parametrize(("words", "said"), [((), ""), (("--create-pr",), "; no pull request was opened")])
def test_pushed_again_nothing_changes_and_it_says_so(
    words: tuple[str, ...], said: str, saved: Path, push: Answer, hub: Hub
) -> None:
    assert json.loads(push(saved, "--json")[1])["changed"] is True
    head = hub.head(REPOSITORY)
    code, out, _ = push(saved, *words)
    assert code == 0
    assert (
        out == f"nothing changed: {REPOSITORY} has all of it already{said}: {hub.endpoint}/{REPOSITORY}/commit/{head}\n"
    )
    assert json.loads(push(saved, "--json", *words)[1])["changed"] is False
    assert list(hub.branches(REPOSITORY).values()) == [head]


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


# ---------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("name", ["notes.txt", "README.md", "figures/loss.svg", "broken.txt"])
def test_a_link_out_of_the_folder_is_not_followed(name: str, saved: Path, push: Answer, hub: Hub) -> None:
    secret = saved.parent / "secret"
    if name != "broken.txt":
        secret.write_text("SECRET")
    (saved / name).unlink(missing_ok=True)
    (saved / name).parent.mkdir(exist_ok=True)
    (saved / name).symlink_to(secret)
    code, out, _ = push(saved)
    assert code == 0
    assert f"left out, as links to what is outside of the folder: {name}\n" in out
    assert all(b"SECRET" not in content for content in told(hub)[0].values())


def test_a_linked_folder_is_not_followed(saved: Path, push: Answer, hub: Hub) -> None:
    (saved.parent / "other").mkdir()
    (saved.parent / "other" / "secret").write_text("SECRET")
    (saved / "other").symlink_to(saved.parent / "other")
    assert json.loads(push(saved, "--json")[1])["left_out"] == ["other"]
    assert not {name for name in told(hub)[0] if name.startswith("other")}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_model_that_is_a_link_out_of_the_folder_is_refused(name: str, saved: Path, push: Answer, hub: Hub) -> None:
    (saved / name).rename(saved.parent / name)
    (saved / name).symlink_to(saved.parent / name)
    code, _, errors = push(saved)
    assert code == 1
    assert f"{name} in {str(saved)!r} is a link" in errors
    assert not hub.requests()


def test_a_link_within_the_folder_is_followed(saved: Path, push: Answer, hub: Hub) -> None:
    (saved / "notes.md").write_text("Notes.")
    (saved / "NOTES").symlink_to("notes.md")
    push(saved)
    assert told(hub)[0]["NOTES"] == b"Notes."


@pytest.mark.parametrize("cache", [None, "elsewhere"])
def test_a_snapshot_of_the_cache_is_published(
    cache: str | None, saved: Path, push: Answer, hub: Hub, tmp_path: Path
) -> None:
    push(saved)
    folder = Path(snapshot_download(REPOSITORY, cache_dir=cache and tmp_path / cache))
    assert (folder / "model.safetensors").is_symlink()
    assert push(folder, repository="user/copy")[0] == 0
    assert hub.files("user/copy") == hub.files(REPOSITORY)


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


HEADER = "license: mit\ndatasets:\n- my/data\n"


def with_header(values: str, readme: str) -> str:
    return readme.replace("---\n", f"---\n{values}", 1)


def test_header_values_set_in_the_folder_are_published(saved: Path, push: Answer, hub: Hub) -> None:
    push(saved)
    file = saved / "README.md"
    file.write_text(with_header(HEADER, file.read_text()))
    assert push(saved)[0] == 0
    data = ModelCard(told(hub)[0]["README.md"].decode()).data
    assert (data.license, data.datasets) == ("mit", ["my/data"])
    assert "nothing changed" in push(saved)[1]


def test_of_two_values_in_the_headers_one_is_chosen(saved: Path, push: Answer, hub: Hub) -> None:
    push(saved)
    there = hub.files(REPOSITORY)["README.md"].decode()
    hub.edit(REPOSITORY, "README.md", with_header("license: apache-2.0\n", there))
    (saved / "README.md").write_text(with_header(HEADER, there))
    code, _, errors = push(saved)
    assert code == 1
    assert "--readme folder or --readme repository" in errors
    assert push(saved, "--readme", "repository")[0] == 0
    assert ModelCard(told(hub)[0]["README.md"].decode()).data.license == "apache-2.0"


def test_a_readme_with_less_than_the_repositorys_changes_nothing_of_it(saved: Path, push: Answer, hub: Hub) -> None:
    push(saved)
    there = hub.files(REPOSITORY)["README.md"].decode()
    edit = with_header(HEADER, there.replace(part_of(there), f"Their words.\n\n{part_of(there)}"))
    hub.edit(REPOSITORY, "README.md", edit)
    assert push(saved)[0] == 0
    assert told(hub)[0]["README.md"].decode() == edit


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


def adapter_beside(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else", "peft_type": "LORA"}')


def latin_readme(folder: Path) -> None:
    with (folder / "README.md").open("ab") as file:
        file.write(b"caf\xe9")


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
        (adapter_beside, "an adapter beside a model.*move adapter_config.json"),
        (latin_readme, "README.md' is not UTF-8 text"),
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


# ---------------------------------------------------------------------------------------------------- figures recorded


def test_figures_recorded_at_once_all_stay(saved: Path, push: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each recording waits, between reading the report and writing it, for the others to begin: without a lock all but one are lost."""
    together = threading.Barrier(3)
    save = Report.save

    def slow(self: Report, folder: Any) -> Path:
        with suppress(threading.BrokenBarrierError):
            together.wait(timeout=0.2)
        return save(self, folder)

    monkeypatch.setattr(Report, "save", slow)
    figures = [{"text": f"text {number}", "dense": None, "sparse": 2.0 + number} for number in range(3)]
    threads = [threading.Thread(target=record, args=(saved, [figure])) for figure in figures]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.undo()
    assert {values["sparse"] for values in Report.load(saved).evaluations} == {2.0, 3.0, 4.0}
