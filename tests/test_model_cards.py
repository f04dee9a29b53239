"""A card says what the report and the evaluations say, no more; a README keeps what its owner wrote."""

import argparse
import ast
import copy
import dataclasses
import json
import logging
import re
import shlex
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import peft
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData, constants
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import llama
from test_recovery import make_recovery
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_sparse import checkpoint, embedded
from hf_sparse.adapters import mask_lora_
from hf_sparse.config import SparsityConfig
from hf_sparse.errors import CheckpointError, ConfigError, ModelError
from hf_sparse.hashes import hashes_of, misfit
from hf_sparse.prune import prune_
from hf_sparse.recovery import Recovery
from hf_sparse.report import BlockReport, Report, SiteReport
from hf_sparse.text import one_line
from model_cards import (
    CardSource,
    Evaluation,
    SparseAdapterCard,
    SparseModelCard,
    card_class,
    file_hashes,
    header,
    merge_trainer,
    set_card_class,
    variables,
    write_card,
)
from model_cards.escape import code, fenced, json_text, plain, python_literal, shell_word
from model_cards.merge import merge
from model_cards.parts import BEGIN, END, TRAINER, begin, end, part_of, replace_part

MEASURED = Evaluation(10.5, 12.25, window=512, stride=256, text="wikitext", fingerprint="cafe", tokens=4096)
NASTY = "a|b`c`<script>alert(1)</script>\n\n# top ](x) $$x$$ " + END + " \u202e\ud800 *bold* https://x.example ```"


def make_site(block: int, name: str, **changes: Any) -> SiteReport:
    site = SiteReport(
        f"model.layers.{block}.{name}", block, None, (64, 64), "2:4", "input", "dass", 2048, 0.5, 0.1, 100
    )
    return dataclasses.replace(site, **changes)


def make_block(index: int, stack: str = "model.layers", **changes: Any) -> BlockReport:
    sites = [
        make_site(index, "q_proj"),
        make_site(index, "down_proj", axis="output", metric="magnitude", note="nothing is known"),
    ]
    block = BlockReport(index, f"{stack}.{index}", stack, 4096, 8192, 10240, 0.125, 1.0, sites)
    return dataclasses.replace(block, **changes)


def make_report(blocks: int | list[BlockReport] = 2, config: Any = None, **changes: Any) -> Report:
    report = Report(
        config=SparsityConfig(metric="dass").to_dict()
        if config is None
        else getattr(config, "to_dict", lambda: config)(),
        model="someone/base",
        model_class="LlamaForCausalLM",
        parameters=81920,
        blocks=[make_block(index) for index in range(blocks)] if isinstance(blocks, int) else blocks,
        left_out={"model.layers.0.gate.weight": "It belongs to a router."},
        notes=["2 sites: nothing is known", "the batch was halved"],
        calibration={"source": "some texts", "fingerprint": "beef", "samples": 7, "tokens": 1234, "batch_size": 2},
        versions={"hf_sparse": "0.1.0", "torch": "2.13.0"},
        seconds=3.0,
        peak_memory_bytes=None,
    )
    return dataclasses.replace(report, **changes)


def trained(**changes: Any) -> Recovery:
    """A training of the model that `make_report` tells of."""
    zeros = {"zeros_before": 8192, "zeros_after": 8192, "size": 16384}
    return make_recovery(**{**zeros, **changes})


def card_of(report: Report | None = None, **given: Any) -> SparseModelCard:
    return SparseModelCard.from_report(report or make_report(), **given)


def block_of(text: str, language: str) -> str:
    found = re.search(rf"^(`{{3,}}){language}\n(.*?)^\1$", text, re.MULTILINE | re.DOTALL)
    assert found, text
    return found[2]


# ---------------------------------------------------------------------------------------------------- facts


def test_parses_back() -> None:
    card = ModelCard(card_of(evaluations=[MEASURED], base_card="---\nlicense: llama3\n---\ntext").content)
    assert card.data.tags == ["hf_sparse", "sparse", "pruned", "2:4"]
    assert card.data.base_model == "someone/base"
    assert card.data.license == "llama3"
    assert (card.data["base_model_relation"], card.data.library_name, card.data.pipeline_tag) == (
        "finetune", "transformers", "text-generation",
    )  # fmt: skip
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("perplexity", 12.25, "wikitext")
    assert result.metric_args == {
        "tool": "hf_sparse", "dense": 10.5, "window": 512, "stride": 256, "tokens": 4096, "fingerprint": "cafe",
    }  # fmt: skip


def test_states_the_figures_of_the_report() -> None:
    text = card_of(evaluations=[MEASURED]).text
    for fact in (
        "8,192 of 16,384 (50.00 %)",
        "8,192 of 20,480 (40.00 %)",
        "8,192 of 81,920 (10.00 %)",
        "| perplexity | 10.5000 | 12.2500 | 512 | 256 | wikitext | 4,096 | `cafe` |",
        "| `model.layers.1` | 2 | 50.00 % | 0.1250 | `input` (1 site), `output` (1 site) |",
        "`input`: 2 sites (within a row), `output`: 2 sites (within a column)",
        "chosen: `dass`; used: `dass` (2 sites), `magnitude` (2 sites)",
        "of every 4 consecutive weights 2 are kept",
        "| 7, 1234 |",
        "`beef`",
        "- the batch was halved\n",
        "- nothing is known (`model.layers.0.down_proj`, `model.layers.1.down_proj`)\n",
        "- It belongs to a router. (`model.layers.0.gate.weight`)\n",
        "hf_sparse 0.1.0, torch 2.13.0.",
        "2 of 4 sites keep at most two",
        "2 of 4 sites have their groups along the output axis",
        'AutoModelForCausalLM.from_pretrained("PATH_OR_REPOSITORY")',
    ):
        assert fact in text, fact
    assert "2 sites: nothing is known" not in text  # said once, with names


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_no_result_without_a_finite_measurement(value: float | None) -> None:
    card = card_of(evaluations=[Evaluation(None, value, text="x")])
    assert "model-index" not in card.data.to_dict()
    assert ("| not measured | not measured |" if value is None else "| not measured | not finite |") in card.text
    assert "nan" not in card.text.lower().replace("finance", "")


def test_not_measured() -> None:
    report = make_report(calibration=None)
    report.blocks[0].output_error = None
    text = card_of(report).text
    assert "| perplexity | not measured | not measured |" in text
    assert "| `model.layers.0` | 2 | 50.00 % | not measured |" in text
    assert "none: the metric does not look at data" in text


def test_figures_on_the_calibration_text_are_named_as_such() -> None:
    same = dataclasses.replace(MEASURED, fingerprint="beef")
    assert "flatters the sparse model" in card_of(evaluations=[same]).text
    assert "flatters" not in card_of(evaluations=[MEASURED]).text


@pytest.mark.parametrize(("blocks", "folded"), [(12, False), (13, True)])
def test_long_tables_are_folded(blocks: int, folded: bool) -> None:
    text = card_of(make_report(blocks)).text
    assert ("<details>" in text, "</details>" in text) == (folded, folded)
    assert text.count("| `model.layers.") == blocks


def test_picture_command_and_later_training() -> None:
    claim = {"hf_sparse": {"totals": {"zeros": 8000, "sparsity": 8000 / 16384}}}
    card = card_of(plot_name="a b.png", command="hf-sparse prune x y", model_config=claim)
    assert "(a%20b.png)" in card.text
    assert "\nhf-sparse prune x y\n" in card.text
    assert "8,000 zeros were counted in the sites (48.83 %)" in card.text
    claim["hf_sparse"]["totals"]["zeros"] = 8192
    plain_card = card_of(model_config=claim)
    assert "was changed after pruning" not in plain_card.text
    assert "This was typed" not in plain_card.text


@pytest.mark.parametrize(
    ("pattern", "axis", "fits"),
    [("2:4", "input", True), ("1:4", "input", True), ("2:8", "input", True), ("1:2", "input", True), ("4:8", "input", False),
     ("3:4", "input", False), ("2:4", "output", False), ("unstructured", "site", False), ("odd", "input", False)],
)  # fmt: skip
def test_what_tensor_cores_accept(pattern: str, axis: str, fits: bool) -> None:
    assert make_site(0, "q", pattern=pattern, axis=axis).fits_tensor_cores is fits


@pytest.mark.parametrize("allocation", [[0.5, 0.75], {"*": 0.5, "*.1.*": 0.75}])
def test_a_pattern_for_each_block_is_told_and_repeated_from_a_file(allocation: Any) -> None:
    report = make_report(config=SparsityConfig(allocation=allocation, calibration="my.jsonl"))
    report.blocks[1].sites = [dataclasses.replace(site, pattern="1:4") for site in report.blocks[1].sites]
    card = card_of(report)
    assert (
        "| Pattern | `N:4`: of every 4 consecutive weights as many are kept as the site's own pattern says: `2:4` (2 sites), `1:4` (2 sites) |"
        in card.text
    )
    assert "2 of 4 sites keep at most two" in card.text
    assert card.data.tags == ["hf_sparse", "sparse", "pruned", "N:4"]
    command = block_of(card.text, "bash")
    assert shlex.split(command.replace("\\\n", " "), comments=True) == [
        "hf-sparse", "prune", "someone/base", "DEST", "--config", "sparsity_config.json",
    ]  # fmt: skip
    assert SparsityConfig.from_dict(json.loads(block_of(card.text, "json"))) == SparsityConfig(
        allocation=allocation, calibration="my.jsonl"
    )
    assert f"allocation={allocation!r}" in card.text.replace('"', "'")


def test_unstructured_gains_nowhere() -> None:
    report = make_report(config=SparsityConfig(pattern="unstructured", sparsity=0.5), blocks=1)
    report.blocks[0].sites = [make_site(0, "q", pattern="unstructured", axis="output")]
    text = card_of(report).text
    assert "No stock runtime gains" in text
    assert "tensor cores" not in text


def test_a_local_base_is_no_repository(tmp_path: Path) -> None:
    for report in (make_report(model=str(tmp_path)), make_report(model="")):
        card = card_of(report)
        assert "base_model" not in card.data.to_dict() or card.data.base_model is None
        assert "base_model_relation" not in card.data.to_dict()
    assert str(tmp_path.parent) not in card_of(make_report(model=str(tmp_path))).content


@pytest.mark.parametrize(
    ("model_class", "name", "tag"),
    [("GPT2LMHeadModel", "AutoModelForCausalLM", "text-generation"), ("BertForMaskedLM", "AutoModelForMaskedLM", "fill-mask"),
     ("T5ForConditionalGeneration", "T5ForConditionalGeneration", None), ("Own<b>", "AutoModel", None)],
)  # fmt: skip
def test_class_to_load_with(model_class: str, name: str, tag: str | None) -> None:
    card = card_of(make_report(model_class=model_class))
    assert f"from transformers import {name}\n" in card.text
    assert card.data.pipeline_tag == tag


@pytest.mark.parametrize("header", ["---\n[1\n---\n", "---\n- 1\n---\n", "---\nlicense: 3\n---\n", "no header", ""])
def test_base_cards_that_say_nothing(header: str) -> None:
    assert card_of(base_card=header).data.license is None


@pytest.mark.parametrize(
    "damage",
    [{"parameters": "many"}, {"calibration": "text"}, {"blocks": [make_block(0, zeros="<b>")]}, {"seconds": float("nan")},
     {"blocks": [make_block(0, output_error="x")]}, {"config": [1]}, {"recoveries": [trained(tokens="<b>")]},
     {"recoveries": [trained(), trained(seconds=float("nan"))]}, {"recoveries": [trained(zeros_after=10**6)]}],
)  # fmt: skip
def test_damaged_reports_are_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="prune again" if "recoveries" not in damage else "in a recovery"):
        card_of(make_report(**damage))


def test_of_model() -> None:
    class Config:
        def to_dict(self) -> dict[str, Any]:
            return {"hf_sparse": {"totals": {"zeros": 8192, "sparsity": 0.5}}}

    class Model:
        config = Config()

    report = make_report(evaluations=[{**dataclasses.asdict(MEASURED), "sparse": 99.5}])
    card = SparseModelCard.of_model(Model(), report, plot_name="picture.png")
    assert "(picture.png)" in card.text
    assert "| 99.5000 |" in card.text
    assert [result.metric_value for result in card.data.eval_results] == [99.5]


@pytest.mark.parametrize(
    "values",
    [
        [],
        {"dense": 1.0},
        {"dense": "1", "sparse": 1.0},
        {"dense": True, "sparse": 1.0},
        {"dense": 1, "sparse": 1, "text": 3},
        {"dense": 1, "sparse": 1, "x": 3},
        {"dense": 1, "sparse": 1, "before_recovery": "2"},
    ],
)
def test_damaged_evaluations_are_refused(values: Any) -> None:
    with pytest.raises(CheckpointError, match="measure again"):
        card_of(make_report(evaluations=[values]))


def test_a_loss_has_no_window() -> None:
    before = Evaluation(None, None, "loss", before_recovery=3)
    assert "| loss | not measured | 3.0000 | not measured | none | none | none |" in card_of(evaluations=[before]).text
    assert (
        "| loss | 1.0000 | 2.0000 | none | none | x | 3 | none |"
        in card_of(evaluations=[Evaluation(1, 2, "loss", text="x", tokens=3)]).text
    )


def test_the_embedded_model_goes_by_its_name() -> None:
    card = card_of(make_report(model=str(embedded.model_path())))
    assert "hf-sparse prune embedded DEST" in card.text
    assert card.data.base_model is None


def test_the_template_is_the_packages_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "template.md").write_text("---\n{{ card_data }}\n---\nwrong")
    (tmp_path / "model_cards").mkdir()
    (tmp_path / "model_cards" / "template.md").write_text("---\n{{ card_data }}\n---\nwrong")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "wrong" not in card_of().text


# ---------------------------------------------------------------------------------------------------- trainings


def section(text: str, heading: str) -> str:
    return text.partition(f"### {heading}\n")[2].partition("\n### ")[0]


def recovery_tables(text: str) -> list[dict[str, str]]:
    """The tables under Recovery: name -> value."""
    tables = section(text, "Recovery").split("| | |\n|---|---|\n")[1:]
    rows = [[line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")] for table in tables]
    return [dict(table) for table in rows]


def test_each_training_has_its_table() -> None:
    lora = trained(
        method="masked LoRA, r 16", callbacks=[], data="your *.txt", fingerprint=None, learning_rate=None, before=None, settings={},
        zeros_before=8000, zeros_after=7990, zeros_lost=10, tokens=1_234_567, seconds=4000, processes=2,
    )  # fmt: skip
    text = card_of(make_report(recoveries=[trained(), lora])).text
    first, second = recovery_tables(text)
    assert first == {
        "What trained": "full fine-tuning", "Data": "my.jsonl", "Their fingerprint": "`0123456789abcdef`",
        "Sequences, tokens (without padding)": "240, 30,720", "Steps, sequences a step": "120, 2",
        "Learning rate, schedule": "0.0005, cosine, 10 steps of warm-up", "Optimizer": "adamw_torch",
        "Objective": "distillation from user/model, temperature 1", "Precision, processes": "bf16, 1",
        "eval_loss, before → after": "2.5000 → 1.2500", "Zeros in the sites before": "8,192 of 16,384 (50.00 %)",
        "Zeros in the sites after": "8,192 of 16,384 (50.00 %)", "Zeros lost": "0", "Wall time": "75.2 s",
        "Callbacks": "`KeepMasks`, `Distillation`",
        "Settings": '`temperature: 1.0`, `teacher: user/model`, `steps: [1, {"a": null}]`', "Versions": "`torch 2.13.0`",
    }  # fmt: skip
    changed = {name: value for name, value in second.items() if value != first[name]}
    assert changed == {
        "What trained": "masked LoRA, r 16", "Data": "your &#42;.txt", "Their fingerprint": "not told",
        "Sequences, tokens (without padding)": "240, 1,234,567", "Learning rate, schedule": "not told, cosine, 10 steps of warm-up",
        "Precision, processes": "bf16, 2", "eval_loss, before → after": "not measured → 1.2500",
        "Zeros in the sites before": "8,000 of 16,384 (48.83 %)", "Zeros in the sites after": "7,990 of 16,384 (48.77 %)",
        "Zeros lost": "10", "Wall time": "4,000.0 s", "Callbacks": "none",
    }  # fmt: skip
    assert "Settings" not in second
    assert "Each table is one training, in order." in text
    assert text.index("### Quality") < text.index("### Recovery") < text.index("### Blocks")


def test_without_training_nothing_is_said_of_it() -> None:
    text = card_of(evaluations=[MEASURED]).text
    for word in ("Recovery", "recovery", "raining", "KeepMasks"):
        assert word not in text


def test_what_the_card_says_of_the_pruning_stays_true_after_training() -> None:
    report = make_report(recoveries=[trained()])
    text = card_of(report).text
    for fact in (
        "of the weights are zero. Training changed its kept weights, see Recovery.\n",
        "| Update of the kept weights | `none`, at pruning; training changed them too, see Recovery |",
        "over the calibration tokens. It was measured at pruning, without what training changed. Figures per site",
        "This prunes and does not train.",
    ):
        assert fact in text, fact
    assert "Each table" not in text
    for block in report.blocks:
        block.output_error = None
    assert "measured at pruning" not in card_of(report).text


@pytest.mark.parametrize(
    ("counted", "after", "told"),
    [
        (None, 8192, None),
        (None, 8000, "after the last training 8,000 of 16,384 (48.83 %) weights in the sites were zero."),
        (8192, 8000, None),  # what was counted at the save holds
        (7000, 8000, "when it was saved, 7,000 zeros were counted in the sites (42.72 %)."),
    ],
)
def test_other_counts_after_training_are_told(counted: int | None, after: int, told: str | None) -> None:
    claim = {"hf_sparse": {"totals": {"zeros": counted, "sparsity": counted / 16384}}} if counted else None
    first = trained(zeros_after=100)  # only the last training tells what is there now
    report = make_report(recoveries=[first, trained(zeros_after=after)])
    text = card_of(report, model_config=claim).text
    assert ("was changed after pruning" in text) == (told is not None)
    if told:
        assert f"{told}** The table below and the section Blocks tell of the pruning." in text


@pytest.mark.parametrize(
    ("versions", "row"),
    [
        ({"hf_sparse": "0.1.0", "torch": "2.13.0"}, None),  # those of the pruning, which stand at the card's end
        ({}, None),
        ({"hf_sparse": "0.2.0", "torch": "2.13.0"}, "`hf_sparse 0.2.0`, `torch 2.13.0`"),
    ],
)
def test_versions_of_a_training_are_told_where_they_differ(versions: dict[str, str], row: str | None) -> None:
    (table,) = recovery_tables(card_of(make_report(recoveries=[trained(versions=versions)])).text)
    assert table.get("Versions") == row


def test_very_many_trainings_and_settings_are_cut() -> None:
    recoveries = [trained(data=f"text {index}") for index in range(25)]
    recoveries[-1].settings = {f"name{index}": index for index in range(25)}
    text = card_of(make_report(recoveries=recoveries)).text
    tables = recovery_tables(text)
    assert [table["Data"] for table in tables] == [f"text {index}" for index in range(5, 25)]
    assert "5 earlier trainings are left to `hf_sparse_report.json`." in text
    assert tables[-1]["Settings"].endswith("`name19: 19`, and 5 more, see `hf_sparse_report.json`")


def test_figures_before_recovery_have_their_own_column() -> None:
    report = make_report(
        recoveries=[trained()], evaluations=[{**dataclasses.asdict(MEASURED), "before_recovery": 14.5}]
    )
    report.add_evaluation({**dataclasses.asdict(MEASURED), "text": "other"})
    card = card_of(report)
    assert section(card.text, "Quality").splitlines()[1:5] == [
        "| Metric | Dense | Sparse, before recovery | Sparse | Window (tokens) | Stride (tokens) | Text | Tokens | Fingerprint of the text |",
        "|---|---|---|---|---|---|---|---|---|",
        "| perplexity | 10.5000 | 14.5000 | 12.2500 | 512 | 256 | wikitext | 4,096 | `cafe` |",
        "| perplexity | 10.5000 | not measured | 12.2500 | 512 | 256 | other | 4,096 | `cafe` |",
    ]
    assert [result.metric_value for result in card.data.eval_results] == [12.25, 12.25]
    assert card.data.eval_results[0].metric_args == card_of(evaluations=[MEASURED]).data.eval_results[0].metric_args
    assert "before recovery" not in card_of(make_report(recoveries=[trained()]), evaluations=[MEASURED]).text


def test_a_figure_of_the_pruned_model_is_not_given_for_the_trained_one() -> None:
    report = make_report(evaluations=[dataclasses.asdict(MEASURED)])
    report.add_recovery(trained())
    card = card_of(report)
    assert "| perplexity | 10.5000 | 12.2500 | not measured | 512 |" in card.text
    assert "model-index" not in card.data.to_dict()


@pytest.mark.parametrize(("fingerprint", "named"), [("cafe", True), ("beef", False), ("", False), (None, False)])
def test_figures_on_the_text_that_was_trained_on_are_named_as_such(fingerprint: str | None, named: bool) -> None:
    report = make_report(recoveries=[trained(fingerprint=fingerprint), trained()])
    text = card_of(report, evaluations=[MEASURED, dataclasses.replace(MEASURED, fingerprint="")]).text
    assert ("trained on, so it flatters" in text) == named


@pytest.mark.parametrize("model_class", ["LlamaForCausalLM", "BertForMaskedLM", "Own<b>"])
def test_the_snippet_trains_with_the_zeros_kept(model_class: str) -> None:
    text = card_of(make_report(recoveries=[trained()], model_class=model_class)).text
    snippet = next(
        found[1] for found in re.finditer(r"```python\n(.*?)```", text, re.DOTALL) if "KeepMasks" in found[1]
    )
    tree = ast.parse(snippet)
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported >= {"Trainer", "TrainingArguments", "KeepMasks"}
    unknown = {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    } - imported - {"model", "arguments", "trainer"}  # fmt: skip
    assert unknown == {"YOUR_TRAINING_DATA"}
    assert "callbacks=[KeepMasks()]" in snippet


def test_a_second_save_renews_the_trainings(tmp_path: Path) -> None:
    report = make_report()
    assert write_card(tmp_path, card_of(report))
    (tmp_path / "README.md").write_text(read(tmp_path) + "\nMine.\n")
    report.add_recovery(trained(steps=10))
    assert write_card(tmp_path, card_of(report))
    report.recoveries[0].steps = 20
    report.add_recovery(trained(steps=30))
    assert write_card(tmp_path, card_of(Report.from_dict(report.to_dict())))
    text = read(tmp_path)
    assert [table["Steps, sequences a step"] for table in recovery_tables(text)] == ["20, 2", "30, 2"]
    assert text.count("### Recovery\n") == text.count(BEGIN) == 1
    assert text.endswith("\nMine.\n")
    assert write_card(tmp_path, card_of(report))
    assert read(tmp_path) == text


# ---------------------------------------------------------------------------------------------------- doing it again

CONFIGS = [
    SparsityConfig(
        options={"dass": {"exponent": 1e-5}}, targets="mlp", exclude=["*q*"], calibration="stdlib:calibration"
    ),
    SparsityConfig(),
    SparsityConfig(
        pattern="4:8",
        metric="wanda",
        axis="input",
        num_samples=3,
        sequence_length=17,
        batch_size=2,
        seed=5,
        device="cuda:0",
    ),
    SparsityConfig(pattern="unstructured", sparsity=0.3, targets=["*.mlp.*", "*q_proj"], exclude=["*.0.*"]),
    SparsityConfig(
        options={"dass": {"exponent": 0.75}, "unstructured": {"rounding": "truncate"}}, calibration="my data/é`<x>.txt"
    ),
]


def typed(text: str) -> list[str]:
    """The words that bash makes of the card's command."""
    command = block_of(text, "bash").replace("hf-sparse", "printf '%s\\0'", 1)
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin"}
    )
    return done.stdout.decode().split("\0")[:-1]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_command_holds_every_field_that_is_not_default(config: SparsityConfig) -> None:
    words = typed(card_of(make_report(config=config)).text)
    assert words[:3] == ["prune", "someone/base", "DEST"]
    values, defaults = config.to_dict(), SparsityConfig().to_dict()
    for name in (name for name in values if values[name] != defaults[name] or name in ("pattern", "metric", "update")):
        if name == "options":
            given = [words[index + 1] for index, word in enumerate(words) if word == "--option"]
            expected = [f"{group}.{key}" for group, options in values[name].items() for key in options]
            assert [word.partition("=")[0] for word in given] == expected
            continue
        value = values[name] if isinstance(values[name], list) else [values[name]]
        start = words.index("--" + name.replace("_", "-")) + 1
        assert words[start : start + len(value)] == [str(item) for item in value]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_command_line_reads_the_command_as_the_same_config(config: SparsityConfig) -> None:
    from hf_sparse.cli import prune

    parser = argparse.ArgumentParser()
    prune.add(parser)
    arguments = parser.parse_args(typed(card_of(make_report(config=config)).text)[1:])
    assert prune.build_config(arguments) == config
    assert (arguments.model, str(arguments.destination)) == ("someone/base", "DEST")


@pytest.mark.parametrize("config", CONFIGS)
def test_config_and_snippet_give_the_same_config(config: SparsityConfig) -> None:
    text = card_of(make_report(config=config)).text
    assert SparsityConfig.from_dict(json.loads(block_of(text, "json"))) == config
    snippet = next(
        found[1] for found in re.finditer(r"```python\n(.*?)```", text, re.DOTALL) if "SparsityConfig(" in found[1]
    )
    (call,) = [
        node
        for node in ast.walk(ast.parse(snippet))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "SparsityConfig"
    ]
    given = {word.arg: word.value for word in call.keywords if word.arg}
    data = given.pop("calibration")
    assert SparsityConfig(**{name: ast.literal_eval(value) for name, value in given.items()}) == config
    if config.calibration is None:
        assert ast.unparse(data) == "YOUR_CALIBRATION_DATA"
        assert "given in memory" in text
    else:
        assert ast.literal_eval(data) == config.calibration


# ---------------------------------------------------------------------------------------------------- names from files


def nasty_report(nasty: str) -> Report:
    site = make_site(0, nasty, axis=nasty, metric=nasty, note=nasty, pattern=nasty)
    block = make_block(0, stack=nasty, name=nasty, sites=[site])
    return make_report(
        blocks=[block], model=nasty, model_class=nasty, files={nasty: "0" * 64}, left_out={nasty: nasty}, notes=[nasty], versions={nasty: nasty},
        calibration=dict.fromkeys(("source", "fingerprint", "samples", "tokens", "batch_size"), nasty),
        recoveries=[nasty_recovery(nasty), nasty_recovery(nasty)],
        config={**SparsityConfig().to_dict(), "targets": [nasty], "options": {nasty: {nasty: nasty}}, "pattern": nasty, nasty: nasty},
    )  # fmt: skip


def nasty_recovery(nasty: str) -> Recovery:
    words = dict.fromkeys(
        ("method", "data", "fingerprint", "schedule", "optimizer", "precision", "loss", "metric"), nasty
    )
    return trained(**words, callbacks=[nasty], settings={nasty: nasty, "a": [nasty]}, versions={nasty: nasty})


def outside_code(text: str) -> str:
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^(`{3,})\w*\n.*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL))


def assert_whole(card: SparseModelCard) -> None:
    content = card.content
    content.encode("utf-8")
    body = content.partition("\n---\n")[2]
    assert body.count(BEGIN) == body.count(END) == 1
    assert [line for line in content.splitlines() if line.startswith((BEGIN, END))] == [BEGIN, END]
    assert part_of(content) is not None
    assert content.endswith(f"{END}\n")
    prose = outside_code(body)
    tags = set(re.findall(r"<[^>]*>", prose))
    assert {tag for tag in tags if not tag.startswith("<!-- hf_sparse")} <= {
        "<code>",
        "</code>",
        "<details>",
        "<summary>",
        "</details>",
        "</summary>",
    }
    headings = [
        "Weight sparsity",
        "Quality",
        "Recovery",
        "Blocks",
        "Load it",
        "Files",
        "What runs faster",
        "Do it again",
    ]
    assert [line.lstrip("# ") for line in prose.splitlines() if line.lstrip().startswith("#")][1:] == headings
    rows = [line for line in prose.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {3, 7, 10}
    assert ModelCard(content).content == content


def test_malicious_names_are_neutralised() -> None:
    evil = dataclasses.replace(MEASURED, text=NASTY, fingerprint=NASTY, metric=NASTY, before_recovery=1.0)
    on_task = Evaluation(
        1.0, 1.0, NASTY, task=NASTY, task_version=NASTY, filter=NASTY, harness=NASTY, before_recovery=1.0
    )
    card = card_of(
        nasty_report(NASTY),
        evaluations=[evil, on_task],
        plot_name=NASTY,
        command=NASTY,
        base_card=f"---\nlicense: {NASTY!r}\n---\n",
    )
    assert_whole(card)
    prose = re.sub(r"<!--.*-->", "", outside_code(card.text))
    for active in ("<script", "# top", "$$", "*bold*", "https://", "\u202e"):
        assert active not in prose, active
    assert card.merged_into(card.content) == card.content


@settings(max_examples=40)
@given(st.text())
def test_any_name_leaves_the_card_whole(name: str) -> None:
    assert_whole(
        card_of(
            nasty_report(name),
            evaluations=[dataclasses.replace(MEASURED, text=name, before_recovery=1.0)],
            command=name,
        )
    )


@given(st.text())
def test_escaping(text: str) -> None:
    assert "\n" not in one_line(text)
    assert not set("<>`|*[]\\$\n") & set(plain(text))
    assert "|" not in code(text)
    assert "<" not in code(text).replace("<code>", "").replace("</code>", "")
    assert json.loads(json_text({"a": text})) == {"a": text}
    assert ast.literal_eval(python_literal([text])) == [text]
    assert ast.literal_eval(python_literal(text)) == text
    assert not set("<>`\n") & set(python_literal(text) + json_text(text) + shell_word(text))
    lines = fenced(text, "x").splitlines()
    assert lines[0] == lines[-1] + "x"
    assert not any(line.startswith(lines[-1]) for line in lines[1:-1])


@pytest.mark.parametrize(
    "word", ["plain", "two words", "it's", "`id`", "$(id)", "<a>", "é\U0001f600`", "a\nb", "\\x60'<", ""]
)
def test_shell_words_come_back(word: str) -> None:
    if shell_word(word)[:1] != "$":
        assert shlex.split(shell_word(word)) == [word]
    done = subprocess.run(
        ["bash", "-c", f"printf %s {shell_word(word)}"],
        capture_output=True,
        check=True,
        env={"LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin"},
    )
    assert done.stdout.decode() == word


# ---------------------------------------------------------------------------------------------------- READMEs


def read(folder: Path) -> str:
    return (folder / "README.md").read_bytes().decode()


def test_a_second_write_keeps_the_persons_text(tmp_path: Path) -> None:
    assert write_card(tmp_path / "new", card_of(evaluations=[MEASURED]))
    folder = tmp_path / "new"
    file = folder / "README.md"
    edited = read(folder).replace("---\n\n#", "---\n\nAbove.\n\n#", 1) + "\nBelow.\n"
    edited = edited.replace(
        "library_name: transformers\n", "library_name: transformers\nlicense: mit # mine\n# a remark\nlanguage: no\n"
    )
    file.write_text(edited)
    better = dataclasses.replace(MEASURED, sparse=11.0)
    base_card = "---\nlicense: llama3\nlanguage: en\n---\n"
    assert write_card(folder, card_of(make_report(3), evaluations=[better], base_card=base_card))
    text = read(folder)
    assert "Above.\n" in text
    assert text.endswith("\nBelow.\n")
    assert text.count(BEGIN) == text.count(END) == 1
    assert "`model.layers.2`" in text
    assert "license: mit # mine\n# a remark\nlanguage: no\n" in text
    assert [result.metric_value for result in ModelCard(text).data.eval_results] == [11.0]
    assert [item.name for item in folder.iterdir()] == ["README.md"]
    assert write_card(folder, card_of(make_report(3), evaluations=[better], base_card=base_card))
    assert read(folder) == text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"# Mine\n",
        b"\xff\xfe",
        f"# Mine\n{BEGIN}\n".encode(),
        f"{END}\n{BEGIN}\n".encode(),
        f"`{BEGIN}` and `{END}`".encode(),
    ],
)
def test_a_foreign_readme_is_left_alone(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(content)
    assert not write_card(tmp_path, card_of())
    assert (tmp_path / "README.md").read_bytes() == content


def test_a_broken_header_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for broken in ("a: [1", "- 1"):
        content = f"---\n{broken}\n---\n{BEGIN}\n{END}\n"
        (tmp_path / "README.md").write_text(content)
        with caplog.at_level(logging.WARNING):
            assert not write_card(tmp_path, card_of())
        assert read(tmp_path) == content
        with pytest.raises(CheckpointError, match="header of the README"):
            card_of().merged_into(content)
    assert "was not renewed" in caplog.text


def test_line_ends_and_byte_order_mark_stay(tmp_path: Path) -> None:
    text = "\ufeff" + f"---\r\nlicense: mit\r\n---\r\nMine.\r\n{BEGIN}\r\nstale words\r\n{END}\r\nBelow.\r\n"
    (tmp_path / "README.md").write_bytes(text.encode())
    assert write_card(tmp_path, card_of())
    merged = read(tmp_path)
    assert merged.startswith("\ufeff---\r\nlicense: mit\r\n")
    assert merged.count("\n") == merged.count("\r\n")
    assert "stale words" not in merged
    assert merged.endswith(f"{END}\r\nBelow.\r\n")


def test_merging_into_a_readme_without_our_section() -> None:
    theirs = "---\nlibrary_name: transformers\ntags: []\nbase_model: my/choice\nlicense: mit\n---\n\n# Mine\n\nText.\n"
    merged = card_of(base_card="---\nlicense: other\nlicense_name: x\n---\n").merged_into(theirs)
    header = yaml.safe_load(merged.split("---\n")[1])
    assert "# Mine\n\nText.\n\n" + BEGIN in merged
    assert header == {
        "library_name": "transformers", "tags": ["hf_sparse", "sparse", "pruned", "2:4"], "base_model": "my/choice", "license": "mit",
        "pipeline_tag": "text-generation",
    }  # fmt: skip
    assert card_of().merged_into("# Only text\n").startswith("---\n")
    assert card_of().merged_into("# Only text\n").count(BEGIN) == 1
    assert card_of().merged_into("") == card_of().content


def test_values_that_were_ours_are_renewed_and_a_persons_are_not() -> None:
    first = card_of().content
    other = card_of(make_report(config=SparsityConfig(pattern="4:8"), model="someone/else"))
    renewed = ModelCard(other.merged_into(first)).data
    assert (renewed.base_model, renewed.tags) == ("someone/else", ["hf_sparse", "sparse", "pruned", "4:8"])
    edited = first.replace("base_model: someone/base", "base_model: mine/own", 1).replace("- pruned\n", "- llama\n", 1)
    edited = edited.replace("pipeline_tag: text-generation\n", "", 1)
    kept = ModelCard(other.merged_into(edited)).data
    assert (kept.base_model, kept.tags) == ("mine/own", ["hf_sparse", "sparse", "llama", "4:8"])
    assert kept.pipeline_tag is None  # taken away by the person


def test_results_of_others_are_kept() -> None:
    first = card_of(evaluations=[MEASURED])
    foreign = {
        "task": {"type": "x"},
        "dataset": {"name": "d", "type": "d"},
        "metrics": [{"type": "accuracy", "value": 0.5}],
    }
    header, _, body = first.content.removeprefix("---\n").partition("\n---\n")
    values = yaml.safe_load(header)
    values["model-index"][0]["results"].insert(0, foreign)
    values["model-index"][0]["results"][1]["metrics"].append({"type": "bleu", "value": 1.0})
    existing = f"---\n{yaml.safe_dump(values)}---\n{body}"

    def results(card: SparseModelCard) -> list[tuple[str, float]]:
        return [
            (found.metric_type, found.metric_value) for found in ModelCard(card.merged_into(existing)).data.eval_results
        ]

    better = dataclasses.replace(MEASURED, sparse=11.0)
    assert results(card_of(evaluations=[better])) == [("accuracy", 0.5), ("bleu", 1.0), ("perplexity", 11.0)]
    assert results(card_of()) == [("accuracy", 0.5), ("bleu", 1.0)]


@pytest.mark.parametrize(
    "header",
    [
        "{license: mit, tags: [a]}",
        "? license\n: mit\ntags:\n  - a",
        "x: &x mit\nlicense: *x\ntags: a",
        "license: mit\ntags: [a]\n# end",
    ],
)
def test_unusual_headers(header: str) -> None:
    values = yaml.safe_load(card_of().merged_into(f"---\n{header}\n---\nText.\n").split("---\n")[1])
    assert values["license"] == "mit"
    assert values["tags"] == ["a", "hf_sparse", "sparse", "pruned", "2:4"]


@pytest.mark.parametrize("index", ["text", [1], [{"name": "x"}], [{"name": "x", "results": ["odd", {"metrics": 3}]}]])
def test_odd_results_of_others_do_not_break_the_merge(index: Any) -> None:
    existing = f"---\n{yaml.safe_dump({'model-index': index})}---\nText.\n"
    merged = yaml.safe_load(card_of().merged_into(existing).split("---\n")[1])
    assert merged["model-index"] == index


@settings(max_examples=40)
@given(above=st.text(), below=st.text())
def test_text_outside_the_markers_is_kept(above: str, below: str) -> None:
    body = f"\n{above}\n{BEGIN}\nold\n{END}\n{below}".replace("\r", "")
    merged = card_of().merged_into(f"---\nlicense: mit\n---\n{body}")
    start, _, end = body.partition(f"{BEGIN}\nold\n{END}")
    assert merged.partition("\n---\n")[2].startswith(start)
    assert merged.endswith(end)
    assert card_of().merged_into(merged) == merged


# ---------------------------------------------------------------------------------------------------- hashes of files

FILES = {"config.json": "a" * 64, "model-00001-of-00002.safetensors": "0123456789abcdef" * 4}


def test_the_card_tells_the_hashes_of_the_report() -> None:
    text = card_of(make_report(files=FILES)).content
    assert section(text, "Files").strip().splitlines()[2:] == [
        "| File | SHA-256 |", "|---|---|", f"| `config.json` | `{'a' * 64}` |",
        f"| `model-00001-of-00002.safetensors` | `{'0123456789abcdef' * 4}` |",
    ]  # fmt: skip
    assert file_hashes(text) == FILES
    assert "SHA-256" not in card_of().content
    assert file_hashes(card_of().content) == {}


@pytest.mark.parametrize(("number", "folded"), [(12, False), (13, True)])
def test_many_files_are_folded(number: int, folded: bool) -> None:
    files = {f"model-{index:05}.safetensors": f"{index:064x}" for index in range(number)}
    text = card_of(make_report(files=files)).content
    assert (f"<summary>{number} files</summary>" in text) == folded
    assert file_hashes(text) == files


@settings(max_examples=40)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=255).filter(lambda name: misfit(name, "0" * 64) is None), st.just("f" * 64)
    )
)
@example({'"x"': "f" * 64, '"': "f" * 64, " x": "f" * 64, "&amp;|": "f" * 64, "\ud800\U0001f600": "f" * 64})
def test_every_name_of_a_file_comes_back(files: dict[str, str]) -> None:
    assert file_hashes(card_of(make_report(files=files)).content) == files


@pytest.mark.parametrize(
    "line",
    [
        "| `../x` | `{digest}` |",
        "| `a/b` | `{digest}` |",
        "| `x` | `{upper}` |",
        "| `x` | `{digest}0` |",
        "| `x` | {digest} |",
        "| x | `{digest}` |",
        "| `x` | `{digest}` | more |",
        " | `x` | `{digest}` |",
        "| <code>&#34;x</code> | `{digest}` |",  # JSON that does not end
        "| <code>&#34;&#92;ud83&#34;</code> | `{digest}` |",
        "| <code>" + "&#32;" * 2000 + "</code> | `{digest}` |",
        "| `" + "x" * 300 + "` | `{digest}` |",
        "```\n| `x` | `{digest}`",
    ],
)
def test_rows_that_we_would_not_write_are_passed_over(line: str) -> None:
    row = line.format(digest="b" * 64, upper="B" * 64)
    text = card_of(make_report(files=FILES)).content.replace("|---|---|\n| `config", f"|---|---|\n{row}\n| `config")
    assert row in text
    assert file_hashes(text) == FILES


def test_hashes_are_read_from_our_section_only() -> None:
    ours = card_of(make_report(files=FILES)).content
    row = f"| `config.json` | `{'b' * 64}` |"
    table = f"### Files\n\n| File | SHA-256 |\n|---|---|\n{row}\n"
    assert file_hashes(table) == {}
    assert file_hashes(f"{BEGIN}\n{table}") == {}
    assert file_hashes(f"```\n{BEGIN}\n{table}{END}\n```\n{ours}") == FILES
    assert file_hashes(ours.replace("|---|---|\n| `config", f"|---|---|\n| `x` | `{'c' * 64}` |\n| `config")) == {
        "x": "c" * 64,
        **FILES,
    }
    assert file_hashes(ours.replace("\n### What runs", f"{row}\n\n### What runs")) == FILES  # the first row holds
    other = f"| `other` | `{'b' * 64}` |"
    assert file_hashes(ours.replace("\n### What runs", f"{other}\n\n### What runs")) == {**FILES, "other": "b" * 64}
    assert file_hashes(ours.replace("\n### Do it", f"{other}\n\n### Do it")) == FILES  # another table
    assert file_hashes(ours.replace("\n", "\r\n")) == FILES
    assert file_hashes(ours + "x" * 2**24) == {}


@settings(max_examples=40)
@given(st.text())
def test_any_text_gives_hashes_or_none(text: str) -> None:
    for content in (text, f"{BEGIN}\n### Files\n{text}\n{END}\n"):
        assert all(misfit(*item) is None for item in file_hashes(content).items())


@pytest.mark.parametrize(
    "files",
    [{"a/b": "0" * 64}, {"": "0" * 64}, {"a": "0" * 63}, {"a": "G" * 64}, {"a": None}, ["a"], {"a" * 256: "0" * 64}],
)
def test_a_report_with_other_hashes_is_refused(files: Any) -> None:
    values = make_report(files=FILES).to_dict()
    assert Report.from_dict(values).files == FILES
    with pytest.raises(CheckpointError, match="files"):
        Report.from_dict({**values, "files": files})
    del values["files"]
    assert Report.from_dict(values).files == {}  # as written by earlier versions


# ---------------------------------------------------------------------------------------------------- cards of one's own

OWN = "---\n{{ card_data }}\n---\n# {{ team }}\n{{ begin }}\n{{ title }}: {{ in_sites }}, {{ license }}\n{{ end }}\n"


class TeamCard(SparseModelCard):
    @classmethod
    def template_variables(cls, source: CardSource) -> dict[str, Any]:
        return {**super().template_variables(source), "team": f"Team of {source.report.model_class}"}

    @classmethod
    def header_data(cls, source: CardSource) -> ModelCardData:
        data = super().header_data(source)
        data["team"] = "ours"
        return data


@pytest.fixture
def own_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own.md").write_text(OWN, encoding="utf-8")
    monkeypatch.setattr(TeamCard, "default_template_path", tmp_path / "own.md")
    return tmp_path / "own.md"


def test_a_subclass_has_its_own_template_variables_and_header(own_template: Path) -> None:
    card = TeamCard.from_report(make_report(), base_card="---\nlicense: mit\n---\n")
    assert card.text.startswith("# Team of LlamaForCausalLM\n" + BEGIN)
    assert "base, 2:4 sparse: 8,192 of 16,384 (50.00 %), mit\n" in card.text
    assert card.data["team"] == "ours"
    assert isinstance(card, TeamCard)


def test_a_template_and_variables_for_one_card(own_template: Path) -> None:
    for template in ({"template_path": own_template}, {"template_path": str(own_template)}, {"template_str": OWN}):
        assert "# Us\n" in card_of(team="Us", **template).text
    assert "\n# Mine\n" in card_of(title="Mine").text  # a variable of ours is replaced
    assert "# \n" in card_of(template_str=OWN).text  # what is not given is empty, as Jinja has it


def test_a_card_of_an_own_template_is_renewed(own_template: Path, tmp_path: Path) -> None:
    assert write_card(tmp_path, TeamCard.from_report(make_report()))
    (tmp_path / "README.md").write_text(read(tmp_path) + "Mine.\n")
    other = make_report(config=SparsityConfig(pattern="4:8"), model="someone/else")
    assert write_card(tmp_path, TeamCard.from_report(other))
    text = read(tmp_path)
    assert text.endswith("Mine.\n")
    assert "else, 4:8 sparse: 8,192" in text
    assert ModelCard(text).data.base_model == "someone/else"  # the section remembers what the header held
    assert text.count(BEGIN) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"template_str": OWN.replace("{{ begin }}\n", "")}, r"the text given, needs '\{\{ begin \}\}' and"),
        ({"template_str": OWN.replace("{{ end }}\n", "")}, "each alone on a line"),
        ({"template_str": OWN.replace("{{ end }}", "x {{ end }}")}, "each alone on a line"),
        ({"template_str": OWN.replace("{{ begin }}", "> {{ begin }}")}, "each alone on a line"),
        ({"template_str": OWN + "{{ begin }}\n{{ end }}\n"}, "once, each alone"),
        ({"template_str": "```\n" + BEGIN + "\n" + END + "\n```\n" + OWN}, "does not begin with the header"),
        ({"template_str": OWN.partition("---\n# ")[2]}, "first lines must be '---'"),
        ({"template_str": OWN.replace("{{ card_data }}", "license: mit")}, "does not begin with the header"),
        ({"template_str": "{{ card_data"}, "line 1, cannot be rendered by Jinja"),
        ({"template_str": "{% include 'x' %}"}, "no loader"),
        ({"template_str": OWN, "template_path": "x"}, "give one of them"),
        ({"template_path": "/missing/own.md"}, "'/missing/own.md', cannot be read: .*No such file"),
    ],
)  # fmt: skip
def test_templates_that_cannot_be_used_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        card_of(**given)


def test_all_variables_are_documented() -> None:
    table = re.findall(r"^\| (`.*?) \|", variables.__doc__ or "", re.MULTILINE)
    documented = [name for cell in table for name in re.findall(r"`(\w+)`", cell)]
    source = CardSource(report=make_report(), base="someone/base")
    given = set(SparseModelCard.template_variables(source)) | {"card_data", "begin", "end"}
    assert sorted(documented) == sorted(given)
    template = Path(SparseModelCard.default_template_path).read_text(encoding="utf-8")
    tree = jinja2.Environment(autoescape=True).parse(template)
    assert jinja2.meta.find_undeclared_variables(tree) <= given


@pytest.fixture
def chosen_class() -> Iterator[None]:
    yield
    set_card_class(None)


@pytest.mark.usefixtures("chosen_class")
def test_saves_write_the_chosen_class(own_template: Path, tmp_path: Path) -> None:
    model = pruned_llama()
    set_card_class(TeamCard)
    assert card_class() is TeamCard
    model.save_pretrained(tmp_path / "own")
    assert "# Team of LlamaForCausalLM\n" in read(tmp_path / "own")
    set_card_class(None)
    assert card_class() is SparseModelCard
    model.save_pretrained(tmp_path / "ours")
    assert "Team" not in read(tmp_path / "ours")


@pytest.mark.parametrize("kind", [ModelCard, "TeamCard", 3, card_of])
def test_other_classes_are_refused(kind: Any) -> None:
    with pytest.raises(ConfigError, match="give a subclass of SparseModelCard"):
        set_card_class(kind)
    assert card_class() is SparseModelCard


def pruned_llama() -> Any:
    model = llama()
    prune_(model, SparsityConfig(pattern="2:4", metric="magnitude"))
    return model


def test_from_a_saved_folder(tmp_path: Path) -> None:
    pruned_llama().save_pretrained(tmp_path)
    card = SparseModelCard.from_folder(tmp_path)
    assert card.content == read(tmp_path)
    assert file_hashes(card.content) == hashes_of(tmp_path)
    assert set(file_hashes(card.content)) == {"config.json", "model.safetensors"}
    assert "hf-sparse prune x\n" in SparseModelCard.from_folder(str(tmp_path), command="hf-sparse prune x").text
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json' is not valid JSON"):
        SparseModelCard.from_folder(tmp_path)
    with pytest.raises(CheckpointError, match="cannot read"):
        SparseModelCard.from_folder(tmp_path / "missing")


# ---------------------------------------------------------------------------------------------------- the card as data


def test_results_parse_back_as_the_reports_evaluations() -> None:
    evaluations = [
        MEASURED,
        dataclasses.replace(MEASURED, text="stdlib:evaluation", window=128, stride=None, fingerprint="beef00"),
        Evaluation(None, 1e-07, "loss", text="wikitext", tokens=3),
        Evaluation(123456789.125, 1e17, text="a: b, [c] #d 'e'", window=2048, tokens=10**12, fingerprint="12345678"),
    ]
    report = make_report()
    for item in evaluations:
        report.add_evaluation(dataclasses.asdict(item))
    found = ModelCard(SparseModelCard.from_report(Report.from_dict(report.to_dict())).content).data.eval_results
    back = [
        Evaluation(
            text=result.dataset_name, metric=result.metric_type, sparse=result.metric_value,
            **{name: result.metric_args.get(name) for name in ("dense", "window", "stride", "tokens")},
            fingerprint=result.metric_args.get("fingerprint", ""),
        )
        for result in found
    ]  # fmt: skip
    assert sorted(back, key=repr) == sorted(evaluations, key=repr)
    assert {result.task_type for result in found} == {"text-generation"}


def test_merging_into_a_card_keeps_the_results(tmp_path: Path) -> None:
    card = card_of(evaluations=[MEASURED])
    merged = ModelCard(card.merged_into("# Mine\n")).data
    assert merged.eval_results == ModelCard(card.content).data.eval_results
    assert merged.to_dict() == ModelCard(card.content).data.to_dict()


LICENSED = (
    "license: other\nlicense_name: llama3\nlicense_link: LICENSE\nlanguage:\n- en\n- de\npipeline_tag: fill-mask\n"
)


@pytest.mark.parametrize(
    ("base", "link"),
    [
        ("someone/base", "https://huggingface.co/someone/base/blob/main/LICENSE"),
        ("/somewhere/base", "LICENSE"),
    ],
)
def test_license_and_language_are_the_base_models(base: str, link: str) -> None:
    data = card_of(make_report(model=base), base_card=f"---\n{LICENSED}tags:\n- x\ndatasets:\n- y\n---\n").data
    assert (data.license, data.license_name, data.license_link) == ("other", "llama3", link)
    assert (data.language, data.pipeline_tag, data.datasets) == (["en", "de"], "fill-mask", None)
    full = f"---\n{LICENSED.replace('LICENSE', 'https://x.example/l')}---\n"
    assert card_of(make_report(model=base), base_card=full).data.license_link == "https://x.example/l"


def test_the_base_models_card_is_found_in_its_folder_and_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("\ufeff---\nlicense: mit\n---\n", encoding="utf-8")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    cached = tmp_path / "cache" / "models--someone--base"
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots" / "abc" / "README.md").write_text("---\nlicense: llama3\n---\n")
    model = llama()
    for base, license_name in [(str(folder), "mit"), ("someone/base", "llama3"), ("someone/other", None), ("", None)]:
        assert SparseModelCard.of_model(model, make_report(model=base)).data.license == license_name
    given = SparseModelCard.of_model(model, make_report(model=str(folder)), base_card="---\nlicense: gpl-3.0\n---\n")
    assert given.data.license == "gpl-3.0"
    with (folder / "README.md").open("ab") as file:
        file.truncate(5 * 2**20)  # no card is as large
    assert SparseModelCard.of_model(model, make_report(model=str(folder))).data.license is None


# ---------------------------------------------------------------------------------------------------- cards of others

EXAMPLE = f"{BEGIN}\nan example\n{END}\n"
OTHERS = {
    "tables and HTML": "---\nlicense: mit\n---\n# Base\n\n<div align='center'><b>x</b></div>\n\n| a | b |\n|---|---|\n| 1 | `|` |\n\n<!-- a\ncomment -->\n" + "Words. " * 3000,
    "our markers in a block of code": f"# Base\n\n```md\n{EXAMPLE}```\n\nText.\n",
    "our markers in a longer fence": f"~~~~ md\n~~~\n{EXAMPLE}~~~\n~~~~\nText.\n",
    "our markers in code, twice": f"```\n{EXAMPLE}```\n\n   ```\n{EXAMPLE}   ```\n",
    "a fence that is not closed": "# Base\n\n```python\nx = 1\n",
    "a tilde fence that is not closed": "# Base\n\n~~~\nx = 1\n",
    "code within a line": "```not a fence```\nText.\n",
    "half of a pair": f"# Base\n{BEGIN}\nText.\n",
    "the other half": f"# Base\n{END}\nText.\n",
    "indented markers": f"# Base\n\n    {BEGIN}\n    {END}\n",
    "no header": "# Base\n\n---\nnot: a header\n---\n",
    "a header without end": "---\nlicense: mit\n\n# Base\n",
    "an empty header": "---\n\n---\n# Base\n",
    "keys twice": "---\nlicense: mit\ntags: [a]\nlicense: apache-2.0\ntags: [b]\n---\n# Base\n",
    "line ends of Windows": "---\r\nlicense: mit\r\n---\r\n# Base\r\n\r\n```\r\n" + EXAMPLE.replace("\n", "\r\n") + "```\r\n",
    "line ends of Windows, without header": "# Base\r\n\r\nText.\r\n",
    "a single line": "Base",
    "line ends of both kinds": "---\r\nlicense: mit\r\n---\nText.\n",
    "form feeds and other breaks": "# Base\x0c\u2028\x85text\n",
}  # fmt: skip


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", OTHERS)
def test_no_card_is_lost(name: str, mark: str) -> None:
    theirs = OTHERS[name]
    body = header.split(theirs)[1]
    merged = card_of().merged_into(mark + theirs)
    assert merged.startswith(mark + "---")
    assert body.strip() in merged
    assert merged.count("8,192 of 16,384") == card_of().text.count("8,192 of 16,384")
    newline = "\r\n" if "\r\n" in theirs else "\n"
    assert merged.endswith(f"{newline}{END}{newline}")
    again = card_of(make_report(blocks=3)).merged_into(merged)
    assert body.strip() in again
    assert "8,192 of 16,384" not in again  # the section was renewed, not added a second time
    assert card_of(make_report(blocks=3)).merged_into(again) == again
    assert ModelCard(again.removeprefix(mark)).data.library_name == "transformers"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"```a```\n{EXAMPLE}```\nx\n```\n", True),  # code within a line opens no block
        (f"```\n```python\n{EXAMPLE}```\n", False),  # what closes a block stands alone on its line
        (f"````\n```\n{EXAMPLE}```\n````\n", False),
        (f"~~~\n```\n{EXAMPLE}~~~\n", False),
        (f"~~~ a`b`\n{EXAMPLE}~~~\n", False),
        (f"    ```\n{EXAMPLE}    ```\n", True),  # so far to the right it is text in a block of its own
        (f"{BEGIN}  \nan example\n{END}\t\n", True),
        (f"{BEGIN} x\nan example\n{END}\n", False),
        (f"{BEGIN}\n```\n{END}\n```\n", True),
        (f"{END}\n{EXAMPLE}", True),
    ],
)
def test_which_markers_count(text: str, found: bool) -> None:
    assert (part_of(text) is not None) == found
    assert ("an example" in replace_part(text, "", "new")) == ("an example" in text and not found)


def test_a_byte_order_mark_alone_stays() -> None:
    assert card_of().merged_into("\ufeff") == "\ufeff" + card_of().content


def test_keys_that_stand_twice_mean_what_they_meant() -> None:
    merged = card_of().merged_into(OTHERS["keys twice"])
    values = header.read(header.split(merged)[0])
    assert values["license"] == "apache-2.0"
    assert values["tags"] == ["b", "hf_sparse", "sparse", "pruned", "2:4"]
    assert merged.count("tags:") == 1


def test_a_section_below_a_fence_that_was_never_closed_is_renewed() -> None:
    merged = card_of().merged_into(OTHERS["a fence that is not closed"])
    assert part_of(merged) is not None
    assert card_of(make_report(blocks=1)).merged_into(merged).count(BEGIN) == 1


LARGE = {
    "words": "word " * 400_000,
    "lines": "\n" * 2_000_000,
    "markers": f"{BEGIN}\n" * 80_000,
    "pairs": f"{BEGIN}\n{END}\n" * 40_000,
    "fences": "```\n" * 500_000,
    "fences of all lengths": "".join("`" * (3 + index % 500) + "\n" for index in range(8_000)),
    "markers in a fence": "```\n" + f"{BEGIN}\n" * 80_000,
    "one long line of backticks": "`" * 2_000_000,
    "dashes": "---\n" * 500_000,
    "spaces": "---" + " " * 2_000_000,
    "rules with spaces": "---\na: 1\n" + ("---" + " " * 100 + "x\n") * 18_000,
    "comments": "<!-- hf_sparse:" * 120_000,
    "remembered": f"{BEGIN}\n" + "<!-- hf_sparse:header " * 90_000 + f"\n{END}\n",
}


@pytest.mark.parametrize("name", LARGE)
def test_two_megabytes_are_merged_and_read(name: str) -> None:
    merged = card_of(make_report(files=FILES)).merged_into("# x\n" + LARGE[name])
    assert file_hashes(merged) == FILES
    assert card_of(make_report(files=FILES)).merged_into(merged) == merged


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "a: &a [*a]",
        "a: " + "[" * 40 + "]" * 40,
        "a: " + "[" * 10_000,
        "a: " + "{b: " * 10_000,
        "a: 0x" + "f" * 5000,
        "a: " + "1" * 5000,
        "a: 2024-13-45",
        "a: !!int ''",
        "a: !!python/object/apply:os.system [ls]",
        "? [a]\n: b",
        "a: \x07",
        "a: [1",
        "- a",
        "text",
        "a: b\n" + "# x\n" * 300_000,
    ],
)
def test_headers_that_cannot_be_read_are_refused_and_nothing_is_inherited(text: str) -> None:
    with pytest.raises(CheckpointError, match="YAML header of the README"):
        card_of().merged_into(f"---\n{text}\n---\nText.\n")
    assert card_of(base_card=f"---\nlicense: mit\n{text}\n---\n").data.license is None


# ---------------------------------------------------------------------------------------------------- the Trainer's text


def trainers(loss: float = 0.5, **header_values: Any) -> str:
    """What a Trainer writes."""
    values = {
        "library_name": "transformers", "license": "mit", "base_model": "someone/pruned", "tags": ["generated_from_trainer"],
        "model-index": [{"name": "out", "results": [{
            "task": {"name": "Causal LM", "type": "text-generation"}, "dataset": {"name": "d", "type": "d"},
            "metrics": [{"name": "Loss", "type": "loss", "value": loss}],
        }]}],
    }  # fmt: skip
    values = {key: value for key, value in {**values, **header_values}.items() if value is not None}
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---\n\n<!-- generated -->\n\n# out\n\nLoss: {loss}\n"


def header_of(text: str) -> dict[str, Any]:
    return header.read(header.split(text)[0])


@pytest.mark.parametrize("existing", ["", "\n", "\ufeff", "\ufeff \n"])
def test_an_empty_readme_becomes_the_trainers(existing: str) -> None:
    merged = merge_trainer(existing, trainers())
    assert merged.startswith("\ufeff" if existing.startswith("\ufeff") else "---")
    assert header.split(merged.removeprefix("\ufeff"))[0] == header.split(trainers())[0]  # to the letter
    part = part_of(merged, TRAINER)
    assert part is not None
    assert part.endswith(f"<!-- generated -->\n\n# out\n\nLoss: 0.5\n{end(TRAINER)}")
    assert merge_trainer(merged, trainers()) == merged


def test_a_second_push_renews_the_trainers_part_and_keeps_the_persons_text() -> None:
    first = merge_trainer("", trainers()).replace("---\n\n<!--", "---\n\nAbove.\n\n<!--", 1) + "\nBelow.\n"
    first = first.replace("license: mit\n", "license: apache-2.0 # mine\nlanguage: de\n", 1)
    second = merge_trainer(first, trainers(0.25, license="gpl-3.0", base_model="someone/other", datasets=["d"]))
    assert "\n\nAbove.\n\n<!-- hf_sparse:trainer:begin -->\n" in second
    assert second.endswith(f"Loss: 0.25\n{end(TRAINER)}\n\nBelow.\n")
    assert "0.5" not in second
    assert "license: apache-2.0 # mine\nlanguage: de\n" in second  # a person's stay
    values = header_of(second)
    assert (values["base_model"], values["datasets"]) == (
        "someone/other",
        ["d"],
    )  # the Trainer's are renewed, absent ones filled
    assert [metric["value"] for result in values["model-index"][0]["results"] for metric in result["metrics"]] == [0.25]
    third = merge_trainer(second, trainers(0.125, base_model="someone/other", datasets=None))
    assert "datasets" not in header_of(third)
    assert header_of(third)["license"] == "apache-2.0"


@pytest.mark.parametrize("existing", [*OTHERS.values(), "---\n[1\n---\nText.\n", "\ufeff# x", EXAMPLE])
def test_a_readme_without_the_trainers_part_stays_to_the_letter(existing: str) -> None:
    assert merge_trainer(existing, trainers()) == existing


def test_trainers_part_and_our_section_stand_side_by_side() -> None:
    card = card_of(evaluations=[MEASURED])
    text = card.merged_into(merge_trainer("", trainers()))
    assert text.index(end(TRAINER)) < text.index(BEGIN)
    assert header_of(text)["tags"] == ["generated_from_trainer", "hf_sparse", "sparse", "pruned", "2:4"]
    for _ in range(2):
        text = card_of(evaluations=[dataclasses.replace(MEASURED, sparse=11.0)]).merged_into(
            merge_trainer(text, trainers(0.25))
        )
    assert text.count(BEGIN) == text.count(begin(TRAINER)) == 1
    found = ModelCard(text).data.eval_results
    assert sorted((result.metric_type, result.metric_value) for result in found) == [
        ("loss", 0.25),
        ("perplexity", 11.0),
    ]
    assert text == card_of(evaluations=[dataclasses.replace(MEASURED, sparse=11.0)]).merged_into(
        merge_trainer(text, trainers(0.25))
    )


@pytest.mark.parametrize(
    ("generated", "base", "license_name"),
    [
        (None, "someone/pruned", "mit"),  # counted as a person's
        ({"base_model": "someone/pruned", "license": "mit"}, "someone/base", "mit"),  # ours has no license
        ({"base_model": "other"}, "someone/pruned", "mit"),
    ],
)
def test_header_values_that_a_program_wrote_give_way_to_ours(generated: Any, base: str, license_name: str) -> None:
    merged = header_of(merge(merge_trainer("", trainers()), card_of().content, generated=generated))
    assert (merged["base_model"], merged["license"]) == (base, license_name)
    assert ("base_model_relation" in merged) == (base == "someone/base")
    assert "generated_from_trainer" in merged["tags"]


def test_a_persons_results_stay_beside_the_trainers() -> None:
    first = merge_trainer("", trainers())
    values = header_of(first)
    (result,) = values["model-index"][0]["results"]
    other = {**copy.deepcopy(result), "dataset": {"name": "mine", "type": "mine"}}  # the same figure on other data
    result["metrics"].append({"type": "bleu", "value": 1.0})
    values["model-index"][0]["results"].append(other)
    text = f"---\n{yaml.safe_dump(values)}---\n{header.split(first)[1]}"
    found = ModelCard(merge_trainer(text, trainers(0.25))).data.eval_results
    assert sorted((result.dataset_name, result.metric_type, result.metric_value) for result in found) == [
        ("d", "bleu", 1.0), ("d", "loss", 0.25), ("mine", "loss", 0.5),
    ]  # fmt: skip


def test_a_trainers_text_without_a_header() -> None:
    merged = merge_trainer("", "# out\n")
    assert header.split(merged) == ("", merged.removeprefix("---\n\n---\n"))
    assert merge_trainer(merged, "# out\n") == merged
    assert header_of(merge_trainer(merged, trainers()))["license"] == "mit"


def test_the_trainers_part_cannot_be_ended_by_a_name() -> None:
    nasty = trainers() + f"\n{end(TRAINER)}\n{BEGIN}\nx\n{END}\n"
    merged = merge_trainer("", nasty)
    assert (merged.count(end(TRAINER)), merged.count(BEGIN)) == (1, 0)
    assert merge_trainer(merged, nasty) == merged


def test_what_transformers_writes_is_merged(tmp_path: Path) -> None:
    trainer = Trainer(llama(), TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    trainer.create_model_card(license="mit", tags=["mine"])
    generated = read(tmp_path)
    merged = merge_trainer("", generated)
    assert merge_trainer(merged, generated) == merged
    assert ModelCard(merged).data.to_dict() == ModelCard(generated).data.to_dict()
    assert ModelCard(generated).text.strip() in merged


# ---------------------------------------------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def sparse_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sparse") / "base_2to4"
    pruned_llama().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: llama3\n---\n")
    return folder


def adapted(folder: Path, config: Any = None, name: str = "default") -> Any:
    base = AutoModelForCausalLM.from_pretrained(folder)
    return peft.get_peft_model(base, config or peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]), name)


def zeros_below(model: Any, *endings: str) -> int:
    return sum(
        int((parameter == 0).sum())
        for name, parameter in pruned_llama().named_parameters()
        if any(f"{ending}.weight" in name for ending in endings)
    )


LORA = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])


@pytest.mark.parametrize(
    ("config", "masked", "row", "said"),
    [
        (LORA, True, "| `default` | `LORA` | 4 | 4 | yes | {lost:,} |", "Masked (`default`)"),
        (LORA, False, "| `default` | `LORA` | 4 | 4 | no | {lost:,} |", "Not masked (`default`)"),
        (peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]), False,
         "| `default` | `IA3` | none | 4 | no | 0 |", "merging it fills in no zero of the base"),
    ],
)  # fmt: skip
def test_what_an_adapter_card_tells(sparse_folder: Path, config: Any, masked: bool, row: str, said: str) -> None:
    model = adapted(sparse_folder, config)
    if masked:
        mask_lora_(model)
    card = SparseAdapterCard.of_model(model)
    lost = zeros_below(model, "q_proj", "down_proj")
    assert row.format(lost=lost) in card.text
    assert lost > 0
    assert "| Base | `base_2to4` |" in card.text
    assert "| Pattern | `2:4` |" in card.text
    zeros = sum(zeros for zeros, _ in checkpoint.count(pruned_llama()).values())
    assert f"| Zeros in the pruned sites | {zeros:,} of {2 * zeros:,} (50.00 %) |" in card.text
    sayings = ("Masked (`default`)", "Not masked (`default`)", "merging it fills in no zero of the base")
    assert [saying for saying in sayings if saying in card.text] == [said]
    assert ("mask_lora_(model)\n" in card.text) == masked
    assert str(sparse_folder.parent) not in card.content


@pytest.mark.parametrize("masked", [True, False])
def test_the_figures_of_an_adapter_card_hold(sparse_folder: Path, tmp_path: Path, masked: bool) -> None:
    model = adapted(sparse_folder)
    torch.nn.init.normal_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    for layer in model.base_model.model.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.lora_B["default"].weight)
        torch.nn.init.normal_(layer.mlp.down_proj.lora_B["default"].weight)
    if masked:
        mask_lora_(model)
    text = SparseAdapterCard.of_model(model).text
    model.save_pretrained(tmp_path)
    before = checkpoint.count(model)
    told = int(re.search(r"\| (?:yes|no) \| ([\d,]+) \|", text)[1].replace(",", ""))  # type: ignore[index]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(sparse_folder)
        merged = peft.PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    after = checkpoint.count(merged)
    assert sum(zeros for zeros, _ in before.values()) - sum(zeros for zeros, _ in after.values()) == told


@pytest.mark.parametrize("masked", [True, False])
def test_the_snippets_of_an_adapter_card_run(sparse_folder: Path, tmp_path: Path, masked: bool) -> None:
    model = adapted(sparse_folder)
    if masked:
        mask_lora_(model)
    model.save_pretrained(tmp_path / "adapter")
    snippets = re.findall(r"```python\n(.*?)```", SparseAdapterCard.of_model(model).text, re.DOTALL)
    program = "\n".join(snippets).replace("PATH_OR_REPOSITORY", str(tmp_path / "adapter"))
    program = program.replace('"base_2to4"', repr(str(sparse_folder))).replace("MERGED", str(tmp_path / "merged"))
    exec(program, {})
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert checkpoint.count(back) == checkpoint.count(pruned_llama())


def test_adapters_of_several_names(sparse_folder: Path, tmp_path: Path) -> None:
    model = adapted(sparse_folder, name="first")
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["v_proj"]))
    mask_lora_(model, "second")
    card = SparseAdapterCard.of_model(model)
    assert f"| `first` | `LORA` | 4 | 4 | no | {zeros_below(model, 'q_proj', 'down_proj'):,} |" in card.text
    assert f"| `second` | `LORA` | 2 | 2 | yes | {zeros_below(model, 'v_proj'):,} |" in card.text
    assert "Masked (`second`)" in card.text
    assert "Not masked (`first`)" in card.text
    model.save_pretrained(tmp_path / "adapter")
    snippet = block_of(card.text, "python").replace("PATH_OR_REPOSITORY", str(tmp_path / "adapter"))
    names: dict[str, Any] = {}
    exec(snippet.replace('"base_2to4"', repr(str(sparse_folder))), names)
    assert sorted(names["model"].peft_config) == ["first", "second"]
    assert SparseAdapterCard.of_model(names["model"]).text == card.text


def test_the_header_of_an_adapter_card_is_data(sparse_folder: Path) -> None:
    model = adapted(sparse_folder)
    local = ModelCard(SparseAdapterCard.of_model(model).content).data
    assert (local.library_name, local.base_model, local.license) == ("peft", None, "llama3")
    assert (local.tags, local.pipeline_tag) == (["hf_sparse", "sparse", "lora"], "text-generation")
    model.peft_config["default"].base_model_name_or_path = "someone/sparse"
    remote = ModelCard(SparseAdapterCard.of_model(model).content).data
    assert (remote.base_model, remote["base_model_relation"]) == ("someone/sparse", "adapter")
    assert remote.tags == ["hf_sparse", "sparse", "lora", "base_model:adapter:someone/sparse"]


@pytest.mark.parametrize("base", ["local", "someone/sparse"])
def test_what_peft_writes_is_kept_but_for_a_folder(sparse_folder: Path, tmp_path: Path, base: str) -> None:
    model = adapted(sparse_folder)
    if base != "local":
        model.peft_config["default"].base_model_name_or_path = model.config._name_or_path = base
        model.get_base_model().name_or_path = base
    model.save_pretrained(tmp_path)
    written = read(tmp_path)
    assert ("base_model: someone/sparse" in written) or str(sparse_folder) in written
    card = SparseAdapterCard.of_model(model, file_hashes=hashes_of(tmp_path))
    merged = card.merged_into(written)
    assert ModelCard(written).text.strip() in merged
    data = ModelCard(merged).data
    assert data.base_model == (None if base == "local" else base)
    assert data.tags is not None
    assert set(data.tags) >= {"hf_sparse", "sparse", "lora", "transformers"}
    assert str(sparse_folder) not in merged.replace("\\", "/")
    assert card.merged_into(merged) == merged
    assert file_hashes(merged) == hashes_of(tmp_path)
    assert write_card(tmp_path, card) is False  # PEFT's README has no section of ours, so it counts as a person's


def test_a_base_that_was_pruned_in_memory_is_told_of() -> None:
    model = llama()
    model.config._name_or_path = model.name_or_path = "someone/dense"
    prune_(model, SparsityConfig(pattern="2:4", metric="magnitude"))
    card = SparseAdapterCard.of_model(peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])))
    assert "The base is not what this name gives" in card.text
    assert "| Base | `someone/dense`, pruned |" in card.text
    unnamed = peft.get_peft_model(pruned_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    assert "The base has no name" in SparseAdapterCard.of_model(unnamed).text


def test_adapters_that_transformers_added(sparse_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(sparse_folder)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"]))
    lost = zeros_below(model, "q_proj")
    assert f"| `default` | `LORA` | 4 | 2 | no | {lost:,} |" in SparseAdapterCard.of_model(model).text


def test_names_in_an_adapter_card_are_neutralised(sparse_folder: Path) -> None:
    model = adapted(sparse_folder)
    nasty = NASTY.replace(".", "")
    model.peft_config[nasty] = model.peft_config["default"]
    model.peft_config["default"].base_model_name_or_path = NASTY
    report = checkpoint.report(model)
    assert report is not None
    report.config = {**report.config, "pattern": NASTY, "metric": NASTY}
    card = SparseAdapterCard.of_model(model, base_card=f"---\nlicense: {NASTY!r}\n---\n", file_hashes={NASTY: "0" * 64})
    card.content.encode("utf-8")
    assert card.content.partition("\n---\n")[2].count(END) == 1
    prose = re.sub(r"<!--.*-->", "", outside_code(card.text))
    for active in ("<script", "# top", "$$", "*bold*", "https://", "\u202e"):
        assert active not in prose, active


def test_adapter_cards_of_other_models_are_refused() -> None:
    with pytest.raises(ModelError, match="not sparse"):
        SparseAdapterCard.of_model(peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"])))
    with pytest.raises(ModelError, match="has no adapters"):
        SparseAdapterCard.of_model(pruned_llama())
