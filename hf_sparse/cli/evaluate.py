"""Measure a model: token perplexity (or its own loss where that makes no sense), and tasks of the lm-eval harness."""

import argparse
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_sparse import checkpoint
from hf_sparse.cli.loading import add_loading, load_model, load_processor, model_name
from hf_sparse.cli.recording import check_recordable, record
from hf_sparse.cli.teaching import base_name, is_same
from hf_sparse.errors import ConfigError
from hf_sparse.evaluate import Measurement, as_evaluation, dtype_of, evaluate
from hf_sparse.harness import TaskFigure, as_evaluations, evaluate_tasks
from hf_sparse.prune import check_device
from hf_sparse.text import one_line

_log = logging.getLogger(__name__)
_DEFAULT_TEXT = "stdlib:evaluation"
_COLUMNS = ("task", "version", "metric", "few-shot", "value", "standard error", "samples")


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="path or Hub id of the model, or 'embedded'")
    text = parser.add_argument_group("on a text")
    text.add_argument(
        "--text",
        default=None,
        help=f"a .txt, .jsonl or .npy path, a Hub data set id, or {_DEFAULT_TEXT} (the default, where no tasks are given)",
    )
    text.add_argument("--window", type=int, default=None, help="tokens a window (default 512)")
    text.add_argument(
        "--stride", type=int, default=None, help="tokens between the starts of two windows (default: the window)"
    )
    text.add_argument("--max-windows", type=int, default=None, help="use only the first windows of the text")
    text.add_argument("--allow-same-text", action="store_true", help="allow the text that the model was calibrated on")
    tasks = parser.add_argument_group("on tasks of lm-eval (needs hf-sparse[evaluation])")
    tasks.add_argument(
        "--tasks", default=None, metavar="NAMES", help="names of tasks or groups, or globs, with commas between"
    )
    tasks.add_argument("--num-fewshot", type=int, default=None, help="examples in the prompt (default: the task's own)")
    tasks.add_argument("--limit", type=int, default=None, help="only so many documents of each task, to try things out")
    tasks.add_argument("--batch-size", type=int, default=1, help="sequences at once (default 1)")
    tasks.add_argument(
        "--include-path", default=None, metavar="FOLDER", help="with tasks of your own, whose Python functions are run"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=None,
        help="of the masked positions of a masked model (default 0), and of tasks (default: as lm-eval has it)",
    )
    parser.add_argument(
        "--dense",
        nargs="?",
        const="",
        default=None,
        metavar="MODEL",
        help="measure the dense model as well (default: the one that the report of the sparse model names)",
    )
    parser.add_argument(
        "--record",
        action="store_true",
        help="write the figures into the report and the card of the model's local folder",
    )
    add_loading(parser, device="accelerator to compute on, such as cuda:0")


@dataclass
class Found:
    """What was measured of one model."""

    on_text: Measurement | None = None
    on_tasks: list[TaskFigure] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        text = self.on_text.to_dict() if self.on_text else {}
        return {**text, **({"tasks": [item.to_dict() for item in self.on_tasks]} if self.on_tasks else {})}


def run(arguments: argparse.Namespace) -> None:
    folder = check_recordable(model_name(arguments), arguments.dtype) if arguments.record else None
    model, processor = load_model(arguments), load_processor(arguments)
    base = None if arguments.dense is None else _base(arguments, model)
    sparse = _measured(arguments, model, processor)
    dtype = dtype_of(model)
    del model  # the dense one is as large
    dense = Found() if base is None else _measured(arguments, _load_dense(arguments, base, dtype), processor)
    if folder is not None and not record(folder, _pairs(sparse, dense)):
        _log.warning("the card in %s was not renewed, so only the report has the figures.", folder)
    if arguments.json:
        told = {"model": model_name(arguments), **sparse.to_dict()}
        told |= {"dense": {"model": base, **dense.to_dict()}} if base is not None else {}
        print(json.dumps(told | ({"recorded": str(folder)} if folder is not None else {})))
        return
    for title, found in (("dense", dense), ("sparse", sparse)) if base is not None else (("", sparse),):
        _print(found, title)
    if folder is not None:
        print(f"recorded in {folder}")


def _measured(arguments: argparse.Namespace, model: Any, processor: Any) -> Found:
    if arguments.device is not None:
        check_device(arguments.device)
        model = model.to(arguments.device)
    names = [name.strip() for name in (arguments.tasks or "").split(",") if name.strip()]
    if arguments.tasks is not None and not names:
        raise ConfigError(f"--tasks {arguments.tasks!r} names no task; give at least one, such as arc_easy.")
    found = Found()
    if names:  # first: an unknown task is told before minutes of work
        found.on_tasks = evaluate_tasks(
            model, processor, names, num_fewshot=arguments.num_fewshot, limit=arguments.limit, batch_size=arguments.batch_size,
            include_path=arguments.include_path, seed=arguments.seed,
        )  # fmt: skip
    if arguments.text is not None or not names:
        found.on_text = evaluate(
            model, arguments.text or _DEFAULT_TEXT, tokenizer=processor, window=arguments.window, stride=arguments.stride,
            max_windows=arguments.max_windows, seed=arguments.seed or 0, same_text_allowed=arguments.allow_same_text,
        )  # fmt: skip
    return found


def _pairs(sparse: Found, dense: Found) -> list[dict[str, Any]]:
    """As a report keeps them."""
    on_text = [as_evaluation(sparse.on_text, dense.on_text)] if sparse.on_text else []
    return [*on_text, *as_evaluations(sparse.on_tasks, dense.on_tasks)]


# ---------------------------------------------------------------------------------------------------- the dense model


def _base(arguments: argparse.Namespace, model: Any) -> str:
    """Path or Hub id of the dense model: the one that was typed, or else the one in the report."""
    from hf_sparse import embedded

    typed = str(embedded.model_path()) if arguments.dense == embedded.NAME else arguments.dense
    name = typed or base_name(checkpoint.report(model))
    if not name:
        raise ConfigError(f"no report beside {model_name(arguments)!r} names the dense model; name it: --dense MODEL.")
    if is_same(name, model_name(arguments)):
        raise ConfigError(
            f"the dense model {name!r} is the measured model itself; name the one it was made from: --dense MODEL."
        )
    return name


def _load_dense(arguments: argparse.Namespace, name: str, dtype: str) -> Any:
    """The dense model in the number format of the sparse one.

    Revision and remote code were allowed for the model that was named: code only runs for a dense model that was typed, too.
    """
    trusted = arguments.trust_remote_code and bool(arguments.dense)
    changed = {"model": name, "revision": None, "dtype": dtype, "trust_remote_code": trusted}
    try:
        model = load_model(argparse.Namespace(**{**vars(arguments), **changed}))
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"the dense model {name!r} cannot be loaded ({first}); name it: --dense MODEL.") from error
    if checkpoint.report(model) is not None:
        raise ConfigError(f"the dense model {name!r} is sparse itself; name the one it was made from: --dense MODEL.")
    return model


# ---------------------------------------------------------------------------------------------------- for people


def _print(found: Found, title: str) -> None:
    start = f"{title}: " if title else ""
    if found.on_text is not None:
        print(start + _sentence(found.on_text))
    if found.on_tasks:
        print(*([f"{title}:"] if title else []), *_table(found.on_tasks), sep="\n")


def _sentence(found: Measurement) -> str:
    window = "" if found.window is None else f", windows of {found.window} tokens"
    stride = f", stride {found.stride}" if found.window and found.stride else ""
    return (
        f"{found.metric} {found.value:.4f} on {one_line(found.text)} "
        f"({found.tokens} predicted tokens{window}{stride}, fingerprint {found.fingerprint})"
    )


def _table(figures: Sequence[TaskFigure]) -> list[str]:
    rows = [_COLUMNS, *map(_cells, figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    harness = {item.harness for item in figures}
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return [*lines, f"measured with {', '.join(sorted(harness))}"]


def _cells(item: TaskFigure) -> tuple[str, ...]:
    metric = item.metric if item.filter == "none" else f"{item.metric} ({item.filter})"
    value = f"{item.value:.4f}" if math.isfinite(item.value) else "not finite"
    error = "not told" if item.standard_error is None else f"{item.standard_error:.4f}"
    shots = "not told" if item.few_shot is None else str(item.few_shot)
    samples = str(item.samples) + ("" if item.limit is None else " (limited)")
    return one_line(item.task), one_line(item.task_version), one_line(metric), shots, value, error, samples
