"""List the metrics, patterns, allocations and updates, with their options and sources."""

import argparse
import json
from typing import Any

import hf_sparse.config  # noqa: F401  (fills the registries)
from hf_sparse.registry import ALLOCATIONS, METRICS, UPDATES, Entry

_PATTERNS = {
    "N:M": "N of every M consecutive weights stay, along the input or the output axis, such as 2:4 or 4:8",
    "unstructured": "the lowest scores of each row, each column or the whole site go; needs sparsity",
}


def add(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


def _needs_calibration(entry: Entry[Any]) -> bool:
    """Whether it looks at activations; an allocation that holds samples out searches on them."""
    looks = entry.needs or entry.consumer_needs or entry.traits.get("second_stream")
    return bool(looks or "held_out" in entry.options)


def _entries() -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {
        kind: [
            {"name": entry.name, "summary": entry.summary, "source": entry.source, "options": entry.options, "needs_calibration": _needs_calibration(entry)}
            for entry in sorted(registry, key=lambda entry: entry.name)
        ]
        for kind, registry in {"metrics": METRICS, "allocations": ALLOCATIONS, "updates": UPDATES}.items()
    }  # fmt: skip
    return {**found, "patterns": [{"name": name, "summary": summary} for name, summary in _PATTERNS.items()]}


def run(arguments: argparse.Namespace) -> None:
    entries = _entries()
    if arguments.json:
        print(json.dumps(entries))
        return
    for kind, members in entries.items():
        print(f"{kind}:")
        for member in members:
            options = ", ".join(f"{key}={value}" for key, value in member.get("options", {}).items())
            print(f"  {member['name']:<14} {member['summary']}" + (f" [{options}]" if options else ""))
            if member.get("source", "this project") != "this project":
                print(
                    f"  {'':<14} {member['source']}" + ("" if member["needs_calibration"] else "; needs no calibration")
                )
