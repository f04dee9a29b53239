"""Plain data of bounded size: what is read from files of others, and what is refused with its place."""

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse.config.serialise import read_file
from hf_sparse.errors import CheckpointError, ConfigError
from hf_sparse.schema import LARGEST_NUMBER, check_plain, parse_json, read_json
from hf_sparse.text import shown

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(categories=None)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


def nested(depth: int, innermost: Any = 1) -> Any:
    value = innermost
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "values",
    [None, True, 0, -5, 2**64, 1.5, "", "text", [], {}, [1, 2, 3], {"a": [{"b": None}]}, (1, "a"), nested(16), [0] * 99_999, "x" * 2**16],
    ids=lambda value: ascii(shown(value))[:24],
)  # fmt: skip
def test_plain_data_pass(values: Any) -> None:
    check_plain(values, "it")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (float("nan"), "it: it is nan, which is no usable number"),
        ({"a": float("inf")}, r"it: a is inf"),
        ([1, 2, 10**400], r"it: \[2\] is 1000000"),
        ([1, 10**5000], r"it: \[1\] is a huge int"),
        ([1.5, -LARGEST_NUMBER], r"it: \[1\] is -1e\+300"),
        ({"a": {"b": [0, {"c": b"x"}]}}, r"it: a\.b\[1\]\.c is a bytes, which is no plain data"),
        ([set()], r"it: \[0\] is a set"),
        ({"a": {1: 2}}, "it: a has a key that is no text"),
        ({"x" * 70_000: 1}, "it: it has a key that is no text of at most 65536 letters"),
        ({"a": "x" * 65_537}, "it: a is longer than 65536 letters"),
        (nested(17), r"it: (\[0\]){16} is nested too deeply"),
        (nested(100_000), "nested too deeply"),
        ([0] * 100_000, "it: it holds more than 100000 values"),
        ([[0] * 50_000, [0] * 50_000], "more than 100000 values"),
        ({"\x1b[31m": {"a\nb": set()}}, "it: \ufffd.31m.a b is a set"),
    ],
    ids=lambda value: ascii(shown(value))[:24],
)
def test_anything_else_is_refused_with_its_place(values: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        check_plain(values, "it")
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


def test_the_limits_can_be_chosen() -> None:
    check_plain([[1]], "it", depth=2, items=3, text=0)
    for limits in ({"depth": 1}, {"items": 2}):
        with pytest.raises(CheckpointError):
            check_plain([[1]], "it", **limits)
    with pytest.raises(CheckpointError, match="longer than 1 letters"):
        check_plain(["ab"], "it", text=1)


def test_data_that_hold_themselves_are_refused() -> None:
    values: list[Any] = []
    values.append(values)
    with pytest.raises(CheckpointError, match="too deeply"):
        check_plain(values, "it")


def test_what_aliases_multiply_is_counted_as_often_as_it_stands_there() -> None:
    bomb: Any = ["x"] * 10
    for _ in range(9):
        bomb = [bomb] * 10
    with pytest.raises(CheckpointError, match="more than 100000 values"):
        check_plain(bomb, "it")


@given(values=ANY_JSON)
def test_whatever_passes_can_be_written_and_read(values: Any) -> None:
    try:
        check_plain(values, "it")
    except CheckpointError:
        return
    assert parse_json(json.dumps(values, allow_nan=False).encode(), "it") == values


@given(data=st.binary() | st.text().map(str.encode) | ANY_JSON.map(lambda values: json.dumps(values).encode()))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    said = None
    try:
        parse_json(data, "it")
    except CheckpointError as error:
        said = str(error)
    assert said is None or (said.startswith("it is not valid JSON: ") and said.isprintable())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON"), (b"{", "not valid JSON"), (b"\xff\xfe", "not valid JSON"), (b"[" * 10**6, "not valid JSON|lists and mappings"),
        (b'{"a":' * 100_000, "not valid JSON"), (b"[" + b"9" * 5000 + b"]", "not valid JSON: .*4300 digits"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "not valid JSON: 'c' stands twice"), (b"[" + b"[]," * 2**20 + b"1]", "more than 1048576 lists"),
        (b'["' + b'","' * 2**22 + b'"]', "or 4194304 words"),
    ],
    ids=lambda value: repr(value[:12]),
)  # fmt: skip
def test_files_that_are_traps_are_refused(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_json(tmp_path / "a.json", 2**24, "the report")
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize(
    "part", [b"[],", b'{"a":1},', b'"ab",', b"300,", b"1.5,", b'"\xf0\x9f\x98\x80",'], ids=["lists", "mappings", "words", "ints", "floats", "wide"]
)  # fmt: skip
def test_a_file_takes_a_small_multiple_of_its_size_in_memory(part: bytes) -> None:
    data = b"[" + part * (200_000 // len(part)) + b"1]"
    tracemalloc.start()
    try:
        check_plain(parse_json(data, "it"), "it", items=10**6)
        assert tracemalloc.get_traced_memory()[1] < 30 * len(data)
    finally:
        tracemalloc.stop()


def test_the_size_is_looked_at_before_a_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"a": 1}')
    assert read_json(file, 8, "the report") == {"a": 1}
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("the file was opened"))
    with pytest.raises(CheckpointError, match="larger than 7 bytes; that is not the report"):
        read_json(file, 7, "the report")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read the report .*No such file"):
        read_json(tmp_path / "absent", 100, "the report")
    with pytest.raises(CheckpointError, match="is no file"):
        read_json(tmp_path, 100, "the report")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
        with pytest.raises(CheckpointError, match="is no file"):
            read_json(tmp_path / "pipe", 100, "the report")


# ---------------------------------------------------------------------------------------------------- files of settings


def laughs(levels: int) -> str:
    """YAML whose every line stands for ten times the one before."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


def merges(levels: int) -> str:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", laughs(9), "more than 20 aliases"),
        ("a.yaml", merges(9), "more than 20 aliases"),
        ("a.yaml", "a: 2026-01-01", "a is a date, which is no plain data"),
        ("a.yaml", "a: {1: 2}", "a has a key that is no text"),
        ("a.yaml", "a: .nan", "a is nan"),
        ("a.yaml", "# " + "x" * 2**21, "larger than 2097152 bytes"),
        ("a.json", " " * 2**24 + "1", "larger than 16777216 bytes"),
        ("a.json", '{"a": 1, "a": 2}', "'a' stands twice"),
        ("a.json", '{"a": Infinity}', "a is inf"),
    ],
    ids=lambda value: value[:12],
)
def test_settings_that_are_a_trap_are_refused(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_file(tmp_path / name)


def test_settings_may_repeat_themselves(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\n")
    assert read_file(tmp_path / "a.yaml") == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2}}
