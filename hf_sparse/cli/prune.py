"""Prune a model and write it, with its report and card, to a folder.

Started by torchrun or `accelerate launch -m hf_sparse prune ...`, all processes share the work and the first one writes; one that is
silent for HF_SPARSE_RANKS_TIMEOUT seconds (300) ends them all.
"""

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_sparse import ranks
from hf_sparse.cli.loading import add_loading, check_dtype, hub_options, load_model, load_processor, model_name
from hf_sparse.config import SparsityConfig
from hf_sparse.config.serialise import mapping, read_fields, read_value
from hf_sparse.destination import check_destination, check_place, complete_folder
from hf_sparse.errors import ConfigError
from hf_sparse.evaluate import as_evaluation, evaluate
from hf_sparse.forecast import forecast
from hf_sparse.prune import prune_
from hf_sparse.report import Report
from hf_sparse.spill import HIDDEN_MEMORY
from hf_sparse.storage import FORMATS


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="path or Hub id of the model, or 'embedded'")
    parser.add_argument("destination", type=Path, help="folder to write; must be empty or absent")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a destination that is not empty, once the new one is complete"
    )
    parser.add_argument(
        "--config", default=None, metavar="FILE", help="JSON or YAML file with the fields of SparsityConfig"
    )
    parser.add_argument("--sparse-format", choices=FORMATS, default=None, help="bitmask writes compressed weights")
    parser.add_argument(
        "--dry-run", action="store_true",
        help="foretell memory, disk and time by phase, and refuse what cannot fit; the weights are not read and nothing is written",
    )  # fmt: skip
    _add_streaming(parser)
    fields = parser.add_argument_group("fields of SparsityConfig (they override the file)")
    for name, kind in {"pattern": str, "sparsity": float, "axis": str, "metric": str, "allocation": str, "calibration": str,
                       "num-samples": int, "sequence-length": int, "batch-size": str, "seed": int}.items():  # fmt: skip
        fields.add_argument(f"--{name}", type=kind, default=None)
    fields.add_argument(
        "--targets", nargs="+", default=None, metavar="GLOB", help="all, mlp, attention or globs over site names"
    )
    fields.add_argument("--exclude", nargs="+", default=None, metavar="GLOB")
    fields.add_argument(
        "--update",
        nargs="+",
        default=None,
        metavar="NAME",
        help="one or several, such as dense_stream admm reconstruct",
    )
    fields.add_argument(
        "--permute",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="reorder channels so that N:M groups lose less",
    )
    fields.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME.KEY=VALUE",
        help="such as dass.exponent=0.5; may be repeated",
    )
    measure = parser.add_argument_group("measuring")
    measure.add_argument(
        "--evaluate",
        default=None,
        metavar="TEXT",
        help="measure the dense and the sparse model on this text (path, Hub id or stdlib:evaluation)",
    )
    measure.add_argument("--window", type=int, default=None, help="tokens a window (default 512)")
    measure.add_argument("--max-windows", type=int, default=None, help="use only the first windows of the text")
    measure.add_argument(
        "--allow-same-text", action="store_true", help="allow to evaluate on the text that was calibrated on"
    )
    add_loading(parser)


def _add_streaming(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("from disk to disk")
    group.add_argument(
        "--stream", action="store_true",
        help="one block at a time is in memory; the same command goes on where an interrupted one was. Without --evaluate, which needs the "
        "whole model: hf-sparse evaluate measures the result",
    )  # fmt: skip
    group.add_argument("--restart", action="store_true", help="forget what an interrupted --stream has done")
    group.add_argument(
        "--hidden-memory", default=None, metavar="SIZE",
        help=f"what hidden states may take in memory with --stream; beyond it they are in files (default {HIDDEN_MEMORY})",
    )  # fmt: skip


def options(words: list[str]) -> dict[str, dict[str, Any]]:
    """`["dass.exponent=0.5"]` as `{"dass": {"exponent": 0.5}}`."""
    found: dict[str, dict[str, Any]] = {}
    for word in words:
        path, equals, value = word.partition("=")
        name, dot, key = path.partition(".")
        if not (equals and dot and name and key):
            raise ConfigError(f"option {word!r} cannot be read; write NAME.KEY=VALUE, such as dass.exponent=0.5.")
        try:
            found.setdefault(name, {})[key] = read_value(value)
        except ConfigError as error:
            raise ConfigError(f"option {path!r}: {error}") from error
    return found


def build_config(arguments: argparse.Namespace) -> SparsityConfig:
    """The file's fields with the command line's on top."""
    values = read_fields(arguments.config) if arguments.config else {}
    names = (
        "pattern",
        "sparsity",
        "axis",
        "metric",
        "allocation",
        "update",
        "permute",
        "calibration",
        "num_samples",
        "sequence_length",
        "seed",
        "exclude",
        "device",
    )
    values |= {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.targets is not None:
        one = arguments.targets[0] if len(arguments.targets) == 1 else None
        values["targets"] = one if one in ("all", "mlp", "attention") else arguments.targets
    if arguments.batch_size is not None:
        values["batch_size"] = (
            int(arguments.batch_size) if re.fullmatch(r"[0-9]+", arguments.batch_size) else arguments.batch_size
        )
    if arguments.option:
        merged = mapping("options", values.get("options", {}))
        for name, given in options(arguments.option).items():
            merged[name] = {**mapping(f"options[{name!r}]", merged.get(name, {})), **given}
        values["options"] = merged
    return SparsityConfig.from_dict(values)


def run(arguments: argparse.Namespace) -> None:
    with ranks.together():
        _run(arguments)


def _run(arguments: argparse.Namespace) -> None:
    """What all processes do; those other than the first only prune, and wait while it measures, writes and prints."""
    config = build_config(arguments)
    sources = [model_name(arguments), arguments.config, config.calibration, arguments.evaluate]
    if ranks.is_first():
        given = [source for source in sources if source and isinstance(source, str | Path)]
        if arguments.stream:  # an interrupted one may have written all but its last words
            check_place(arguments.destination, given)
        else:
            check_destination(arguments.destination, arguments.overwrite, given)
    if arguments.evaluate and arguments.evaluate == config.calibration and not arguments.allow_same_text:
        raise ConfigError(
            f"calibration and evaluation both name {arguments.evaluate!r}; measure on other text, or give --allow-same-text."
        )
    if not arguments.stream and (arguments.restart or arguments.hidden_memory is not None):
        raise ConfigError("--restart and --hidden-memory belong to --stream; give that too, or leave them out.")
    if arguments.dry_run:
        _foretell(arguments, config)
        return
    if arguments.stream:
        report = _stream(arguments, config)
        if ranks.is_first():
            _tell(arguments, report)
        return
    model = load_model(arguments)
    processor = load_processor(arguments)
    measuring = {
        "tokenizer": processor,
        "window": arguments.window,
        "max_windows": arguments.max_windows,
        "same_text_allowed": arguments.allow_same_text,
    }
    measures = arguments.evaluate and ranks.is_first()
    dense = evaluate(model, arguments.evaluate, **measuring) if measures else None
    report = prune_(model, config, processor, tokenizer_options=hub_options(arguments))
    if not ranks.is_first():
        return
    if dense is not None:
        report.evaluations.append(as_evaluation(evaluate(model, arguments.evaluate, **measuring), dense))
    with complete_folder(arguments.destination, arguments.overwrite) as folder:
        if processor is not None:
            processor.save_pretrained(folder)
        model.save_pretrained(folder, sparse_format=arguments.sparse_format)
    _tell(arguments, report)


def _foretell(arguments: argparse.Namespace, config: SparsityConfig) -> None:
    if arguments.evaluate:
        raise ConfigError("--dry-run foretells the pruning, not --evaluate; leave that out.")
    check_dtype(arguments.dtype)
    given: Mapping[str, Any] = {} if arguments.hidden_memory is None else {"hidden_memory": arguments.hidden_memory}
    told = forecast(
        model_name(arguments), config, arguments.destination, stream=arguments.stream, overwrite=arguments.overwrite,
        sparse_format=arguments.sparse_format, dtype=None if arguments.dtype == "auto" else arguments.dtype, **given,
        **hub_options(arguments),
    )  # fmt: skip
    if ranks.is_first():
        print(json.dumps(told.to_dict()) if arguments.json else told)


def _stream(arguments: argparse.Namespace, config: SparsityConfig) -> Report:
    from hf_sparse.stream import prune_checkpoint  # needs file locks as Linux and macOS have them

    if arguments.evaluate:
        raise ConfigError(
            "--evaluate needs the whole model in memory, which --stream does not have; leave it out, then: hf-sparse evaluate "
            f"{arguments.destination}"
        )
    check_dtype(arguments.dtype)
    given: Mapping[str, Any] = {} if arguments.hidden_memory is None else {"hidden_memory": arguments.hidden_memory}
    return prune_checkpoint(
        model_name(arguments), arguments.destination, config, load_processor(arguments), overwrite=arguments.overwrite,
        restart=arguments.restart, sparse_format=arguments.sparse_format,
        dtype=None if arguments.dtype == "auto" else arguments.dtype, **given, **hub_options(arguments),
    )  # fmt: skip


def _tell(arguments: argparse.Namespace, report: Report) -> None:
    if arguments.json:
        told = {"model": model_name(arguments), "destination": str(arguments.destination), "report": report.to_dict()}
        print(json.dumps(told))
        return
    print(report)
    for pair in report.evaluations:
        print(
            f"{pair['metric']} on {pair['text']}, windows of {pair['window']} tokens: dense {pair['dense']:.4f}, sparse {pair['sparse']:.4f}"
        )
    print(f"written to {arguments.destination}")
