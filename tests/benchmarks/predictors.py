"""What contextual predictors cost in quality: `python tests/benchmarks/predictors.py [MODEL] [--seeds 3] [--on eval] [--distil]
[--criteria NAME ...] [--json FILE]`.

MODEL is `stories260k` (the default; in the folder that HF_SPARSE_TEST_DATA names, or `shared` beside the checkout) or `embedded`.
Predictors learn from traces of the calibration text; figures are rises of log perplexity over the dense model on other text, with a mask
for every token in every block but the first. `--on dev` is for choices; `--distil` measures the default criterion before and after training end to end instead. One thread.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hf_sparse import embedded
from hf_sparse.data import read_samples
from hf_sparse.predictors.distill import Distillation, distill
from hf_sparse.predictors.evaluate import evaluate_predictors
from hf_sparse.predictors.networks import Predictor
from hf_sparse.predictors.recording import record
from hf_sparse.predictors.select import Selection
from hf_sparse.predictors.table import PredictorTable, Row
from hf_sparse.predictors.traces import Traces
from hf_sparse.predictors.train import Training, train
from hf_sparse.registry import CRITERIA

DEFAULT, LITERAL = "magnitude", "l2_pre_activation"
HALF = Selection(keep_neurons=0.5, keep_heads=0.5)
MORE = [
    Selection(keep_neurons=0.75, keep_heads=0.75),
    Selection(keep_neurons=0.25, keep_heads=0.25),
    Selection(keep_neurons=0.5, keep_heads=1.0),
    Selection(keep_neurons=1.0, keep_heads=0.5),
    replace(HALF, mode="global"),
]


class Stories:
    """The small model of the development data: 260,032 weights, sequences of 256 tokens."""

    rank, equal_rank = 32, 26  # 9.9 % of the weights; and dejavu's with as many weights as shadow

    def __init__(self) -> None:
        root = Path(__file__).resolve().parents[2]
        given = os.environ.get("HF_SPARSE_TEST_DATA")
        folders = [Path(given)] if given else [root.parent / "shared", root / "shared"]
        found = [folder for folder in folders if (folder / "models" / "stories260k").is_dir()]
        if not found:
            sys.exit("skipped: no models/stories260k; set HF_SPARSE_TEST_DATA to the folder of the development data.")
        self.path, self._text = found[0] / "models" / "stories260k", found[0] / "text" / "stories"

    def rows(self, name: str, windows: int | None) -> torch.Tensor:
        return torch.from_numpy(numpy.load(self._text / f"{name}.npy")).long()[:windows]


class Embedded:
    """The model in the package on the standard library's text: 3,542,976 weights, windows of 256 tokens."""

    rank, equal_rank = 64, 49  # 7.0 % of the weights

    def __init__(self) -> None:
        self.path = embedded.model_path()

    def rows(self, name: str, windows: int | None) -> torch.Tensor:
        split = {"calib": "calibration", "dev": "evaluation", "eval": "evaluation"}[name]
        tokenizer = AutoTokenizer.from_pretrained(self.path)
        number = 128 if name == "calib" else 256
        found = read_samples(
            f"stdlib:{split}", tokenizer=lambda: tokenizer, num_samples=number, sequence_length=256, fewer_allowed=True
        )
        rows = torch.cat([row["input_ids"] for row in found.rows])
        return {"calib": rows, "dev": rows[128:], "eval": rows[:128]}[name][:windows]


def seeded(model: Any, traces: Traces, kind: str, seeds: int, **options: Any) -> list[Predictor]:
    return [train(model, traces, kind, Training(seed=seed), **options) for seed in range(seeds)]


def measured(
    model: Any, data: Any, text: torch.Tensor, seeds: int, folder: Path, others: list[str]
) -> Iterator[PredictorTable]:
    """Tables of the default criterion, then of the other ones."""
    calibration = data.rows("calib", None)
    for criterion in [DEFAULT, *others]:
        traces = record(model, calibration, folder / criterion, criterion=criterion)
        fixed = {f"{kind} {criterion}": [train(model, traces, kind)] for kind in ("static", "oracle")}
        group = {f"shadow {criterion}": seeded(model, traces, "shadow", seeds, rank=data.rank), **fixed}
        if criterion == DEFAULT:
            group[f"dejavu {criterion}"] = seeded(model, traces, "dejavu", seeds, rank=data.rank)
            group[f"gate_first {criterion}"] = seeded(model, traces, "gate_first", seeds, rank=data.rank)
            yield evaluate_predictors(model, group, text, MORE, with_agreement=False)
            group["dejavu, weights of shadow"] = seeded(model, traces, "dejavu", seeds, rank=data.equal_rank)
        yield evaluate_predictors(model, group, text, [HALF])


@torch.no_grad()
def sampled(model: Any, number: int, length: int) -> torch.Tensor:
    """Text of the model's own at temperature 1."""
    torch.manual_seed(0)
    begin = torch.full((number, 1), model.config.bos_token_id)
    return model.generate(
        begin, attention_mask=torch.ones_like(begin), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        min_length=length, max_length=length, pad_token_id=0,
    )  # fmt: skip


def distilled(model: Any, data: Any, text: torch.Tensor, seeds: int, folder: Path) -> Iterator[PredictorTable]:
    """Tables of the default criterion, the trained ones before and after training end to end.

    On the calibration text, some rows of which are held out, and four times as many rows that the dense model wrote.
    """
    calibration = data.rows("calib", None)
    traces = record(model, calibration, folder / DEFAULT)
    group = {f"{kind} {DEFAULT}": seeded(model, traces, kind, 1) for kind in ("static", "oracle")}
    before = seeded(model, traces, "shadow", seeds, rank=data.rank)
    rows = torch.cat([sampled(model, 4 * len(calibration), calibration.shape[1]), calibration])
    settings = {"held_out": 0.02}  # of all, so all from the calibration text
    after = [
        distill(model, one, rows, distillation=Distillation(seed=seed, **settings)) for seed, one in enumerate(before)
    ]
    group |= {f"shadow {DEFAULT}": before, "shadow, distilled": after}
    yield evaluate_predictors(model, group, text, MORE, with_agreement=False)
    yield evaluate_predictors(model, group, text, [HALF])


def joined(tables: list[PredictorTable]) -> PredictorTable:
    return replace(tables[0], rows=tuple(row for table in tables for row in table.rows))


def targets(table: PredictorTable, distil: bool) -> Iterator[tuple[str, float, float]]:
    """What was set out to be reached: (what, figure, at most)."""

    def rise(name: str, neurons: float = 0.5, heads: float = 0.5, mode: str = "block") -> float:
        return table.rise(table.find(name=name, keep_neurons=neurons, keep_heads=heads, mode=mode))

    shadow, dejavu, static, oracle, gate = (
        f"{kind} {DEFAULT}" for kind in ("shadow", "dejavu", "static", "oracle", "gate_first")
    )
    gap = (rise(shadow) - rise(oracle)) / (rise(static) - rise(oracle))
    if distil:
        after = (rise("shadow, distilled") - rise(oracle)) / (rise(static) - rise(oracle))
        yield "(shadow - oracle) / (static - oracle), 50 % of both, before", gap, 0.40
        yield "the same, distilled", after, 0.30
        yield "shadow, distilled, 75 % of both", rise("shadow, distilled", 0.75, 0.75), 0.27
        return
    yield "shadow / static, 50 % of both", rise(shadow) / rise(static), 0.45
    yield "shadow / static, 50 % of neurons", rise(shadow, heads=1.0) / rise(static, heads=1.0), 0.35
    yield "shadow / static, 50 % of heads", rise(shadow, neurons=1.0) / rise(static, neurons=1.0), 0.70
    yield "shadow / dejavu, equal rank", rise(shadow) / rise(dejavu), 1.35
    yield "shadow / dejavu, equal weights", rise(shadow) / rise("dejavu, weights of shadow"), 1.25
    yield "shadow, 75 % of both", rise(shadow, 0.75, 0.75), 0.27
    yield "(shadow - oracle) / (static - oracle), 50 % of both (aim 0.30)", gap, 0.40
    if any(row.criterion == LITERAL for row in table.rows):
        yield f"shadow {DEFAULT} / {LITERAL}", rise(shadow) / rise(f"shadow {LITERAL}"), 0.60
        yield f"oracle {DEFAULT} / {LITERAL}", rise(oracle) / rise(f"oracle {LITERAL}"), 0.60
    yield "gate_first with shadow for heads, 75 % of both", rise(gate, 0.75, 0.75), 0.10
    yield "gate_first with shadow for heads, 50 % of both", rise(gate), 0.45


def order(row: Row) -> tuple[Any, ...]:
    return (row.criterion != DEFAULT, row.criterion, row.mode, -row.keep_neurons - row.keep_heads, -row.keep_neurons)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", choices=["stories260k", "embedded"], default="stories260k")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--on", choices=["dev", "eval"], default="eval")
    parser.add_argument("--distil", action="store_true")
    others = [entry.name for entry in CRITERIA if entry.name != DEFAULT]
    parser.add_argument("--criteria", nargs="*", choices=others, default=others, help="beside the default one")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    start, data = time.monotonic(), Stories() if given.model == "stories260k" else Embedded()
    model = AutoModelForCausalLM.from_pretrained(data.path, dtype=torch.float32).eval()
    text = data.rows(given.on, given.windows)
    with tempfile.TemporaryDirectory() as folder:
        settings = (model, data, text, given.seeds, Path(folder))
        tables = distilled(*settings) if given.distil else measured(*settings, given.criteria)
        table = joined(list(tables))
    table = replace(table, rows=tuple(sorted(table.rows, key=order)))
    print(table.markdown())
    print(f"\nRank {data.rank}; seeds 0 to {given.seeds - 1}; {(time.monotonic() - start) / 60:.1f} minutes.\n")
    print("| target | at most | measured |\n| --- | ---: | ---: |")
    for what, figure, most in targets(table, given.distil):
        print(f"| {what} | {most:.2f} | {figure:.3f}{'' if figure <= most else ' (missed)'} |")
    if given.json:
        given.json.write_text(json.dumps(table.to_dict(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
