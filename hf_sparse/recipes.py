"""Recipes for a comparison: named configurations, each checked before any of them runs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_sparse.config import SparsityConfig
from hf_sparse.config.serialise import read_file
from hf_sparse.errors import CalibrationError, ConfigError, HfSparseError, unknown

# From the plainest to the best, for half of the weights.
DEFAULT: tuple[dict[str, Any], ...] = (
    {"name": "magnitude", "metric": "magnitude"},
    {"name": "wanda", "metric": "wanda"},
    {"name": "dass", "metric": "dass"},
    {"name": "sparsegpt", "metric": "sparsegpt", "update": "sparsegpt"},
    {"name": "wanda + admm", "metric": "wanda", "update": "admm"},
    {"name": "wanda + dense stream, admm", "metric": "wanda", "update": ["dense_stream", "admm"]},
    {"name": "wanda + dense stream, admm, reconstruct", "metric": "wanda", "update": ["dense_stream", "admm", "reconstruct"]},
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """One way to prune, under the name that the table gives it."""

    name: str
    config: SparsityConfig

    def with_seed(self, seed: int) -> "Recipe":
        return replace(self, config=replace(self.config, seed=seed))


def read_recipes(path: str | Path) -> list[Any]:
    """The list in a JSON or YAML file; "default" is the built-in one.

    Raises: ConfigError where the file cannot be read or holds no list.
    """
    if str(path) == "default":
        return [dict(fields) for fields in DEFAULT]
    found = read_file(path)
    if not isinstance(found, list):
        raise ConfigError(
            f"{str(path)!r} holds {_a(found)}; recipes are a list of mappings, such as [{{'name': 'wanda', 'metric': 'wanda'}}]."
        )
    return found


def make_recipes(given: Iterable[Any], defaults: Mapping[str, Any] | None = None) -> list[Recipe]:
    """Recipes from mappings (fields of SparsityConfig and a "name"), configurations or recipes; `defaults` fill what a mapping leaves out.

    A default calibration goes only to those that look at activations, so that the others are measured as they would be run.
    Raises: ConfigError that tells which one is wrong.
    """
    recipes: list[Recipe] = []
    for number, one in enumerate(given, start=1):
        named = one.get("name") if isinstance(one, Mapping) else getattr(one, "name", None)
        try:
            recipe = _recipe(one, defaults or {})
        except (HfSparseError, TypeError) as error:
            raise ConfigError(f"recipe {number}{'' if named is None else f' ({named!r})'}: {error}") from error
        earlier = next((at for at, other in enumerate(recipes, start=1) if other.name == recipe.name), None)
        if earlier is not None:
            raise ConfigError(f"recipes {earlier} and {number} have the same name {recipe.name!r}; name them apart.")
        recipes.append(recipe)
    if not recipes:
        raise ConfigError("the list of recipes is empty; give at least one.")
    return recipes


def _recipe(given: Any, defaults: Mapping[str, Any]) -> Recipe:
    if isinstance(given, Recipe):
        given.config.check_calibration()
        return given
    if isinstance(given, SparsityConfig):
        given.check_calibration()
        return Recipe(_name_of(given), given)
    if not isinstance(given, Mapping):
        raise ConfigError(f"it is {_a(given)}; give a mapping of names to values.")
    name = given.get("name")
    if "name" in given and (not isinstance(name, str) or not name.strip() or not name.isprintable()):
        raise ConfigError("its name has to be one line of text.")
    fields = {key: value for key, value in given.items() if key != "name"}
    config = SparsityConfig.from_dict({**_without_calibration(defaults), **fields})
    try:
        config.check_calibration()
    except CalibrationError:
        if defaults.get("calibration") is None:
            raise
        config = SparsityConfig.from_dict({**defaults, **fields})
        config.check_calibration()
    return Recipe(name or _name_of(config), config)


def _without_calibration(defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in defaults.items() if key != "calibration"}


def _name_of(config: SparsityConfig) -> str:
    """What sets a configuration apart, in a few words."""
    share = f" {config.sparsity:g}" if config.sparsity is not None else ""
    allocation = config.allocation if isinstance(config.allocation, str) else "own allocation"
    updates = [name for name in config.update if name != "none"]
    words = [f"{config.metric} {config.pattern}{share}", *([allocation] if allocation != "uniform" else [])]
    return " + ".join([*words, *(["permute"] if config.permute else []), *([", ".join(updates)] if updates else [])])


def reference_of(recipes: Sequence[Recipe], name: str | None) -> Recipe:
    """The recipe that the others are measured against: the named one, else the first.

    Raises: ConfigError for a name that none of them has.
    """
    if name is None:
        return recipes[0]
    found = next((recipe for recipe in recipes if recipe.name == name), None)
    if found is None:
        raise ConfigError(unknown("reference", name, [recipe.name for recipe in recipes]))
    return found


def _a(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
