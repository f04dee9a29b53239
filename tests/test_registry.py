"""Registries: parts are found by name, and a name or option that is not known gets the nearest one for an answer."""

import pytest

from hf_sparse.errors import ConfigError, HfSparseError, PruningInterrupted, unknown
from hf_sparse.registry import ALLOCATIONS, METRICS, STATISTICS, UPDATES, Registry


@pytest.fixture
def tools() -> Registry:
    registry: Registry = Registry("tool")

    @registry.register("hammer", source="page 1", needs=("nail",), options={"weight": 2, "grip": "wood"}, loud=True)
    def hammer() -> str:
        """Hits things.

        Second paragraph.
        """
        return "hit"

    @registry.register("saw")
    def saw() -> str:
        return "cut"

    return registry


def test_a_part_is_found_with_all_that_it_declared(tools: Registry) -> None:
    entry = tools["hammer"]
    assert (entry.name, entry.summary, entry.source, entry.needs) == (
        "hammer",
        "Hits things.",
        "page 1",
        frozenset({"nail"}),
    )
    assert (entry.consumer_needs, entry.options, entry.traits) == (
        frozenset(),
        {"weight": 2, "grip": "wood"},
        {"loud": True},
    )
    assert entry.function() == "hit"
    assert (tools["saw"].summary, tools["saw"].source) == ("", "this project")
    assert [entry.name for entry in tools] == ["hammer", "saw"]
    assert "saw" in tools
    assert "sew" not in tools
    assert ["saw"] not in tools


def test_registering_returns_the_function_itself(tools: Registry) -> None:
    def file() -> None:
        """ """

    assert tools.register("file")(file) is file
    assert tools["file"].summary == ""


def test_a_name_is_given_once(tools: Registry) -> None:
    with pytest.raises(ConfigError, match="'saw' is already registered"):
        tools.register("saw")(lambda: "other")
    assert tools["saw"].function() == "cut"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("hamer", "Did you mean 'hammer'?"),
        ("swa", "Did you mean 'saw'?"),
        ("quux", ""),
        (None, ""),
        (3, ""),
        (["saw"], ""),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(tools: Registry, name: object, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tools[name]  # type: ignore[index]
    message = str(caught.value)
    assert message.startswith(f"tool {name!r} does not exist.")
    assert "Allowed: 'hammer', 'saw'." in message
    assert hint in message


def test_options_are_laid_over_the_defaults(tools: Registry) -> None:
    assert tools.resolve_options("hammer", {}) == {"weight": 2, "grip": "wood"}
    assert tools.resolve_options("hammer", {"weight": 5}) == {"weight": 5, "grip": "wood"}
    assert tools["hammer"].options == {"weight": 2, "grip": "wood"}
    with pytest.raises(ConfigError, match=r"option of tool 'hammer': 'wait' does not exist\. Did you mean 'weight'\?"):
        tools.resolve_options("hammer", {"wait": 1})
    with pytest.raises(ConfigError, match="None is known"):
        tools.resolve_options("saw", {"weight": 1})


@pytest.mark.parametrize("registry", [METRICS, ALLOCATIONS, UPDATES, STATISTICS], ids=lambda registry: registry.kind)
def test_everything_that_ships_says_what_it_is_and_where_from(registry: Registry) -> None:
    entries = list(registry)
    assert entries
    for entry in entries:
        assert entry.summary, entry.name
        assert entry.source, entry.name


@pytest.mark.parametrize("entry", list(METRICS), ids=lambda entry: entry.name)
def test_what_a_metric_needs_can_be_measured(entry: object) -> None:
    for name in entry.needs | entry.consumer_needs:  # type: ignore[attr-defined]
        assert name in STATISTICS
    if entry.consumer_needs:  # type: ignore[attr-defined]
        assert entry.traits["otherwise"] in METRICS  # type: ignore[attr-defined]
        assert entry.traits["roles"]  # type: ignore[attr-defined]


def test_all_errors_are_value_errors_and_share_one_base() -> None:
    assert issubclass(HfSparseError, ValueError)
    error = PruningInterrupted("stopped", [0, 1])
    assert isinstance(error, HfSparseError)
    assert (str(error), error.blocks) == ("stopped", [0, 1])
    assert unknown("axis", "x", ()) == "axis 'x' does not exist. None is known."
