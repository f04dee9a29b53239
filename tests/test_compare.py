"""Several recipes on one model: the same bits as one by one, what is shared is done once, and the model is dense again."""

import importlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import bert, llama, text, token_rows, tokenizer
from PIL import Image

import hf_sparse
from hf_sparse import SparsityConfig, prune_
from hf_sparse.cli import main
from hf_sparse.compare import ComparisonInterrupted, compare
from hf_sparse.comparison import Comparison
from hf_sparse.errors import CalibrationError, ConfigError
from hf_sparse.evaluate import evaluate
from hf_sparse.memory import Growth
from hf_sparse.recipes import DEFAULT, make_recipes, read_recipes

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot determine a Gram matrix")

State = dict[str, torch.Tensor]
DATA = {"calibration": token_rows(4, 24), "num_samples": 4, "sequence_length": 24}
STEPS = {"reconstruct": {"steps": 2}}
RECIPES: list[dict[str, Any]] = [
    {"name": "magnitude", "metric": "magnitude"},
    {"name": "wanda", "metric": "wanda"},
    {"name": "dass", "metric": "dass"},
    {"name": "sparsegpt", "metric": "sparsegpt", "update": "sparsegpt"},
    {"name": "admm", "metric": "wanda", "update": "admm"},
    {"name": "two streams", "metric": "wanda", "update": ["dense_stream", "admm"]},
    {"name": "trained", "metric": "wanda", "update": ["dense_stream", "admm", "reconstruct"], "options": STEPS},
    {"name": "owl 50", "metric": "wanda", "pattern": "unstructured", "sparsity": 0.5, "allocation": "owl"},
    {"name": "owl 60", "metric": "wanda", "pattern": "unstructured", "sparsity": 0.6, "allocation": "owl"},
    {"name": "permuted", "metric": "wanda", "permute": True},
    {"name": "wanda again", "metric": "wanda"},
]  # fmt: skip
TEXT = token_rows(3, 24, seed=9)


def state_of(model: torch.nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def on_rows(recipes: list[dict[str, Any]], **changes: Any) -> Comparison:
    return compare(llama(), make_recipes(recipes, DATA), TEXT, **changes)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the pieces that recipes can share are worked out."""
    counts: Counter[str] = Counter()

    def watch(name: str) -> None:
        module, _, attribute = name.rpartition(".")
        original = getattr(importlib.import_module(module), attribute)

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[attribute] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(name, call)

    for name in (
        "shared.read_calibration",
        "shared.survey",
        "shared.allot_",
        "compare.read_samples",
        "compare.evaluate",
    ):
        watch(f"hf_sparse.{name}")
    return counts


@pytest.fixture
def fail_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, BaseException], None]:
    """Let the pruning with this number break off behind its first change."""
    import hf_sparse.compare as module

    original = module.prune_sharing_

    def install(number: int, error: BaseException) -> None:
        calls = Counter[str]()

        def prune(model: Any, *rest: Any) -> Any:
            calls["prune"] += 1
            if calls["prune"] == number:
                with torch.no_grad():
                    model.model.layers[0].mlp.up_proj.weight.zero_()
                raise error
            return original(model, *rest)

        monkeypatch.setattr(module, "prune_sharing_", prune)

    return install


# ------------------------------------------------------------------------------------------------ the same bits


@pytest.mark.slow
def test_each_recipe_gives_the_bits_and_the_report_of_prune_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import hf_sparse.compare as module

    found: list[tuple[State, Any]] = []
    original = module.prune_sharing_

    def spy(model: Any, *rest: Any) -> Any:
        report = original(model, *rest)
        found.append((state_of(model), report))
        return report

    monkeypatch.setattr(module, "prune_sharing_", spy)
    comparison = on_rows(RECIPES)
    assert not comparison.failed
    for recipe, (weights, report), row in zip(make_recipes(RECIPES, DATA), found, comparison.rows, strict=True):
        alone = llama()
        expected = prune_(alone, recipe.config)
        assert same(weights, state_of(alone)), recipe.name
        assert report.notes == expected.notes
        assert [block.output_error for block in report.blocks] == [block.output_error for block in expected.blocks]
        assert [site.zeros for site in report.sites] == [site.zeros for site in expected.sites]
        assert row.value == evaluate(alone, TEXT, window=64).value
        assert row.sparsity == expected.sparsity


def test_the_model_is_as_it_was() -> None:
    model = llama()
    before = state_of(model)
    compare(model, make_recipes(RECIPES, DATA), TEXT)
    assert same(before, state_of(model))
    assert hf_sparse.report(model) is None
    assert "hf_sparse" not in model.config.to_dict()
    assert not model.training


def test_a_model_that_was_sparse_before_keeps_its_report_and_claim() -> None:
    model = llama()
    report = prune_(model, SparsityConfig(metric="magnitude", targets="mlp"))
    before, claim = state_of(model), model.config.hf_sparse
    compare(model, [{"metric": "magnitude", "targets": "attention"}], TEXT)
    assert same(before, state_of(model))
    assert hf_sparse.report(model) is report
    assert model.config.hf_sparse == claim


def test_the_dense_figure_is_that_of_evaluate(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(text(301))
    model = llama()
    found = compare(
        model, [{"metric": "magnitude"}], tmp_path / "text.txt", tokenizer=tokenizer(), window=16, max_windows=5
    )
    alone = evaluate(model, tmp_path / "text.txt", tokenizer=tokenizer(), window=16, max_windows=5).to_dict()
    assert {**found.dense, "seconds": 0} == {**alone, "seconds": 0}


# ------------------------------------------------------------------------------------------------ shared work


def test_what_recipes_have_in_common_is_done_once(counted: Counter[str]) -> None:
    plain = [{"name": f"{sparsity}", "metric": "wanda", "pattern": "unstructured", "sparsity": sparsity, "allocation": "owl"}
             for sparsity in (0.4, 0.5, 0.6)]  # fmt: skip
    on_rows(plain)
    assert counted == {"read_calibration": 1, "survey": 1, "allot_": 1, "read_samples": 1, "evaluate": 1 + 3}


@pytest.mark.slow
def test_surveys_with_other_probes_and_samples_of_other_seeds_are_others(counted: Counter[str]) -> None:
    on_rows(RECIPES)
    assert counted["read_calibration"] == 1
    assert counted["survey"] == 3  # plain, with feeds (dass, permuted), with two streams
    counted.clear()
    on_rows([{"metric": "wanda"}, {"metric": "dass"}], draws=2)
    assert (counted["read_calibration"], counted["survey"]) == (2, 4)


def test_shared_work_counts_for_every_recipe_that_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import hf_sparse.shared as module

    original = module.read_calibration

    def slow(*args: Any) -> Any:
        until = time.process_time() + 0.4
        while time.process_time() < until:
            pass
        return original(*args)

    monkeypatch.setattr(module, "read_calibration", slow)
    found = on_rows([{"name": "a", "metric": "wanda"}, {"name": "b", "metric": "wanda"}, {"metric": "magnitude"}])
    seconds = [row.cpu_seconds for row in found.rows]
    assert seconds[0] >= 0.4
    assert seconds[1] >= 0.4
    assert seconds[2] < 0.4


def test_recipes_that_look_at_no_data_are_run_without(counted: Counter[str]) -> None:
    found = on_rows([{"metric": "magnitude"}], draws=3)
    assert counted["read_calibration"] == 0
    assert len(found.rows[0].draws) == 1
    assert found.rows[0].config["calibration"] is None


def test_draws_give_the_median_and_the_spread() -> None:
    stream = token_rows(1, 2000)[0]
    shared = {"calibration": stream, "num_samples": 4, "sequence_length": 24, "seed": 5}
    row = compare(llama(), make_recipes([{"metric": "wanda"}], shared), TEXT, draws=3).rows[0]
    values = sorted(draw.value for draw in row.draws)
    assert [draw.seed for draw in row.draws] == [5, 6, 7]
    assert len({draw.calibration["fingerprint"] for draw in row.draws}) == 3
    assert (row.value, row.spread) == (values[1], (values[0], values[2]))


# ------------------------------------------------------------------------------------------------ figures


def test_gap_and_ratio_are_set_against_the_reference() -> None:
    found = on_rows(RECIPES[:3], reference="wanda")
    rows = {row.name: row for row in found.rows}
    dense = math.log(2.0)
    found.dense["value"] = 2.0  # pruning a random model may well improve it, and then there is no gap to compare with
    assert found.gap(rows["wanda"]) == found.cpu_ratio(rows["wanda"]) == 1
    unit = math.log(rows["wanda"].value) - dense
    assert found.gap(rows["dass"]) == pytest.approx((math.log(rows["dass"].value) - dense) / unit)
    found.dense["value"] = 1e6
    assert found.gap(rows["dass"]) is None
    assert found.cpu_ratio(rows["dass"]) == rows["dass"].cpu_seconds / rows["wanda"].cpu_seconds


def test_a_masked_model_is_compared_by_its_loss() -> None:
    found = compare(bert(), [{"metric": "magnitude"}], TEXT.clamp_max(12), tokenizer=tokenizer())
    assert found.dense["metric"] == "masked loss"
    assert found.loss(found.rows[0]) == found.rows[0].value - found.dense["value"]
    assert "masked loss" in str(found)


def test_growth_sees_what_is_held_for_a_moment() -> None:
    growth = Growth()
    if growth.peak() is None:
        pytest.skip("this system does not let the peak be set back")
    held = torch.ones(8 * 2**20)  # 32 MiB
    del held
    assert 30 * 2**20 < growth.peak() < 60 * 2**20
    assert Growth().peak() < 10 * 2**20


def test_memory_that_cannot_be_measured_is_said_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("hf_sparse.memory._CLEAR", tmp_path / "absent" / "clear_refs")
    found = on_rows(RECIPES[:1])
    assert found.rows[0].memory_bytes is None
    assert "not measured" in str(found)


# ------------------------------------------------------------------------------------------------ failures


def test_a_recipe_that_fails_says_so_and_the_others_run() -> None:
    model = llama()
    before = state_of(model)
    bad = {"name": "bad", "metric": "wanda", "exclude": ["*.nothing"]}
    found = compare(model, make_recipes([RECIPES[0], bad, RECIPES[1]], DATA), TEXT)
    assert [row.error is None for row in found.rows] == [True, False, True]
    assert "*.nothing" in found.rows[1].error
    assert found.rows[1].value is None
    assert "bad failed: " in str(found)
    assert same(before, state_of(model))


def test_one_that_breaks_off_half_way_leaves_nothing_behind(fail_at: Callable[[int, BaseException], None]) -> None:
    expected = on_rows(RECIPES[:3]).rows[2].value
    fail_at(2, RuntimeError("the disk is full\nand more"))
    found = on_rows(RECIPES[:3])
    assert found.rows[1].error == "RuntimeError: the disk is full"
    assert found.rows[2].value == expected


def test_a_reference_that_failed_leaves_gaps_open(fail_at: Callable[[int, BaseException], None]) -> None:
    fail_at(1, RuntimeError("no"))
    found = on_rows(RECIPES[:2])
    assert found.gap(found.rows[1]) is None
    assert found.cpu_ratio(found.rows[1]) is None
    json.dumps(found.to_dict())
    assert "magnitude failed" in found.markdown()


def test_ctrl_c_keeps_what_was_finished(fail_at: Callable[[int, BaseException], None]) -> None:
    model = llama()
    before = state_of(model)
    fail_at(3, KeyboardInterrupt())
    with pytest.raises(ComparisonInterrupted) as caught:
        compare(model, make_recipes(RECIPES, DATA), TEXT)
    assert [row.name for row in caught.value.comparison.rows] == ["magnitude", "wanda"]
    assert same(before, state_of(model))
    assert f"interrupted: 2 of {len(RECIPES)} recipes" in str(caught.value.comparison)


BAD: list[tuple[Any, str]] = [
    ([], "is empty"),
    ([{"metric": "wanda"}, {"metric": "wnda"}], r"recipe 2: .*Did you mean 'wanda'"),
    ([{"name": "x", "metric": "magnitude", "colour": 1}], r"recipe 1 \('x'\): .*'colour' does not exist"),
    ([{"name": "x", "metric": "wanda"}, {"name": "x", "metric": "dass"}], r"recipes 1 and 2 have the same name 'x'"),
    ([{"metric": "wanda"}, {"metric": "wanda"}], r"recipes 1 and 2 have the same name 'wanda 2:4'"),
    (["wanda"], r"recipe 1: it is a str"),
    ([None], r"recipe 1: it is nothing"),
    ([{"name": 3, "metric": "wanda"}], r"recipe 1 \(3\): its name"),
    ([{"name": "a\nb", "metric": "wanda"}], "one line"),
]


@pytest.mark.parametrize(("recipes", "message"), BAD, ids=[message for _, message in BAD])
def test_wrong_recipes_are_refused_with_their_number_and_name(
    recipes: Any, message: str, counted: Counter[str]
) -> None:
    with pytest.raises(ConfigError, match=message):
        compare(llama(), make_recipes(recipes, DATA), TEXT)
    assert not counted


def test_data_that_a_recipe_needs_are_asked_for(counted: Counter[str]) -> None:
    with pytest.raises(ConfigError, match=r"recipe 2 \('w'\): metric 'wanda' looks at activations"):
        compare(llama(), [{"metric": "magnitude"}, {"name": "w", "metric": "wanda"}], TEXT)
    with pytest.raises(CalibrationError, match=r"recipe 'w': .*absent\.txt"):
        compare(llama(), [{"name": "w", "metric": "wanda", "calibration": "absent.txt"}], TEXT, tokenizer=tokenizer())
    assert counted["evaluate"] == 0


def test_other_arguments_are_checked_before_anything_runs(counted: Counter[str]) -> None:
    for changes, message in (
        ({"reference": "wnda"}, "Did you mean 'wanda'"),
        ({"draws": 0}, "draws=0"),
        ({"window": 1}, "window=1"),
        ({"max_windows": 0}, "max_windows=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            on_rows(RECIPES[:2], **changes)
    with pytest.raises(ConfigError, match="window=65"):
        on_rows(RECIPES[:2], window=65)
    assert counted["survey"] == 0


def test_text_that_is_calibrated_on_is_refused_before_anything_runs(counted: Counter[str]) -> None:
    recipes = make_recipes(RECIPES[:2], DATA)
    with pytest.raises(CalibrationError, match="4 of the texts"):
        compare(llama(), recipes, DATA["calibration"])
    assert counted["evaluate"] == 0
    assert not compare(llama(), recipes, DATA["calibration"], same_text_allowed=True).failed


# ------------------------------------------------------------------------------------------------ the command line


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "calibration.txt").write_text(text(600))
    (tmp_path / "evaluation.txt").write_text(text(301)[4:])
    return tmp_path / "dense"


def run(folder: Path, recipes: Any, *words: object) -> int:
    if not isinstance(recipes, str):
        (folder / "recipes.json").write_text(json.dumps(recipes))
        recipes = folder / "recipes.json"
    always = ["compare", folder / "dense", "--recipes", recipes, "--calibration", folder / "calibration.txt", "--num-samples", 4,
              "--sequence-length", 32, "--evaluate", folder / "evaluation.txt", "--window", 16]  # fmt: skip
    return main([str(word) for word in (*always, *words)])


def test_json_and_the_file_hold_the_same(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, RECIPES[:2], "--json", "--output", tmp_path / "new" / "o.json", "--draws", 2, "--seed", 3) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "new" / "o.json").read_text())
    assert {
        "model",
        "parameters",
        "dtype",
        "dense",
        "reference",
        "draws",
        "versions",
        "threads",
        "interrupted",
        "rows",
    } <= set(found)
    assert set(found["rows"][0]) == {
        "name", "pattern", "sparsity", "value", "lowest", "highest", "loss", "gap", "cpu_seconds", "cpu_ratio", "seconds", "memory_bytes",
        "error", "notes", "config", "draws",
    }  # fmt: skip
    assert (found["dense"]["metric"], found["dense"]["text"]) == ("perplexity", "evaluation.txt")
    assert [draw["seed"] for draw in found["rows"][1]["draws"]] == [3, 4]
    assert SparsityConfig.from_dict(found["rows"][1]["config"]).metric == "wanda"


def test_the_table_and_markdown_tell_what_figures_depend_on(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes = [{**RECIPES[0], "name": "a|b"}, RECIPES[1]]
    assert run(tmp_path, recipes) == 0
    table = capsys.readouterr().out
    assert run(tmp_path, recipes, "--markdown") == 0
    markdown = capsys.readouterr().out
    lines = markdown.splitlines()
    assert lines[0].startswith(
        "| recipe | pattern | zeros | perplexity | gap | CPU seconds | CPU ratio | extra memory |"
    )
    assert lines[3].startswith(r"| a\|b | 2:4 | 50.00 % |")
    for told in (table, markdown):
        for part in (
            "evaluation.txt",
            "calibration.txt",
            "seed 0: ",
            "windows of 16",
            f"torch {torch.__version__}",
            "1 thread",
            "a|b = 1",
        ):
            assert part in told


@pytest.mark.slow
def test_the_default_recipes_run(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [recipe.name for recipe in make_recipes(read_recipes("default"), DATA)] == [one["name"] for one in DEFAULT]
    assert run(tmp_path, "default", "--plot", tmp_path / "new" / "p.png", "--reference", "wanda") == 0
    table = capsys.readouterr().out
    assert all(one["name"] in table for one in DEFAULT)
    with Image.open(tmp_path / "new" / "p.png") as picture:
        found = picture.convert("RGB").getcolors(maxcolors=2**24) or []
    drawn = {colour for count, colour in found if count > 100}
    assert {(0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0)} <= drawn


def test_yaml_reads_patterns_as_they_are_written(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "recipes.yaml").write_text("- {metric: magnitude, pattern: 1:4}\n- {metric: wanda, pattern: 2:4}\n")
    assert run(tmp_path, str(tmp_path / "recipes.yaml")) == 0


def test_a_failed_recipe_ends_with_1_behind_the_table(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes = [RECIPES[0], {"name": "bad", "metric": "wanda", "exclude": ["*.nothing"]}]
    assert run(tmp_path, recipes, "--json", "--plot", tmp_path / "p.png") == 1
    captured = capsys.readouterr()
    assert [row["error"] is None for row in json.loads(captured.out)["rows"]] == [True, False]
    assert "recipe 'bad' failed" in captured.err
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_interrupted_writes_what_is_complete(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fail_at: Callable[[int, BaseException], None]
) -> None:
    fail_at(2, KeyboardInterrupt())
    assert run(tmp_path, RECIPES[:3], "--output", tmp_path / "o.json") == 130
    assert "interrupted; 1 of 3 recipes were finished; they are in " in capsys.readouterr().err
    written = json.loads((tmp_path / "o.json").read_text())
    assert written["interrupted"] is True
    assert [row["name"] for row in written["rows"]] == ["magnitude"]


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        ("{}", [], "a list of mappings"),
        ("[]", [], "is empty"),
        ("[", [], "not valid JSON"),
        ('[{"metric": "wanda", "patern": "2:4"}]', [], "Did you mean 'pattern'"),
        ('[{"metric": "wanda"}]', ["--reference", "x"], "reference 'x' does not exist"),
        ('[{"metric": "wanda"}]', ["--draws", "0"], "draws=0"),
        ('[{"metric": "wanda"}]', ["--plot", "p.docx"], "written as '.docx'"),
        ('[{"metric": "wanda"}]', ["--output", "."], "is a folder"),
        ('[{"metric": "wanda"}]', ["--batch-size", "many"], "batch_size"),
        ('[{"metric": "wanda"}]', ["--evaluate", "SAME"], "--allow-same-text"),
        ('[{"metric": "wanda"}]', ["--calibration", "absent.txt"], "absent.txt"),
    ],
)
def test_errors_are_one_line(
    content: str, words: list[str], message: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.json").write_text(content)
    words = [str(tmp_path / "calibration.txt") if word == "SAME" else word for word in words]
    capsys.readouterr()
    assert run(tmp_path, str(tmp_path / "bad.json"), *words) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_missing_file(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "absent.json", "--json") == 1
    assert set(json.loads(capsys.readouterr().out)) == {"error", "kind"}


# ------------------------------------------------------------------------------------------------ the picture


def test_the_picture_says_what_it_shows(tmp_path: Path) -> None:
    from matplotlib.text import Text

    from hf_sparse.plot import new_figure
    from hf_sparse.plot_comparison import _draw

    found = on_rows([{**RECIPES[0], "name": "_$x$"}, *RECIPES[1:3], {**RECIPES[7], "name": "half"}], draws=2)
    found.rows[2].draws.clear()
    found.rows[2].error = "no"
    figure = new_figure(tmp_path / "p.png")
    _draw(figure, found)
    texts = {one.get_text() for one in figure.findobj(Text)}  # type: ignore[attr-defined]
    assert {
        "perplexity",
        "$x$",
        "wanda",
        "dass (failed)",
        "half",
        "dense",
        "CPU seconds of pruning (1 thread)",
        "extra memory (MiB)",
    } <= texts
    for suffix in ("png", "svg", "pdf"):
        assert found.plot(tmp_path / f"p.{suffix}").stat().st_size > 1000


def test_a_picture_of_nothing_measured(tmp_path: Path) -> None:
    found = on_rows(RECIPES[:1])
    found.rows[0].draws.clear()
    found.rows[0].error = "no"
    assert found.plot(tmp_path / "p.png").stat().st_size > 10_000
