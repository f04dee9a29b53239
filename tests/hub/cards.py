"""What the Hub demands of the YAML header of a model card."""

import re
from typing import Any

import yaml

_KNOWN = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0
openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
other
"""
LICENSES = frozenset(_KNOWN.split())
RELATIONS = ("adapter", "merge", "quantized", "finetune")
METRIC = {"type": str, "value": object}


def header_of(card: str) -> dict[str, Any]:
    """The header as data; ValueError with the Hub's words where it is none."""
    lines = card.splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    if "---" not in (line.rstrip() for line in lines[1:]):
        raise ValueError("the YAML metadata block is not closed")
    try:
        values = yaml.safe_load("\n".join(lines[1 : 1 + [line.rstrip() for line in lines[1:]].index("---")]))
    except yaml.YAMLError as error:
        raise ValueError(f"YAML parse error: {error}") from error
    if values is not None and not isinstance(values, dict):
        raise ValueError('"yaml metadata" must be of type object')
    return values or {}


def check(card: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about a card."""
    try:
        values = header_of(card)
    except ValueError as error:
        return [str(error)], []
    if not values:
        return [], ["empty or missing yaml metadata in repo card"]
    return [*_wrong_values(values), *_wrong_results(values.get("model-index"))], []


def _texts(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _wrong_values(values: dict[str, Any]) -> list[str]:
    found = []
    licenses = values.get("license", [])
    if not _texts(licenses) or not LICENSES.issuperset([licenses] if isinstance(licenses, str) else licenses):
        found.append(f'"license" must be one of [{", ".join(sorted(LICENSES))}]')
    if "tags" in values and not (isinstance(values["tags"], list) and _texts(values["tags"])):
        found.append('"tags" must be an array')
    found += [
        f'"{name}" must be a string'
        for name in ("library_name", "pipeline_tag")
        if not isinstance(values.get(name, ""), str)
    ]
    for name in ("base_model", "datasets", "language", "metrics"):
        if not _texts(values.get(name, [])):
            found.append(f'"{name}" must be a string or an array of strings')
    bases = values.get("base_model", [])
    for base in [bases] if isinstance(bases, str) else bases if _texts(bases) else []:
        if not base or base.startswith(("/", ".", "~")) or base.count("/") > 1 or " " in base:
            found.append(f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.')
    if values.get("base_model_relation", RELATIONS[0]) not in RELATIONS:
        found.append(f'"base_model_relation" must be one of [{", ".join(RELATIONS)}]')
    return found


def _wrong_results(models: Any) -> list[str]:
    if models is None:
        return []
    if not isinstance(models, list):
        return ['"model-index" must be an array']
    found = []
    for at, model in enumerate(models):
        place = f"model-index[{at}]"
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            found.append(f'"{place}.name" is required')
            continue
        for number, result in enumerate(model.get("results") or []):
            found += [f'"{place}.results[{number}].{what}" is required' for what in _missing(result)]
    return found


def _missing(result: Any) -> list[str]:
    """What each result must say: the task, the data set, and metrics with a value."""
    if not isinstance(result, dict):
        return ["task"]
    wanted = [("task", "type"), ("dataset", "type"), ("dataset", "name")]
    found = [f"{part}.{name}" for part, name in wanted if not isinstance((result.get(part) or {}).get(name), str)]
    if not re.fullmatch(r"(?:[\w-]+/)?[\w.-]+", str((result.get("dataset") or {}).get("type")), re.ASCII):
        found.append("dataset.type, of the pattern of a data set's name,")
    metrics = result.get("metrics")
    if not isinstance(metrics, list) or not metrics:
        return [*found, "metrics"]
    for at, metric in enumerate(metrics):
        found += [
            f"metrics[{at}].{name}"
            for name, kind in METRIC.items()
            if not isinstance(metric.get(name), kind) or metric[name] is None
        ]
    return found
