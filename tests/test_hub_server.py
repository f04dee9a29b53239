"""The test Hub speaks the protocol of the real client: what other tests see through it is what they would see on the Hub."""

import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import huggingface_hub
import pytest
import torch
from hub.client import Hub, pointed_at
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from models import llama, tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

NAME = "user/tiny"
# Older clients have ModelCard.validate ask the real Hub, whatever the endpoint is.
CHECKS_HERE = huggingface_hub.__version__ >= "2"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # huggingface_hub's own


def equal(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def api(hub: Hub) -> HfApi:
    return HfApi()


# ------------------------------------------------------------------------------------------------ the fixture


def test_the_process_is_offline_again_afterwards(tmp_path: Path) -> None:
    def settings() -> dict[str, Any]:
        return {name: value for name, value in vars(constants).items() if name.isupper()}

    before = settings()
    sys.modules.pop("huggingface_hub.utils._git_credential", None)
    with pointed_at("http://127.0.0.1:9", tmp_path, []):
        assert str(tmp_path) in constants.HF_HUB_CACHE
        from huggingface_hub.utils import _git_credential  # has a copy, made while the other endpoint holds

        assert HfApi().endpoint == "http://127.0.0.1:9"
        assert not constants.HF_HUB_OFFLINE
    assert settings() == before
    assert before["ENDPOINT"] == HfApi().endpoint == _git_credential.ENDPOINT
    with pytest.raises(OfflineModeIsEnabled):
        HfApi().model_info(NAME)


def test_each_test_finds_an_empty_hub(hub: Hub, api: HfApi) -> None:
    assert not hub.exists(NAME)
    api.create_repo("tiny")
    assert hub.exists(NAME)
    hub.reset()
    assert not hub.exists(NAME)
    assert hub.requests() == []


def test_what_the_server_does_not_speak_is_recorded(hub: Hub, api: HfApi) -> None:
    with pytest.raises(HfHubHTTPError, match="501"):
        api.list_repo_likers(NAME).__next__()
    assert [seen.method for seen in hub.requests_unknown()] == ["GET"]
    hub.reset()


def test_a_fresh_process_uses_the_server(hub: Hub) -> None:
    hub.edit(NAME, "note.txt", "text")
    code = (
        "from huggingface_hub import hf_hub_download as get; print(open(get('user/tiny', 'note.txt')).read(), end='')"
    )
    assert hub.run(code).stdout == "text"
    assert hub.run(code, token=None).stdout == "text"
    assert {seen.authorised for seen in hub.requests("HEAD .*note")} == {True, False}


def test_secrets_are_found_where_they_leak(hub: Hub) -> None:
    hub.home.mkdir()
    (hub.home / "kept").write_text(f"x{hub.token}x")
    assert hub.leaks("fine", f"a {hub.other_token}") == [f"a {hub.other_token}", str(hub.home / "kept")]


# ------------------------------------------------------------------------------------------------ repositories


def test_whoami(hub: Hub, api: HfApi) -> None:
    assert api.whoami()["name"] == "user"
    assert HfApi(token=hub.other_token).whoami()["name"] == "other"
    with pytest.raises(HfHubHTTPError, match="Invalid"):
        HfApi(token="hf_wrong").whoami()


@pytest.mark.parametrize("private", [False, True, None])
def test_creating_a_repository(private: bool | None, hub: Hub, api: HfApi) -> None:
    assert api.create_repo("tiny", private=private).repo_id == NAME
    assert hub.is_private(NAME) == bool(private)
    assert api.model_info(NAME).private == bool(private)
    assert api.create_repo(NAME, exist_ok=True).repo_id == NAME
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(NAME)


def test_a_private_repository_is_there_for_its_owner_only(
    hub: Hub, api: HfApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama().push_to_hub(NAME, private=True)
    assert api.repo_exists(NAME)
    assert not HfApi(token=hub.other_token).repo_exists(NAME)
    monkeypatch.delenv("HF_TOKEN")
    assert not api.repo_exists(NAME)
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download(NAME, "config.json")
    with pytest.raises(OSError, match="private repository"):
        AutoModelForCausalLM.from_pretrained(NAME)
    assert equal(AutoModelForCausalLM.from_pretrained(NAME, token=hub.token), llama())


@pytest.mark.parametrize(
    ("token", "status"), [("", 401), ("hf_wrong", 401), ("other", 403)], ids=["none", "wrong", "another's"]
)
def test_only_the_owner_writes(token: str, status: int, hub: Hub, api: HfApi, monkeypatch: pytest.MonkeyPatch) -> None:
    api.create_repo(NAME)
    stranger = HfApi(token=hub.other_token if token == "other" else token or False)
    calls: list[Any] = [
        lambda: stranger.create_repo("user/more"),
        lambda: stranger.create_branch(NAME, branch="mine"),
        lambda: stranger.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=NAME),
        lambda: stranger.upload_file(path_or_fileobj=b"x\0", path_in_repo="x.bin", repo_id=NAME),
    ]
    for call in calls:
        with pytest.raises(HfHubHTTPError) as raised:
            call()
        assert raised.value.response.status_code == status
        assert hub.token not in str(raised.value)
    assert hub.files(NAME) == {}
    assert set(hub.branches(NAME)) == {"main"}


# ------------------------------------------------------------------------------------------------ looking


def test_model_info(hub: Hub, api: HfApi) -> None:
    hub.edit(NAME, "README.md", "---\ntags: [sparse]\nlicense: mit\npipeline_tag: text-generation\n---\n# A card\n")
    head = hub.edit(NAME, "model.safetensors", b"weights")
    info = api.model_info(NAME, files_metadata=True)
    siblings = {sibling.rfilename: sibling for sibling in info.siblings}
    assert (info.id, info.sha, info.pipeline_tag, info.card_data.license) == (NAME, head, "text-generation", "mit")
    assert info.tags == ["sparse"]
    assert siblings["model.safetensors"].lfs.sha256 == hashlib.sha256(b"weights").hexdigest()
    assert siblings["README.md"].lfs is None
    assert api.model_info(NAME, expand=["siblings"]).card_data is None
    assert api.model_info(NAME, revision=hub.commits(NAME)[1]["oid"]).sha == hub.commits(NAME)[1]["oid"]


def test_trees_come_in_pages_and_name_hashes(hub: Hub, api: HfApi) -> None:
    api.create_repo(NAME)
    names = [f"folder/part-{number:03}.txt" for number in range(120)]
    content = b"weights"
    operations = [CommitOperationAdd(name, name.encode()) for name in names]
    api.create_commit(NAME, [*operations, CommitOperationAdd("model.bin", content)], commit_message="many")
    tree = {entry.path: entry for entry in api.list_repo_tree(NAME, recursive=True)}
    assert set(tree) == {*names, "folder", "model.bin", ".gitattributes"}
    assert len(hub.requests("GET /api/models/user/tiny/tree")) == 3
    assert (tree["model.bin"].lfs.sha256, tree["model.bin"].size) == (hashlib.sha256(content).hexdigest(), 7)
    assert tree[names[0]].blob_id == hashlib.sha1(b"blob %d\0" % len(names[0]) + names[0].encode()).hexdigest()
    assert {entry.path for entry in api.list_repo_tree(NAME)} == {".gitattributes", "folder", "model.bin"}
    assert {entry.path for entry in api.list_repo_tree(NAME, "folder")} == set(names)
    about = api.get_paths_info(NAME, ["model.bin", "folder", "no such file"])
    assert {entry.path for entry in about} == {"model.bin", "folder"}


def test_what_is_not_there_is_told_apart(hub: Hub, api: HfApi) -> None:
    hub.edit(NAME, "note.txt", "text")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("user/nothing")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(NAME, revision="nothing")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(NAME, "nothing")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(NAME, "note.txt", revision="nothing")
    assert api.file_exists(NAME, "note.txt")
    assert not api.file_exists(NAME, "nothing")
    with pytest.raises(HfHubHTTPError) as raised:
        HfApi(token="hf_wrong").model_info(NAME)
    assert raised.value.response.status_code == 401


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("size", [0, 7, 1_000_000, 1_000_001, 3_500_000])
@pytest.mark.parametrize("name", ["plain.txt", "weights.bin"])
def test_files_go_there_and_back(name: str, size: int, hub: Hub, api: HfApi, tmp_path: Path) -> None:
    content = bytes(ord("a") + index % 26 for index in range(251)) * (size // 251 + 1)
    content = content[:size]
    (tmp_path / name).write_bytes(content)
    api.create_repo(NAME)
    api.upload_file(path_or_fileobj=tmp_path / name, path_in_repo=f"deep/{name}", repo_id=NAME)
    assert hub.files(NAME) == {f"deep/{name}": content}
    assert Path(hf_hub_download(NAME, f"deep/{name}")).read_bytes() == content
    parts = -(-size // 1_000_000) if name == "weights.bin" else 0
    assert len(hub.requests("PUT /store/")) == parts
    assert len(hub.requests("POST /api/complete/")) == (parts > 1)
    assert not [seen for seen in hub.requests("/store/") if seen.authorised]


def test_what_is_in_the_store_is_not_sent_again(hub: Hub, api: HfApi) -> None:
    api.create_repo(NAME)
    for name in ("one.bin", "other.bin"):
        api.upload_file(path_or_fileobj=b"weights", path_in_repo=name, repo_id=NAME)
    assert len(hub.requests("PUT /store/")) == 1
    head = hub.head(NAME)
    api.upload_file(path_or_fileobj=b"weights", path_in_repo="one.bin", repo_id=NAME)
    assert hub.head(NAME) == head


def test_ranges(hub: Hub) -> None:
    hub.edit(NAME, "plain.txt", "0123456789")
    hub.edit(NAME, "large.bin", b"0123456789")
    client = huggingface_hub.get_session()
    for name in ("plain.txt", "large.bin"):
        url = f"{hub.endpoint}/{NAME}/resolve/main/{name}"

        def part(asked: str, url: str = url) -> tuple[int, bytes, str | None]:
            answer = client.get(url, headers={"Range": asked})
            return answer.status_code, answer.content, answer.headers.get("Content-Range")

        assert part("bytes=2-4") == (206, b"234", "bytes 2-4/10")
        assert part("bytes=7-") == (206, b"789", "bytes 7-9/10")
        assert part("bytes=-3") == (206, b"789", "bytes 7-9/10")
        assert part("bytes=5-100") == (206, b"56789", "bytes 5-9/10")
        assert part("bytes=10-") == (416, b"", "bytes */10")
        assert client.get(url).content == b"0123456789"


def test_the_headers_of_safetensors_are_read_without_the_weights(hub: Hub, api: HfApi) -> None:
    llama().push_to_hub(NAME)
    found = api.get_safetensors_metadata(NAME)
    assert found.weight_map["model.norm.weight"] == "model.safetensors"
    assert [seen.status for seen in hub.requests("GET /store/")] == [206]
    llama().push_to_hub("user/sharded", max_shard_size="20KB")
    assert len(api.get_safetensors_metadata("user/sharded").files_metadata) > 1


# ------------------------------------------------------------------------------------------------ commits


def test_commits_add_replace_and_delete(hub: Hub, api: HfApi) -> None:
    api.create_repo(NAME)
    first = api.create_commit(
        NAME,
        [CommitOperationAdd("a.txt", b"1"), CommitOperationAdd("b/c.txt", b"2"), CommitOperationAdd("d.txt", b"3")],
        commit_message="first",
        commit_description="why",
    )
    second = api.create_commit(
        NAME,
        [CommitOperationAdd("a.txt", b"4"), CommitOperationDelete("b/"), CommitOperationDelete("d.txt")],
        commit_message="second",
    )
    assert hub.files(NAME) == {"a.txt": b"4"}
    assert hub.files(NAME, first.oid) == {"a.txt": b"1", "b/c.txt": b"2", "d.txt": b"3"}
    told = [(commit["oid"], commit["title"], commit["description"]) for commit in hub.commits(NAME)]
    assert told == [(second.oid, "second", ""), (first.oid, "first", "why")]
    assert [commit.commit_id for commit in api.list_repo_commits(NAME)][:2] == [second.oid, first.oid]
    with pytest.raises(EntryNotFoundError):
        api.create_commit(NAME, [CommitOperationDelete("nothing")], commit_message="third")


def test_a_commit_on_an_old_parent_is_refused(hub: Hub, api: HfApi) -> None:
    old = hub.edit(NAME, "a.txt", "1")
    hub.edit(NAME, "b.txt", "2")
    with pytest.raises(HfHubHTTPError) as raised:
        api.upload_file(path_or_fileobj=b"x", path_in_repo="c.txt", repo_id=NAME, parent_commit=old)
    assert raised.value.response.status_code == 412
    api.upload_file(path_or_fileobj=b"x", path_in_repo="c.txt", repo_id=NAME, parent_commit=hub.head(NAME))
    assert set(hub.files(NAME)) == {"a.txt", "b.txt", "c.txt"}


def test_branches_tags_and_pull_requests(hub: Hub, api: HfApi) -> None:
    hub.edit(NAME, "a.txt", "1")
    api.create_branch(NAME, branch="half/done")
    api.create_branch(NAME, branch="half/done", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(NAME, branch="half/done")
    api.create_tag(NAME, tag="v1")
    upload: dict[str, Any] = {"path_or_fileobj": b"2", "path_in_repo": "b.txt", "repo_id": NAME}
    api.upload_file(**upload, revision="half/done")
    made = HfApi(token=hub.other_token).upload_file(**upload, create_pr=True)
    assert (made.pr_num, made.pr_revision) == (1, "refs/pr/1")
    assert set(hub.files(NAME)) == set(hub.files(NAME, "v1")) == {"a.txt"}
    assert set(hub.files(NAME, "half/done")) == set(hub.files(NAME, "refs/pr/1")) == {"a.txt", "b.txt"}
    refs = api.list_repo_refs(NAME, include_pull_requests=True)
    assert [ref.name for ref in refs.branches] == ["main", "half/done"]
    assert [ref.name for ref in refs.tags] == ["v1"]
    assert [ref.ref for ref in refs.pull_requests] == ["refs/pr/1"]
    assert Path(hf_hub_download(NAME, "b.txt", revision="refs/pr/1")).read_text() == "2"
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(**upload, revision="nothing")


# ------------------------------------------------------------------------------------------------ cards

GOOD = {
    "nothing": "",
    "the usual": "license: apache-2.0\nlibrary_name: transformers\ntags: [sparse]\nbase_model: a/b\nbase_model_relation: finetune",
    "several bases": "base_model: [a/b, c/d]\nlanguage: [en]",
    "results": "model-index:\n- name: x\n  results:\n  - task: {type: text-generation}\n    dataset: {type: wikitext, name: WikiText}\n"
    "    metrics: [{type: perplexity, value: 7.5}]",
}
WRONG = {
    "license: best-2.0": '"license" must be one of',
    "tags: sparse": '"tags" must be an array',
    "base_model: /home/me/model": '"base_model" with value "/home/me/model" is not valid',
    "base_model: a/b\nbase_model_relation: pruned": '"base_model_relation" must be one of',
    "library_name: [transformers]": '"library_name" must be a string',
    "tags: [unclosed": "YAML parse error",
    "- a\n- list": "must be of type object",
    "model-index:\n- results: []": r'"model-index\[0\].name" is required',
    "model-index:\n- name: x\n  results:\n  - task: {type: t}\n    dataset: {type: d, name: D}": r"results\[0\].metrics",
    "model-index:\n- name: x\n  results:\n  - task: {type: t}\n    metrics: [{type: p, value: 1}]": r"dataset.type",
}


@pytest.mark.skipif(not CHECKS_HERE, reason="this client checks cards on huggingface.co")
@pytest.mark.filterwarnings("ignore:Warnings while validating metadata:UserWarning")  # there may be none
@pytest.mark.parametrize("header", GOOD.values(), ids=GOOD.keys())
def test_a_good_card_is_taken(header: str, hub: Hub) -> None:
    text = f"---\n{header}\n---\n# Title\n" if header else "# Title\n"
    HfApi().create_repo(NAME)
    card = ModelCard(text)
    card.push_to_hub(NAME)
    assert hub.files(NAME)["README.md"].decode() == str(card)
    again = ModelCard.load(NAME)
    assert (again.text.strip(), again.data.to_dict()) == ("# Title", card.data.to_dict())


@pytest.mark.parametrize(("header", "message"), WRONG.items())
def test_a_wrong_card_is_refused(header: str, message: str, hub: Hub, api: HfApi) -> None:
    api.create_repo(NAME)
    card = f"---\n{header}\n---\n# Title\n".encode()
    with pytest.raises(ValueError, match=message):
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=NAME)
    assert hub.files(NAME) == {}
    if CHECKS_HERE and not header.startswith(
        ("tags", "- a", "model-index")
    ):  # with those ModelCard itself refuses or leaves them out
        with pytest.raises(ValueError, match=message):
            ModelCard(card.decode(), ignore_metadata_errors=True).validate()


# ------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("way", ["push", "save"])
def test_models(way: str, shard: str, hub: Hub, tmp_path: Path) -> None:
    model = llama()
    if way == "push":
        model.push_to_hub(NAME, max_shard_size=shard, commit_message="here it is")
    else:
        model.save_pretrained(tmp_path / "tiny", max_shard_size=shard, push_to_hub=True, repo_id=NAME)
    tokenizer().push_to_hub(NAME)
    assert ("model.safetensors.index.json" in hub.files(NAME)) == (shard == "20KB")
    assert len(hub.commits(NAME)) == 2
    assert equal(AutoModelForCausalLM.from_pretrained(NAME), model)
    assert AutoTokenizer.from_pretrained(NAME).vocab_size == tokenizer().vocab_size
    folder = Path(snapshot_download(NAME))
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if not path.is_dir()}
    assert {name: content for name, content in found.items() if name != ".gitattributes"} == hub.files(NAME)
    assert not hub.leaks()


def test_models_on_branches_and_in_pull_requests(hub: Hub) -> None:
    llama().push_to_hub(NAME)
    other = llama(layers=1)
    other.push_to_hub(NAME, revision="small")
    other.push_to_hub(NAME, create_pr=True, token=hub.other_token)
    for revision in ("small", "refs/pr/1", hub.head(NAME, "small")):
        assert equal(AutoModelForCausalLM.from_pretrained(NAME, revision=revision), other)
    assert equal(AutoModelForCausalLM.from_pretrained(NAME), llama())


def test_adapters(hub: Hub) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    llama().push_to_hub(NAME)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(NAME), LoraConfig(target_modules=["q_proj"], r=2))
    model.push_to_hub("user/adapter")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(hub.files("user/adapter"))
    assert json.loads(hub.files("user/adapter")["adapter_config.json"])["base_model_name_or_path"] == NAME
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(NAME), "user/adapter")
    assert equal(model, again)
    assert AutoModelForCausalLM.from_pretrained("user/adapter").peft_config


def test_the_trainer_pushes(hub: Hub, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    settings = TrainingArguments(tmp_path / "out", push_to_hub=True, hub_model_id=NAME, report_to="none", use_cpu=True)
    Trainer(llama(), settings).push_to_hub(commit_message="trained")
    assert {"model.safetensors", "training_args.bin"} <= set(hub.files(NAME))
    assert equal(AutoModelForCausalLM.from_pretrained(NAME), llama())


# ------------------------------------------------------------------------------------------------ steering


def test_faults_hit_what_they_name_as_often_as_they_say(hub: Hub) -> None:
    hub.edit(NAME, "a.txt", "0123456789")
    client = huggingface_hub.get_session()

    def ask(name: str = "a.txt") -> int:
        return client.get(f"{hub.endpoint}/{NAME}/resolve/main/{name}").status_code

    hub.fault("GET", r"a\.txt", after=1, times=2, status=503, headers={"Retry-After": "7"})
    assert [ask("b.txt"), ask(), ask(), ask(), ask()] == [404, 200, 503, 503, 200]
    hub.fault("*", r"a\.txt", times=None, status=500)
    assert [ask(), ask()] == [500, 500]
    hub.clear_faults()
    assert ask() == 200
    hub.fault("GET", r"a\.txt", corrupt=3)
    assert client.get(f"{hub.endpoint}/{NAME}/resolve/main/a.txt").content == b"012#456789"
    hub.fault("GET", r"a\.txt", swap=(NAME, "a.txt", "new"))
    assert [client.get(f"{hub.endpoint}/{NAME}/resolve/main/a.txt").text for _ in range(2)] == ["0123456789", "new"]


@pytest.mark.parametrize("how", ["cut", "reset"])
def test_a_connection_that_breaks_off_is_taken_up_again(
    how: str, hub: Hub, api: HfApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2)
    api.create_repo(NAME)
    hub.fault("PUT", "/store/", times=2, **{how: 3})
    api.upload_file(path_or_fileobj=b"weights", path_in_repo="w.bin", repo_id=NAME)
    assert hub.files(NAME) == {"w.bin": b"weights"}
    assert [seen.status for seen in hub.requests("PUT")] == [0, 0, 200]
    assert hub.sleeps == [1, 2]
    hub.fault("GET", "/store/", cut=3)
    assert Path(hf_hub_download(NAME, "w.bin")).read_bytes() == b"weights"
    assert [seen.status for seen in hub.requests("GET /store/")] == [200, 206]


def test_the_client_waits_as_long_as_it_is_told(hub: Hub) -> None:
    hub.edit(NAME, "a.bin", b"weights")
    hub.fault("GET", "/store/", status=429, headers={"Retry-After": "5"})
    hf_hub_download(NAME, "a.bin")
    assert hub.sleeps == [6.0]  # it adds a second


def test_damage_on_the_way_is_seen_by_the_store_but_not_by_the_client(hub: Hub, api: HfApi) -> None:
    api.create_repo(NAME)
    hub.fault("PUT", "/store/", corrupt=0)
    with pytest.raises(RuntimeError, match=re.escape("w.bin")):
        api.upload_file(path_or_fileobj=b"weights", path_in_repo="w.bin", repo_id=NAME)
    assert hub.files(NAME) == {}
    api.upload_file(path_or_fileobj=b"weights", path_in_repo="w.bin", repo_id=NAME)
    hub.fault("GET", "/store/", corrupt=0)
    assert Path(hf_hub_download(NAME, "w.bin")).read_bytes() == b"geights"  # it looks at the size only


def test_the_store_refuses_a_token(hub: Hub) -> None:
    hub.edit(NAME, "w.bin", b"weights")
    client = huggingface_hub.get_session()
    headers = {"Authorization": f"Bearer {hub.token}"}
    found = client.head(f"{hub.endpoint}/{NAME}/resolve/main/w.bin", headers=headers, follow_redirects=False)
    place = found.headers["Location"]
    assert client.get(place, headers=headers).status_code == 400
    with urlopen(place) as answer:
        assert answer.read() == b"weights"
    assert os.environ["HF_TOKEN"] == hub.token
