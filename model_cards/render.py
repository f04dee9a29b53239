"""Makes a card from a template, and refuses templates whose section could not be renewed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from huggingface_hub import ModelCard, ModelCardData

from hf_sparse.errors import ConfigError
from hf_sparse.text import one_line
from model_cards import parts
from model_cards.merge import remembered_values

_REMARK = "<!-- hf_sparse writes what stands between its two markers anew at every save. Write your own text above or below. -->"
Card = TypeVar("Card", bound=ModelCard)


def render(
    kind: type[Card],
    data: ModelCardData,
    variables: Mapping[str, Any],
    template_path: str | Path | None = None,
    template_str: str | None = None,
) -> Card:
    """A card of this kind from its header and the variables of a template: the one given, or that of the kind.

    Raises: ConfigError where the template cannot be read or rendered, or has no header or not our markers.
    """
    if template_path is not None and template_str is not None:
        raise ConfigError("both template_path and template_str are given; give one of them.")
    name = "the text given" if template_str is not None else repr(str(template_path or kind.default_template_path))
    given = {**variables, "begin": _begin(data), "end": parts.END}
    try:
        path = None if template_path is None else str(template_path)
        card = kind.from_template(data, template_path=path, template_str=template_str, **given)
    except (jinja2.TemplateError, TypeError) as error:
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise ConfigError(
            f"the template of a card, {name}{line}, cannot be rendered by Jinja: {one_line(error)}."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the template of a card, {name}, cannot be read: {one_line(error)}.") from error
    _check(card, data, name)
    if not card.text.endswith("\n"):  # Jinja takes the last line end away
        card.text += "\n"
    return card


def _begin(data: ModelCardData) -> str:
    return "\n".join([parts.BEGIN, parts.header_comment(remembered_values(data.to_dict())), _REMARK])


def _check(card: ModelCard, data: ModelCardData, name: str) -> None:
    if card.data.to_dict() != data.to_dict():
        raise ConfigError(
            f"the template of a card, {name}, does not begin with the header; its first lines must be '---', "
            "'{{ card_data }}' and '---'."
        )
    if parts.count(card.text) != 1:
        raise ConfigError(
            f"the template of a card, {name}, needs '{{{{ begin }}}}' and '{{{{ end }}}}' once, each alone on a line: what stands "
            "between them is what a later save renews."
        )
