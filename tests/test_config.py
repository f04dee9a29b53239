"""Configurations: what is wrong is refused by name at once; what is right goes to JSON, YAML and back."""

import copy
import dataclasses
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse import PredictorConfig, SparsityConfig
from hf_sparse.config.serialise import read_value
from hf_sparse.errors import CalibrationError, ConfigError
from hf_sparse.recipes import read_recipes

NAN, INF = float("nan"), float("inf")
HALF = {"pattern": "unstructured", "sparsity": 0.5}

# fields -> what the message must say: what was given, and what is allowed or to be done
BAD: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"metric": "wand"}, ("metric 'wand'", "Did you mean 'wanda'?", "'magnitude'")),
    ({"metric": "WANDA"}, ("metric 'WANDA'", "'wanda'")),
    ({"metric": None}, ("metric None", "'wanda'")),
    ({"metric": ["dass"]}, ("metric ['dass']", "'dass'")),
    ({"pattern": "unstructred"}, ("'unstructred'", '"unstructured"', "2:4")),
    ({"pattern": "5:4"}, ("'5:4'", "less than M")),
    ({"pattern": "0:4"}, ("'0:4'", "at least 1")),
    ({"pattern": "2:4:1"}, ("'2:4:1'", "2:4")),
    ({"pattern": " 2:4"}, ("' 2:4'", "2:4")),
    ({"pattern": 2.4}, ("2.4", "2:4")),
    ({"pattern": None}, ("None", "2:4")),
    ({"allocation": "uniformly"}, ("allocation 'uniformly'", "Did you mean 'uniform'?")),
    ({"allocation": None}, ("allocation None", "'uniform'")),
    ({"allocation": []}, ("allocation=[]", "empty")),
    ({"allocation": {}}, ("allocation={}", "empty")),
    ({"allocation": {0.5}}, ("allocation {0.5}", "'uniform'")),
    ({"allocation": {"": 0.5}}, ("key ''", "globs")),
    ({"allocation": {1: 0.5}}, ("key 1", "globs")),
    ({"allocation": [0, 0.0]}, ("dense", "above 0")),
    *(({**HALF, "allocation": [0.5, value]}, (f"allocation[1]={value!r}", "from 0")) for value in
      (1, 1.0, -0.1, NAN, INF, True, "0.5", None, 10**400)),
    ({"allocation": {"*.mlp.*": 1.5}}, ("allocation['*.mlp.*']=1.5", "from 0")),
    ({"allocation": [0.5, 0.6]}, ("allocation[1]=0.6", "'2:4'", "0.5 or 0.75")),
    ({"allocation": {"*": 0.8}}, ("allocation['*']=0.8", "whole number of every 4", "0.75")),
    ({"pattern": "unstructured", "allocation": "owl"}, ("needs sparsity",)),
    ({"pattern": "4:8", "allocation": "atp", "sparsity": 0.9}, ("sparsity=0.9", "at most 0.875")),
    ({"pattern": "4:8", "sparsity": 0.625}, ("sparsity=0.625", "other than uniform")),
    ({"allocation": [0.5], "sparsity": 1}, ("sparsity=1", "below 1")),
    ({"options": {"atp": {"steps": 0.1}}}, ("'steps'", "Did you mean 'step'?")),
    *(({"options": {"atp": {"step": value}}}, (f"atp.step={value!r}", "from -1 to 1")) for value in (2, -1.5, "up", NAN, True)),
    *(({"options": {"owl": {"limit": value}}}, (f"owl.limit={value!r}", "from 0 to 0.5")) for value in (0.6, -0.1, None, NAN)),
    ({"options": {"owl": {"threshold": -1}}}, ("owl.threshold=-1", "from 0")),
    ({"update": "non"}, ("update 'non'", "Did you mean 'none'?")),
    ({"update": ["none", "foo"]}, ("update 'foo'", "'none'")),
    ({"update": None}, ("update=None", "list of names")),
    ({"update": []}, ("update=()", '"none"')),
    ({"update": ["none", "admm"]}, ("'none' must stand alone",)),
    ({"update": ["admm", "admm"]}, ("'admm' must stand only once",)),
    ({"update": ["admm", "dense_stream"]}, ("'dense_stream' must stand first",)),
    ({"update": ["reconstruct", "admm"]}, ("'reconstruct' must stand last",)),
    ({"axis": "inputs"}, ("axis 'inputs'", "Did you mean 'input'?", "'auto'")),
    ({"axis": None}, ("axis None", "'output'")),
    ({"axis": "site"}, ('"site"', "'2:4'", '"input"', '"output"')),
    ({"targets": "atention"}, ("targets 'atention'", "Did you mean 'attention'?", "globs")),
    ({"targets": 5}, ("targets=5", "list of names")),
    ({"targets": None}, ("targets=None", "list of names")),
    ({"exclude": [1]}, ("exclude=[1]", "list of names")),
    ({"pattern": "unstructured"}, ("needs sparsity", "0.5")),
    *(({**HALF, "sparsity": value}, (f"sparsity={value!r}", "above 0 and below 1")) for value in
      (0, 0.0, 1, 1.0, 1.5, -0.1, NAN, INF, -INF, True, "0.5", 10**400, [0.5], 0.5j)),
    ({"sparsity": 0.6}, ("sparsity=0.6", "'2:4'", "0.5")),
    ({"pattern": "1:4", "sparsity": 0.25}, ("sparsity=0.25", "'1:4'", "0.75")),
    ({"permute": True, "pattern": "unstructured", "sparsity": 0.5}, ("permute=True", "unstructured", "False")),
    ({"permute": "no"}, ("permute='no'", "False")),
    ({"predictor": "shadow"}, ("predictor='shadow'", "give a PredictorConfig")),
    ({"predictor": {"kind": "shadows"}}, ("predictor kind 'shadows'", "Did you mean 'shadow'?")),
    *(({name: value}, (f"{name}={value!r}", "whole number of at least"))
      for name in ("num_samples", "sequence_length", "batch_size", "seed") for value in (-1, 1.5, True, "8", NAN, None)),
    *(({name: 0}, (f"{name}=0", "at least 1")) for name in ("num_samples", "sequence_length", "batch_size")),
    ({"batch_size": "automatic"}, ("batch_size='automatic'", '"auto"')),
    ({"device": "gpu"}, ("device='gpu'", "cuda:0")),
    ({"device": []}, ("device=[]", "cpu")),
    ({"options": None}, ("options=None", "mapping")),
    ({"options": {"das": {}}}, ("options for 'das'", "Did you mean 'dass'?")),
    ({"options": {"dass": 0.5}}, ("options['dass']=0.5", "mapping")),
    ({"options": {"dass": {"exponnet": 0.5}}}, ("'exponnet'", "Did you mean 'exponent'?", "'dass'")),
    ({"options": {"wanda": {"exponent": 0.5}}}, ("'exponent'", "'wanda'")),
    ({"options": {"none": {"rounds": 1}}}, ("'rounds'", "'none'")),
    ({"options": {"uniform": {"step": 1}}}, ("'step'", "'uniform'")),
    *(({"options": {"dass": {"exponent": value}}}, (f"dass.exponent={value!r}", "number from 0")) for value in
      (NAN, INF, "0.5", True, None, -0.5)),
    ({"options": {"unstructured": {"rounding": "up"}}}, ("'up'", "'exact'", "'truncate'")),
    ({"options": {"unstructured": {"round": "exact"}}}, ("'round'", "Did you mean 'rounding'?")),
    ({"version": 2}, ("version 2", "upgrade")),
    ({"version": "1"}, ("version '1'", "upgrade")),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "said"), BAD, ids=lambda value: repr(value)[:60] if isinstance(value, dict) else "")
def test_what_is_wrong_is_refused_by_name(fields: dict[str, Any], said: tuple[str, ...]) -> None:
    for make in (
        lambda: SparsityConfig(**fields),
        lambda: SparsityConfig.from_dict(fields),
        lambda: SparsityConfig.of(fields),
    ):
        with pytest.raises(ConfigError) as caught:
            make()
        for part in said:
            assert part in str(caught.value)


@pytest.mark.parametrize(
    ("key", "hint"),
    [("sparsty", "'sparsity'"), ("metrics", "'metric'"), ("pattern ", "'pattern'"), ("foo", ""), (3, "")],
)
def test_unknown_keys_are_refused(key: object, hint: str) -> None:
    with pytest.raises(ConfigError, match="key of SparsityConfig") as caught:
        SparsityConfig.from_dict({key: 1})  # type: ignore[dict-item]
    assert repr(key) in str(caught.value)
    assert f"Did you mean {hint}?" in str(caught.value) if hint else "Allowed" in str(caught.value)


@pytest.mark.parametrize("value", [None, 5, [("pattern", "2:4")], b"x"], ids=repr)
def test_what_is_no_configuration_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=type(value).__name__):
        SparsityConfig.of(value)
    with pytest.raises(ConfigError, match=type(value).__name__):
        SparsityConfig.from_dict(value)


# ------------------------------------------------------------------------------------------------ what is allowed

NAMES = st.lists(st.sampled_from(["model.layers.*", "*.mlp.*", "*.q_proj", "model.layers.0.mlp.up_proj"]), max_size=3)
PATTERNS = st.one_of(
    st.builds(lambda share, axis: {"pattern": "unstructured", "sparsity": share, "axis": axis},
              st.floats(0.001, 0.999), st.sampled_from(["auto", "input", "output", "site"])),
    st.builds(lambda keep, more, given, axis: {"pattern": f"{keep}:{keep + more}", "sparsity": more / (keep + more) if given else None,
                                               "axis": axis},
              st.integers(1, 40), st.integers(1, 40), st.booleans(), st.sampled_from(["auto", "input", "output"])),
)  # fmt: skip
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "atp": st.fixed_dictionaries({}, optional={"step": st.one_of(st.none(), st.floats(-1, 1))}),
        "owl": st.fixed_dictionaries({}, optional={"limit": st.floats(0, 0.5), "threshold": st.floats(0, 100)}),
        "dass": st.fixed_dictionaries({}, optional={"exponent": st.floats(0, 4)}),
        "ria": st.fixed_dictionaries({}, optional={"exponent": st.integers(0, 4)}),
        "unstructured": st.fixed_dictionaries({"rounding": st.sampled_from(["exact", "truncate"])}),
        "none": st.just({}),
    },
)
OTHERS = st.fixed_dictionaries(
    {},
    optional={
        "metric": st.sampled_from(["magnitude", "wanda", "dass", "ria"]),
        "update": st.sampled_from(
            ["auto", "none", ["none"], ("dense_stream", "admm"), ["sparsegpt", "least_squares", "reconstruct"]]
        ),
        "targets": st.one_of(st.sampled_from(["all", "mlp", "attention", "*.down_proj"]), NAMES, NAMES.map(tuple)),
        "exclude": st.one_of(NAMES, st.just("*.o_proj")),
        "options": OPTIONS,
        "num_samples": st.integers(1, 10**6),
        "sequence_length": st.integers(1, 10**6),
        "batch_size": st.one_of(st.just("auto"), st.integers(1, 512)),
        "seed": st.integers(0, 2**64),
        "device": st.sampled_from([None, "cpu", "cuda", "cuda:1", "mps"]),
        "calibration": st.sampled_from([None, "text.jsonl", "user/name:subset:split"]),
    },
)
EIGHTHS = st.integers(1, 7).map(lambda count: count / 8)
GIVEN = st.one_of(
    st.lists(EIGHTHS, min_size=1, max_size=4),
    st.lists(EIGHTHS, min_size=1, max_size=4).map(tuple),
    st.dictionaries(st.sampled_from(["*", "*.mlp.*", "*.0.*", "model.layers.1.mlp.up_proj"]), EIGHTHS, min_size=1),
)
ALLOCATED = st.one_of(
    st.builds(lambda pattern, given: {**pattern, "allocation": given},
              st.sampled_from([{"pattern": "unstructured"}, HALF, {"pattern": "4:8"}, {"pattern": "2:8", "sparsity": 0.5}]), GIVEN),
    st.builds(lambda name, sparsity: {"pattern": "2:8", "sparsity": sparsity, "allocation": name},
              st.sampled_from(["atp", "owl"]), st.one_of(st.none(), st.floats(0.01, 0.87))),
)  # fmt: skip
CONFIGS = st.builds(lambda pattern, others: SparsityConfig(**pattern, **others), st.one_of(PATTERNS, ALLOCATED), OTHERS)


@given(config=CONFIGS)
def test_plain_data_hold_every_field_and_come_back(config: SparsityConfig) -> None:
    plain = config.to_dict()
    assert set(plain) == {item.name for item in dataclasses.fields(SparsityConfig)}
    for values in (plain, json.loads(json.dumps(plain, allow_nan=False)), yaml.safe_load(yaml.safe_dump(plain))):
        back = SparsityConfig.from_dict(values)
        assert back == config
        assert back.calibration == config.calibration
        assert back.to_dict() == plain


@given(config=CONFIGS)
def test_files_come_back(config: SparsityConfig, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("config")
    config.save_pretrained(folder / "new" / "folder")
    file = folder / "new" / "folder" / "sparsity_config.json"
    for path in (file.parent, str(file.parent), file):
        assert SparsityConfig.from_pretrained(path) == config
    for suffix in ("yaml", "yml"):
        (folder / f"mine.{suffix}").write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
        assert SparsityConfig.of(folder / f"mine.{suffix}") == config


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "4:8", "16:32", "3:90"])
def test_a_pattern_in_yaml_needs_no_quotes(pattern: str, tmp_path: Path) -> None:
    # YAML 1.1 takes 2:4 for a number to base 60.
    (tmp_path / "mine.yaml").write_text(f"pattern: {pattern}\nnum_samples: 8\noptions: {{dass: {{exponent: 0.25}}}}\n")
    config = SparsityConfig.from_pretrained(tmp_path / "mine.yaml")
    assert (config.pattern, config.num_samples, config.options) == (pattern, 8, {"dass": {"exponent": 0.25}})


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-3", 1e-3), ("1E5", 1e5), (".5", 0.5), ("-.5", -0.5), ("-2e+4", -2e4), ("1.5e3", 1500.0), ("+1.e2", 100.0), (".5e1", 5.0),
        ("0.5", 0.5), ("1e-05", 1e-5), ("12", 12), ("true", True), ("null", None), ("", None), ("[1e-1, 2]", [0.1, 2]),
        ("1e", "1e"), ("e5", "e5"), ("1e5m", "1e5m"), (".e5", ".e5"), ("1e5.5", "1e5.5"), ("2:4", "2:4"), ("'1e-3'", "1e-3"),
        ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-1.7B"), ("opt-1e3", "opt-1e3"), ("1-e3", "1-e3"),
    ],
)  # fmt: skip
def test_numbers_are_read_as_people_write_them(written: str, value: object) -> None:
    # YAML 1.1 takes 1e-3 for text, as it has no dot.
    assert read_value(written) == value
    assert type(read_value(written)) is type(value)


def test_numbers_in_a_file_are_read_as_people_write_them(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("pattern: 2:4\noptions: {dass: {exponent: 5e-1}}\ncalibration: a/1e-3\n")
    config = SparsityConfig.from_pretrained(tmp_path / "mine.yaml")
    assert (config.pattern, config.options, config.calibration) == ("2:4", {"dass": {"exponent": 0.5}}, "a/1e-3")
    (tmp_path / "recipes.yaml").write_text("- {name: 1e, pattern: unstructured, sparsity: 5e-1}\n")
    assert read_recipes(tmp_path / "recipes.yaml") == [{"name": "1e", "pattern": "unstructured", "sparsity": 0.5}]


@pytest.mark.parametrize("written", ["[1", "2024-13-45", "!!python/name:os.getcwd", "[" * 3_000])
def test_a_value_that_cannot_be_read_is_refused(written: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_value(written)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("absent.json", None, "cannot read"),
        ("cut.json", b'{"pattern": "2:', "not valid JSON or YAML"),
        ("empty.json", b"", "not valid JSON or YAML"),
        ("list.json", b"[1]", "list"),
        ("empty.yaml", b"", "NoneType"),
        ("text.yaml", b"hello", "str"),
        ("bad.yaml", b"a: [1", "not valid JSON or YAML"),
        ("code.yaml", b"!!python/object/apply:os.getcwd []", "not valid JSON or YAML"),
        ("latin.json", b'{"pattern": "\xe9"}', "not valid JSON or YAML"),
        ("deep.json", b"[" * 100_000, "not valid JSON or YAML"),
        ("deep.yaml", b"[" * 3_000, "not valid JSON or YAML"),
        ("key.json", b'{"patern": "2:4"}', "Did you mean 'pattern'?"),
        ("newer.json", b'{"version": 7}', "version 7"),
    ],
)
def test_files_that_hold_no_configuration_are_refused(
    name: str, content: bytes | None, said: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        SparsityConfig.from_pretrained(tmp_path / name)
    assert said in str(caught.value)


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sparsity_config\.json"):
        SparsityConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({}, "target", 0.5),
        ({"pattern": "1:4"}, "target", 0.75),
        ({"pattern": "1:3", "sparsity": 2 / 3}, "target", 2 / 3),
        (HALF, "target", 0.5),
        ({"update": "none"}, "update", ("none",)),
        ({"targets": "mlp"}, "targets", "mlp"),
        ({"targets": "*.q_proj"}, "targets", ("*.q_proj",)),
        ({"targets": "model.layers.0.mlp.up_proj"}, "targets", ("model.layers.0.mlp.up_proj",)),
        ({"exclude": "*.q_proj"}, "exclude", ("*.q_proj",)),
        ({"device": torch.device("cuda", 1)}, "device", "cuda:1"),
        ({"allocation": [0, 0.5]}, "allocation", (0.0, 0.5)),
        ({"allocation": {"*": 0.5}}, "allocation", {"*": 0.5}),
        ({"pattern": "4:8", "allocation": "atp"}, "target", 0.5),
        ({"pattern": "4:8", "allocation": "atp", "sparsity": 0.625}, "target", 0.625),
    ],
)
def test_fields_are_brought_to_one_form(fields: dict[str, Any], name: str, value: object) -> None:
    assert getattr(SparsityConfig(**fields), name) == value


def test_options_are_filled_in() -> None:
    config = SparsityConfig(options={"dass": {"exponent": 1}})
    assert config.options_of("dass") == {"exponent": 1}
    assert config.options_of("ria") == {"exponent": 0.5}
    assert config.options_of("unstructured") == {"rounding": "exact"}
    assert config.options_of("uniform") == config.options_of("none") == {}
    with pytest.raises(ConfigError, match="'nothing'"):
        config.options_of("nothing")


def test_a_configuration_does_not_change() -> None:
    options = {"dass": {"exponent": 1.0}}
    config = SparsityConfig(options=options)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.metric = "ria"  # type: ignore[misc]
    with pytest.raises(TypeError):
        SparsityConfig("2:4")  # type: ignore[misc]
    options["ria"] = {"exponent": 2.0}
    options["dass"]["exponent"] = math.nan
    config.to_dict()["options"]["dass"]["exponent"] = math.nan
    assert config.options == {"dass": {"exponent": 1.0}}
    assert dataclasses.replace(config, metric="ria").metric == "ria"


def test_copies_share_the_calibration_data() -> None:
    items = (text for text in ["a", "b"])
    config = SparsityConfig(calibration=items)
    assert copy.deepcopy(config).calibration is items
    assert copy.deepcopy({"sparsity_config": config})["sparsity_config"].calibration is items
    assert copy.copy(config).calibration is items
    assert list(items) == ["a", "b"]


def test_data_in_memory_are_not_written_and_do_not_count_as_different() -> None:
    config = SparsityConfig(calibration=torch.zeros(2, 2))
    assert config == SparsityConfig(calibration=["text"])
    assert config.to_dict()["calibration"] is None
    assert SparsityConfig(calibration=Path("a") / "b.txt").to_dict()["calibration"] == str(Path("a") / "b.txt")
    assert pickle.loads(pickle.dumps(SparsityConfig(calibration=["text"]))).calibration == ["text"]


@pytest.mark.parametrize("metric", ["wanda", "dass", "ria"])
def test_a_metric_that_looks_at_activations_asks_for_data(metric: str) -> None:
    with pytest.raises(CalibrationError, match="calibration=") as caught:
        SparsityConfig(metric=metric).check_calibration()
    assert repr(metric) in str(caught.value)
    SparsityConfig(metric=metric, calibration=["text"]).check_calibration()
    SparsityConfig(metric="magnitude").check_calibration()


def test_an_allocation_that_looks_at_activations_asks_for_data() -> None:
    with pytest.raises(
        CalibrationError, match="allocation 'owl' looks at activations and needs calibration="
    ) as caught:
        SparsityConfig(metric="magnitude", allocation="owl").check_calibration()
    assert 'allocation="uniform"' in str(caught.value)
    SparsityConfig(metric="magnitude", allocation="owl", calibration=["text"]).check_calibration()
    with pytest.raises(CalibrationError, match="allocation 'atp'"):  # searched for
        SparsityConfig(metric="magnitude", allocation="atp").check_calibration()
    SparsityConfig(metric="magnitude", allocation="atp", options={"atp": {"step": 0.01}}).check_calibration()
    SparsityConfig(metric="magnitude", allocation=[0.5]).check_calibration()


def test_resolving_keeps_a_given_allocation_and_fills_in_the_options_of_a_named_one() -> None:
    for allocation in ((0.25, 0.5), {"*.mlp.*": 0.25, "*": 0.5}):
        resolved = SparsityConfig(allocation=allocation).resolved()
        assert (resolved.allocation, resolved.sparsity) == (allocation, None)
        with pytest.raises(ConfigError, match="sizes"):
            _ = resolved.target
    resolved = SparsityConfig(allocation="owl", options={"owl": {"limit": 0.1}}).resolved()
    assert resolved.options["owl"] == {"threshold": 5.0, "limit": 0.1}
    assert resolved.sparsity == 0.5
    assert SparsityConfig(allocation="atp").resolved().options["atp"] == {
        "step": None,
        "selector": "loss",
        "held_out": 0.25,
    }


def test_of_takes_objects_dicts_and_paths(tmp_path: Path) -> None:
    config = SparsityConfig(metric="wanda")
    assert SparsityConfig.of(config) is config
    assert SparsityConfig.of({"metric": "wanda"}) == config
    config.save_pretrained(tmp_path)
    assert SparsityConfig.of(tmp_path) == SparsityConfig.of(str(tmp_path)) == config


# ------------------------------------------------------------------------------------------------ predictors


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "dejavue"}, ("'dejavue'", "Did you mean 'dejavu'?")),
        ({"selection": "blocks"}, ("'blocks'", "Did you mean 'block'?")),
        ({"keep_neurons": 0}, ("keep_neurons=0", "above 0")),
        ({"keep_neurons": 1.5}, ("keep_neurons=1.5", "below 1")),
        ({"keep_heads": NAN}, ("keep_heads=nan", "above 0")),
        ({"neuron_block": 8}, ("neuron_block=8", "16")),
        ({"refresh_every": 0}, ("refresh_every=0", "at least 1")),
        ({"dense_blocks": 0}, ("dense_blocks=0", "list")),
        ({"dense_blocks": [-1]}, ("dense_blocks=-1", "at least 0")),
        ({"options": 3}, ("options=3", "mapping")),
        ({"version": 2}, ("version 2", "upgrade")),
    ],
)
def test_what_is_wrong_with_a_predictor_is_refused(fields: dict[str, Any], said: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        PredictorConfig(**fields)
    assert all(part in str(caught.value) for part in said)


def test_predictor_configurations_come_back(tmp_path: Path) -> None:
    config = PredictorConfig(kind="oracle", keep_neurons=1.0, dense_blocks=[0, 3], options={"rank": 8})  # type: ignore[arg-type]
    assert config.dense_blocks == (0, 3)
    config.save_pretrained(tmp_path)
    assert PredictorConfig.from_pretrained(tmp_path) == config == PredictorConfig.from_dict(config.to_dict())


# ------------------------------------------------------------------------------------------------ what "auto" stands for


@pytest.mark.parametrize(
    ("fields", "metric", "update"),
    [
        ({}, "wanda", ("dense_stream", "admm")),  # the best recipe
        ({"update": "none"}, "wanda", ("none",)),
        ({"update": ("reconstruct",)}, "wanda", ("reconstruct",)),
        ({"metric": "wanda"}, "wanda", ("none",)),  # a metric that is named comes as it was published
        ({"metric": "dass"}, "dass", ("none",)),
        ({"metric": "sparsegpt"}, "sparsegpt", ("sparsegpt",)),
        ({"metric": "sparsegpt", "update": "none"}, "sparsegpt", ("none",)),
    ],
)
def test_auto_is_the_best_recipe_or_the_named_metric_as_published(
    fields: dict[str, Any], metric: str, update: tuple[str, ...]
) -> None:
    config = SparsityConfig(**fields)
    assert (config.metric, config.update) == (metric, update)
    assert SparsityConfig.from_dict(config.to_dict()) == config
