"""A card says what the report and the evaluations say, no more; a README keeps what its owner wrote."""

import argparse
import ast
import dataclasses
import json
import logging
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from test_recovery import make_recovery

from hf_sparse import embedded
from hf_sparse.config import SparsityConfig
from hf_sparse.errors import CheckpointError
from hf_sparse.recovery import Recovery
from hf_sparse.report import BlockReport, Report, SiteReport
from model_cards import Evaluation, SparseModelCard, write_card
from model_cards.escape import clean, code, fenced, json_text, plain, python_literal, shell_word
from model_cards.merge import BEGIN, END, section_of

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


def test_picture_files_command_and_later_training() -> None:
    claim = {"hf_sparse": {"totals": {"zeros": 8000, "sparsity": 8000 / 16384}}}
    card = card_of(plot_name="a b.png", files={"x.npz": "the masks"}, command="hf-sparse prune x y", model_config=claim)
    assert "(a%20b.png)" in card.text
    assert "| `x.npz` | the masks |" in card.text
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
        blocks=[block], model=nasty, model_class=nasty, left_out={nasty: nasty}, notes=[nasty], versions={nasty: nasty},
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
    assert section_of(content) is not None
    assert content.endswith(END)
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
    headings = ["Weight sparsity", "Quality", "Recovery", "Blocks", "Load it", "What runs faster", "Do it again"]
    assert [line.lstrip("# ") for line in prose.splitlines() if line.lstrip().startswith("#")][1:] == headings
    rows = [line for line in prose.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {3, 7, 10}
    assert ModelCard(content).content == content


def test_malicious_names_are_neutralised() -> None:
    evil = dataclasses.replace(MEASURED, text=NASTY, fingerprint=NASTY, metric=NASTY, before_recovery=1.0)
    card = card_of(
        nasty_report(NASTY),
        evaluations=[evil],
        files={NASTY: NASTY},
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
    assert "\n" not in clean(text)
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
    for header in ("a: [1", "- 1"):
        content = f"---\n{header}\n---\n{BEGIN}\n{END}\n"
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
