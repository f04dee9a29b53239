"""Prune a model by several recipes, one after the other, and compare quality, time and memory."""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from hf_sparse.cli import FAILED, INTERRUPTED, OK
from hf_sparse.cli.loading import add_loading, hub_options, load_model, load_processor
from hf_sparse.compare import ComparisonInterrupted, compare
from hf_sparse.comparison import Comparison
from hf_sparse.config.serialise import whole
from hf_sparse.errors import ConfigError
from hf_sparse.plot import new_figure
from hf_sparse.recipes import Recipe, make_recipes, read_recipes, reference_of


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="path or Hub id of the model, or 'embedded'")
    parser.add_argument(
        "--recipes",
        required=True,
        metavar="FILE",
        help="JSON or YAML list of mappings, each the fields of SparsityConfig and a name; or 'default', a list of seven for 2:4",
    )
    parser.add_argument(
        "--reference", default=None, metavar="NAME", help="recipe that counts as 1 (default: the first)"
    )
    parser.add_argument(
        "--draws", type=int, default=1, help="calibration draws of each recipe, with seeds from its own on (default 1)"
    )
    shared = parser.add_argument_group("fields of SparsityConfig for recipes that leave them out")
    for name, kind in {"calibration": str, "num-samples": int, "sequence-length": int, "seed": int, "batch-size": str}.items():  # fmt: skip
        shared.add_argument(f"--{name}", type=kind, default=None)
    measure = parser.add_argument_group("measuring")
    measure.add_argument(
        "--evaluate", required=True, metavar="TEXT", help="text to measure on (path, Hub id or stdlib:evaluation)"
    )
    measure.add_argument("--window", type=int, default=None, help="tokens a window (default 512)")
    measure.add_argument("--max-windows", type=int, default=None, help="use only the first windows of the text")
    measure.add_argument(
        "--allow-same-text", action="store_true", help="allow to measure on text that is calibrated on"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, default=None, metavar="FILE", help="write the figures as JSON")
    output.add_argument("--plot", type=Path, default=None, metavar="FILE", help="draw them (.png, .svg or .pdf)")
    output.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    add_loading(parser)


def _recipes(arguments: argparse.Namespace) -> list[Recipe]:
    names = ("calibration", "num_samples", "sequence_length", "seed", "batch_size", "device")
    defaults: dict[str, Any] = {
        name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None
    }
    if re.fullmatch(r"[0-9]+", defaults.get("batch_size", "")):
        defaults["batch_size"] = int(defaults["batch_size"])
    return make_recipes(read_recipes(arguments.recipes), defaults)


def _check(arguments: argparse.Namespace, recipes: list[Recipe]) -> None:
    """What can be refused is refused before a model is loaded."""
    reference_of(recipes, arguments.reference)
    whole("draws", arguments.draws, 1)
    same = [recipe.name for recipe in recipes if recipe.config.calibration == arguments.evaluate]
    if same and not arguments.allow_same_text:
        raise ConfigError(
            f"recipe {same[0]!r} calibrates on {arguments.evaluate!r}, which --evaluate names as well; measure on other text, or give "
            "--allow-same-text."
        )
    for path in (arguments.output, arguments.plot):
        if path is not None and path.is_dir():
            raise ConfigError(f"{str(path)!r} is a folder; give a file.")
    if arguments.plot is not None:
        new_figure(arguments.plot)


def run(arguments: argparse.Namespace) -> int:
    recipes = _recipes(arguments)
    _check(arguments, recipes)
    model = load_model(arguments)
    try:
        found = compare(
            model, recipes, arguments.evaluate, tokenizer=load_processor(arguments), tokenizer_options=hub_options(arguments),
            window=arguments.window, max_windows=arguments.max_windows, draws=arguments.draws, reference=arguments.reference,
            same_text_allowed=arguments.allow_same_text,
        )  # fmt: skip
    except ComparisonInterrupted as interrupted:
        found = interrupted.comparison
    _tell(found, arguments)
    if found.interrupted:
        return INTERRUPTED
    return FAILED if found.failed else OK


def _tell(found: Comparison, arguments: argparse.Namespace) -> None:
    if arguments.output is not None:
        found.save(arguments.output)
    if arguments.plot is not None and found.rows:
        found.plot(arguments.plot)
    if arguments.json:
        print(json.dumps(found.to_dict()))
    else:
        print(found.markdown() if arguments.markdown else found)
    for row in found.failed:
        print(f"hf-sparse compare: recipe {row.name!r} failed: {row.error}", file=sys.stderr)
    if found.interrupted:
        done = f"{len(found.rows)} of {found.planned} recipes were finished"
        kept = f"; they are in {arguments.output}" if arguments.output is not None else ""
        print(f"interrupted; {done}{kept}.", file=sys.stderr)
