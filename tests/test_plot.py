"""A report becomes a picture, whatever is missing from it and whatever its names hold."""

import dataclasses
import sys
from pathlib import Path

import pytest
from PIL import Image

from hf_sparse.errors import HfSparseError
from hf_sparse.plot import plot_report
from hf_sparse.report import BlockReport, Report

pytestmark = pytest.mark.filterwarnings("error")


def block(index: int, stack: str, error: float | None) -> BlockReport:
    return BlockReport(index, f"{stack}.{index}", stack, 500 + 10 * index, 1000, 1200, error, 0.1)


def make_report(blocks: list[BlockReport], model: str = "someone/t5-tiny") -> Report:
    config = {"pattern": "2:4", "metric": "wanda"}
    return Report(config, model, "T5ForConditionalGeneration", 9999, blocks, {}, [], None, {}, 1.0, None)


@pytest.fixture
def two_stacks() -> Report:
    encoder = [block(index, "encoder.block", 0.1 * index) for index in range(4)]
    return make_report([*encoder, *(block(index, "decoder.block", 0.2) for index in range(4, 8))])


def colours(path: Path) -> set[tuple[int, ...]]:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        found = picture.convert("RGB").getcolors(maxcolors=2**24) or []
    return {colour for count, colour in found if count > 500}  # type: ignore[misc]


def test_both_stacks_are_drawn_into_a_real_png(two_stacks: Report, tmp_path: Path) -> None:
    path = tmp_path / "new" / "picture.png"
    assert two_stacks.plot(path) == path
    assert path.stat().st_size > 10_000
    assert {(0, 114, 178), (213, 94, 0), (255, 255, 255)} <= colours(path)
    assert [item.name for item in path.parent.iterdir()] == ["picture.png"]


def test_one_stack_has_one_colour(tmp_path: Path) -> None:
    path = plot_report(make_report([block(index, "layers", 0.1) for index in range(3)]), tmp_path / "a.png")
    assert (213, 94, 0) not in colours(path)


def texts(report: Report) -> list[str]:
    from matplotlib.text import Text

    from hf_sparse.plot import _draw, new_figure

    figure = new_figure(Path("a.png"))
    _draw(figure, report)
    return [text.get_text() for text in figure.findobj(Text)]  # type: ignore[attr-defined]


def test_says_what_it_shows(two_stacks: Report) -> None:
    found = texts(two_stacks)
    assert "t5-tiny\npattern 2:4, metric wanda" in found
    assert {"encoder.block", "decoder.block", "sparsity of the sites (%)", "dashed: all sites, 53.50 %"} <= set(found)
    assert "not measured" not in " ".join(found)


def test_not_measured(two_stacks: Report, tmp_path: Path) -> None:
    two_stacks.blocks[2].output_error = None
    assert "not measured for 1 of 8 blocks" in texts(two_stacks)
    for one in two_stacks.blocks:
        one.output_error = None
    assert "not measured" in texts(two_stacks)
    plot_report(two_stacks, tmp_path / "a.png")


@pytest.mark.parametrize("errors", [[0.0, 0.0], [1e-6, 1.0], [float("nan"), 0.1], [float("inf"), None]])
def test_odd_errors(errors: list[float | None], tmp_path: Path) -> None:
    report = make_report([block(index, "layers", error) for index, error in enumerate(errors)])
    assert plot_report(report, tmp_path / "a.png").stat().st_size > 10_000


def test_no_blocks(tmp_path: Path) -> None:
    assert "no block was pruned" in texts(make_report([]))
    plot_report(make_report([]), tmp_path / "a.png")


def test_names_are_no_formulas(tmp_path: Path) -> None:
    blocks = [block(0, r"$\frac{$", 0.1), block(1, "__hidden", 0.1)]
    report = make_report(blocks, model="a$\\" + "x" * 300 + "\n$")
    plot_report(report, tmp_path / "a.png")
    assert "hidden" in texts(report)


def test_other_formats_and_none(two_stacks: Report, tmp_path: Path) -> None:
    assert plot_report(two_stacks, tmp_path / "a.svg").read_text(encoding="utf-8").lstrip().startswith("<?xml")
    assert plot_report(two_stacks, tmp_path / "plain").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(HfSparseError, match=r"written as '\.docx'; allowed: .*png"):
        plot_report(two_stacks, tmp_path / "a.docx")


def test_a_failed_write_keeps_the_old_picture(
    two_stacks: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = plot_report(two_stacks, tmp_path / "a.png")
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("hf_sparse.plot.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        plot_report(dataclasses.replace(two_stacks, model="other"), path)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["a.png"]


def test_without_matplotlib(two_stacks: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(HfSparseError, match=r"pip install hf-sparse\[plots\]"):
        plot_report(two_stacks, tmp_path / "a.png")


def test_pyplot_is_not_touched(two_stacks: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    plot_report(two_stacks, tmp_path / "a.png")
