"""Puts our section and our header values into a README that a person may have edited, and leaves the rest as it is."""

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from hf_sparse.errors import CheckpointError
from model_cards.escape import json_text
from model_cards.evaluation import TOOL

BEGIN, END = "<!-- hf_sparse:begin -->", "<!-- hf_sparse:end -->"
_HEADER = "<!-- hf_sparse:header "
_SECTION = re.compile(rf"^{BEGIN}[ \t]*\r?\n(?:(?!^{BEGIN}).)*?^{END}[ \t]*(?=\r?$)", re.MULTILINE | re.DOTALL)
# Values that belong together; the first of a group decides whether the group is a person's or ours.
_GROUPS = (
    ("base_model", "base_model_relation"),
    ("library_name",),
    ("pipeline_tag",),
    ("license", "license_name", "license_link"),
    ("language",),
)


def section_of(text: str) -> str | None:
    """The part between our markers, with them; None where there is none."""
    match = _SECTION.search(text)
    return match[0] if match else None


def header_comment(header: Mapping[str, Any]) -> str:
    """A comment that remembers what we wrote into the header, so that later a person's changes can be told from ours."""
    ours = {key: header[key] for group in (*_GROUPS, ("tags",)) for key in group if key in header}
    return f"{_HEADER}{json_text(ours, indent=None)} -->"


def _remembered(section: str | None) -> dict[str, Any]:
    start = (section or "").find(_HEADER)
    if section is None or start < 0:
        return {}
    try:
        found = json.loads(section[start + len(_HEADER) :].partition(" -->")[0])
    except ValueError:  # edited by hand: then every value counts as the person's
        return {}
    return found if isinstance(found, dict) else {}


def merge(existing: str, ours: str) -> str:
    """`existing` with our section put in or renewed, and with our header values where no person set other ones.

    Raises: CheckpointError where the header of `existing` is not valid YAML.
    """
    if not existing.strip():
        return ours
    newline = "\r\n" if "\r\n" in existing else "\n"
    their_header, body = _split(existing)
    our_header, our_body = _split(ours)
    section = (section_of(our_body) or our_body).replace("\r\n", "\n").replace("\n", newline)
    header = _merged_header(their_header, yaml.safe_load(our_header) or {}, _remembered(section_of(body)), newline)
    return f"---{newline}{header}---{newline}{_merged_body(body, section, newline)}"


def _split(content: str) -> tuple[str, str]:
    match = REGEX_YAML_BLOCK.search(content)
    return (match[2], content[match.end() :]) if match else ("", content)


def _merged_body(body: str, section: str, newline: str) -> str:
    if section_of(body) is None:
        return f"{body.rstrip()}{2 * newline}{section}{newline}" if body.strip() else f"{newline}{section}{newline}"
    first = True

    def replace(_: re.Match[str]) -> str:
        nonlocal first
        text, first = (section if first else ""), False
        return text

    return _SECTION.sub(replace, body)


def _merged_header(text: str, ours: dict[str, Any], before: dict[str, Any], newline: str) -> str:
    theirs = _loaded(text)
    values = _merged_values(theirs, ours, before)
    text = text if text.endswith("\n") or not text else text + newline
    if values == theirs:
        return text
    # Only the lines of changed keys are written anew: comments, order and spelling of the others stay.
    spliced = _spliced(text, theirs, values, newline)
    try:
        if yaml.safe_load(spliced) == values:
            return spliced
    except yaml.YAMLError:
        pass
    return _dump(values, newline)  # an unusual header (flow style, anchors) that cannot be cut by lines


def _loaded(text: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise CheckpointError(
            "the YAML header of the README is not valid; correct it, or move the file away."
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError("the YAML header of the README is no mapping; correct it, or move the file away.")
    return values


def _spliced(text: str, theirs: dict[str, Any], values: dict[str, Any], newline: str) -> str:
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    keys = [(key.value, key.start_mark.index) for key, _ in node.value] if node is not None else []
    ends = [start for _, start in keys[1:]] + [len(text)]
    parts = [text[: keys[0][1]] if keys else text]
    for (key, start), end in zip(keys, ends):
        if key in values and values[key] == theirs.get(key):
            parts.append(text[start:end])
        elif key in values:
            parts.append(_dump({key: values[key]}, newline))
    parts.extend(_dump({key: value}, newline) for key, value in values.items() if key not in theirs)
    return "".join(parts)


def _dump(values: dict[str, Any], newline: str) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, line_break=newline)


def _merged_values(theirs: dict[str, Any], ours: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    result = dict(theirs)
    for group in _GROUPS:
        lead = theirs.get(group[0])
        if not _is_empty(lead) and lead not in (before.get(group[0]), ours.get(group[0])):
            continue  # a person's choice
        for key in group:
            if key in before and key not in theirs:
                continue  # a person took it away
            if _is_empty(theirs.get(key)) or theirs[key] == before.get(key):
                result[key] = ours.get(key)
    result["tags"] = _merged_tags(theirs.get("tags"), ours.get("tags", []), before.get("tags"))
    result["model-index"] = _merged_index(theirs.get("model-index"), ours.get("model-index", []))
    return {
        key: value
        for key, value in result.items()
        if (key in theirs and value == theirs[key]) or value not in (None, [])
    }


def _is_empty(value: Any) -> bool:
    return value is None or value == "" or value == []  # but not False, which is how YAML reads `language: no`


def _merged_tags(theirs: Any, ours: list[str], before: Any) -> list[Any]:
    tags = [theirs] if isinstance(theirs, str) else theirs if isinstance(theirs, list) else []
    old = before if isinstance(before, list) else []
    kept = [tag for tag in tags if tag not in old or tag in ours]
    # What we wrote before and is gone was taken away by a person.
    return [*kept, *(tag for tag in ours if tag not in kept and tag not in old)]


def _merged_index(theirs: Any, ours: list[dict[str, Any]]) -> Any:
    """The results of others, and ours. All stand under the first model's name, because a repository holds one model."""
    if not isinstance(theirs, list) or not all(
        isinstance(m, dict) and isinstance(m.get("results"), list) for m in theirs
    ):
        return theirs or ours
    kept = [{**model, "results": _without_ours(model["results"])} for model in theirs]
    kept = [model for model, before in zip(kept, theirs) if model["results"] or not before["results"]]
    if not kept or not ours:
        return kept or ours
    added = [result for model in ours for result in model["results"]]
    return [{**kept[0], "results": kept[0]["results"] + added}, *kept[1:]]


def _without_ours(results: list[Any]) -> list[Any]:
    left = []
    for result in results:
        metrics = result.get("metrics") if isinstance(result, dict) else None
        others = [metric for metric in metrics if not _is_ours(metric)] if isinstance(metrics, list) else metrics
        if others == metrics:
            left.append(result)
        elif others:
            left.append({**result, "metrics": others})
    return left


def _is_ours(metric: Any) -> bool:
    arguments = metric.get("args") if isinstance(metric, dict) else None
    return isinstance(arguments, dict) and arguments.get("tool") == TOOL
