"""Gives lm-eval the data that lie beside its tasks, whatever folder it is started in."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset


def _rows(name: str) -> list[dict[str, Any]]:
    lines = Path(__file__).with_name(name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def questions(**_: Any) -> dict[str, Dataset]:
    rows = _rows("questions.jsonl")
    return {"train": Dataset.from_list(rows[:3]), "test": Dataset.from_list(rows[3:])}


def texts(**_: Any) -> dict[str, Dataset]:
    return {"test": Dataset.from_list(_rows("texts.jsonl"))}
