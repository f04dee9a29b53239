"""What a card says about the trainings of a sparse model: one table of two columns for each, and how to train on."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hf_sparse.recovery import Recovery
from hf_sparse.report import Report
from model_cards import again
from model_cards.escape import code, plain
from model_cards.evaluation import figure
from model_cards.facts import cut, share

YOUR_DATA = "YOUR_TRAINING_DATA"
_LIST_AT_MOST = 20
_NOT_TOLD = "not told"


def check(report: Report) -> None:
    """Raise CheckpointError where a recovery in the report could not be read back."""
    for recovery in report.recoveries:
        Recovery.from_dict(recovery.to_dict())


def tables(report: Report) -> list[list[tuple[str, str]]]:
    """Name and value of what is known of each training; of very many the last ones."""
    return [_rows(recovery, report.versions) for recovery in report.recoveries[-_LIST_AT_MOST:]]


def _rows(recovery: Recovery, versions: Mapping[str, str]) -> list[tuple[str, str]]:
    rows = [
        ("What trained", _words(recovery.method)),
        ("Data", _words(recovery.data)),
        ("Their fingerprint", code(recovery.fingerprint) if recovery.fingerprint else _NOT_TOLD),
        ("Sequences, tokens (without padding)", f"{recovery.sequences:,}, {recovery.tokens:,}"),
        ("Steps, sequences a step", f"{recovery.steps:,}, {recovery.batch_size:,}"),
        ("Learning rate, schedule", f"{_rate(recovery.learning_rate)}, {_words(recovery.schedule)}"),
        ("Optimizer", _words(recovery.optimizer)),
        ("Objective", _words(recovery.loss)),
        ("Precision, processes", f"{_words(recovery.precision)}, {recovery.processes:,}"),
        (f"{plain(recovery.metric or 'Metric')}, before → after", f"{figure(recovery.before)} → {figure(recovery.after)}"),
        ("Zeros in the sites before", share(recovery.zeros_before, recovery.size)),
        ("Zeros in the sites after", share(recovery.zeros_after, recovery.size)),
        ("Zeros lost", f"{recovery.zeros_lost:,}"),
        ("Wall time", f"{recovery.seconds:,.1f} s"),
        ("Callbacks", _joined(recovery.callbacks)),
    ]  # fmt: skip
    if settings := recovery.to_dict()["settings"]:  # as plain data
        rows.append(("Settings", _joined(f"{name}: {_value(value)}" for name, value in settings.items())))
    if recovery.versions and recovery.versions != versions:  # those of the pruning stand at the end of the card
        rows.append(("Versions", _joined(f"{name} {value}" for name, value in recovery.versions.items())))
    return rows


def _words(text: str) -> str:
    return plain(text) or _NOT_TOLD


def _rate(value: float | None) -> str:
    return _NOT_TOLD if value is None else f"{value:g}"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _joined(items: Iterable[str]) -> str:
    return ", ".join(cut([code(item) for item in items])) or "none"


def left_away(report: Report) -> int:
    """How many trainings the card leaves to the report."""
    return max(0, len(report.recoveries) - _LIST_AT_MOST)


def trained_on(report: Report, fingerprints: Sequence[str]) -> bool:
    """Whether one of these fingerprints is that of data that were trained on."""
    return any(recovery.fingerprint and recovery.fingerprint in fingerprints for recovery in report.recoveries)


def train_snippet(report: Report) -> str:
    """The Python that trains the pruned model on and keeps its zeros; the figures of a training stand in its table."""
    name = again.auto_class(report.model_class)
    return "\n".join(
        [
            f"from transformers import {name}, Trainer, TrainingArguments",
            "from trainer_callbacks import KeepMasks",
            "",
            f'model = {name}.from_pretrained("DEST")',
            'arguments = TrainingArguments("OUTPUT")',
            f"trainer = Trainer(model, arguments, train_dataset={YOUR_DATA}, callbacks=[KeepMasks()])",
            "trainer.train()",
            'trainer.save_model("RECOVERED")',
        ]
    )
