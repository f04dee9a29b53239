"""Puts our section, or the Trainer's text, into a README that a person may have edited, and leaves the rest as it is."""

from collections.abc import Mapping
from typing import Any

from hf_sparse.errors import CheckpointError
from model_cards import header, parts
from model_cards.evaluation import TOOL
from model_cards.parts import TRAINER

# Values that belong together; the first of a group decides whether the group is a person's or ours.
_GROUPS = (
    ("base_model", "base_model_relation"),
    ("library_name",),
    ("pipeline_tag",),
    ("license", "license_name", "license_link"),
    ("language",),
)
_MARK = "\ufeff"  # some editors begin a file with a byte order mark
_ANY_MARKER = "<!-- hf_sparse:"


def remembered_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those values of a header of ours that the comment in our section remembers."""
    return {key: values[key] for group in (*_GROUPS, ("tags",)) for key in group if key in values}


def merge(
    existing: str,
    ours: str,
    *,
    generated: Mapping[str, Any] | None = None,
    unwanted: Mapping[str, Any] | None = None,
) -> str:
    """`existing` with our section put in or renewed, and with our header values where no person set other ones.

    `ours` is a card with our section. Header values that another program has written: ours take the place of those in
    `generated`, those in `unwanted` go even where ours have none.

    Raises: CheckpointError where the header of `existing` is not valid YAML, or `ours` has no section.
    """
    section = parts.content_of(ours)
    if section is None:
        raise CheckpointError(f"the card has no section between {parts.BEGIN} and {parts.END}; make it anew.")
    mark, existing = _cut_mark(existing)
    if not existing.strip():
        return mark + ours
    theirs, new = header.read(header.split(existing)[0]), header.read(header.split(ours)[0])
    before = parts.remembered(parts.part_of(existing))
    if new.get("base_model") == before.get("base_model"):
        # The base's card may be out of reach today; what was inherited from it before is still true.
        new |= {
            key: before[key]
            for key in header.INHERITED
            if before.get(key) == theirs.get(key) is not None and not new.get(key)
        }
    given = {key: value for key, value in (generated or {}).items() if new.get(key)} | dict(unwanted or {})
    foreign = {key: value for key, value in given.items() if key != "tags" and theirs.get(key) == value}
    tags = [*header.listed(before.get("tags")), *header.listed((unwanted or {}).get("tags"))]
    values = header.merged_values(theirs, new, {**before, **foreign, "tags": tags}, _GROUPS, _is_ours)
    return mark + _joined(existing, "", section, values)


def merge_trainer(existing: str, generated: str) -> str:
    """The README that a Trainer's push leaves, from the one in the repository and what `Trainer.create_model_card` has written.

    An empty one becomes the Trainer's text, in a part of its own. One with such a part has it renewed: text around it stays, and
    so do header values that a person has set. One without is a person's, or the base model's card: it stays as it is, to the
    letter, and the Trainer's text is left away.

    Raises: CheckpointError where one of the headers is not valid YAML.
    """
    mark, text = _cut_mark(existing)
    part = parts.part_of(text, TRAINER)
    if text.strip() and part is None:
        return existing
    our_header, our_body = header.split(_cut_mark(generated)[1])
    ours = header.read(our_header)
    # A name that holds a line of ours must not end the part.
    content = f"{parts.header_comment(ours, TRAINER)}\n{our_body.replace(_ANY_MARKER, '<!-- hf_sparse ').strip()}"
    if part is None:
        return f"{mark}---\n{our_header}\n---\n{parts.replace_part('', TRAINER, content)}"
    theirs = header.read(header.split(text)[0])
    before = parts.remembered(part, TRAINER)
    groups = [(key,) for key in {**before, **ours} if key not in ("tags", "model-index")]

    def is_trainers(result: dict[str, Any], metric: Any) -> bool:
        return any(_holds(old, result, metric) for old in _results(before.get("model-index")))

    values = header.merged_values(theirs, ours, before, groups, is_trainers)
    return mark + _joined(text, TRAINER, content, values)


def _cut_mark(text: str) -> tuple[str, str]:
    return (_MARK, text[1:]) if text.startswith(_MARK) else ("", text)


def _joined(existing: str, name: str, content: str, values: Mapping[str, Any]) -> str:
    """A README with other header values and another content of one part, its line ends kept."""
    newline = "\r\n" if "\r\n" in existing else "\n"
    text, body = header.split(existing)
    new_header = header.merged(text, values, newline)
    return f"---{newline}{new_header or newline}---{newline}{parts.replace_part(body, name, content, newline)}"


def _is_ours(_: dict[str, Any], metric: Any) -> bool:
    arguments = metric.get("args") if isinstance(metric, dict) else None
    return isinstance(arguments, dict) and arguments.get("tool") == TOOL


def _results(index: Any) -> list[dict[str, Any]]:
    models = [model for model in index if isinstance(model, dict)] if isinstance(index, list) else []
    lists = [model["results"] for model in models if isinstance(model.get("results"), list)]
    return [result for results in lists for result in results if isinstance(result, dict)]


def _holds(old: dict[str, Any], result: dict[str, Any], metric: Any) -> bool:
    same = all(old.get(key) == result.get(key) for key in ("task", "dataset"))
    metrics = old.get("metrics")
    return same and isinstance(metrics, list) and metric in metrics
