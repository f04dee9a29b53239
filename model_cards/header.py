"""The YAML header of a README: read with limits, merged with values of ours, and written so that untouched lines stay."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from hf_sparse.errors import CheckpointError

# What a card takes over from that of the base model.
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_LONGEST = 2**20  # letters; a header is read at some 100,000 letters a second
_MOST_VALUES = 100_000  # aliases of aliases stand for more values than a machine can hold
_DEEPEST = 32
# What PyYAML raises for text that is no YAML, and for scalars that are no value of the type they look like.
_UNREADABLE = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
# Whether a metric of an entry under `results` of a model-index is one that was written by a program and may be renewed.
IsOurs = Callable[[dict[str, Any], Any], bool]


def split(content: str) -> tuple[str, str]:
    """The header's YAML and the text below it, as the Hub cuts them; without a header all is text."""
    match = REGEX_YAML_BLOCK.search(content)
    return (match[2], content[match.end() :]) if match else ("", content)


def read(text: str) -> dict[str, Any]:
    """The values of a header; raises CheckpointError for one that is not valid, no mapping, or beyond all size."""
    if len(text) > _LONGEST:
        raise CheckpointError(
            f"the YAML header of the README has {len(text):,} letters, at most {_LONGEST:,} are read; shorten it."
        )
    try:
        values = yaml.safe_load(text) or {}
    except _UNREADABLE as error:
        raise CheckpointError(
            "the YAML header of the README is not valid; correct it, or move the file away."
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError("the YAML header of the README is no mapping; correct it, or move the file away.")
    _check_size(values)
    return values


def _check_size(values: Any) -> None:
    """Refuse what unfolds into very many values, before anything compares, copies or prints them."""
    waiting, left = [(values, 0)], _MOST_VALUES
    while waiting:
        value, depth = waiting.pop()
        items = [*value, *value.values()] if isinstance(value, dict) else value
        if isinstance(items, list | tuple | set):
            left -= len(items)
            waiting.extend((item, depth + 1) for item in items if left >= 0)
        too_long = (
            isinstance(value, int) and value.bit_length() > 1024
        )  # Python prints no numbers of thousands of digits
        if left < 0 or depth > _DEEPEST or too_long:
            raise CheckpointError(
                f"the YAML header of the README holds more than {_MOST_VALUES:,} values, more than {_DEEPEST} levels or a number "
                "of more than 300 digits; shorten it, or move the file away."
            )


# ---------------------------------------------------------------------------------------------------- merged values


def merged(text: str, values: Mapping[str, Any], newline: str) -> str:
    """A header's YAML with these values in the place of its own: only the lines of changed keys are written anew.

    Comments, order and spelling of the others stay. Raises CheckpointError as `read` does.
    """
    theirs = read(text)
    text = text if text.endswith("\n") or not text else text + newline
    if values == theirs:
        return text
    spliced = _spliced(text, theirs, values, newline)
    try:
        if yaml.safe_load(spliced) == values:
            return spliced
    except _UNREADABLE:
        pass
    return _dump(values, newline)  # an unusual header (flow style, anchors) that cannot be cut by lines


def _spliced(text: str, theirs: Mapping[str, Any], values: Mapping[str, Any], newline: str) -> str:
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    keys = [(key.value, key.start_mark.index) for key, _ in node.value] if node is not None else []
    ends = [start for _, start in keys[1:]] + [len(text)]
    parts, written = [text[: keys[0][1]] if keys else text], set()
    for (key, start), stop in zip(keys, ends):
        if key in values and values[key] == theirs.get(key):
            parts.append(text[start:stop])
        elif key in values and key not in written:  # a key may stand there twice
            parts.append(_dump({key: values[key]}, newline))
            written.add(key)
    parts.extend(_dump({key: value}, newline) for key, value in values.items() if key not in theirs)
    return "".join(parts)


def _dump(values: Mapping[str, Any], newline: str) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, line_break=newline)


def merged_values(
    theirs: dict[str, Any],
    ours: Mapping[str, Any],
    before: Mapping[str, Any],
    groups: Sequence[Sequence[str]],
    is_ours: IsOurs,
) -> dict[str, Any]:
    """A person's values, with ours where there are none and where what stands there is what we wrote `before`.

    The keys of a group belong together: its first one decides whether the group is a person's. A value or tag that was ours and
    is gone was taken away by a person, and stays away.
    """
    result = dict(theirs)
    for group in groups:
        lead = theirs.get(group[0])
        if not _is_empty(lead) and lead not in (before.get(group[0]), ours.get(group[0])):
            continue
        for key in group:
            if key in before and key not in theirs:
                continue
            if _is_empty(theirs.get(key)) or theirs[key] == before.get(key):
                result[key] = ours.get(key)
    result["tags"] = _merged_tags(theirs.get("tags"), listed(ours.get("tags")), before.get("tags"))
    result["model-index"] = _merged_index(theirs.get("model-index"), ours.get("model-index") or [], is_ours)
    return {
        key: value
        for key, value in result.items()
        if (key in theirs and value == theirs[key]) or value not in (None, [])
    }


def _is_empty(value: Any) -> bool:
    return value is None or value == "" or value == []  # but not False, which is how YAML reads `language: no`


def listed(tags: Any) -> list[Any]:
    """Tags as a list; a single one may stand alone."""
    return [tags] if isinstance(tags, str) else tags if isinstance(tags, list) else []


def _merged_tags(theirs: Any, ours: list[Any], before: Any) -> list[Any]:
    tags, old = listed(theirs), listed(before)
    kept = [tag for tag in tags if tag not in old or tag in ours]
    return [*kept, *(tag for tag in ours if tag not in kept and tag not in old)]


def _merged_index(theirs: Any, ours: list[dict[str, Any]], is_ours: IsOurs) -> Any:
    """The results of others, and ours. All stand under the first model's name, because a repository holds one model."""
    if not isinstance(theirs, list) or not all(
        isinstance(model, dict) and isinstance(model.get("results"), list) for model in theirs
    ):
        return theirs or ours
    kept = [{**model, "results": _without_ours(model["results"], is_ours)} for model in theirs]
    kept = [model for model, before in zip(kept, theirs) if model["results"] or not before["results"]]
    if not kept or not ours:
        return kept or ours
    added = [result for model in ours for result in model.get("results") or []]
    return [{**kept[0], "results": kept[0]["results"] + added}, *kept[1:]]


def _without_ours(results: list[Any], is_ours: IsOurs) -> list[Any]:
    left = []
    for result in results:
        metrics = result.get("metrics") if isinstance(result, dict) else None
        others = [metric for metric in metrics if not is_ours(result, metric)] if isinstance(metrics, list) else metrics
        if others == metrics:
            left.append(result)
        elif others:
            left.append({**result, "metrics": others})
    return left
