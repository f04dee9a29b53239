"""What is told of a training: it comes back from JSON as it was, and from files of others only if it is whole."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse.errors import CheckpointError
from hf_sparse.recovery import Recovery, set_aside

NAN, INFINITY = float("nan"), float("inf")


def make_recovery(**changes: Any) -> Recovery:
    recovery = Recovery(
        method="full fine-tuning", callbacks=["KeepMasks", "Distillation"], data="my.jsonl", fingerprint="0123456789abcdef", steps=120,
        tokens=30720, sequences=240, learning_rate=5e-4, schedule="cosine, 10 steps of warm-up", optimizer="adamw_torch", batch_size=2,
        precision="bf16", seconds=75.25, processes=1, loss="distillation from user/model, temperature 1",
        settings={"temperature": 1.0, "teacher": "user/model", "steps": [1, {"a": None}]}, metric="eval_loss", before=2.5, after=1.25,
        zeros_before=64, zeros_after=65, size=128, zeros_lost=0, versions={"torch": "2.13.0"},
    )  # fmt: skip
    return dataclasses.replace(recovery, **changes)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


RECOVERIES = {
    "full": make_recovery(),
    "nothing measured": make_recovery(metric=None, before=None, after=None, fingerprint=None, learning_rate=None),
    "nothing set": make_recovery(settings={}, versions={}, callbacks=[]),
    "nothing done yet": make_recovery(
        steps=0, tokens=0, sequences=0, seconds=0.0, zeros_before=0, zeros_after=0, size=0
    ),
    "whole numbers": make_recovery(seconds=3, before=2, learning_rate=1),
}


@pytest.mark.parametrize("recovery", RECOVERIES.values(), ids=RECOVERIES)
def test_it_comes_back(recovery: Recovery) -> None:
    assert Recovery.from_dict(recovery.to_dict()) == recovery
    assert Recovery.from_dict(json.loads(json.dumps(recovery.to_dict(), allow_nan=False))) == recovery


def test_what_was_not_known_can_be_left_out() -> None:
    optional = ("fingerprint", "settings", "metric", "before", "after", "versions")
    values = {name: value for name, value in make_recovery().to_dict().items() if name not in optional}
    expected = make_recovery(fingerprint=None, settings={}, metric=None, before=None, after=None, versions={})
    assert Recovery.from_dict(values) == expected
    for name in values:
        with pytest.raises(CheckpointError, match=f"has no {name}"):
            Recovery.from_dict({key: value for key, value in values.items() if key != name})


def test_fields_of_later_versions_are_passed_over() -> None:
    assert Recovery.from_dict({**make_recovery().to_dict(), "later": nested(900)}) == make_recovery()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("method", None), ("method", 5), ("callbacks", "KeepMasks"), ("callbacks", ["KeepMasks", 1]), ("callbacks", None), ("data", []),
        ("fingerprint", 5), ("steps", "120"), ("steps", 1.5), ("steps", True), ("steps", -1), ("steps", None), ("tokens", 2**63),
        ("tokens", 10**400), ("tokens", -5), ("sequences", [1]), ("learning_rate", "fast"), ("learning_rate", NAN), ("learning_rate", True),
        ("schedule", 1), ("optimizer", {}), ("batch_size", 0.5), ("precision", None), ("seconds", INFINITY),
        ("seconds", -0.5), ("seconds", None), ("processes", "one"), ("loss", 0.5), ("settings", None), ("settings", []),
        ("settings", {1: 2}), ("settings", {"a": NAN}), ("settings", {"a": [INFINITY]}), ("settings", {"a": {1: 2}}),
        ("settings", {"a": 10**5000}), ("settings", {"a": Path("x")}), ("settings", {"a": nested(17)}), ("settings", {"a": nested(100_000)}),
        ("metric", 5), ("before", NAN), ("before", "2.5"), ("after", INFINITY), ("after", 10**400), ("zeros_before", 129),
        ("zeros_after", 129), ("zeros_after", None), ("size", "128"), ("size", 1), ("zeros_lost", -1), ("zeros_lost", 0.0),
        ("versions", []), ("versions", {"torch": 2}), ("versions", None),
    ],
)  # fmt: skip
def test_damaged_data_are_refused_by_name(name: str, value: Any) -> None:
    of_zeros = "(zeros_before|zeros_after|size)" if name == "size" else name
    with pytest.raises(CheckpointError, match=f"no report of hf_sparse: in a recovery, {of_zeros} is ") as caught:
        Recovery.from_dict({**make_recovery().to_dict(), name: value})
    assert len(str(caught.value)) < 250


def test_a_number_too_long_to_print_is_refused() -> None:
    with pytest.raises(CheckpointError, match="learning_rate is a huge int"):
        Recovery.from_dict({**make_recovery().to_dict(), "learning_rate": 10**5000})


@pytest.mark.parametrize(
    "value", [None, [], 5, "text", nested(100_000)], ids=["null", "list", "number", "text", "deep"]
)
def test_what_is_no_mapping_is_refused(value: Any) -> None:
    with pytest.raises(CheckpointError, match="a recovery is "):
        Recovery.from_dict(value)


@pytest.mark.parametrize("figure", [NAN, INFINITY, -INFINITY, 1e301])
def test_figures_that_are_not_finite_become_null(figure: float) -> None:
    recovery = make_recovery(before=figure, learning_rate=figure, settings={"a": [figure], "b": {"c": figure}})
    expected = make_recovery(before=None, learning_rate=None, settings={"a": [None], "b": {"c": None}})
    assert Recovery.from_dict(json.loads(json.dumps(recovery.to_dict(), allow_nan=False))) == expected


@pytest.mark.parametrize(
    "wrap",
    [lambda value: [value], lambda value: (value,), lambda value: {"a": value}],
    ids=["list", "tuple", "mapping"],
)
def test_settings_nested_too_deeply_end_in_words(wrap: Callable[[Any], Any]) -> None:
    value: Any = "inside"
    for _ in range(20):
        value = wrap(value)
    told = make_recovery(settings={"deep": value}).to_dict()
    assert Recovery.from_dict(told).to_dict() == told
    assert "inside" in str(told["settings"])


def test_settings_that_json_cannot_hold_become_words() -> None:
    settings = {"folder": Path("a"), "kind": dict, 3: (1, 2), "big": 10**400, "deep": {"deeper": nested(15)}}
    plain = make_recovery(settings=settings).to_dict()["settings"]
    assert plain == {
        "folder": "a", "kind": "<class 'dict'>", "3": [1, 2], "big": str(10**400), "deep": {"deeper": plain["deep"]["deeper"]},
    }  # fmt: skip
    assert json.dumps(plain["deep"]["deeper"]) == json.dumps(nested(14)).replace("1", '"[1]"')


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    ),
)


@given(settings=st.dictionaries(st.text(), ANYTHING, max_size=4), before=st.floats() | st.none(), words=st.text())
def test_whatever_was_told_can_be_read_again(settings: dict[str, Any], before: float | None, words: str) -> None:
    told = make_recovery(settings=settings, before=before, method=words, data=words).to_dict()
    again = Recovery.from_dict(json.loads(json.dumps(told, allow_nan=False)))
    assert again.to_dict() == told
    assert again.method == again.data == words


def test_it_prints_on_one_line() -> None:
    line = str(make_recovery())
    for part in ("full fine-tuning on my.jsonl", "120 steps", "30720 tokens", "learning rate 0.0005 (cosine, 10 steps of warm-up)",
                 "distillation from user/model, temperature 1", "eval_loss 2.5000 -> 1.2500", "zeros 64 -> 65 of 128, 0 lost", "75.2 s"):  # fmt: skip
        assert part in line
    assert "not measured" not in line
    unknown = str(make_recovery(metric=None, before=None, after=None, learning_rate=None))
    assert "learning rate not told" in unknown
    assert "metric not measured -> not measured" in unknown


@pytest.mark.parametrize("letters", ["\n", "\r\n", "\x1b[31m", "\u202e", "\x00", "\u2028", "\ud800", "\x85"], ids=ascii)
def test_words_of_a_file_cannot_act_on_a_terminal(letters: str) -> None:
    line = str(make_recovery(method=f"a{letters}b", data=letters, loss=letters, metric=letters, schedule=letters))
    assert line.isprintable()
    assert len(line.splitlines()) == 1


@pytest.mark.parametrize(
    ("evaluation", "expected"),
    [
        ({"dense": 1.0, "sparse": 3.0}, {"dense": 1.0, "sparse": None, "before_recovery": 3.0}),
        ({"sparse": 3.0, "before_recovery": None}, {"sparse": None, "before_recovery": 3.0}),
        ({"sparse": 2.0, "before_recovery": 3.0}, {"sparse": None, "before_recovery": 3.0}),  # a second training
        ({"sparse": None, "before_recovery": 3.0}, {"sparse": None, "before_recovery": 3.0}),
        ({"sparse": None}, {"sparse": None}),
        ({"value": 3.0}, {"value": 3.0}),
    ],
)
def test_a_figure_from_before_the_training_is_told_as_such(
    evaluation: dict[str, Any], expected: dict[str, Any]
) -> None:
    given_before = dict(evaluation)
    assert set_aside(evaluation) == expected
    assert evaluation == given_before
