"""The text that is always at hand: disjoint splits, the same every time, and a clear word where it is missing."""

import itertools
from pathlib import Path
from typing import get_args

import pytest

from hf_sparse import stdlib_text
from hf_sparse.errors import CalibrationError

SPLITS = get_args(stdlib_text.Split)


@pytest.fixture(scope="module")
def found() -> dict[str, list[Path]]:
    return {split: stdlib_text.files(split) for split in SPLITS}


def test_no_split_is_empty_and_no_file_is_in_two(found: dict[str, list[Path]]) -> None:
    assert all(found.values())
    for one, other in itertools.combinations(SPLITS, 2):
        assert not set(found[one]) & set(found[other])


def test_the_files_come_in_the_same_order_every_time(found: dict[str, list[Path]]) -> None:
    for split in SPLITS:
        assert stdlib_text.files(split) == found[split]
        assert found[split] == sorted(
            found[split], key=lambda path: path.relative_to(stdlib_text.stdlib_folder()).as_posix()
        )


def test_every_file_is_source_of_the_library_itself(found: dict[str, list[Path]]) -> None:
    for path in itertools.chain.from_iterable(found.values()):
        assert path.suffix == ".py"
        assert not {"site-packages", "dist-packages", "encodings"} & set(
            path.parts[len(stdlib_text.stdlib_folder().parts) :]
        )


@pytest.mark.parametrize(
    "name", ["test/test_json.py", "unittest/test/test_case.py", "tkinter/tests/x.py", "idlelib/idle_test/a.py"]
)
def test_tests_are_only_trained_on(name: str) -> None:
    assert stdlib_text.split_of(name) == "training"


def test_a_name_alone_decides_the_split() -> None:
    # Fixed for ever: the embedded model was trained on one split and is measured on another.
    known = {
        "argparse.py": "training", "json/decoder.py": "training", "collections/abc.py": "calibration", "base64.py": "development",
        "collections/__init__.py": "evaluation", "bz2.py": "evaluation",
    }  # fmt: skip
    assert {name: stdlib_text.split_of(name) for name in known} == known


def test_texts_and_fingerprints_are_reproducible_and_differ() -> None:
    texts = stdlib_text.texts("development")
    assert texts == stdlib_text.texts("development")
    assert all(text.strip() and "\r\n" not in text for text in texts)
    prints = {split: stdlib_text.fingerprint(split) for split in ("calibration", "development", "evaluation")}
    assert len(set(prints.values())) == 3
    assert prints["development"] == stdlib_text.fingerprint("development")
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in prints.values())


@pytest.mark.parametrize(
    ("split", "hint"), [("evaluate", "'evaluation'"), ("", ""), ("train", "'training'"), (None, "")]
)
def test_an_unknown_split_is_refused_with_the_nearest(split: str, hint: str) -> None:
    with pytest.raises(CalibrationError, match="split of the standard library") as caught:
        stdlib_text.files(split)
    assert repr(split) in str(caught.value)
    assert f"Did you mean {hint}" in str(caught.value) if hint else "'evaluation'" in str(caught.value)


@pytest.mark.parametrize("place", ["python311.zip", "empty", "absent"])
def test_a_zipped_or_stripped_library_is_refused(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "python311.zip").write_bytes(b"PK")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path / place)})
    for call in (
        stdlib_text.stdlib_folder,
        lambda: stdlib_text.texts("calibration"),
        lambda: stdlib_text.fingerprint("training"),
    ):
        with pytest.raises(CalibrationError, match="zipped or stripped") as caught:
            call()
        assert place in str(caught.value)


def test_only_readable_text_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        "argparse.py",
        "test/latin.py",
        "test/blank.py",
        "test/windows.py",
        "site-packages/other.py",
        "test/notes.txt",
        "config-3.11-arm/python-config.py",
    ]
    contents = [b"import sys\n", b"\xe9", b" \n", b"a = 1\r\n", b"x = 1\n", b"text", b"y = 1\n"]
    for name, content in zip(names, contents, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    everything = [text for split in SPLITS for text in stdlib_text.texts(split)]
    assert sorted(everything) == ["a = 1\n", "import sys\n"]
