"""The report: it comes back from JSON as it was, refuses what is no report, and prints every block."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from test_recovery import make_recovery, nested

from hf_sparse import SparsityConfig
from hf_sparse.checkpoint import claim
from hf_sparse.errors import CheckpointError
from hf_sparse.report import FILE_NAME, FORMAT, BlockReport, Report, SiteReport
from hf_sparse.report_text import percent

NAN = float("nan")


def site(name: str, block: int, **fields: Any) -> SiteReport:
    values = {
        "role": "up",
        "shape": (8, 4),
        "pattern": "2:4",
        "axis": "output",
        "metric": "dass",
        "zeros": 16,
        "sparsity": 0.5,
    }
    return SiteReport(**{"name": name, "block": block, **values, **fields})


def block(index: int, **fields: Any) -> BlockReport:
    name = f"model.layers.{index}"
    sites = [
        site(f"{name}.mlp.up_proj", index, output_error=0.25, tokens=512),
        site(f"{name}.mlp.down_proj", index, axis="input", metric="wanda"),
    ]
    values = {
        "stack": "model.layers",
        "zeros": 32,
        "size": 64,
        "all_matrices": 128,
        "output_error": 0.125,
        "seconds": 1.5,
    }
    return BlockReport(**{"index": index, "name": name, "sites": sites, **values, **fields})


def report(**fields: Any) -> Report:
    calibration = {
        "source": "my.jsonl",
        "fingerprint": "0123456789abcdef",
        "samples": 8,
        "tokens": 512,
        "batch_size": 4,
    }
    values: dict[str, Any] = {
        "config": SparsityConfig(calibration="my.jsonl").to_dict(), "model": "user/model", "model_class": "LlamaForCausalLM",
        "parameters": 1000, "blocks": [block(0), block(1)], "left_out": {"model.layers.0.self_attn.q_proj": "not among the targets"},
        "notes": ["2 sites: a reason"], "calibration": calibration, "versions": {"hf_sparse": "0.1.0", "torch": "2.13.0"},
        "seconds": 3.5, "peak_memory_bytes": 3 * 2**20,
    }  # fmt: skip
    return Report(**{**values, **fields})


REPORTS = {
    "full": report(),
    "without data": report(calibration=None, peak_memory_bytes=None, blocks=[block(0, output_error=None)]),
    "without blocks": report(blocks=[], notes=[], left_out={}),
    "trained": report(
        recoveries=[make_recovery(), make_recovery(method="masked LoRA", metric=None, before=None, after=None)]
    ),
    "evaluated": report(evaluations=[{"metric": "perplexity", "value": 3.5, "dense": None}]),
}


@pytest.mark.parametrize("given", REPORTS.values(), ids=REPORTS)
def test_it_comes_back(given: Report, tmp_path: Path) -> None:
    assert Report.from_dict(given.to_dict()) == given
    assert Report.from_dict(json.loads(json.dumps(given.to_dict(), allow_nan=False))) == given
    path = given.save(tmp_path / "new")
    assert path == tmp_path / "new" / FILE_NAME
    for source in (path, str(path), path.parent):
        assert Report.load(source) == given
    assert str(Report.load(path)) == str(given)


def test_figures_that_are_not_finite_become_null(tmp_path: Path) -> None:
    sites = [site("model.layers.0.mlp.up_proj", 0, output_error=NAN)]
    given = report(blocks=[block(0, output_error=float("inf"), sites=sites)], evaluations=[{"values": [1.0, NAN]}])
    plain = given.to_dict()
    text = given.save(tmp_path).read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    for values in (plain, json.loads(text)):
        assert values["blocks"][0]["output_error"] is None
        assert values["blocks"][0]["sites"][0]["output_error"] is None
        assert values["evaluations"] == [{"values": [1.0, None]}]
    assert Report.load(tmp_path).blocks[0].output_error is None


def test_a_report_from_before_there_was_training_has_none() -> None:
    older = {name: value for name, value in report().to_dict().items() if name != "recoveries"}
    assert Report.from_dict(older) == report(recoveries=[])


def test_what_is_counted() -> None:
    given = report(
        blocks=[block(0, zeros=10, size=40, all_matrices=100), block(1, zeros=20, size=20, all_matrices=100)]
    )
    assert given.zeros == 30
    assert given.sparsity == 0.5
    assert given.block_sparsity == 0.15
    assert given.totals() == {"zeros": 30, "sites": 4, "sparsity": 0.5, "block_sparsity": 0.15}
    assert given.to_dict()["totals"] == given.totals()
    assert [site.name for site in given.sites] == [site.name for block in given.blocks for site in block.sites]
    assert block(0, zeros=1, size=4).sparsity == 0.25
    empty = report(blocks=[block(0, zeros=0, size=0, all_matrices=0, sites=[])])
    assert (empty.sparsity, empty.block_sparsity, empty.blocks[0].sparsity) == (0.0, 0.0, 0.0)


def test_it_prints_every_block_and_what_was_done() -> None:
    text = str(report())
    for part in ("model.layers.0", "model.layers.1", "LlamaForCausalLM", "2:4", "dass", "4 sites in 2 blocks", "50.00 %", "25.00 %",
                 "output (1), input (1)", "dass (1), wanda (1)", "0.1250", "my.jsonl", "8 samples", "512 tokens", "batches of 4",
                 "0123456789abcdef", "3.5 s", "3 MiB", "note: 2 sites: a reason"):  # fmt: skip
        assert part in text
    assert "not measured" not in text


def test_it_prints_every_training() -> None:
    recoveries = [make_recovery(), make_recovery(method="gradual\npruning")]
    lines = str(report(recoveries=recoveries)).splitlines()
    assert [line for line in lines if line.startswith("recovery")] == [str(recovery) for recovery in recoveries]
    assert not any("recovery" in line for line in str(report()).splitlines())


EVALUATED = {
    "dense": 1.0, "sparse": 3.0, "metric": "perplexity", "window": 8, "stride": 8, "text": "mine", "fingerprint": "beef", "tokens": 64,
}  # fmt: skip


def test_training_makes_earlier_figures_those_before_it() -> None:
    given = report(evaluations=[dict(EVALUATED)])
    given.add_recovery(make_recovery())
    assert given.recoveries == [make_recovery()]
    assert given.evaluations == [{**EVALUATED, "sparse": None, "before_recovery": 3.0}]
    given.add_evaluation({**EVALUATED, "dense": None, "sparse": 2.0})  # the dense model need not be measured again
    assert given.evaluations == [{**EVALUATED, "sparse": 2.0, "before_recovery": 3.0}]
    given.add_recovery(make_recovery())
    given.add_evaluation({**EVALUATED, "sparse": 1.5})
    assert given.evaluations == [{**EVALUATED, "sparse": 1.5, "before_recovery": 3.0}]
    assert len(given.recoveries) == 2
    assert Report.from_dict(given.to_dict()) == given


def test_a_training_without_a_step_leaves_the_figures() -> None:
    given = report(evaluations=[dict(EVALUATED)], recoveries=[make_recovery(steps=5)])
    given.add_recovery(make_recovery(steps=0))
    assert given.evaluations == [EVALUATED]
    given.add_recovery(make_recovery(steps=10))
    assert [one.steps for one in given.recoveries] == [5, 0, 10]
    assert given.evaluations == [{**EVALUATED, "sparse": None, "before_recovery": 3.0}]


@pytest.mark.parametrize(
    ("name", "value"),
    [("metric", "loss"), ("window", 16), ("stride", 4), ("text", "other"), ("fingerprint", "cafe"), ("tokens", 65)],
)
def test_a_figure_measured_in_another_way_stands_by_itself(name: str, value: object) -> None:
    given = report(evaluations=[dict(EVALUATED)])
    given.add_recovery(make_recovery())
    other = {**EVALUATED, name: value}
    given.add_evaluation(other)
    assert given.evaluations == [{**EVALUATED, "sparse": None, "before_recovery": 3.0}, other]


def test_figures_of_one_model_do_not_replace_each_other() -> None:
    given = report()
    given.add_evaluation(EVALUATED)
    given.add_evaluation(EVALUATED)
    assert given.evaluations == [EVALUATED, EVALUATED]


def test_what_was_not_measured_is_said_to_be() -> None:
    lines = str(
        report(calibration=None, peak_memory_bytes=None, blocks=[block(0, output_error=None), block(1)])
    ).splitlines()
    of_blocks = {line.split()[0]: line for line in lines if line.startswith("model.layers.")}
    assert "not measured" in of_blocks["model.layers.0"]
    assert "not measured" not in of_blocks["model.layers.1"]
    assert not any("calibrated on" in line or "memory" in line for line in lines)
    assert percent(None) == "not measured"
    assert percent(0.4567) == "45.67 %"


def changed(path: str, value: Any) -> dict[str, Any]:
    """A report's data with one value, at a path such as `blocks.0.sites.0.shape`, replaced."""
    plain = copy.deepcopy(report().to_dict())
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    inner: Any = plain
    for part in way:
        inner = inner[part]
    inner[last] = value
    return plain


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("config", None), ("config", []), ("config", {"pattern": "2:4"}), ("model", 5), ("parameters", "many"), ("parameters", True),
        ("blocks", None), ("blocks", {"a": 1}), ("blocks", [5]), ("blocks", "abc"), ("blocks.0.sites", None), ("blocks.0.sites", [None]),
        ("blocks.0.zeros", 1.5), ("blocks.0.zeros", 10**400), ("blocks.0.name", None), ("blocks.0.output_error", "0.5"),
        ("blocks.0.seconds", None), ("blocks.0.extra", 1), ("blocks.0.sites.0.shape", [8]), ("blocks.0.sites.0.shape", "84"),
        ("blocks.0.sites.0.shape", 8), ("blocks.0.sites.0.sparsity", None), ("blocks.0.sites.0.sparsity", 1e400),
        ("blocks.0.sites.0.metric", ["dass"]), ("blocks.0.sites.0.extra", 1), ("left_out", []), ("left_out", {"a": 1}), ("notes", "a"),
        ("notes", [1]), ("calibration", 3), ("calibration", {"source": "x"}), ("versions", None), ("seconds", "1"),
        ("peak_memory_bytes", 1.5), ("evaluations", None), ("evaluations", [1]), ("recoveries", None), ("recoveries", {}),
        ("recoveries", ""), ("recoveries", [None]), ("recoveries", [{}]), ("recoveries", {"steps": 1}),
        ("recoveries", [{**make_recovery().to_dict(), "steps": "many"}]), ("recoveries", [{**make_recovery().to_dict(), "size": 10**400}]),
        ("recoveries", [make_recovery().to_dict(), {**make_recovery().to_dict(), "settings": {"a": nested(900)}}]),
        ("config.options", {"a": nested(900)}), ("calibration.source", {"a": nested(900)}), ("evaluations", [{"a": nested(900)}]),
        ("evaluations", [{"a": 10**400}]), ("evaluations", [{"a": float("inf")}]),
    ],
)  # fmt: skip
def test_data_of_another_make_are_refused(path: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no report of hf_sparse"):
        Report.from_dict(changed(path, value))
    (tmp_path / FILE_NAME).write_text(json.dumps(changed(path, value)))
    with pytest.raises(CheckpointError, match="no report of hf_sparse"):
        Report.load(tmp_path)


@pytest.mark.parametrize("key", ["config", "blocks", "model", "seconds", "notes"])
def test_a_missing_field_is_refused(key: str) -> None:
    plain = report().to_dict()
    del plain[key]
    with pytest.raises(CheckpointError, match=key):
        Report.from_dict(plain)


@pytest.mark.parametrize("value", [None, [], 5, "x"], ids=repr)
def test_what_is_no_mapping_is_refused(value: Any) -> None:
    with pytest.raises(CheckpointError, match="no report"):
        Report.from_dict(value)


@pytest.mark.parametrize("version", [FORMAT + 1, "1", None], ids=repr)
def test_another_format_is_refused(version: object) -> None:
    with pytest.raises(CheckpointError, match="upgrade"):
        Report.from_dict({**report().to_dict(), "format": version})


def test_fields_of_later_versions_at_the_top_are_passed_over() -> None:
    assert Report.from_dict({**report().to_dict(), "later": 1}) == report()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"5", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b"{}"],
    ids=lambda value: repr(value[:8]),
)
def test_files_that_hold_no_report_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(CheckpointError):
        Report.load(tmp_path)


def test_a_report_cut_at_any_place_is_refused(tmp_path: Path) -> None:
    whole = report().save(tmp_path).read_text().rstrip()
    for end in range(0, len(whole), 37):
        (tmp_path / FILE_NAME).write_text(whole[:end])
        with pytest.raises(CheckpointError):
            Report.load(tmp_path)


def test_a_missing_or_far_too_large_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="cannot read"):
        Report.load(tmp_path)
    report().save(tmp_path)
    # `hf_sparse.report` is also the name of a function, so the module is taken from where all modules are.
    monkeypatch.setattr(sys.modules["hf_sparse.report"], "_LARGEST_FILE", 100)
    with pytest.raises(CheckpointError, match="larger than"):
        Report.load(tmp_path)


def test_orders_of_millions_of_channels_are_read() -> None:
    order = list(range(28_672))
    orders = {f"model.layers.{index}.mlp": order for index in range(80)}  # of a model of 70 billion weights
    assert Report.from_dict({**report().to_dict(), "permutations": orders}).permutations == orders
    with pytest.raises(CheckpointError, match="permutations is"):
        Report.from_dict({**report().to_dict(), "permutations": {**orders, "last": [*order, 2**63]}})


@pytest.mark.parametrize(
    ("path", "value"),
    [("parameters", -1), ("blocks.0.zeros", -1), ("blocks.0.sites.0.zeros", -(2**40)), ("blocks.1.all_matrices", -1)],
)
def test_counts_below_0_are_refused(path: str, value: int) -> None:
    with pytest.raises(CheckpointError, match=f"{path.rpartition('.')[2]} is {value}, which is less than 0"):
        Report.from_dict(changed(path, value))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"config": {}, "config": {}}', "'config' stands twice"), (b'{"seconds": NaN}', "seconds is nan"),
        (b'{"seconds": -Infinity}', "seconds is -inf"), (b'{"parameters": 1' + b"0" * 5000 + b"}", "4300 digits"),
        (b'{"notes": ["' + b"x" * (2**20 + 1) + b'"]}', r"notes\[0\] is longer than 1048576 letters"),
        (b"[" * 10**6, "lists and mappings|not valid JSON"), (b'{"a":' * 10**5 + b"1" + b"}" * 10**5, "not valid JSON"),
        (b'{"left_out": ' + b"[" * 30 + b"]" * 30 + b"}", "nested too deeply"),
    ],
    ids=lambda value: repr(value[:20]),
)  # fmt: skip
def test_files_made_to_do_harm_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Report.load(tmp_path)
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


@pytest.mark.parametrize("text", ["\x1b[31m", "a\nnote: b", "\u202e", "\ud800", "\x9b", "x" * 10_000], ids=ascii)
def test_texts_of_a_file_cannot_act_on_a_terminal(text: str) -> None:
    data = dict.fromkeys(("source", "samples", "tokens", "batch_size", "fingerprint"), text)
    of_block = block(0, name=text, sites=[site(text, 0, pattern=text, axis=text, metric=text), site("b", 0)])
    given = report(model_class=text, notes=[text], calibration=data, blocks=[of_block, block(1)],
                   config={"pattern": "2:4", "metric": text, "update": [text, 5]})  # fmt: skip
    lines = str(given).splitlines()
    assert all(line.isprintable() and len(line) < 4000 for line in lines)
    usual = [*given.notes, *given.blocks, "the model", "the heading", "tensor cores", "calibration", "seconds"]
    assert len(lines) == len(usual)


@pytest.mark.parametrize("updates", [None, 5, {}, [], [None], {"a": 1}], ids=repr)
def test_any_update_in_a_config_is_printed(updates: Any) -> None:
    assert "2:4 wanda" in str(report(config={"pattern": "2:4", "metric": "wanda", "update": updates}))


def test_no_secret_is_told() -> None:
    secret = "hf_" + "aB3" * 12
    address = f"https://me:{secret}@host/data?token={secret}"
    config = SparsityConfig(calibration=address)
    assert config.calibration == address
    given = report(
        config=config.to_dict(), model=address, notes=[address], calibration={**report().calibration, "source": address},
        evaluations=[{"text": address}], recoveries=[make_recovery(data=address, settings={"teacher": [address]})],
    )  # fmt: skip
    told = [
        repr(config),
        json.dumps(config.to_dict()),
        str(given),
        json.dumps(given.to_dict()),
        str(given.recoveries[0]),
    ]
    told.append(json.dumps(claim(given)))
    assert [text for text in told if secret in text or "me:" in text] == []
    assert "https://***@host/data?token=***" in given.to_dict()["model"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("options", {"unstructured": 1.0}),
        ("options", [1]),
        ("update", 5),
        ("update", ["admm", 5]),
        ("targets", {"a": 1}),
        ("allocation", 3),
    ],
)
def test_a_recorded_config_of_other_types_is_refused(name: str, value: object) -> None:
    values = report().to_dict()
    values["config"] = {**values["config"], name: value}
    with pytest.raises(CheckpointError, match=f"in config, {name} is"):
        Report.from_dict(values)
