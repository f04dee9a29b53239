"""Every way to push a sparse model leaves the same in the repository: weights, config, report, picture, card, what reads its input."""

import functools
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub.client import Hub
from huggingface_hub import HfApi, ModelCard
from models import llama, token_rows, tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

import hf_sparse
from hf_sparse import SparsityConfig, prune_
from hf_sparse import hub as hub_module
from hf_sparse.errors import CheckpointError, HubError
from hf_sparse.report import Report
from model_cards.parts import part_of
from trainer_callbacks import KeepMasks

BESIDE = {"config.json", "hf_sparse_report.json", "hf_sparse_report.png", "README.md"}
REPOSITORY = "user/sparse"
CONFIG = SparsityConfig(pattern="2:4", metric="magnitude")


def pruned(folder: Path | None = None, **changes: Any) -> Any:
    """A pruned model; with a folder, one that was loaded from there, where a tokenizer lies beside it."""
    if folder is None:
        model = llama(**changes)
        prune_(model, CONFIG)
        return model
    llama(**changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, sparsity_config=CONFIG)


def rows() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row, "labels": row} for row in token_rows(4, 8)]


def trainer(model: Any, folder: Path, callbacks: list[Any] | None = None, **arguments: Any) -> Trainer:
    return Trainer(
        model,
        TrainingArguments(
            str(folder), hub_model_id=REPOSITORY, use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=2,
            **{"max_steps": 2, "save_strategy": "no", **arguments},
        ),
        train_dataset=rows(), callbacks=callbacks or [], processing_class=tokenizer(),
    )  # fmt: skip


def by_model(model: Any, folder: Path) -> None:
    model.push_to_hub(REPOSITORY)


def by_save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder / "saved", push_to_hub=True, repo_id=REPOSITORY)


def by_pipeline(model: Any, folder: Path) -> None:
    pipeline("text-generation", model=model, tokenizer=tokenizer()).push_to_hub(REPOSITORY)


def by_trainer(model: Any, folder: Path) -> None:
    trainer(model, folder / "runs").push_to_hub()


def by_command(model: Any, folder: Path) -> None:
    from hf_sparse.cli import main

    model.save_pretrained(folder / "saved")
    tokenizer().save_pretrained(folder / "saved")
    assert main(["push", str(folder / "saved"), REPOSITORY]) == 0


WAYS = [by_model, by_save, by_pipeline, by_trainer, by_command]


def told(hub: Hub, revision: str = "main") -> tuple[dict[str, bytes], Report]:
    """The files of a revision, once its report, card and weights have been found to be of one save."""
    files = hub.files(REPOSITORY, revision)
    report = Report.from_dict(json.loads(files["hf_sparse_report.json"]))
    weights = {name for name in files if name.endswith(".safetensors") and "/" not in name}
    assert weights
    assert weights <= set(report.files)
    for name, found in report.files.items():
        assert hashlib.sha256(files[name]).hexdigest() == found, name
    section = part_of(files["README.md"].decode())
    assert section
    for name in weights:
        assert report.files[name] in section
    return files, report


def same(model: Any, other: Any) -> bool:
    here, there = model.state_dict(), other.state_dict()
    return here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)


# ---------------------------------------------------------------------------------------------------- each way


@pytest.mark.parametrize("push", WAYS)
def test_all_is_there_in_one_commit_and_comes_back(push: Callable[..., None], hub: Hub, tmp_path: Path) -> None:
    model = pruned(tmp_path / "dense")
    push(model, tmp_path)
    files, _ = told(hub)
    assert len(hub.commits(REPOSITORY)) == 1
    assert set(files) >= BESIDE | {"model.safetensors", "tokenizer_config.json", "tokenizer.json"}
    loaded = AutoModelForCausalLM.from_pretrained(REPOSITORY)
    assert same(loaded, model)
    assert hf_sparse.report(loaded).to_dict() == hf_sparse.report(model).to_dict()
    assert AutoTokenizer.from_pretrained(REPOSITORY).get_vocab() == tokenizer().get_vocab()


@pytest.mark.parametrize("push", WAYS)
def test_a_second_push_renews_the_card_and_keeps_what_a_person_wrote(
    push: Callable[..., None], hub: Hub, tmp_path: Path
) -> None:
    model = pruned(tmp_path / "dense")
    push(model, tmp_path)
    readme = hub.files(REPOSITORY)["README.md"].decode()
    section = part_of(readme)
    edited = readme.replace(section, f"Above.\n\n{section}\n\nBelow.")
    hub.edit(REPOSITORY, "README.md", edited)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, 0] = 0
    (tmp_path / "saved" / "README.md").unlink(missing_ok=True)
    push(model, tmp_path)
    files, _ = told(hub)
    now = files["README.md"].decode()
    assert now.count("<!-- hf_sparse:begin -->") == 1
    assert part_of(now) != section
    assert now.replace(part_of(now), section) == edited


@pytest.mark.parametrize("push", WAYS)
def test_the_card_of_the_base_model_in_the_repository_is_kept(
    push: Callable[..., None], hub: Hub, tmp_path: Path
) -> None:
    base = "---\nlicense: mit\nlanguage:\n- en # spoken\n---\n# The base\n\nIts story.\n"
    hub.edit(REPOSITORY, "README.md", base)
    push(pruned(tmp_path / "dense"), tmp_path)
    readme = told(hub)[0]["README.md"].decode()
    assert "# The base\n\nIts story.\n" in readme
    assert "- en # spoken" in readme
    data = ModelCard(readme).data
    assert (data.license, data.library_name) == ("mit", "transformers")
    assert {"hf_sparse", "pruned", "2:4"} <= set(data.tags)


def test_an_adapter_comes_with_a_card_of_its_own(hub: Hub, tmp_path: Path) -> None:
    pruned().push_to_hub("user/base")
    model = AutoModelForCausalLM.from_pretrained("user/base")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    torch.nn.init.normal_(adapted.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight)
    adapted.push_to_hub(REPOSITORY)
    files, _ = told(hub)
    assert len(hub.commits(REPOSITORY)) == 1
    assert "model.safetensors" not in files
    data = ModelCard(files["README.md"].decode()).data
    assert (data.library_name, data.base_model, data.base_model_relation) == ("peft", "user/base", "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("user/base"), REPOSITORY)
    assert same(again, adapted)


def test_a_dense_model_is_pushed_as_ever(hub: Hub, tmp_path: Path) -> None:
    llama().push_to_hub("user/with")
    hf_sparse.uninstall()
    try:
        llama().push_to_hub("user/without")
    finally:
        hf_sparse.install()
    assert hub.files("user/with") == hub.files("user/without")


def test_taken_out_nothing_of_ours_is_pushed(hub: Hub) -> None:
    model = pruned()
    hf_sparse.uninstall()
    try:
        model.push_to_hub(REPOSITORY)
    finally:
        hf_sparse.install()
    assert "hf_sparse_report.json" not in hub.files(REPOSITORY)


# ---------------------------------------------------------------------------------------------------- where to


@pytest.mark.parametrize("push", ["python", "command"])
def test_a_branch_is_made(push: str, hub: Hub, tmp_path: Path) -> None:
    model = pruned()
    if push == "python":
        model.push_to_hub(REPOSITORY, revision="sparse")
    else:
        from hf_sparse.cli import main

        model.save_pretrained(tmp_path)
        assert main(["push", str(tmp_path), REPOSITORY, "--revision", "sparse"]) == 0
    told(hub, "sparse")
    assert hub.files(REPOSITORY) == {}
    assert same(AutoModelForCausalLM.from_pretrained(REPOSITORY, revision="sparse"), model)


@pytest.mark.parametrize("push", ["python", "command"])
def test_a_pull_request_is_opened(push: str, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.edit(REPOSITORY, "README.md", "# Theirs\n")
    model = pruned()
    if push == "python":
        done = model.push_to_hub(REPOSITORY, create_pr=True, commit_message="Sparse", commit_description="All of it.")
        assert done.pr_revision == "refs/pr/1"
    else:
        from hf_sparse.cli import main

        model.save_pretrained(tmp_path)
        assert main(["push", str(tmp_path), REPOSITORY, "--create-pr", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["url"].endswith("/discussions/1")
    files, _ = told(hub, "refs/pr/1")
    assert files["README.md"].startswith(b"---\n")
    assert b"# Theirs\n" in files["README.md"]
    assert set(hub.files(REPOSITORY)) == {"README.md"}


def test_private_and_somebody_elses(hub: Hub) -> None:
    model = pruned()
    model.push_to_hub(REPOSITORY, private=True)
    assert hub.is_private(REPOSITORY)
    with pytest.raises(Exception, match=r"403|rights|permission"):
        model.push_to_hub("other/sparse")
    assert not hub.exists("other/sparse")


# ---------------------------------------------------------------------------------------------------- what was there


@pytest.mark.parametrize("sizes", [("1KB", "50GB"), ("50GB", "1KB"), ("2KB", "1KB")])
def test_weights_of_another_sharding_do_not_stay_behind(sizes: tuple[str, str], hub: Hub) -> None:
    pruned().push_to_hub(REPOSITORY, max_shard_size=sizes[0])
    torch.manual_seed(1)
    model = pruned()
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.push_to_hub(REPOSITORY, max_shard_size=sizes[1])
    files, report = told(hub)
    assert {name for name in files if "safetensors" in name} == {name for name in report.files if "safetensors" in name}
    assert same(AutoModelForCausalLM.from_pretrained(REPOSITORY), model)


def test_a_commit_that_comes_in_between_is_kept(hub: Hub) -> None:
    model = pruned()
    model.push_to_hub(REPOSITORY)
    section = part_of(hub.files(REPOSITORY)["README.md"].decode())
    edited = f"---\nlicense: mit\n---\n# Edited meanwhile\n\n{section}\n"
    hub.fault("GET", r"README\.md", swap=(REPOSITORY, "README.md", edited))
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.push_to_hub(REPOSITORY)
    readme = told(hub)[0]["README.md"].decode()
    assert "# Edited meanwhile" in readme
    assert ModelCard(readme).data.license == "mit"


def test_a_header_that_is_no_yaml_stops_the_push_before_anything_is_sent(hub: Hub) -> None:
    hub.edit(REPOSITORY, "README.md", "---\nlicense: [mit\n---\n# Theirs\n")
    with pytest.raises(CheckpointError, match="YAML"):
        hf_push(pruned(), REPOSITORY)
    assert set(hub.files(REPOSITORY)) == {"README.md"}
    assert not hub.requests("^PUT")


def hf_push(model: Any, repository: str) -> Any:
    """The last step of every push; Transformers' own first one refuses a README without a readable header."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return model._upload_modified_files(folder, repository, {})


def test_a_tokenizer_in_the_repository_is_not_replaced(hub: Hub, tmp_path: Path) -> None:
    hub.edit(REPOSITORY, "tokenizer_config.json", '{"mine": true}')
    pruned(tmp_path).push_to_hub(REPOSITORY)
    files, _ = told(hub)
    assert files["tokenizer_config.json"] == b'{"mine": true}'
    assert "tokenizer.json" not in files


def test_a_model_of_unknown_origin_comes_without_tokenizer(hub: Hub) -> None:
    pruned().push_to_hub(REPOSITORY)
    assert not {name for name in told(hub)[0] if "tokenizer" in name}


@pytest.mark.parametrize(
    ("local", "there", "pushed"),
    [
        ("", None, None),
        ("# Mine\n", None, "# Mine"),
        ("# Mine\n", "# Theirs\n", "# Theirs"),
        ("", "# Theirs\n", "# Theirs"),
    ],
)
def test_saving_with_push_loses_neither_readme(
    local: str, there: str | None, pushed: str | None, hub: Hub, tmp_path: Path
) -> None:
    if local:
        (tmp_path / "README.md").write_text(local)
    if there is not None:
        hub.edit(REPOSITORY, "README.md", there)
    pruned().save_pretrained(tmp_path, push_to_hub=True, repo_id=REPOSITORY)
    readme = told(hub)[0]["README.md"].decode()
    assert pushed is None or pushed in readme
    here = (tmp_path / "README.md").read_text()
    assert (here == local) if local else part_of(here) == part_of(readme)


def test_only_what_was_saved_is_pushed_from_a_folder_with_other_files(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("private")
    pruned().save_pretrained(tmp_path, push_to_hub=True, repo_id=REPOSITORY)
    assert "notes.txt" not in told(hub)[0]


# ---------------------------------------------------------------------------------------------------- while training


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
@pytest.mark.parametrize("callbacks", [[], [KeepMasks()]], ids=["plain", "KeepMasks"])
def test_each_strategy_pushes_card_and_report_of_the_weights_beside_them(
    strategy: str, callbacks: list[Any], hub: Hub, tmp_path: Path
) -> None:
    run = trainer(
        pruned(), tmp_path, callbacks, push_to_hub=True, hub_strategy=strategy, hub_always_push=True, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    run.train()
    run.push_to_hub()
    commits = [commit for commit in hub.commits(REPOSITORY) if "checkpoint" not in commit["title"]]
    assert len(commits) >= (1 if strategy == "end" else 2)
    for commit in commits:
        told(hub, commit["oid"])
    files, report = told(hub)
    assert same(AutoModelForCausalLM.from_pretrained(REPOSITORY), run.model)
    assert len(report.recoveries) == len(callbacks)
    assert ("Recovery" in files["README.md"].decode()) == bool(callbacks)
    if strategy in ("checkpoint", "all_checkpoints"):
        folder = "last-checkpoint" if strategy == "checkpoint" else "checkpoint-2"
        assert {f"{folder}/{name}" for name in BESIDE} <= set(files)


@pytest.mark.parametrize("strategy", ["end", "every_save", "all_checkpoints"])
def test_a_token_in_the_arguments_is_not_pushed(strategy: str, hub: Hub, tmp_path: Path) -> None:
    run = trainer(
        pruned(), tmp_path, push_to_hub=True, hub_token=hub.token, hub_strategy=strategy, hub_always_push=True, save_strategy="steps",
        save_steps=1,
    )  # fmt: skip
    run.train()
    run.push_to_hub()
    assert hub.token.encode() in (tmp_path / "training_args.bin").read_bytes()  # so there is something to leave out
    for revision in [commit["oid"] for commit in hub.commits(REPOSITORY)]:
        assert not [name for name, content in hub.files(REPOSITORY, revision).items() if hub.token.encode() in content]


def test_while_an_adapter_is_trained(hub: Hub, tmp_path: Path) -> None:
    adapted = get_peft_model(pruned(), LoraConfig(r=2, target_modules="all-linear"))
    run = trainer(
        adapted,
        tmp_path,
        push_to_hub=True,
        hub_strategy="every_save",
        hub_always_push=True,
        save_strategy="steps",
        save_steps=1,
    )
    run.train()
    run.push_to_hub()
    for commit in hub.commits(REPOSITORY):
        files, _ = told(hub, commit["oid"])
        assert "model.safetensors" not in files


def test_the_trainers_own_text_is_renewed_and_a_persons_kept(hub: Hub, tmp_path: Path) -> None:
    model = pruned()
    trainer(model, tmp_path / "first", max_steps=2).push_to_hub()
    readme = hub.files(REPOSITORY)["README.md"].decode()
    assert "Training procedure" in readme
    hub.edit(REPOSITORY, "README.md", readme.replace(part_of(readme), f"My notes.\n\n{part_of(readme)}"))
    run = trainer(model, tmp_path / "second", max_steps=3, learning_rate=0.0123)
    run.train()
    run.push_to_hub()
    now = told(hub)[0]["README.md"].decode()
    assert now.count("My notes.") == 1
    assert now.count("Training procedure") == 1
    assert "0.0123" in now


# ---------------------------------------------------------------------------------------------------- README of a Trainer


EVERY_SAVE = {
    "push_to_hub": True,
    "hub_strategy": "every_save",
    "hub_always_push": True,
    "save_strategy": "steps",
    "save_steps": 1,
}


def trained(folder: Path, **arguments: Any) -> Trainer:
    run = trainer(pruned(), folder, max_steps=1, **EVERY_SAVE, **arguments)
    run.train()
    run._finish_current_push()
    return run


def with_words(words: str, readme: str) -> str:
    return readme.replace(part_of(readme), f"{words}\n\n{part_of(readme)}")


def texts(hub: Hub, folder: Path) -> tuple[str, str]:
    return (folder / "README.md").read_text(), told(hub)[0]["README.md"].decode()


@pytest.mark.parametrize("there", [None, "---\nlicense: mit\n---\n# Mine\n"])
def test_a_persons_readme_in_the_output_folder_is_pushed(there: str | None, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nMy words.\n")
    if there:
        hub.edit(REPOSITORY, "README.md", there)
    run = trained(tmp_path)
    while_training = texts(hub, tmp_path)
    run.push_to_hub()
    for text in (*while_training, *texts(hub, tmp_path)):
        assert "# Mine\n\nMy words.\n" in text
        assert "hf_sparse:trainer" not in text
        assert "license: mit" in text
    assert not (tmp_path / "_README.md").exists()


@pytest.mark.parametrize("again", [False, True], ids=["same Trainer", "another Trainer"])
def test_an_edit_of_what_was_pushed_is_pushed(again: bool, hub: Hub, tmp_path: Path) -> None:
    run = trained(tmp_path)
    file = tmp_path / "README.md"
    file.write_text(with_words("My words.", file.read_text()))
    run = trained(tmp_path) if again else run
    run.push_to_hub()
    assert all(text.count("My words.") == 1 for text in texts(hub, tmp_path))


@pytest.mark.parametrize("where", ["here", "there"])
def test_a_text_taken_out_on_one_side_stays_away(where: str, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Mine\n\nMy words.\n")
    run = trained(tmp_path)
    here, there = texts(hub, tmp_path)
    if where == "here":
        (tmp_path / "README.md").write_text(here.replace("My words.", ""))
    else:
        hub.edit(REPOSITORY, "README.md", there.replace("My words.", ""))
    run.push_to_hub()
    assert all("My words." not in text and "# Mine" in text for text in texts(hub, tmp_path))


@pytest.mark.parametrize("words", ["Mine.", "Mine, as before."])
def test_of_two_texts_the_repositorys_is_pushed_and_the_other_is_kept_beside(
    words: str, hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "README.md").write_text(f"{words}\n")
    (tmp_path / "_README.md").write_text("Mine, as before.\n")
    hub.edit(REPOSITORY, "README.md", "Theirs.\n")
    trained(tmp_path).push_to_hub()
    assert all("Theirs." in text and "Mine" not in text for text in texts(hub, tmp_path))
    assert (tmp_path / "_README.md").read_text() == "Mine, as before.\n"
    kept = "_README-2.md" if words == "Mine." else "_README.md"
    assert (tmp_path / kept).read_text() == f"{words}\n"
    assert f"it is kept as {tmp_path / kept}" in caplog.text
    assert len(list(tmp_path.glob("_README*"))) == (2 if words == "Mine." else 1)
    assert not {name for name in hub.files(REPOSITORY) if "_README" in name}


def test_a_readme_that_is_no_text_is_kept_beside(hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "README.md").write_bytes(b"caf\xe9")
    trained(tmp_path)
    told(hub)
    assert (tmp_path / "_README.md").read_bytes() == b"caf\xe9"
    assert "is not UTF-8" in caplog.text


class Talking(Trainer):
    """Writes a card of its own at every save, as those of TRL do."""

    saves = 0

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        self.saves += 1
        (Path(self.args.output_dir) / "README.md").write_text(
            f"---\ntags:\n- talking\n---\n# Talking\n\nSaved {self.saves}.\n"
        )

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.create_model_card()
        super()._save_checkpoint(*args, **kwargs)


@pytest.mark.parametrize("mine", ["", "# Mine\n"])
def test_a_subclass_that_writes_cards_while_training(
    mine: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "Trainer", Talking)
    if mine:
        (tmp_path / "README.md").write_text(mine)
    run = trained(tmp_path)
    hub.edit(REPOSITORY, "README.md", with_words("Added there.", texts(hub, tmp_path)[1]))
    run.push_to_hub()
    for text in texts(hub, tmp_path):
        assert text.count("Added there.") == 1
        assert text.count("Saved 2.") == (0 if mine else 1)
        assert "Saved 1." not in text
        assert ("# Mine" in text) == bool(mine)
        assert ("talking" in ModelCard(text).data.tags) == (not mine)


@pytest.mark.parametrize("mine", ["", "# Mine\n\nMy words.\n"])
def test_a_card_asked_for_by_hand(mine: str, hub: Hub, tmp_path: Path) -> None:
    run = trainer(pruned(), tmp_path)
    run.save_model()
    if mine:
        (tmp_path / "README.md").write_text(mine)
    run.create_model_card(model_name="by hand")
    text = (tmp_path / "README.md").read_text()
    assert ("Training procedure" in text) == (not mine)
    assert mine in text
    assert bool(part_of(text)) == (not mine)  # what the save has written


def test_the_trainers_text_comes_after_pushes_of_a_card_alone(hub: Hub, tmp_path: Path) -> None:
    trained(tmp_path).push_to_hub()
    for text in texts(hub, tmp_path):
        assert text.count("Training procedure") == 1
        assert text.count("\n# ") == 1


def test_arguments_without_a_name(hub: Hub, tmp_path: Path) -> None:
    run = trainer(pruned(), tmp_path)
    hub.edit(REPOSITORY, "README.md", "# Main\n")
    HfApi().create_branch(REPOSITORY, branch="sparse")
    hub.edit(REPOSITORY, "README.md", "# Theirs\n", revision="sparse")
    run.push_to_hub("Done", True, hub.token, "sparse")
    assert "# Theirs" in told(hub, "sparse")[0]["README.md"].decode()


def test_a_card_that_cannot_be_made_does_not_stop_a_training(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(pruned(), tmp_path)
    hub.edit(REPOSITORY, "README.md", b"\xff\xfe\xfa")
    run.push_to_hub()
    assert "without a new card" in caplog.text
    assert "model.safetensors" in hub.files(REPOSITORY)


def test_the_trainers_methods_come_back(hub: Hub, tmp_path: Path) -> None:
    run = trainer(pruned(), tmp_path)
    run.push_to_hub()
    assert "create_model_card" not in vars(run)
    assert "on_push_begin" not in vars(run.callback_handler)
    wrapped = Trainer.push_to_hub
    hf_sparse.uninstall()
    try:
        assert Trainer.push_to_hub is not wrapped
        assert not hasattr(Trainer.push_to_hub, "__wrapped__")
    finally:
        hf_sparse.install()
    assert hasattr(Trainer.push_to_hub, "__wrapped__")


# ---------------------------------------------------------------------------------------------------- another model there


def in_shards(model: Any, size: str) -> Any:
    model.save_pretrained = functools.partial(type(model).save_pretrained, model, max_shard_size=size)
    return model


@pytest.mark.parametrize("when", ["end", "every_save"])
@pytest.mark.parametrize("sizes", [("1KB", "50GB"), ("50GB", "1KB"), ("2KB", "1KB")])
def test_a_trainer_takes_out_weights_of_another_sharding(
    when: str, sizes: tuple[str, str], hub: Hub, tmp_path: Path
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    pruned().save_pretrained(old, max_shard_size=sizes[0])
    hub.put(REPOSITORY, {path.name: path.read_bytes() for path in old.iterdir()})
    hub.edit(REPOSITORY, "inner/model.safetensors", b"another")
    shutil.copytree(old, new)
    before = len(hub.commits(REPOSITORY))
    model = pruned()
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    run = trainer(in_shards(model, sizes[1]), new, max_steps=1, **({} if when == "end" else EVERY_SAVE))
    if when == "end":
        run.push_to_hub()
    else:
        run.train()
        run._finish_current_push()
    assert len(hub.commits(REPOSITORY)) == before + 1
    files, report = told(hub)
    weights = {name for name in report.files if "safetensors" in name}
    assert {name for name in files if "safetensors" in name} == weights | {"inner/model.safetensors"}
    assert {path.name for path in new.iterdir() if "safetensors" in path.name} == weights
    assert same(AutoModelForCausalLM.from_pretrained(REPOSITORY), model)
    assert same(AutoModelForCausalLM.from_pretrained(new), model)


def with_lora(model: Any) -> Any:
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj"]))
    torch.nn.init.normal_(adapted.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight)
    return adapted


@pytest.mark.parametrize("push", [by_model, by_trainer, by_command])
def test_a_merged_model_takes_the_place_of_its_adapter(push: Callable[..., None], hub: Hub, tmp_path: Path) -> None:
    pruned().push_to_hub("user/base")
    adapted = with_lora(AutoModelForCausalLM.from_pretrained("user/base"))
    adapted.push_to_hub(REPOSITORY)
    assert "# Adapter on base" in told(hub)[0]["README.md"].decode()
    merged = hf_sparse.merge_and_unload(adapted)
    if push is by_trainer:
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "adapter_config.json").write_bytes(hub.files(REPOSITORY)["adapter_config.json"])
    push(merged, tmp_path)
    files, _ = told(hub)
    assert not {name for name in files if name.startswith("adapter")}
    assert same(AutoModelForCausalLM.from_pretrained(REPOSITORY), merged)
    readme = files["README.md"].decode()
    assert "Adapter on" not in readme
    assert readme.count("\n# ") == 1
    assert push is by_trainer or "\n# LlamaForCausalLM, 2:4 sparse\n" in readme
    assert ModelCard(readme).data.library_name == "transformers"


def test_an_adapter_does_not_go_beside_a_whole_model(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pruned().push_to_hub(REPOSITORY)
    head = hub.head(REPOSITORY)
    adapted = with_lora(AutoModelForCausalLM.from_pretrained(REPOSITORY))
    with pytest.raises(HubError, match="a repository of its own"):
        adapted.push_to_hub(REPOSITORY)
    run = trainer(adapted, tmp_path, max_steps=1, **EVERY_SAVE)
    run.train()  # goes to its end
    assert "not pushed: 'user/sparse' holds a whole model" in caplog.text
    with pytest.raises(HubError, match="a repository of its own"):
        run.push_to_hub()
    assert hub.head(REPOSITORY) == head


def test_a_trainer_leaves_whole_weights_in_its_folder_out_of_an_adapters_push(hub: Hub, tmp_path: Path) -> None:
    pruned().save_pretrained(tmp_path)
    trainer(with_lora(pruned()), tmp_path).push_to_hub()
    assert {name for name in told(hub)[0] if name.endswith("safetensors")} == {"adapter_model.safetensors"}
    assert (tmp_path / "model.safetensors").exists()


# ---------------------------------------------------------------------------------------------------- commits


def test_what_comes_in_between_does_not_stay_in_place_of_a_file_that_had_not_changed(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pruned()
    model.push_to_hub(REPOSITORY)
    config = hub.files(REPOSITORY)["config.json"]
    model.add_model_tags(["more"])  # only the card is new
    hub.fault("POST", "/preupload/", swap=(REPOSITORY, "config.json", "{}"))
    hashed = Counter[str]()
    kind = hub_module.CommitOperationAdd
    monkeypatch.setattr(
        hub_module, "CommitOperationAdd", lambda name, content: hashed.update([name]) or kind(name, content)
    )
    model.push_to_hub(REPOSITORY)
    assert told(hub)[0]["config.json"] == config
    assert hashed.pop("README.md") == 2
    assert set(hashed.values()) == {1}


def test_a_pull_request_whose_answer_is_lost_may_be_open(hub: Hub) -> None:
    hub.edit(REPOSITORY, "README.md", "# Theirs\n")
    hub.fault("POST", "/commit/", lost=True)
    with pytest.raises(HubError, match=rf"may be open already: look at {hub.endpoint}/{REPOSITORY}/discussions"):
        pruned().push_to_hub(REPOSITORY, create_pr=True)
    assert "refs/pr/1" in hub.branches(REPOSITORY)


# ---------------------------------------------------------------------------------------------------- coming back


def test_the_report_is_of_the_same_commit_as_the_weights(hub: Hub) -> None:
    model = pruned()
    model.push_to_hub(REPOSITORY)
    hub.fault("GET", r"/store/.*file=model\.safetensors", swap=(REPOSITORY, "hf_sparse_report.json", "{}"))
    loaded = AutoModelForCausalLM.from_pretrained(REPOSITORY)
    assert hf_sparse.report(loaded).to_dict() == hf_sparse.report(model).to_dict()
