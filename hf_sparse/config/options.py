"""Checks the values of options against what their part declares."""

from typing import Any

from hf_sparse.errors import ConfigError, unknown
from hf_sparse.registry import Entry

_MOST = 1e6  # infinite scores or damping would have no meaning


def check_option(entry: Entry[Any], key: str, value: object) -> None:
    """Raise ConfigError for a value that an option cannot take.

    The default gives the kind: a word must be one of the part's `choices`, a whole number stays whole, a truth value true or false,
    None stands for "worked out", and a number lies in the part's `ranges`, from 0 to 1e6 where it gives none.
    """
    name, default = f"{entry.name}.{key}", entry.options[key]
    choices: dict[str, tuple[str, ...]] = entry.traits.get("choices", {})  # type: ignore[assignment]
    if key in choices:
        if value not in choices[key]:
            raise ConfigError(unknown(f"option {name}:", value, choices[key]))
        return
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ConfigError(f"option {name}={value!r} is not allowed; give true or false.")
        return
    if default is None and value is None:
        return
    ranges: dict[str, tuple[float, float]] = entry.traits.get("ranges", {})  # type: ignore[assignment]
    low, high = ranges.get(key, (0, _MOST))
    whole = isinstance(default, int)
    kind = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        number = "a whole number" if whole else "a number"
        raise ConfigError(f"option {name}={value!r} is not allowed; give {number} from {low:g} to {high:g}.")
