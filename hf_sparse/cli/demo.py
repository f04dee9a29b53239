"""Prune the embedded model in several ways, compare them, and write the best one with its card and picture."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse import embedded, stdlib_text
from hf_sparse.config import SparsityConfig
from hf_sparse.destination import check_destination, complete_folder
from hf_sparse.evaluate import Measurement, as_evaluation, evaluate
from hf_sparse.prune import prune_
from hf_sparse.report import Report
from hf_sparse.report_text import recipe_words

# Name -> fields of SparsityConfig; the last are the defaults.
_WAYS: dict[str, dict[str, Any]] = {
    "magnitude": {"metric": "magnitude"},
    "wanda": {"metric": "wanda"},
    "dass": {"metric": "dass"},
    "sparsegpt": {"metric": "sparsegpt"},
    "default": {},
}
_PROMPTS = ("def read_lines(path):\n", "class Stack:\n    def __init__(self):\n", "import os\n\n")


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("hf_sparse_demo"),
        help="folder for the best model (default: hf_sparse_demo)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it is not empty")
    parser.add_argument("--windows", type=int, default=128, help="evaluation windows of 512 tokens (default 128)")
    parser.add_argument("--num-samples", type=int, default=64, help="calibration windows of 512 tokens (default 64)")
    parser.add_argument("--seed", type=int, default=0)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _prune(
    fields: dict[str, Any], arguments: argparse.Namespace, tokenizer: Any, dense: Measurement
) -> tuple[Any, Report]:
    model = AutoModelForCausalLM.from_pretrained(embedded.model_path(), dtype=torch.float32)
    config = SparsityConfig(
        **fields, calibration="stdlib:calibration", num_samples=arguments.num_samples, sequence_length=512, seed=arguments.seed
    )  # fmt: skip
    report = prune_(model, config, tokenizer)
    sparse = evaluate(model, "stdlib:evaluation", tokenizer=tokenizer, window=512, max_windows=arguments.windows)
    report.evaluations.append(as_evaluation(sparse, dense))
    return model, report


def _generate(folder: Path) -> list[str]:
    """Load what was written as anyone would, and let it go on with a few lines of code."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = []
    for prompt in _PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        texts.append(tokenizer.decode(tokens[0], skip_special_tokens=True))
    return texts


def run(arguments: argparse.Namespace) -> None:
    start = time.monotonic()
    check_destination(arguments.output, arguments.overwrite)
    tokenizer = AutoTokenizer.from_pretrained(embedded.model_path())
    dense_model = AutoModelForCausalLM.from_pretrained(embedded.model_path(), dtype=torch.float32)
    dense = evaluate(dense_model, "stdlib:evaluation", tokenizer=tokenizer, window=512, max_windows=arguments.windows)
    rows: list[dict[str, Any]] = [
        {"name": "dense", "recipe": "", "perplexity": dense.value, "sparsity": 0.0, "seconds": 0.0}
    ]
    best: tuple[float, Any, Report] | None = None
    for name, fields in _WAYS.items():
        model, report = _prune(fields, arguments, tokenizer, dense)
        value = report.evaluations[0]["sparse"]
        rows.append(
            {
                "name": name,
                "recipe": recipe_words(report.config),
                "perplexity": value,
                "sparsity": report.sparsity,
                "seconds": report.seconds,
            }
        )
        if best is None or value < best[0]:
            best = (value, model, report)
    if best is None:
        return
    with complete_folder(arguments.output, arguments.overwrite) as folder:
        tokenizer.save_pretrained(folder)
        best[1].to(torch.bfloat16).save_pretrained(folder)
    sizes = {"dense": _size(embedded.model_path()), "sparse": _size(arguments.output)}
    texts = _generate(arguments.output)
    fingerprints = {split: stdlib_text.fingerprint(split) for split in ("calibration", "evaluation")}
    result = {
        "rows": rows, "best": {"recipe": recipe_words(best[2].config), "folder": str(arguments.output)},
        "bytes": sizes, "generated": texts, "text": {"folder": str(stdlib_text.stdlib_folder()), "fingerprints": fingerprints},
        "evaluation": dense.to_dict(), "versions": best[2].versions, "seconds": time.monotonic() - start,
    }  # fmt: skip
    print(json.dumps(result) if arguments.json else _told(result, best[2]))


def _told(result: dict[str, Any], best: Report) -> str:
    measured = result["evaluation"]
    lines = [
        f"embedded model, {best.parameters:,} parameters; text: sources of Python {best.versions['python']}'s standard library",
        f"calibrated on stdlib:calibration ({result['text']['fingerprints']['calibration']}), measured on stdlib:evaluation "
        f"({result['text']['fingerprints']['evaluation']}), {measured['tokens']} predicted tokens, windows of {measured['window']}",
        "",
        f"{'name':<10} {'recipe':<34} {'zeros':>8} {'perplexity':>11} {'seconds':>8}",
    ]
    for row in result["rows"]:
        lines.append(
            f"{row['name']:<10} {row['recipe']:<34} {100 * row['sparsity']:>7.2f}% {row['perplexity']:>11.3f} {row['seconds']:>8.1f}"
        )
    lines += ["", str(best), ""]
    sizes = result["bytes"]
    lines.append(
        f"weights on disk: dense {sizes['dense']:,} bytes, sparse {sizes['sparse']:,} bytes (zeros are stored; the file loads anywhere)"
    )
    lines.append(
        f"the best, {result['best']['recipe']}, is in {result['best']['folder']} with its card and picture; it goes on with:"
    )
    lines += ["-" * 60, *("\n".join([text, "-" * 60]) for text in result["generated"])]
    return "\n".join([*lines, f"{result['seconds']:.0f} s in all"])
