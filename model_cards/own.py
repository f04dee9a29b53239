"""What of a README is a person's: neither our section, nor the Trainer's text, nor what was written into the header for them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from model_cards import header, parts
from model_cards.evaluation import TOOL
from model_cards.parts import PREDICTORS, TRAINER

# The headings of our own cards, as the templates and `CardSource.title` give them.
_TITLE = re.compile(r"# (Adapter on .+|.+, (pruned|.+ sparse)|.+ with contextual predictors)")


@dataclass(frozen=True)
class OwnText:
    """A person's text; false where there is none."""

    lines: tuple[str, ...] = ()  # without white space at the ends and without empty ones
    header: Mapping[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.lines or self.header)

    def is_in(self, other: "OwnText") -> bool:
        """Whether the other text has all of this one: its lines in this order, its header values as they are."""
        left = iter(other.lines)
        return all(line in left for line in self.lines) and all(
            key in other.header and other.header[key] == value for key, value in self.header.items()
        )


def own_text(readme: str | None) -> OwnText:
    """What a person wrote into a README; a heading that we generated and nothing beside it is not a person's.

    Raises: CheckpointError where the header is not valid YAML.
    """
    yaml, body = header.split((readme or "").removeprefix("\ufeff"))
    lines = _lines(body)
    return OwnText(() if _is_title(lines) else lines, _own_values(header.read(yaml), body))


def with_title_of(card: str, readme: str) -> str:
    """A README with the heading of a card, where it has no text around its parts but a heading that we generated."""
    old, new = _lines(header.split(readme)[1]), _lines(header.split(card)[1])
    if not (_is_title(old) and _is_title(new)):
        return readme
    return re.sub(rf"^{re.escape(old[0])}[ \t]*(?=\r?$)", lambda _: new[0], readme, count=1, flags=re.MULTILINE)


def with_place_for_trainer(readme: str) -> str:
    """A README without text of a person's with an empty part for the Trainer's text, in the place of our heading."""
    yaml, body = header.split(readme)
    section = parts.part_of(body)
    if section is None:
        return ""
    return f"---\n{yaml}\n---\n{parts.replace_part('', TRAINER, '')}\n{section}\n"


def _is_title(lines: tuple[str, ...]) -> bool:
    return len(lines) == 1 and _TITLE.fullmatch(lines[0]) is not None


def _lines(body: str) -> tuple[str, ...]:
    for name in ("", PREDICTORS, TRAINER):
        while (part := parts.part_of(body, name)) is not None:
            body = body.replace(part, "", 1)
    return tuple(line.strip() for line in body.splitlines() if line.strip())


def _own_values(values: dict[str, Any], body: str) -> dict[str, Any]:
    """The header values that no part remembers to have written."""
    ours = parts.remembered(parts.part_of(body))
    trainers = parts.remembered(parts.part_of(body, TRAINER), TRAINER)
    for before in (ours, trainers):
        keys = [(key,) for key in before if key not in ("tags", "model-index")]
        values = header.merged_values(values, {}, {key: before[key] for key in before if key in values}, keys, _is_ours)
    if values.get("model-index") and _without_names(values["model-index"]) == _without_names(
        trainers.get("model-index")
    ):
        del values["model-index"]
    return values


def _is_ours(_: dict[str, Any], metric: Any) -> bool:
    arguments = metric.get("args") if isinstance(metric, dict) else None
    return isinstance(arguments, dict) and arguments.get("tool") == TOOL


def _without_names(index: Any) -> list[Any]:
    models = index if isinstance(index, list) else []
    return [model.get("results") for model in models if isinstance(model, dict)]
