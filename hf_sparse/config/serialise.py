"""What all configurations share: checks of single values, and the way to JSON or YAML and back."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml

from hf_sparse.errors import CheckpointError, ConfigError, unknown
from hf_sparse.schema import check_plain, parse_json

FILE_NAME = "sparsity_config.json"
# A share for each of some ten thousand experts' matrices fits in; PyYAML needs half a minute for this much.
_LARGEST_JSON, _LARGEST_YAML = 16 * 2**20, 2 * 2**20
_MOST_ALIASES = 20  # each may double what a document holds


def whole(name: str, value: object, least: int, otherwise: str = "") -> None:
    """Refuse what is no whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r} is not allowed; give a whole number of at least {least}{otherwise}.")


def mapping(name: str, value: object) -> dict[str, Any]:
    """A mapping as a dict of its own; anything else is refused."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name}={value!r} is not allowed; give a mapping, such as {{'dass': {{'exponent': 0.5}}}}.")
    return dict(value)


def share(name: str, value: object) -> None:
    """Refuse what does not lie above 0 and below 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ConfigError(f"{name}={value!r} is not allowed; give a share above 0 and below 1, such as 0.5.")


def known_version(name: str, version: object) -> None:
    """Refuse a format that this version of hf_sparse does not read."""
    if version != 1 or isinstance(version, bool):
        raise ConfigError(
            f"{name} version {version!r} is not known to this hf_sparse, which reads version 1; upgrade hf_sparse."
        )


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 2:4 as a number to base 60 (124) and 1e-3 as text; here they are a pattern and a number, as in YAML 1.2."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode and isinstance(value, str) and re.fullmatch(r"\d+:\d+", value):
            return self.DEFAULT_SCALAR_TAG
        return super().resolve(kind, value, implicit)

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._aliases += self.check_event(yaml.AliasEvent)
        if self._aliases > _MOST_ALIASES:
            raise yaml.YAMLError(f"more than {_MOST_ALIASES} aliases")
        return super().compose_node(parent, index)

    _aliases = 0  # met so far in a document


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\.[0-9]+|(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)[eE][-+]?[0-9]+)$"),
    list("-+.0123456789"),
)


def read_value(text: str) -> Any:
    """A value as it would stand in a YAML file: a number, a truth value, a word or a list; ConfigError where it is none."""
    try:
        return yaml.load(text, _Loader)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"the value {text[:80]!r} cannot be read; write a number or a word.") from error


class Serialisable:
    """JSON both ways for a frozen dataclass; unknown keys are refused."""

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain data."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from plain data; raises ConfigError for an unknown key or a newer format version."""
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"a configuration cannot be a {type(values).__name__}; give a mapping of names to values."
            )
        known = {item.name for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for key in values:
            if key not in known:
                raise ConfigError(unknown(f"key of {cls.__name__}", key, known))
        return cls(**values)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `sparsity_config.json` into a folder, made if absent."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / FILE_NAME).write_text(
            json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Self:
        """Read a JSON or YAML file, or `sparsity_config.json` in a folder."""
        return cls.from_dict(read_fields(path))


def read_file(path: str | Path) -> Any:
    """What a JSON or YAML file holds, as plain data; raises ConfigError where it cannot be read or is far too large."""
    file = Path(path)
    is_yaml = file.suffix in {".yaml", ".yml"}
    most = _LARGEST_YAML if is_yaml else _LARGEST_JSON
    try:
        with file.open("rb") as stream:
            data = stream.read(most + 1)
        if len(data) > most:
            raise ConfigError(f"{str(file)!r} is larger than {most} bytes; that is no configuration.")
        values = yaml.load(data.decode("utf-8"), _Loader) if is_yaml else parse_json(data, "the file")
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {str(file)!r}: {error.strerror}.") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{str(file)!r} is not valid JSON or YAML: {error}") from error
    try:
        check_plain(values, f"the configuration {str(file)!r}")
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    return values


def read_fields(path: str | Path) -> dict[str, Any]:
    """The fields in a JSON or YAML file, or in `sparsity_config.json` in a folder, as they stand there."""
    file = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
    values = read_file(file)
    if not isinstance(values, dict):
        raise ConfigError(f"{str(file)!r} holds {type(values).__name__}; a mapping of field names to values is needed.")
    return values
