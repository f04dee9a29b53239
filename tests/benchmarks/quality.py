"""What each way to prune costs in quality and time: `python tests/benchmarks/quality.py MODEL TABLE [--draws 3] [--json FILE]`.

MODEL is `embedded` or a folder of development data (`models/stories260k`, `text/stories`; see CONTRIBUTING.md). Calibration, the choice
of an allocation and the figures use three disjoint texts. Each figure is the log-perplexity above dense relative to plain Wanda's of
the same draw, median and spread over the draws; times are CPU seconds of pruning relative to Wanda's, on one thread.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse import SparsityConfig, embedded, environment, prune_
from hf_sparse.data import read_samples
from hf_sparse.evaluate import evaluate

SAMPLES = 64
WANDA = {"metric": "wanda"}
LEAST, ADMM, DENSE = "least_squares", "admm", ("dense_stream", "admm")


def reconstruct(steps: int) -> dict[str, Any]:
    return {**WANDA, "update": (*DENSE, "reconstruct"), "options": {"reconstruct": {"steps": steps}}}


TIERS: dict[str, dict[str, Any]] = {
    "magnitude": {"metric": "magnitude"},
    "wanda": WANDA,
    "wanda, dsnot": {**WANDA, "update": "dsnot"},
    "wanda, permute": {**WANDA, "permute": True},
    "dass": {"metric": "dass"},
    "ria": {"metric": "ria"},
    "sparsegpt": {"metric": "sparsegpt"},
    "wanda, least squares": {**WANDA, "update": LEAST},
    "sparsegpt, least squares": {"metric": "sparsegpt", "update": ("sparsegpt", LEAST)},
    "admm": {**WANDA, "update": ADMM},
    "admm, permute": {**WANDA, "update": ADMM, "permute": True},
    "dense stream, least squares": {**WANDA, "update": ("dense_stream", LEAST)},
    "dense stream, sparsegpt": {"metric": "sparsegpt", "update": ("dense_stream", "sparsegpt")},
    "dense stream, admm (default)": {},
    "dense stream, admm, permute": {"permute": True},
    "wanda, reconstruct 40": {**WANDA, "update": "reconstruct", "options": {"reconstruct": {"steps": 40}}},
    "dense stream, admm, reconstruct 40": reconstruct(40),
    "dense stream, admm, reconstruct 220": reconstruct(220),
}  # fmt: skip

UNSTRUCTURED = {"pattern": "unstructured", "sparsity": 0.7}


def allocated(allocation: Any, **options: Any) -> dict[str, Any]:
    return {"allocation": allocation, "options": {allocation: options} if options else {}}


def allocations(bound: float) -> dict[str, dict[str, Any]]:
    """At 70 %: the grid of steps, what the searches find, and the same behind weight updates."""
    grid = {f"atp, step {part * bound / 12:.4f}": allocated("atp", step=part * bound / 12) for part in range(1, 13)}
    searched = {
        "owl": allocated("owl"),
        "atp, searched by loss": allocated("atp", held_out=0.2),
        "atp, searched by alignment": allocated("atp", held_out=0.2, selector="alignment"),
        "search": allocated("search", held_out=0.2),
    }
    plain = {"uniform": {}, **grid, **searched}
    updated = {
        f"dense stream, admm: {name}": {"update": DENSE, **fields}
        for name, fields in {"uniform": {}, "owl": allocated("owl"), "atp, searched by loss": allocated("atp", held_out=0.2)}.items()
    }  # fmt: skip
    return {name: {**WANDA, **UNSTRUCTURED, **fields} for name, fields in {**plain, **updated}.items()}


def layer_wise() -> dict[str, dict[str, Any]]:
    """Average 4:8 with and without an N for each block."""
    kinds = {
        "4:8 everywhere": {}, "owl": allocated("owl"), "atp, step 0.04": allocated("atp", step=0.04),
        "atp, searched": allocated("atp", held_out=0.2),
    }  # fmt: skip
    updates = {"no update": "none", "admm": ADMM, "dense stream, admm": DENSE}
    return {
        f"{name}, {with_}": {**WANDA, "pattern": "4:8", "update": update, **fields}
        for with_, update in updates.items()
        for name, fields in kinds.items()
    }


def dependency() -> dict[str, dict[str, Any]]:
    """What the rows feed, as a criterion, once weights are updated."""
    found = {}
    for pattern, share in (("2:4", None), ("unstructured", 0.6)):
        axes = ("auto",) if share is None else ("auto", "site")
        for update in ("none", LEAST, ("dense_stream", LEAST), DENSE):
            for metric in ("wanda", "dass"):
                for axis in axes:
                    name = (
                        f"{pattern}, {metric}, axis {axis}, {update if isinstance(update, str) else ' + '.join(update)}"
                    )
                    found[name] = {
                        "metric": metric,
                        "pattern": pattern,
                        "sparsity": share,
                        "axis": axis,
                        "update": update,
                    }
    return found


class Development:
    """The small model of the development data: 128 calibration rows, 64 to choose by, 256 for figures."""

    def __init__(self, folder: Path) -> None:
        self.path, self.folder = folder / "models" / "stories260k", folder / "text" / "stories"
        self.tokenizer: Any = None

    def rows(self, name: str) -> torch.Tensor:
        return torch.from_numpy(numpy.load(self.folder / f"{name}.npy")).long()

    def draw(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Calibration rows and rows to choose by."""
        start = (0, 64, 32)[number]
        return self.rows("calib")[start : start + SAMPLES], self.rows("dev")[number * 16 : number * 16 + 16]

    def evaluation(self) -> Any:
        return self.rows("eval")

    window, windows = 256, 256


class Embedded:
    """The model in the package with the standard library's text."""

    def __init__(self) -> None:
        self.path = embedded.model_path()
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)

    def draw(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        samples = read_samples(
            "stdlib:calibration", tokenizer=lambda: self.tokenizer, num_samples=SAMPLES + 16, sequence_length=512, seed=number
        )  # fmt: skip
        ids = torch.cat([row["input_ids"] for row in samples.rows])
        return ids[:SAMPLES], ids[SAMPLES:]

    def evaluation(self) -> Any:
        return "stdlib:evaluation"

    window, windows = 512, 64


def dense(data: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(data.path, dtype=torch.float32)


def perplexity(data: Any, model: Any) -> float:
    found = evaluate(
        model, data.evaluation(), tokenizer=data.tokenizer, window=data.window, max_windows=data.windows, same_text_allowed=False
    )  # fmt: skip
    return found.value


def measured(data: Any, recipes: dict[str, dict[str, Any]], draws: int) -> Iterator[dict[str, Any]]:
    """One row for each recipe and draw; the recipes take turns within a draw."""
    base = math.log(perplexity(data, dense(data)))
    for draw in range(draws):
        calibration, choosing = data.draw(draw)
        reference: dict[str, float] = {}
        for name, fields in {"plain wanda 2:4": WANDA, **recipes}.items():
            searches = SparsityConfig(**{**fields, "calibration": calibration}).searches
            rows = torch.cat([calibration, choosing]) if searches else calibration
            model, start = dense(data), time.process_time()
            report = prune_(
                model, SparsityConfig(**{**fields, "calibration": rows, "num_samples": len(rows), "seed": draw})
            )
            seconds = time.process_time() - start
            value = perplexity(data, model)
            if not reference:
                reference = {"gap": math.log(value) - base, "seconds": seconds}
                prune_(
                    dense(data), SparsityConfig(**WANDA, calibration=rows, num_samples=len(rows))
                )  # nothing is loaded lazily now
            yield {
                "name": name, "draw": draw, "perplexity": value, "ratio": (math.log(value) - base) / reference["gap"],
                "seconds": seconds, "time": seconds / reference["seconds"], "sparsity": report.sparsity,
                "blocks": [round(block.sparsity, 4) for block in report.blocks],
                "notes": [note for note in report.notes if "searched" in note],
            }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| recipe | perplexity | ratio | spread | time / wanda |"
    yield "|---|---:|---:|---:|---:|"
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        ratios = sorted(row["ratio"] for row in own)
        value, cost = (statistics.median(row[key] for row in own) for key in ("perplexity", "time"))
        yield f"| {name} | {value:.2f} | {statistics.median(ratios):.3f} | {ratios[0]:.3f} to {ratios[-1]:.3f} | {cost:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("table", choices=["tiers", "allocations", "layer-wise", "dependency"])
    parser.add_argument("--draws", type=int, default=3, choices=[1, 2, 3])
    parser.add_argument(
        "--only", nargs="+", default=None, metavar="WORD", help="recipes whose names hold one of the words"
    )
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = Embedded() if arguments.model == embedded.NAME else Development(Path(arguments.model))
    blocks = dense(data).config.num_hidden_layers
    tables: dict[str, Callable[[], dict[str, dict[str, Any]]]] = {
        "tiers": lambda: TIERS, "allocations": lambda: allocations(2 * 0.3 / (blocks - 1)), "layer-wise": layer_wise, "dependency": dependency,
    }  # fmt: skip
    recipes = tables[arguments.table]()
    if arguments.only:
        recipes = {name: fields for name, fields in recipes.items() if any(word in name for word in arguments.only)}
    rows = []
    for row in measured(data, recipes, arguments.draws):
        rows.append(row)
        print(f"{row['name']:<46} draw {row['draw']} perplexity {row['perplexity']:9.3f} ratio {row['ratio']:.4f} time {row['time']:.2f} {row['blocks'] if len(set(row['blocks'])) > 1 else ''} {' '.join(row['notes'])}", flush=True)  # fmt: skip
    print(
        "\n".join(
            [
                "",
                *table(rows),
                "",
                f"{environment.versions()}, {arguments.draws} draws, {SAMPLES} calibration rows, 1 thread",
            ]
        )
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows, "versions": environment.versions()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
