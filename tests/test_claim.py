"""The claim in config.json, and all else that comes with a model of unknown origin: read as plain data, shown harmlessly."""

import copy
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import llama
from test_recovery import make_recovery
from test_report import report
from test_schema import ANY_JSON, nested
from test_text import acts
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import hf_sparse
from hf_sparse import SparsityConfig, checkpoint
from hf_sparse.checkpoint import CONFIG_KEY, promised_zeros
from hf_sparse.claim import FORMAT, Claim
from hf_sparse.cli import main
from hf_sparse.errors import CheckpointError
from hf_sparse.report import FILE_NAME, Report
from model_cards import SparseModelCard

TOTALS = {"zeros": 5, "sites": 2, "sparsity": 0.5, "block_sparsity": 0.25}


def claim(**changes: Any) -> dict[str, Any]:
    values = {
        "format": FORMAT, "config": SparsityConfig(metric="magnitude").to_dict(), "totals": dict(TOTALS),
        "calibration": {"source": "my.jsonl", "samples": 4, "batch_size": "auto", "fingerprint": None}, "version": "0.1.0",
    }  # fmt: skip
    return {**values, **changes}


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in claim().items() if key not in keys}


@pytest.mark.parametrize(
    "values",
    [claim(), claim(calibration=None), claim(totals=TOTALS | {"sparsity": 0, "block_sparsity": 1}), claim(version=""), without("totals")],
)  # fmt: skip
def test_it_comes_back(values: dict[str, Any]) -> None:
    parsed = Claim.parse(values)
    assert parsed.to_dict() == values
    assert Claim.parse(json.loads(json.dumps(parsed.to_dict()))) == parsed
    assert parsed.zeros == (5 if "totals" in values else None)
    assert parsed.sparsity_config() == SparsityConfig(metric="magnitude")


def test_a_pruned_model_claims_what_its_report_says() -> None:
    model = llama()
    made = hf_sparse.prune_(model, SparsityConfig(metric="magnitude"))
    parsed = checkpoint.claim_of(model)
    assert parsed == Claim.parse(getattr(model.config, CONFIG_KEY))
    assert (parsed.totals, parsed.config, parsed.calibration) == (made.totals(), made.config, None)
    assert promised_zeros(model) == made.zeros
    assert checkpoint.claim_of(llama()) is None
    assert promised_zeros(llama()) is None


MALFORMED = {
    "no format": (without("format"), "format None; this version reads 1"),
    "newer": (claim(format=2), "format 2; .* Upgrade hf_sparse"),
    "truth for a format": (claim(format=True), "format True"),
    "text for a format": (claim(format="1"), "format '1'"),
    "no config": (without("config", "version"), "has no config, version"),
    "a key of nobody": (claim(later=1), "key 'later' does not exist"),
    "a key that acts": (claim(**{"\x1b[2J": 1}), r"key '\\x1b\[2J' does not exist"),
    "config a list": (claim(config=[]), r"config is \[\], where a mapping should stand"),
    "version a number": (claim(version=1), "version is 1"),
    "version a book": (claim(version="x" * 101), "version is 'xxx"),
    "calibration a text": (claim(calibration="mine"), "calibration is 'mine'"),
    "calibration nested": (claim(calibration={"source": ["a"]}), r"calibration.source is \['a'\]"),
    "totals a number": (claim(totals=5), "totals is 5"),
    "half the totals": (claim(totals={"zeros": 5}), "totals is {'zeros': 5}"),
    "more than the totals": (claim(totals={**TOTALS, "a": 1}), "totals is"),
    "zeros below 0": (claim(totals={**TOTALS, "zeros": -1}), "totals.zeros is -1"),
    "zeros a share": (claim(totals={**TOTALS, "zeros": 5.0}), "totals.zeros is 5.0"),
    "zeros without end": (claim(totals={**TOTALS, "zeros": 10**30}), "totals.zeros is 1000"),
    "zeros true": (claim(totals={**TOTALS, "zeros": True}), "totals.zeros is True"),
    "sites null": (claim(totals={**TOTALS, "sites": None}), "totals.sites is None"),
    "more than all": (claim(totals={**TOTALS, "sparsity": 1.5}), "totals.sparsity is 1.5"),
    "less than none": (claim(totals={**TOTALS, "block_sparsity": -0.5}), "totals.block_sparsity is -0.5"),
    "deep": (claim(config={"options": nested(20)}), r"config\.options\[0\].* is nested too deeply"),
    "long": (claim(config={"targets": ["a"] * 100_001}), "more than 100000 values"),
    "wide": (claim(calibration={"source": "x" * 70_000}), "calibration.source is longer than 65536 letters"),
}


@pytest.mark.parametrize(("values", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_claim_is_refused_with_the_way_out(values: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        Claim.parse(values)
    assert "hf_sparse.uninstall()" in str(caught.value)
    assert len(str(caught.value)) < 700
    assert acts(str(caught.value)) == []


@pytest.mark.parametrize("values", [None, [], "text", 5, True, {}, [claim()]], ids=lambda value: f"{value!r:.10}")
def test_what_is_no_claim_at_all_is_refused(values: Any) -> None:
    with pytest.raises(CheckpointError, match="uninstall"):
        Claim.parse(values)


@pytest.mark.parametrize(
    "config",
    [{}, {"pattern": "2:4", "metric": "of tomorrow"}, {"pattern": 5}, {"metric": []}, {"allocation": {"a": {}}}, {"later": 1},
     {"version": 2}, {"options": {"dass": {"exponent": "x"}}}, {"device": []}, {"pattern": "\x1b]52;c;aGk=\x07"}, {"num_samples": 1.5}],
)  # fmt: skip
def test_a_config_of_another_version_waits_until_it_is_asked_for(config: dict[str, Any]) -> None:
    parsed = Claim.parse(claim(config=config))
    if config:
        with pytest.raises(CheckpointError, match="cannot use the configuration") as caught:
            parsed.sparsity_config()
        assert acts(str(caught.value)) == []
    else:
        assert parsed.sparsity_config() == SparsityConfig()


@st.composite
def spoiled(draw: st.DrawFn, whole: Any) -> Any:
    """Data with one value, anywhere in them, replaced by anything that JSON can hold."""
    values = copy.deepcopy(whole)
    inner = values
    while True:
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        key = draw(st.sampled_from(keys))
        if not (isinstance(inner[key], dict | list) and inner[key] and draw(st.booleans())):
            inner[key] = draw(ANY_JSON)
            return values
        inner = inner[key]


@given(values=ANY_JSON | spoiled(claim()))
def test_any_data_are_a_claim_or_refused(values: Any) -> None:
    try:
        parsed = Claim.parse(values)
    except CheckpointError as error:
        said = str(error)
    else:
        assert parsed.to_dict() == {key: values[key] for key in values if key != "totals" or values[key] is not None}
        try:
            said = repr(parsed.sparsity_config())
        except CheckpointError as error:
            said = str(error)
    assert acts(said) == []


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(values=ANY_JSON | spoiled(report(recoveries=[make_recovery()], evaluations=[{"a": 1.5}]).to_dict()))
def test_any_data_are_a_report_or_refused(values: Any) -> None:
    try:
        said = str(Report.from_dict(values))
    except CheckpointError as error:
        said = str(error)
    assert set(acts(said)) <= {"\n"}


# ---------------------------------------------------------------------------------------------------- a whole model

HOSTILE = {
    "colours": "\x1b[31mred\x1b[0m",
    "cleared screen": "\x1b[2J\x1b[H\x9b2J",
    "link": "\x1b]8;;https://evil.example\x1b\\here\x1b]8;;\x1b\\",
    "clipboard": "\x1b]52;c;cm0gLXJmIH4=\x07",
    "title": "\x1b]0;owned\x07",
    "turned round": "\u202egnp.exe\u2066",
    "hidden": "a\u200bb\ufeffc\u00add",
    "new line": "fine\nhf-sparse: verified\r\nall is well",
    "overwritten": "false\rtrue \x08\x08",
    "html": "<script>alert(1)</script><!-- <img src=x onerror=alert(1)> -->",
    "our markers": "<!-- hf_sparse:end --><!-- hf_sparse:begin -->",
    "markdown": "[click](javascript:alert(1)) ![](http://evil.example/a.png) `|` | # x ***",
    "front matter": "---\nlicense: mit\n---",
    "template": "{{ config.__class__ }}{% for x in range(9) %}{% endfor %}$x$",
    "long": "x" * 60_000,
    "surrogate": "\ud800 \udfff",
    "control": "\0\x7f\x85\u2028",
    "nothing": "",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pruned model with its report, whose texts the tests replace."""
    folder = tmp_path_factory.mktemp("made")
    model = llama(layers=1)
    hf_sparse.prune_(model, SparsityConfig(metric="magnitude"))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


def write_claim(folder: Path, values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, CONFIG_KEY: values}))


def write_texts(folder: Path, text: str) -> None:
    """Put a text wherever claim and report have a text of free choice."""
    write_claim(folder, claim(calibration={"source": text, "fingerprint": text, text: text}, version=text[:100]))
    values = json.loads((folder / FILE_NAME).read_text())
    values |= {
        "model": text, "model_class": text, "notes": [text, f"2 sites: {text}"], "left_out": {text: text, f"{text}2": text},
        "calibration": dict.fromkeys(("source", "samples", "tokens", "batch_size", "fingerprint"), text), "versions": {text: text},
        "evaluations": [{"metric": text, "text": text, "sparse": 2.5, "dense": 2.0, "fingerprint": text}],
        "recoveries": [
            make_recovery(method=text, data=text, loss=text, schedule=text, optimizer=text, callbacks=[text], settings={text: text}).to_dict()
        ],
        "config": {**values["config"], "metric": text, "update": [text, text], "targets": [text], "calibration": text, text: text},
    }  # fmt: skip
    for block in values["blocks"]:
        block |= {"name": text, "stack": text}
        for site in block["sites"]:
            site |= {"role": text, "pattern": text, "axis": text, "metric": text, "note": text}
    (folder / FILE_NAME).write_text(json.dumps(values))


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_texts_of_others_cannot_act(text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_texts(folder, text)
    with warnings.catch_warnings(record=True) as warned:
        model = AutoModelForCausalLM.from_pretrained(folder)
        card = str(SparseModelCard.of_model(model, hf_sparse.report(model)))
    shown = [str(hf_sparse.report(model)), card, *(str(warning.message) for warning in warned)]
    for options in ([], ["--all"], ["--json"]):
        code, out, error = run(capsys, "inspect", folder, *options)
        assert code == 0
        shown += [out, error]
    for said in shown:
        assert set(acts(said)) <= {"\n"}
        assert max(map(len, said.splitlines()), default=0) < 20_000 or "--json" in options
    assert not any(
        line.startswith(("hf-sparse: verified", "all is well")) for said in shown for line in said.splitlines()
    )


def outside_of_code(text: str) -> str:
    return re.sub(r"^(`{3,})[^`\n]*\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    "text", [HOSTILE["html"], HOSTILE["our markers"], HOSTILE["markdown"], HOSTILE["front matter"]]
)
def test_texts_of_others_are_only_text_in_a_card(text: str, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    clean = SparseModelCard.of_model(model, hf_sparse.report(model))
    write_texts(folder, text)
    model = AutoModelForCausalLM.from_pretrained(folder)
    card = SparseModelCard.of_model(model, hf_sparse.report(model))
    for active in ("<script", "<img", "](javascript:", "![](http", "\nlicense: mit"):
        assert active not in outside_of_code(card.text)
    assert card.text.count("<!--") == clean.text.count("<!--")
    assert card.data.license is None
    assert ModelCard(card.merged_into(str(card))).text == card.text


@pytest.mark.parametrize(("values", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_model_with_a_malformed_claim_does_not_load(
    values: Any, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_claim(folder, values)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)
    code, out, error = run(capsys, "inspect", folder)
    assert (code, out) == (1, "")
    assert set(acts(error)) <= {"\n"}
    assert error.count("\n") == 1


def test_the_way_out_works(folder: Path) -> None:
    expected = LlamaForCausalLM.from_pretrained(folder).state_dict()
    write_claim(folder, claim(format=99))
    hf_sparse.uninstall()
    try:
        plain = LlamaForCausalLM.from_pretrained(folder)
    finally:
        hf_sparse.install()
    assert all(bool((plain.state_dict()[name] == value).all()) for name, value in expected.items())
    with pytest.raises(CheckpointError, match="format 99"):
        hf_sparse.is_sparse(plain)
    del plain.config.hf_sparse
    assert hf_sparse.is_sparse(plain)


def test_a_config_that_this_version_does_not_accept_does_not_keep_weights_from_loading(folder: Path) -> None:
    (folder / FILE_NAME).unlink()
    write_claim(folder, claim(config={"metric": "of tomorrow"}))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert hf_sparse.is_sparse(model)
    assert len(hf_sparse.masks(model)) == 7  # of all sites, as it is not known which were pruned
    with pytest.raises(CheckpointError, match="of tomorrow"):
        checkpoint.claim_of(model).sparsity_config()


def test_a_report_of_others_that_is_none_says_the_way_out(folder: Path) -> None:
    (folder / FILE_NAME).write_text('{"a": 1, "a": 2}')
    with pytest.raises(CheckpointError, match=r"'a' stands twice.*Delete the file, or call hf_sparse.uninstall\(\)"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("changes", [{"all_matrices": 1}, {"all_matrices": 0}])
def test_whatever_a_report_says_what_is_saved_again_loads(changes: dict[str, int], folder: Path) -> None:
    values = json.loads((folder / FILE_NAME).read_text())
    for block in values["blocks"]:
        block |= changes
    (folder / FILE_NAME).write_text(json.dumps(values))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder / "again")
    again = checkpoint.claim_of(AutoModelForCausalLM.from_pretrained(folder / "again"))
    assert again.totals["block_sparsity"] == again.totals["sparsity"] == 0.5
