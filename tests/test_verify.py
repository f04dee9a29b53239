"""Verification: an honest model agrees in everything, and each way to tamper is found by the check that is there for it."""

import itertools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
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
from hf_sparse.evaluate import as_evaluation, evaluate
from hf_sparse.hashes import hashes_of
from hf_sparse.patterns import Pattern
from hf_sparse.recovery import Recovery
from hf_sparse.remote import open_place
from hf_sparse.report import Report
from hf_sparse.verify import AGREES, DIFFERS, NOT_CHECKED, Row, Verification, verify
from hf_sparse.verify.base import bits_differ
from hf_sparse.verify.measured import windows_of
from hf_sparse.verify.sites import groups_with_more
from hf_sparse.verify.sizes import headers, unlike
from model_cards import Evaluation, SparseModelCard, set_card_class, write_card

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
    found = verify(tmp_path / "out", base=str(tmp_path / "dense"))
    assert found.agrees, str(found)
    assert not [row for row in found.rows if row.status == NOT_CHECKED and row.item != "hashes of the Hub"]
    compared = {row.item for row in found.rows if row.check == "base" and row.status == AGREES}
    assert {site.name for site in report.sites} <= compared
    assert len([row for row in found.rows if row.check == "zeros"]) == len(report.sites)


def test_a_permuted_model_is_traced_through_its_permutations(made: Path) -> None:
    report = Report.load(made / "out")
    assert any(order != sorted(order) for order in report.permutations.values())
    assert statuses(verify(made / "out", base=str(made / "dense")), "base") == {AGREES}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_model_of_a_wider_number_format_is_rounded_first(dtype: torch.dtype, made: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        made / "dense", dtype=dtype, sparsity_config=SparsityConfig(metric="magnitude")
    )
    model.save_pretrained(tmp_path / "narrow")
    assert statuses(verify(tmp_path / "narrow", base=str(made / "dense")), "base") == {AGREES}


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
    found = verify(tmp_path / "updated", base=str(made / "dense"))
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
    tamper: Callable[[Path], None], forged: bool, check: str, made: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tamper(out)
    if forged:
        forge(out)
    capsys.readouterr()
    assert main(["verify", str(out), "--base", str(made / "dense"), "--json"]) == 3
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
    dense = str(tmp_path / "dense")
    assert verify(tmp_path / "out", base=dense).agrees
    change_weights(tmp_path / "out", lambda tensors: tensors["model.layers.0.self_attn.qkv_proj.weight"][32:48].mul_(2))
    forge(tmp_path / "out")
    found = differing(verify(tmp_path / "out", base=dense))
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


FALSE_CARDS: dict[str, tuple[str, str]] = {
    "sentence": ("(50.00 %) of the weights are zero", "(93.75 %) of the weights are zero"),
    "pattern": ("| Pattern | `2:4`", "| Pattern | `1:16`"),
    "metric": ("| Metric | chosen: `magnitude`", "| Metric | chosen: `sparsegpt`"),
    "a block": ("| `model.layers.1` | 7 | 50.00 %", "| `model.layers.1` | 7 | 93.75 %"),
    "a row more": ("| Axis |", "| Speed-up | 2x |\n| Axis |"),
    "a row less": ("| Update of the kept weights | `none` |\n", ""),
    "a heading that looks the same, and other figures": ("### Quality\n", "### Quality \n\n| perplexity | 5.0 | 5.0 |\n"),
    "text in a comment's line": (" -->\n<!-- hf_sparse writes", " --> 93.75 %\n<!-- hf_sparse writes"),
    "a heading": ("### Load it\n", "### What runs faster\n"),
    "a config": ('"pattern": "2:4"', '"pattern": "1:4"'),
    "a second section": ("<!-- hf_sparse:end -->", "<!-- hf_sparse:end -->\n<!-- hf_sparse:begin -->\n99 %\n<!-- hf_sparse:end -->"),
    "another library": ("library_name: transformers", "library_name: peft"),
    "another pattern in the tags": ("- '2:4'\n", "- '2:4'\n- '1:16'\n"),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new"), FALSE_CARDS.values(), ids=FALSE_CARDS)
def test_what_a_card_says_and_its_report_does_not_is_found(old: str, new: str, out: Path) -> None:
    assert not differing(verify(out))
    card = (out / "README.md").read_text()
    assert old in card
    (out / "README.md").write_text(card.replace(old, new, 1))
    assert list(differing(verify(out))) == ["card"]


def test_lines_of_a_card_in_another_order_are_found(out: Path) -> None:
    lines = (out / "README.md").read_text().split("\n")
    first = next(number for number, line in enumerate(lines) if line.startswith("| `model.layers.0`"))
    lines[first], lines[first + 1] = lines[first + 1], lines[first]
    (out / "README.md").write_text("\n".join(lines))
    assert [row.claimed for row in differing(verify(out))["card"]] == ["lines in another order"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<!-- hf_sparse:begin -->", "Words of mine: 99 % sparse.\n\n<!-- hf_sparse:begin -->"),
        ("library_name: transformers", "license: mit"),
        ("- sparse\n", "- team\n"),
        ("- '2:4'\n", ""),
        ("\n", "\r\n"),
        ("### Quality\n", "### Quality  \n\n\n"),
    ],
    ids=["text outside", "another header", "tags", "a tag taken away", "line ends", "white space"],
)
def test_what_a_person_may_change_in_a_card_is_no_difference(old: str, new: str, out: Path) -> None:
    card = (out / "README.md").read_bytes().decode()
    assert old in card
    (out / "README.md").write_bytes(card.replace(old, new).encode())
    found = verify(out)
    assert found.agrees, str(found)


def test_many_false_lines_are_cut_short(out: Path) -> None:
    change_card(out, "### Quality\n", "### Quality\n" + "".join(f"line {number}\n" for number in range(5000)))
    rows = differing(verify(out))["card"]
    assert len(rows) == 21
    assert rows[-1].item == "section: 4980 more lines"


def test_the_base_model_of_the_header_is_that_of_the_report(made: Path, out: Path) -> None:
    renamed(out, "user/dense")
    forge(out)
    base = str(made / "dense")
    items = {row.item: row for row in verify(out, base=base).rows if row.check == "card"}
    assert items["header: base_model"].status == items["header: base_model_relation"].status == AGREES
    change_card(out, "base_model: user/dense", "base_model: somebody/large")
    assert [row.item for row in differing(verify(out, base=base))["card"]] == ["header: base_model"]


def test_a_base_model_that_a_person_has_put_into_the_header_is_not_taken_for_granted(out: Path) -> None:
    change_card(out, "library_name: transformers", "library_name: transformers\nbase_model: somebody/large")
    row = next(row for row in verify(out).rows if row.item == "header: base_model")
    assert (row.status, row.claimed) == (NOT_CHECKED, "somebody/large")


def test_a_card_that_tells_what_was_typed_agrees_but_for_that(out: Path) -> None:
    card = SparseModelCard.from_folder(out, command="hf-sparse prune `a` ``` b")
    assert write_card(out, card)
    found = verify(out)
    assert found.agrees, str(found)
    assert "the command that was typed" in {row.item for row in found.rows if row.status == NOT_CHECKED}


def test_a_base_that_was_a_repository_there_and_is_a_folder_here_agrees(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renamed(out, "user/dense")
    forge(out)
    (tmp_path / "user" / "dense").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found = verify(out)
    assert found.agrees, str(found)


OTHER_TEMPLATE = """---
{{ card_data }}
---
{{ begin }}
# Sparsity by {{ team }}

| Zeros in the pruned sites | {{ in_sites }} |
| Zeros in all parameters of the model | {{ in_model }} |

### Quality

| | | |
|---|---|---|
{%- for row in evaluations %}
{{ row }}
{%- endfor %}
{{ end }}
"""


class TeamCard(SparseModelCard):
    @classmethod
    def template_variables(cls, source: Any) -> dict[str, Any]:
        return {**super().template_variables(source), "team": "Compression"}


def test_a_card_of_another_template_is_compared_in_its_figures(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "team.md").write_text(OTHER_TEMPLATE)
    monkeypatch.setattr(TeamCard, "default_template_path", tmp_path / "team.md")
    assert write_card(out, TeamCard.from_folder(out))
    found = verify(out)
    assert found.agrees, str(found)
    assert any("another template" in row.reason for row in found.rows if row.status == NOT_CHECKED)
    set_card_class(TeamCard)
    try:
        found = verify(out)
        assert found.agrees, str(found)
        assert not any("another template" in row.reason for row in found.rows)
        change_card(out, "Compression", "Compression, 99 %")
        assert len(differing(verify(out))["card"]) == 2
    finally:
        set_card_class(None)
    assert verify(out).agrees
    change_card(out, "| Zeros in all parameters of the model | ", "| Zeros in all parameters of the model | 9")
    assert [row.item for row in differing(verify(out))["card"]] == ["Zeros in all parameters of the model"]


def test_a_card_of_another_version_may_have_other_words_and_no_other_figures(out: Path) -> None:
    change_report(out, lambda report: report["versions"].update(hf_sparse="99.1"))
    forge(out)
    assert verify(out).agrees
    change_card(out, "### What runs faster", "### How fast it is")
    found = verify(out)
    assert found.agrees, str(found)
    assert "written by hf_sparse 99.1" in " ".join(row.reason for row in found.rows if row.status == NOT_CHECKED)
    change_card(out, "| `model.layers.1` | 7 | 50.00 %", "| `model.layers.1` | 7 | 93.75 %")
    assert [row.item for row in differing(verify(out))["card"]] == ["section: `model.layers.1`"]


def test_very_many_evaluations_are_one_error(out: Path) -> None:
    change_report(out, lambda report: report.update(evaluations=report["evaluations"] * 10_001))
    with pytest.raises(CheckpointError, match="10001 evaluations; at most 10000"):
        verify(out)


def test_a_result_in_the_header_that_cannot_be_sorted_is_read(out: Path) -> None:
    change_card(out, "      tool: hf_sparse", "      tool: hf_sparse\n      1: [2]\n      ? [3]\n      : 4")
    assert "card" in differing(verify(out))


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
    [
        ("", "made in memory"),
        ("/absent/model", "no path that a report names is opened"),
        ("user/absent", "cannot be had"),
    ],
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


LARGE: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"num_hidden_layers": 200_000}, "num_hidden_layers is 2e\\+05"),
    "layers that no list could hold": ({"num_hidden_layers": 10**15}, "num_hidden_layers"),
    "layers within the model": ({"text_config": {"num_layers": 10**6}}, "num_layers"),
    "labels": ({"num_labels": 10**9}, "num_labels"),
    "vocabulary": ({"vocab_size": 10**12}, "far more weights"),
    "width": ({"hidden_size": 2**20, "intermediate_size": 2**20}, "far more weights"),
}


@pytest.mark.parametrize(("changes", "message"), LARGE.values(), ids=LARGE)
def test_a_config_of_a_model_that_is_not_in_the_files_is_one_error(
    changes: dict[str, Any], message: str, out: Path
) -> None:
    change_json(out / "config.json", lambda config: config.update(changes))
    with pytest.raises(CheckpointError, match=f"not that of the weights: .*{message}"):
        verify(out)


def test_nothing_stays_that_counts_after_a_load(out: Path) -> None:
    from torch.nn.modules import module

    before = len(module._global_parameter_registration_hooks), len(module._global_buffer_registration_hooks)
    assert verify(out).agrees
    change_json(out / "config.json", lambda config: config.update(vocab_size=10**12))
    with pytest.raises(CheckpointError, match="far more weights"):
        verify(out)
    assert (len(module._global_parameter_registration_hooks), len(module._global_buffer_registration_hooks)) == before


# ------------------------------------------------------------------------------------------------ measuring again


def test_figures_are_measured_again(made: Path, out: Path) -> None:
    found = verify(out, base=str(made / "dense"), evaluate=True, texts=[made / TEXT])
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
    found = verify(out, base=str(made / "dense"), evaluate=True, texts=[made / TEXT])
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


def endless(items: list[Any], taken: list[Any]) -> Any:
    """A data set without an end that counts what is taken of it."""

    def load_dataset(*names: Any, **options: Any) -> Any:
        for number in itertools.count():
            taken.append(number)
            yield items[number % len(items)]

    return SimpleNamespace(load_dataset=load_dataset)


@pytest.mark.parametrize(
    ("changes", "status", "most"),
    [
        ({}, AGREES, 30),
        ({"max_windows": 10**8}, NOT_CHECKED, 0),
        ({"tokens": 7, "max_windows": None}, NOT_CHECKED, 0),  # not told how many
    ],
    ids=["as many windows as stated", "too many", "all"],
)
def test_of_a_data_set_on_the_hub_no_more_is_read_than_the_windows_need(
    changes: dict[str, Any], status: str, most: int, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Any] = []
    items = [{"text": ""}, {"text": "the cat sat on a mat and the dog ran"}]
    monkeypatch.setitem(sys.modules, "datasets", endless(items, taken))
    model, processor = AutoModelForCausalLM.from_pretrained(out), tokenizer()
    told = evaluate(model, (items[1]["text"] for _ in range(5)), tokenizer=processor, window=16, max_windows=2)
    values = {**as_evaluation(told), "text": "user/endless", "max_windows": 2, **changes}
    change_report(out, lambda report: report.update(evaluations=[values]))
    forge(out)
    rows = [row for row in verify(out, evaluate=True).rows if row.check == "evaluation"]
    assert {row.status for row in rows} == {status}
    assert len(taken) <= most


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


@pytest.mark.parametrize("where", ["folder", "Hub"])
def test_a_folder_that_a_report_names_is_not_opened_unless_it_is_given(
    where: str, published: Hub, made: Path, out: Path
) -> None:
    renamed(out, str(made / "dense"))
    forge(out)
    for name in ("hf_sparse_report.json", "README.md"):
        published.edit(REPOSITORY, name, (out / name).read_bytes())
    place = {"folder": str(out), "Hub": REPOSITORY}[where]
    row = next(row for row in verify(place).rows if row.check == "base")
    assert row.status == NOT_CHECKED
    assert f"give --base {made / 'dense'}" in row.reason
    assert statuses(verify(place, base=str(made / "dense")), "base") == {AGREES}


def test_a_relative_folder_of_the_name_of_a_repository_is_not_opened(
    published: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama(1).save_pretrained(tmp_path / "user" / "dense")
    monkeypatch.chdir(tmp_path)
    row = next(row for row in verify(REPOSITORY).rows if row.check == "base")
    assert (row.status, "give --base user/dense" in row.reason) == (NOT_CHECKED, True)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_model_of_every_family_is_like_the_pruned_one(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    model.save_pretrained(tmp_path / "whole")
    model.base_model.save_pretrained(tmp_path / "body")  # the Hub has some without their heads
    prune_(model.bfloat16(), SparsityConfig(metric="magnitude"))
    model.save_pretrained(tmp_path / "out")
    for name in ("whole", "body"):
        place = open_place(str(tmp_path / name))
        assert unlike(place, headers(tmp_path / "out"), model.base_model_prefix) is None


def other_base(hub: Hub, model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    for path in sorted(folder.iterdir()):
        hub.edit("user/dense", path.name, path.read_bytes())


OTHER_BASES: dict[str, tuple[Callable[[], Any], str]] = {
    "far larger": (lambda: llama(2, hidden_size=128, intermediate_size=512), "values, and this one"),
    "far smaller": (lambda: llama(1, hidden_size=8), "values, and this one"),
    "as large, of other shapes": (
        lambda: llama(2, hidden_size=24, intermediate_size=88), "values lie in tensors of the same name and shape",
    ),
    "of a wide number format": (lambda: llama().double(), "bytes for"),
}  # fmt: skip


@pytest.mark.parametrize(("model", "why"), OTHER_BASES.values(), ids=OTHER_BASES)
def test_another_model_that_a_report_names_is_not_downloaded(
    model: Callable[[], Any], why: str, published: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_sparse.verify.sizes._SLACK", 0)
    other_base(published, model(), tmp_path / "other")
    taken = published.requests(r"/dense/resolve/.*safetensors")
    row = next(row for row in verify(REPOSITORY).rows if row.check == "base")
    assert (row.status, why in row.reason, "give --base" in row.reason) == (NOT_CHECKED, True, True)
    assert len(published.requests(r"/dense/resolve/.*safetensors")) - len(taken) == 1  # its header
    assert not published.requests(r"/dense/resolve/.*config\.json")


def test_of_a_base_that_a_report_names_only_config_and_weights_are_downloaded(published: Hub) -> None:
    for name in ("consolidated.safetensors", "large.json", "vocab.txt"):
        published.edit("user/dense", name, b"anything")
    assert statuses(verify(REPOSITORY), "base") == {AGREES}
    assert not published.requests(r"/dense/resolve/.*(consolidated|large|vocab|tokenizer)")


def test_a_base_whose_config_asks_for_far_more_than_its_files_hold_is_a_reason(published: Hub) -> None:
    config = json.loads(published.files("user/dense")["config.json"])
    published.edit("user/dense", "config.json", json.dumps({**config, "vocab_size": 10**12}))
    row = next(row for row in verify(REPOSITORY).rows if row.check == "base")
    assert (row.status, "far more weights" in row.reason) == (NOT_CHECKED, True)


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
