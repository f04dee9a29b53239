"""A configuration as a report records it, which may come from anyone: whether its fields can be read as what they are."""

from collections.abc import Iterable, Mapping
from typing import Any

from hf_sparse.text import shown

_WORDS = ("pattern", "metric", "axis", "targets", "exclude", "update")  # a name, or a list of names


def misfits(config: Mapping[str, Any]) -> Iterable[str]:
    """What in a recorded configuration is not of a type that it can have; that a name is known is not asked."""
    for name in _WORDS:
        value = config.get(name, "")
        words = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(word, str) for word in words):
            yield f"{name} is {shown(value)}"
    options = config.get("options", {})
    if not isinstance(options, Mapping) or not all(isinstance(group, Mapping) for group in options.values()):
        yield f"options is {shown(options)}"
    if not isinstance(config.get("allocation", ""), str | list | tuple | Mapping):
        yield f"allocation is {shown(config['allocation'])}"
