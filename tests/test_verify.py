"""Verification: an honest model agrees in everything, and each way to tamper is found by the check that is there for it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub.client import Hub
from models import bert, gpt2, llama, mixtral, phi3, t5, text, token_rows, tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import SparsityConfig, prune_
from hf_sparse.cli import main
from hf_sparse.errors import CheckpointError, ConfigError
from hf_sparse.hashes import hashes_of
from hf_sparse.patterns import Pattern
from hf_sparse.recovery import Recovery
from hf_sparse.report import Report
from hf_sparse.verify import AGREES, DIFFERS, NOT_CHECKED, Row, Verification, verify
from hf_sparse.verify.base import bits_differ
from hf_sparse.verify.measured import windows_of
from hf_sparse.verify.sites import groups_with_more
from model_cards import Evaluation, SparseModelCard, write_card

SITE = "model.layers.0.mlp.down_proj"
WEIGHT = f"{SITE}.weight"
TEXT = "evaluation.txt"
REPOSITORY = "user/sparse"


@pytest.fixture(autouse=True)
def without_pictures(no_pictures: None) -> None:
    """A picture takes longer than all else here, and nothing in it is verified."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `dense`, `out` that was pruned from it and measured on `evaluation.txt`, and `other`, pruned by other scores."""
    folder = tmp_path_factory.mktemp("made")
    llama().save_pretrained(folder / "dense")
    tokenizer().save_pretrained(folder / "dense")
    (folder / TEXT).write_text(text(301)[4:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_sparse.side_files.find_spec", lambda name: None)
        words = ["--metric", "magnitude", "--permute", "--evaluate", str(folder / TEXT), "--window", "16"]
        assert main(["prune", str(folder / "dense"), str(folder / "out"), *words]) == 0
        words = ["--metric", "magnitude", "--axis", "output"]
        assert main(["prune", str(folder / "dense"), str(folder / "other"), *words]) == 0
    return folder


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy of the honest model to tamper with."""
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


def statuses(found: Verification, check: str) -> set[str]:
    return {row.status for row in found.rows if row.check == check}


def differing(found: Verification) -> dict[str, list[Row]]:
    by_check: dict[str, list[Row]] = {}
    for row in found.rows:
        if row.status == DIFFERS:
            by_check.setdefault(row.check, []).append(row)
    return by_check


# ------------------------------------------------------------------------------------------------ honest models


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "mixtral": mixtral,
    "phi3": phi3,
    "gpt2": gpt2,
    "bert": bert,
    "t5": t5,
}


def rows_for(family: str) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row[None], **({"labels": row[None]} if family == "t5" else {})} for row in token_rows()]


@pytest.mark.parametrize(
    "settings",
    [
        {"pattern": "2:4", "metric": "magnitude"},
        {"pattern": "unstructured", "sparsity": 0.6, "metric": "wanda", "num_samples": 8, "sequence_length": 16},
        {"pattern": "2:4", "metric": "magnitude", "permute": True},
    ],
    ids=["magnitude 2:4", "wanda unstructured", "permuted"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_honest_model_agrees(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    FAMILIES[family]().save_pretrained(tmp_path / "dense")
    model = type(FAMILIES[family]()).from_pretrained(tmp_path / "dense")
    data = {"calibration": rows_for(family)} if settings["metric"] == "wanda" else {}
    report = prune_(model, SparsityConfig(**settings, **data))
    model.save_pretrained(tmp_path / "out")
    found = verify(tmp_path / "out")
    assert found.agrees, str(found)
    assert not [row for row in found.rows if row.status == NOT_CHECKED and row.item != "hashes of the Hub"]
    compared = {row.item for row in found.rows if row.check == "base" and row.status == AGREES}
    assert {site.name for site in report.sites} <= compared
    assert len([row for row in found.rows if row.check == "zeros"]) == len(report.sites)


def test_a_permuted_model_is_traced_through_its_permutations(made: Path) -> None:
    report = Report.load(made / "out")
    assert any(order != sorted(order) for order in report.permutations.values())
    assert statuses(verify(made / "out"), "base") == {AGREES}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_model_of_a_wider_number_format_is_rounded_first(dtype: torch.dtype, made: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        made / "dense", dtype=dtype, sparsity_config=SparsityConfig(metric="magnitude")
    )
    model.save_pretrained(tmp_path / "narrow")
    assert statuses(verify(tmp_path / "narrow"), "base") == {AGREES}


def test_shards_and_their_index_are_hashed(made: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(made / "out")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    found = verify(tmp_path / "shards", base=str(made / "dense"))
    assert found.agrees, str(found)
    named = {row.item for row in found.rows if row.check == "files"}
    assert "model.safetensors.index.json (card)" in named
    assert any("00002-of-" in name for name in named)


def test_a_trained_model_keeps_its_zeros_and_no_weights_to_compare(out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        weight = model.get_submodule(SITE).weight
        weight.mul_(1.5)
        weight[0, weight[0].nonzero()[0]] = 0  # a training may hit zero
    report = hf_sparse.report(model)
    assert report is not None
    zeros, size = report.zeros + 1, sum(block.size for block in report.blocks)
    report.add_recovery(recovery(zeros_before=report.zeros, zeros_after=zeros, size=size))
    model.save_pretrained(out)
    found = verify(out)
    assert found.agrees, str(found)
    assert statuses(found, "base") == {NOT_CHECKED}


def recovery(zeros_before: int, zeros_after: int, size: int) -> Recovery:
    return Recovery(
        method="full fine-tuning", callbacks=["KeepMasks"], data="rows", steps=3, tokens=48, sequences=3, learning_rate=1e-3,
        schedule="linear", optimizer="AdamW", batch_size=1, precision="as loaded", seconds=1.0, processes=1, loss="cross-entropy",
        zeros_before=zeros_before, zeros_after=zeros_after, size=size, zeros_lost=0,
    )  # fmt: skip


def test_an_update_leaves_only_what_is_outside_of_the_pruned_blocks_to_compare(made: Path, tmp_path: Path) -> None:
    config = SparsityConfig(
        metric="wanda", update="sparsegpt", calibration=rows_for("llama"), num_samples=8, sequence_length=16
    )
    model = AutoModelForCausalLM.from_pretrained(made / "dense", sparsity_config=config)
    model.save_pretrained(tmp_path / "updated")
    found = verify(tmp_path / "updated")
    assert found.agrees, str(found)
    rows = {row.item: row for row in found.rows if row.check == "base"}
    assert rows["lm_head.weight"].status == AGREES
    assert rows[WEIGHT].status == NOT_CHECKED
    assert "sparsegpt" in rows[WEIGHT].reason


# ------------------------------------------------------------------------------------------------ tampering


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def change_report(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    change_json(folder / "hf_sparse_report.json", change)


def change_card(folder: Path, old: str, new: str) -> None:
    card = folder / "README.md"
    assert old in card.read_text()
    card.write_text(card.read_text().replace(old, new))


def first_site(report: dict[str, Any]) -> dict[str, Any]:
    site: dict[str, Any] = report["blocks"][0]["sites"][0]
    return site


def fill_a_zero(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        weight = tensors[WEIGHT]
        weight.view(-1)[(weight.view(-1) == 0).nonzero()[0]] = 0.5

    change_weights(folder, change)


def move_a_zero(folder: Path) -> None:
    """Three of four are kept in one group, one of four in another of the same row, with as many zeros as before."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        row = tensors[WEIGHT][0]
        row[(row[:4] == 0).nonzero()[0]] = 0.5
        row[4 + (row[4:8] != 0).nonzero()[0]] = 0

    change_weights(folder, change)


def change_a_kept_weight(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        kept = tensors[WEIGHT].view(-1)
        place = kept.nonzero()[0]
        kept[place] = torch.nextafter(kept[place], torch.tensor(9.0))

    change_weights(folder, change)


def change_a_norm(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors["model.norm.weight"].add_(1e-6))


def break_a_weight(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors[WEIGHT][0].fill_(torch.nan))


def drop_a_tensor(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.__delitem__("model.norm.weight"))


def swap_the_file(folder: Path) -> None:
    other = next(
        path for path in (Path(Report.load(folder).model).parent / "other").iterdir() if path.suffix == ".safetensors"
    )
    shutil.copy(other, folder / "model.safetensors")


def take_another_report(folder: Path) -> None:
    model = gpt2()
    prune_(model, SparsityConfig(metric="magnitude")).save(folder)


def lose_a_shard(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    next(folder.glob("model-00002-of-*.safetensors")).unlink()


def swap_two_channels(folder: Path) -> None:
    def change(report: dict[str, Any]) -> None:
        order = next(iter(report["permutations"].values()))
        order[0], order[1] = order[1], order[0]

    change_report(folder, change)


def add_a_file(folder: Path) -> None:
    save_file({"extra": torch.ones(2, 2)}, folder / "extra.safetensors", metadata={"format": "pt"})


TAMPERINGS: dict[str, tuple[Callable[[Path], None], bool, str]] = {
    # what is done; whether the hashes in report and card are made to fit afterwards; the check that has to find it
    "a zero filled": (fill_a_zero, False, "files"),
    "a zero filled, hashes forged": (fill_a_zero, True, "zeros"),
    "three of four kept": (move_a_zero, True, "pattern"),
    "a kept weight changed": (change_a_kept_weight, False, "files"),
    "a kept weight changed, hashes forged": (change_a_kept_weight, True, "base"),
    "another tensor changed": (change_a_norm, True, "base"),
    "NaN": (break_a_weight, True, "weights"),
    "a tensor missing": (drop_a_tensor, True, "weights"),
    "the file swapped": (swap_the_file, False, "files"),
    "the file swapped, hashes forged": (swap_the_file, True, "base"),
    "a shard missing": (lose_a_shard, False, "files"),
    "a file cut": (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 100) and None, True, "weights"),
    "a file that nobody names": (add_a_file, False, "files"),
    "fewer zeros claimed": (
        lambda folder: change_json(folder / "config.json", lambda config: config["hf_sparse"]["totals"].update(zeros=7)), True, "claim",
    ),
    "a higher sparsity claimed": (
        lambda folder: change_json(folder / "config.json", lambda config: config["hf_sparse"]["totals"].update(sparsity=0.9)), True, "claim",
    ),
    "another config claimed": (
        lambda folder: change_json(folder / "config.json", lambda config: config["hf_sparse"]["config"].update(seed=5)), True, "claim",
    ),
    "a site's zeros": (lambda folder: change_report(folder, lambda report: first_site(report).update(zeros=1)), True, "zeros"),
    "a site's sparsity": (lambda folder: change_report(folder, lambda report: first_site(report).update(sparsity=0.9)), True, "zeros"),
    "a site's pattern": (lambda folder: change_report(folder, lambda report: first_site(report).update(pattern="1:4")), True, "pattern"),
    "a site's axis": (lambda folder: change_report(folder, lambda report: first_site(report).update(axis="output")), True, "pattern"),
    "a site that is none": (lambda folder: change_report(folder, lambda report: first_site(report).update(name="none")), True, "zeros"),
    "a site's shape": (lambda folder: change_report(folder, lambda report: first_site(report).update(shape=[4, 4])), True, "zeros"),
    "a block's zeros": (lambda folder: change_report(folder, lambda report: report["blocks"][0].update(zeros=9999)), True, "report"),
    "the number of parameters": (lambda folder: change_report(folder, lambda report: report.update(parameters=10**6)), True, "report"),
    "the report of another model": (take_another_report, True, "zeros"),
    "an order of channels": (swap_two_channels, True, "base"),
    "an order that is none": (
        lambda folder: change_report(folder, lambda report: next(iter(report["permutations"].values())).append(0)), True, "base",
    ),
    "a figure in the report": (
        lambda folder: change_report(folder, lambda report: report["evaluations"][0].update(sparse=2.0)), False, "card",
    ),
    "a hash in the card": (
        lambda folder: change_card(folder, hashes_of(folder)["model.safetensors"], "0" * 64), False, "files",
    ),
    "the zeros in the card": (
        lambda folder: change_card(folder, "| Zeros in the pruned sites | ", "| Zeros in the pruned sites | 9"), False, "card",
    ),
}  # fmt: skip


def forge(folder: Path) -> None:
    """Make the hashes in report and card, and all that the card says, fit what is in the folder now."""
    report = Report.load(folder)
    report.files = hashes_of(folder)
    report.save(folder)
    assert write_card(folder, SparseModelCard.from_folder(folder))


@pytest.mark.parametrize(("tamper", "forged", "check"), TAMPERINGS.values(), ids=TAMPERINGS)
def test_tampering_is_found_by_its_check(
    tamper: Callable[[Path], None], forged: bool, check: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tamper(out)
    if forged:
        forge(out)
    capsys.readouterr()
    assert main(["verify", str(out), "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert not found["agrees"]
    assert check in {row["check"] for row in found["rows"] if row["status"] == DIFFERS}
    if forged:
        assert "files" not in {row["check"] for row in found["rows"] if row["status"] == DIFFERS}


def test_weights_beside_a_pruned_site_in_the_same_tensor_are_compared(tmp_path: Path) -> None:
    phi3().save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    report = prune_(model, SparsityConfig(metric="magnitude", exclude=("*.qkv_proj.k",)))
    assert [name for name in report.left_out if name.endswith(".qkv_proj.k")]
    model.save_pretrained(tmp_path / "out")
    assert verify(tmp_path / "out").agrees
    change_weights(tmp_path / "out", lambda tensors: tensors["model.layers.0.self_attn.qkv_proj.weight"][32:48].mul_(2))
    forge(tmp_path / "out")
    found = differing(verify(tmp_path / "out"))
    assert list(found) == ["base"]
    assert [row.item for row in found["base"]] == ["model.layers.0.self_attn.qkv_proj.weight"]


@pytest.mark.parametrize("figure", ["sparse", "dense"])
def test_a_figure_in_the_header_of_the_card_is_compared(figure: str, out: Path) -> None:
    value = Report.load(out).evaluations[0][figure]
    card = (out / "README.md").read_text()
    header, line, rest = card.partition("\n# ")
    assert str(value) in header
    (out / "README.md").write_text(header.replace(str(value), "1.25") + line + rest)
    assert [row.found for row in differing(verify(out))["card"]] == [value]


def test_a_figure_in_the_table_of_the_card_is_compared(out: Path) -> None:
    value = f"{Report.load(out).evaluations[0]['sparse']:,.4f}"
    change_card(out, f"| {value} |", "| 1.0000 |")
    rows = differing(verify(out))["card"]
    assert {type(row.claimed) for row in rows} == {str, type(None)}  # the row that was, and the one that should be


def test_results_of_other_tools_in_the_header_are_left_alone(out: Path) -> None:
    change_card(out, "      tool: hf_sparse", "      tool: another")
    rows = differing(verify(out))["card"]
    assert [row.reason for row in rows] == ["the header does not state it"]


UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "claim": (lambda folder: change_json(folder / "config.json", lambda config: config.update(hf_sparse=[1])), "hf_sparse"),
    "config": (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    "report": (lambda folder: change_report(folder, lambda report: report.update(blocks=5)), "no report"),
    "pickles": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "pickle can run code",
    ),
    "weights": (lambda folder: (folder / "model.safetensors").unlink(), "no .safetensors"),
    "kind of model": (lambda folder: change_json(folder / "config.json", lambda config: config.update(model_type="x")), "Transformers"),
    "adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "adapter"),
    "card": (lambda folder: (folder / "README.md").write_bytes(b"\xff\xfe\xff"), "UTF-8"),
    "nothing claimed": (
        lambda folder: (
            (folder / "hf_sparse_report.json").unlink(), change_json(folder / "config.json", lambda config: config.pop("hf_sparse")),
        ),
        "nothing that could be verified",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_is_one_line(
    spoil: Callable[[Path], object], message: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(out)
    assert main(["verify", str(out)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


# ------------------------------------------------------------------------------------------------ the base model


def renamed(folder: Path, model: str) -> None:
    change_report(folder, lambda report: report.update(model=model))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("", "made in memory"), ("/absent/model", "is not here"), ("user/absent", "cannot be had")],
)
def test_a_base_model_that_is_not_there_is_a_reason_and_no_difference(name: str, reason: str, out: Path) -> None:
    renamed(out, name)
    forge(out)
    rows = [row for row in verify(out).rows if row.check == "base"]
    assert [(row.status, reason in row.reason) for row in rows] == [(NOT_CHECKED, True)]
    assert "give --base" in rows[0].reason


def test_a_base_model_that_is_given_goes_before_the_one_that_is_named(made: Path, out: Path) -> None:
    renamed(out, "user/absent")
    forge(out)
    assert statuses(verify(out, base=str(made / "dense")), "base") == {AGREES}
    torch.manual_seed(1)
    other = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(made / "dense").config)
    other.save_pretrained(out.parent / "unlike")
    assert DIFFERS in statuses(verify(out, base=str(out.parent / "unlike")), "base")
    with pytest.raises(CheckpointError, match="no folder here"):
        verify(out, base="no folder/at all")


def test_the_embedded_model_is_found_wherever_it_lay(out: Path) -> None:
    renamed(out, "/elsewhere/site-packages/hf_sparse/embedded/model")
    forge(out)
    rows = differing(verify(out))["base"]  # it is found, and not what was pruned here
    assert rows


# ------------------------------------------------------------------------------------------------ measuring again


def test_figures_are_measured_again(made: Path, out: Path) -> None:
    found = verify(out, evaluate=True, texts=[made / TEXT])
    assert found.agrees, str(found)
    rows = {row.item: row for row in found.rows if row.check == "evaluation"}
    assert rows[f"perplexity on {TEXT}, sparse"].status == rows[f"perplexity on {TEXT}, dense"].status == AGREES


@pytest.mark.parametrize(
    ("changes", "item"),
    [({"sparse": 2.0}, "sparse"), ({"dense": 2.0}, "dense"), ({"fingerprint": "0" * 16}, "sparse: fingerprint of the text"),
     ({"tokens": 15 * 7}, "sparse: fingerprint of the text")],
)  # fmt: skip
def test_a_figure_that_cannot_be_had_again_differs(changes: dict[str, Any], item: str, made: Path, out: Path) -> None:
    change_report(out, lambda report: report["evaluations"][0].update(changes))
    forge(out)
    found = verify(out, evaluate=True, texts=[made / TEXT])
    assert f"perplexity on {TEXT}, {item}" in {row.item for row in differing(found)["evaluation"]}


def test_tolerance_is_a_share_of_the_figure(made: Path, out: Path) -> None:
    value = Report.load(out).evaluations[0]["sparse"]
    change_report(out, lambda report: report["evaluations"][0].update(sparse=value * 1.01))
    forge(out)
    assert not verify(out, evaluate=True, texts=[made / TEXT]).agrees
    assert verify(out, evaluate=True, texts=[made / TEXT], tolerance=0.02).agrees


def test_a_file_that_a_report_names_is_not_opened_unless_it_is_given(
    made: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    rows = [row for row in verify(out, evaluate=True).rows if row.check == "evaluation"]
    assert [(row.status, "give --text" in row.reason) for row in rows] == [(NOT_CHECKED, True)]


def test_a_number_format_is_that_of_its_figure_and_leaves_the_weights_as_they_are(made: Path, out: Path) -> None:
    def change(report: dict[str, Any]) -> None:
        report["evaluations"].insert(0, {**report["evaluations"][0], "dtype": "bfloat16"})

    change_report(out, change)
    forge(out)
    found = verify(out, evaluate=True, texts=[made / TEXT], tolerance=0.1)
    assert found.agrees, str(found)
    narrow, wide = [row for row in found.rows if row.check == "evaluation" and row.item.endswith(", sparse")]
    assert narrow.found != narrow.claimed
    assert wide.found == wide.claimed
    given = verify(out, evaluate=True, texts=[made / TEXT], tolerance=0.1, dtype="bfloat16")
    assert [row.found for row in given.rows if row.check == "evaluation" and row.item.endswith(", sparse")] == [
        narrow.found
    ] * 2


@pytest.mark.parametrize(
    ("told", "windows"),
    [
        ({"window": 16, "stride": 16, "tokens": 150}, 10),
        ({"window": 16, "stride": None, "tokens": 15}, 1),
        ({"window": 16, "stride": 4, "tokens": 15 + 3 * 4}, 4),
        ({"window": 16, "stride": 16, "tokens": 151}, None),  # not as many as windows predict
        ({"window": 16, "stride": 16, "tokens": 150, "max_windows": 3}, 3),
        ({"window": None, "tokens": 150}, None),
        ({"window": 16, "tokens": 150, "metric": "masked loss"}, None),
    ],
)
def test_the_number_of_windows_follows_from_the_tokens(told: dict[str, Any], windows: int | None) -> None:
    assert windows_of(Evaluation(None, None, **told)) == windows


# ------------------------------------------------------------------------------------------------ on the Hub


@pytest.fixture
def published(hub: Hub, out: Path) -> Hub:
    """The honest model in a repository, with its base model in another one."""
    dense = Path(Report.load(out).model)
    renamed(out, "user/dense")
    forge(out)
    for repository, folder in {REPOSITORY: out, "user/dense": dense}.items():
        for path in sorted(folder.iterdir()):
            hub.edit(repository, path.name, path.read_bytes())
    return hub


def test_a_repository_agrees_with_its_base_model_in_another(
    published: Hub, made: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["verify", REPOSITORY, "--evaluate", "--text", str(made / TEXT), "--token", published.token]) == 0
    out = capsys.readouterr().out
    assert published.head(REPOSITORY) in out
    assert "all that was checked agrees" in out
    found = verify(REPOSITORY, evaluate=True, texts=[made / TEXT])
    assert {row.item for row in found.rows if row.check == "files"} >= {
        "model.safetensors (Hub, SHA-256)", "config.json (Hub, git)", "model.safetensors (card)",
    }  # fmt: skip
    assert statuses(found, "base") == statuses(found, "evaluation") == {AGREES}
    assert not published.leaks(out, caplog.text, json.dumps(found.to_dict()))


def test_only_what_is_needed_is_downloaded(published: Hub) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "modeling_evil.py", "adapter_config.json", "movie.mp4"):
        published.edit(REPOSITORY, name, b"\x80\x04anything")
    assert verify(REPOSITORY).agrees
    assert not published.requests(r"resolve/.*\.(bin|py|mp4)|resolve/.*adapter")


def test_a_damaged_download_is_found(published: Hub) -> None:
    published.fault("GET", r"/store/.*file=model\.safetensors", corrupt=-1)
    found = differing(verify(REPOSITORY, base="user/dense"))["files"]
    assert {row.item for row in found} == {
        "model.safetensors (card)", "model.safetensors (report)", "model.safetensors (Hub, SHA-256)",
    }  # fmt: skip
    assert verify(REPOSITORY, base="user/dense").agrees  # it is downloaded again


def test_a_damaged_file_of_any_kind_is_taken_out_of_the_cache(published: Hub) -> None:
    published.edit(REPOSITORY, "vocab.txt", "the\ncat\n")  # no file that loading would look at
    published.fault("GET", r"/resolve/.*/vocab\.txt", corrupt=-1)
    assert [row.item for row in differing(verify(REPOSITORY))["files"]] == ["vocab.txt (Hub, git)"]
    assert verify(REPOSITORY).agrees


def test_everything_is_read_at_the_commit_that_was_found_first(published: Hub) -> None:
    before = published.head(REPOSITORY)
    published.fault("GET", r"/resolve/.*/README\.md", swap=(REPOSITORY, "config.json", b"{}"))
    assert verify(REPOSITORY).agrees
    assert published.head(REPOSITORY) != before


def test_a_local_folder_that_a_report_on_the_hub_names_is_not_opened(published: Hub, made: Path, out: Path) -> None:
    renamed(out, str(made / "dense"))
    forge(out)
    for name in ("hf_sparse_report.json", "README.md"):
        published.edit(REPOSITORY, name, (out / name).read_bytes())
    rows = [row for row in verify(REPOSITORY).rows if row.check == "base"]
    assert [(row.status, "not opened on this machine; give --base" in row.reason) for row in rows] == [
        (NOT_CHECKED, True)
    ]
    assert statuses(verify(REPOSITORY, base=str(made / "dense")), "base") == {AGREES}


EVIL = "from pathlib import Path\nPath({!r}).write_text('ran')\nclass Evil: ...\n"
AUTO_MAP = {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}


def with_code(hub: Hub, repository: str, mark: Path, **changes: Any) -> None:
    config = json.loads(hub.files(repository)["config.json"])
    hub.edit(repository, "config.json", json.dumps({**config, "auto_map": AUTO_MAP, **changes}))
    hub.edit(repository, "modeling_evil.py", EVIL.format(str(mark)))


def test_code_beside_the_base_model_is_neither_fetched_nor_run(published: Hub, tmp_path: Path) -> None:
    with_code(published, "user/dense", tmp_path / "mark")
    assert statuses(verify(REPOSITORY), "base") == {AGREES}
    assert not (tmp_path / "mark").exists()
    assert not published.requests(r"resolve/.*\.py")


def test_a_model_that_needs_its_own_code_is_an_error(published: Hub, tmp_path: Path) -> None:
    with_code(published, REPOSITORY, tmp_path / "mark", model_type="evil")
    with pytest.raises(CheckpointError, match="trust-remote-code"):
        verify(REPOSITORY)
    assert not (tmp_path / "mark").exists()


def test_a_revision_is_verified(published: Hub, out: Path) -> None:
    first = published.head(REPOSITORY)
    fill_a_zero(out)
    published.edit(REPOSITORY, "model.safetensors", (out / "model.safetensors").read_bytes())
    assert verify(REPOSITORY, revision=first).agrees
    assert not verify(REPOSITORY).agrees


# ------------------------------------------------------------------------------------------------ the parts


@pytest.mark.parametrize(
    ("row", "pattern", "wrong"),
    [
        ([1, 1, 0, 0], "2:4", 0),
        ([1, 1, 1, 0], "2:4", 1),
        ([0, 0, 0, 0, 1, 1, 1, 1], "2:4", 1),
        ([1, 0, 0, 0, 1, 0], "2:4", 0),  # a tail of two may keep one
        ([1, 0, 0, 0, 1, 1], "2:4", 1),
        ([1, 1, 0], "2:4", 0),  # a tail of three may keep two, as half of three is rounded to the even number
        ([1], "2:4", 1),  # a tail of one may keep none
        ([1, 1, 1], "4:8", 1),  # a tail of three may keep two
    ],
)
def test_groups_that_keep_too_many_are_counted(row: list[int], pattern: str, wrong: int) -> None:
    assert groups_with_more(torch.tensor([row, [0] * len(row)]), Pattern.parse(pattern)) == wrong


def test_every_bit_counts() -> None:
    nan = torch.tensor([float("nan")])
    assert not bits_differ(nan, nan.clone()).any()
    assert bits_differ(torch.tensor([0.0]), torch.tensor([-0.0])).all()
    assert not bits_differ(torch.tensor([0.1], dtype=torch.bfloat16), torch.tensor([0.1])).any()


def test_the_table_shows_the_first_differences_and_groups_what_agrees() -> None:
    rows = [Row("zeros", f"site{index}", AGREES, 1, 1) for index in range(224)]
    rows += [Row("zeros", f"wrong{index}\x1b[31m", DIFFERS, 1, 2) for index in range(25)]
    rows += [Row("base", name, NOT_CHECKED, reason="no base") for name in ("one", "two")]
    lines = str(Verification("model\n", None, rows)).splitlines()
    assert len(lines) == 1 + 1 + 20 + 1 + 1 + 1
    assert "224 figures, from site0 to site223" in lines[1]
    assert "and 5 more" in lines[22]
    assert lines[23].endswith("one, two: no base")
    assert lines[24] == "the model is not what it says: 224 agree, 25 differ, 2 not checked."
    assert "\x1b" not in "".join(lines)
    assert len(Verification("model", None, rows).to_dict()["rows"]) == len(rows)


@pytest.mark.parametrize(
    "wrong", [{"dtype": "int3"}, {"tolerance": 1.0}, {"tolerance": -1.0}, {"texts": ["absent.txt"]}]
)
def test_options_that_are_none_are_refused(wrong: dict[str, Any], out: Path) -> None:
    with pytest.raises((ConfigError, CheckpointError)):
        verify(out, **wrong)
