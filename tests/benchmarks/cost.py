"""How well the formulas of `hf_sparse/cost.py` foretell: `python tests/benchmarks/cost.py [--json]`.

Random Llamas of three sizes are pruned; from what each phase took, the rates of the machine are fitted, in units of a forward pass
over the same tokens in the same run. Then a fourth, larger one is foretold and pruned. CPU time, one thread.
`--memory RECIPE` compares the dry run's memory and disk with a streamed run of the third instead (`--in-memory`: with a run in memory).
"""

import argparse
import ctypes
import gc
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from scipy.optimize import nnls
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sparse import SparsityConfig, apply, cost, prune, prune_
from hf_sparse import environment as surroundings
from hf_sparse.calibrate import make_batches
from hf_sparse.cost import Data, Work
from hf_sparse.families import find_sites
from hf_sparse.forecast import forecast
from hf_sparse.plan import select
from hf_sparse.record import Recorder
from hf_sparse.room import process_memory
from hf_sparse.shapes import ModelShape, recipe_of, shape_of
from hf_sparse.shared import Shared
from hf_sparse.stream import prune_checkpoint
from hf_sparse.streaming.work import work_folder

ROOT = Path(__file__).resolve().parents[2]
# name -> hidden, intermediate, blocks, vocabulary
SIZES = {
    "12 M": (320, 864, 8, 8000),
    "38 M": (512, 1408, 11, 12000),
    "99 M": (768, 2048, 14, 16000),
    "295 M": (1280, 3456, 16, 16000),
}
RECIPES: dict[str, dict[str, Any]] = {
    "2:4 dass": {"metric": "dass", "pattern": "2:4"},
    "50 % sparsegpt": {"metric": "sparsegpt", "pattern": "unstructured", "sparsity": 0.5},
}
ROWS, LENGTH = 8, 512
TARGET = 0.2
PHASES = ("passes", "statistics", "masks and updates", "checks and writing", "scan")


def model(size: str) -> LlamaForCausalLM:
    hidden, intermediate, blocks, vocabulary = SIZES[size]
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=blocks,
            num_attention_heads=hidden // 64,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            max_position_embeddings=2048,
        )
    ).eval()


def tokens(size: str) -> torch.Tensor:
    return torch.randint(0, SIZES[size][3], (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


def plain_pass(llama: LlamaForCausalLM, rows: torch.Tensor) -> None:
    _, size = make_batches([{"input_ids": row[None]} for row in rows], "auto")
    with torch.no_grad():
        for batch in rows.split(size):
            llama.model(input_ids=batch, use_cache=False)


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


@contextmanager
def watching(found: dict[str, float], groups: list[tuple[int, int, float]]) -> Iterator[None]:
    """Add up what the phases take; `groups` gets (rows, columns, seconds) of the masks and updates of each input."""
    places = {
        "statistics": (Recorder, "seen"), "masks and updates": (apply, "_updated"), "block": (apply, "_written"), "scan": (prune, "_scan"),
        "survey": (Shared, "survey"),
    }  # fmt: skip
    originals = {name: getattr(owner, method) for name, (owner, method) in places.items()}

    def timed(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return originals[name](*args, **kwargs)
            finally:
                took = time.process_time() - start
                found[name] = found.get(name, 0.0) + took
                if name == "masks and updates":
                    chosen = args[2]
                    groups.append((sum(len(one.weight) for one in chosen), chosen[0].weight.shape[1], took))

        return call

    for name, (owner, method) in places.items():
        setattr(owner, method, timed(name))
    try:
        yield
    finally:
        for name, (owner, method) in places.items():
            setattr(owner, method, originals[name])


def measure(size: str, recipe: str, repeats: int) -> dict[str, Any]:
    """Seconds of each phase and of a forward pass, interleaved; medians."""
    llama, rows = model(size), tokens(size)
    state = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    config = SparsityConfig(calibration=rows, num_samples=len(rows), sequence_length=LENGTH, **RECIPES[recipe])
    plain_pass(llama, rows[:1])
    times: dict[str, list[float]] = {}
    groups: list[tuple[int, int, float]] = []
    for _ in range(repeats):
        llama.load_state_dict(state)
        found: dict[str, float] = {}
        before = seconds(lambda: plain_pass(llama, rows))
        with watching(found, groups):
            found["total"] = seconds(lambda: prune_(llama, config))
        found["forward"] = (before + seconds(lambda: plain_pass(llama, rows))) / 2
        found["checks and writing"] = found.pop("block")
        found["passes"] = found["total"] - sum(
            value for name, value in found.items() if name not in ("total", "forward")
        )
        for name, value in found.items():
            times.setdefault(name, []).append(value)
    by_shape: dict[tuple[int, int], list[float]] = {}
    for height, columns, took in groups:
        by_shape.setdefault((height, columns), []).append(took)
    medians = {name: statistics.median(values) for name, values in times.items()}
    spread = {
        name: [round(value, 3) for value in values] for name, values in times.items() if name in ("total", "forward")
    }
    return {
        "size": size, "recipe": recipe, "parameters": llama.num_parameters(), "seconds": medians, "runs": spread,
        "groups": [[*shape, statistics.median(values)] for shape, values in by_shape.items()],
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------- fit and foretell


def shape(size: str, recipe: str) -> ModelShape:
    llama = model(size)
    inventory = find_sites(llama)
    chosen, _ = select(inventory, SparsityConfig(**RECIPES[recipe]))
    return shape_of(llama, inventory, chosen)


def works(size: str, recipe: str) -> dict[str, Work]:
    """The counts of each phase, and of a forward pass."""
    told, config = shape(size, recipe), SparsityConfig(**RECIPES[recipe])
    rule, data = recipe_of(config), Data(ROWS, LENGTH, ROWS)
    total = dict.fromkeys((*PHASES, "forward"), Work())
    for block in told.blocks:
        solved = cost.solves(block, rule)
        once = cost.forward(block, data, 4)
        total["forward"] += once
        total["passes"] += once * 2
        total["statistics"] += cost.statistics(block, data, rule.statistics)
        total["masks and updates"] += sum((solved or {}).values(), cost.masks(block, rule))
        total["checks and writing"] += Work(weighed=block.weights_pruned)
        total["scan"] += Work(scanned=block.parameters)
    return total


UNITS = {
    "statistics": ("observed", "wide"), "masks and updates": ("weighed", "exact", "calls"), "checks and writing": ("weighed",),
    "scan": ("scanned",),
}  # fmt: skip


def fit(measured: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Phase -> rates in FLOPs of a forward pass for one unit; least squares of relative errors, none negative.

    Products in fp32 run at one rate, that of the Gram matrices, in updates too; with a column of its own it could not be told from the
    factorisations. Passes over weights are in "weighed".
    """
    rates: dict[str, dict[str, float]] = {}
    for phase, units in UNITS.items():
        wide = rates.get("statistics", {}).get("wide", 0.0) if phase == "masks and updates" else 0.0
        matrix, goal = [], []
        for one in measured:
            counts = works(one["size"], one["recipe"])
            unit = one["seconds"]["forward"] / counts["forward"].product
            points = [(counts[phase], one["seconds"][phase] / unit)]
            if phase == "masks and updates":
                points = [(work_of(one["recipe"], *group[:2]), group[2] / unit) for group in one["groups"]]
            for work, took in points:
                matrix.append([getattr(work, name) / took for name in units])
                goal.append(1.0 - wide * work.wide / took)
        scaled = numpy.array(matrix)
        norms = numpy.maximum(numpy.linalg.norm(scaled, axis=0), 1e-300)
        found, _ = nnls(scaled / norms, numpy.array(goal))
        rates[phase] = dict(zip(units, (float(value) for value in found / norms), strict=True))
        if phase == "masks and updates":
            rates[phase]["wide"] = wide
    passes = [one["seconds"]["passes"] / one["seconds"]["forward"] / 2 for one in measured]
    rates["passes"] = {"forward": statistics.mean(passes)}
    return rates


def work_of(recipe: str, rows: int, columns: int) -> Work:
    """The counts of one group of sites."""
    rule = recipe_of(SparsityConfig(**RECIPES[recipe]))
    block = cost.BlockShape(rows * columns, (cost.InputShape(columns, rows, (rows,)),), columns)
    return sum((cost.solves(block, rule) or {}).values(), cost.masks(block, rule))


def foretell(size: str, recipe: str, rates: dict[str, dict[str, float]]) -> dict[str, float]:
    """Each phase in forward passes."""
    counts = works(size, recipe)
    once = counts["forward"].product
    found = {
        phase: sum(getattr(counts[phase], name) * rate for name, rate in rates[phase].items()) / once for phase in UNITS
    }
    return {"passes": 2 * rates["passes"]["forward"], **found}


def table(measured: list[dict[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    *_, largest = SIZES
    for recipe in RECIPES:
        own = [one for one in measured if one["recipe"] == recipe]
        if len(own) < 2:
            continue
        rates = fit([one for one in own if one["size"] != largest])
        rows = []
        for one in own:
            told = foretell(one["size"], recipe, rates)
            forward = one["seconds"]["forward"]
            taken = {phase: one["seconds"][phase] / forward for phase in PHASES}
            rows.append({"size": one["size"], "parameters": one["parameters"], "forward seconds": forward, "measured": taken, "foretold": told,
                         "total": one["seconds"]["total"] / forward, "foretold total": sum(told.values()), "runs": one["runs"]})  # fmt: skip
        result[recipe] = {"rates, in FLOPs of a forward pass": rates, "rows": rows}
    return result


def show(result: dict[str, Any]) -> None:
    for recipe, found in result.items():
        if recipe not in RECIPES:
            continue
        print(f"\n{recipe}: forward passes over {ROWS * LENGTH} tokens\n")
        print("| model | " + " | ".join(PHASES) + " | all | foretold | error |\n|---|" + "---|" * (len(PHASES) + 3))
        for row in found["rows"]:
            cells = [f"{row['measured'][phase]:.2f} ({row['foretold'][phase]:.2f})" for phase in PHASES]
            error = row["foretold total"] / row["total"] - 1
            print(
                f"| {row['size']} | "
                + " | ".join(cells)
                + f" | {row['total']:.2f} | {row['foretold total']:.2f} | {100 * error:+.0f} % |"
            )
        print("rates:", json.dumps(found["rates, in FLOPs of a forward pass"]))


# ---------------------------------------------------------------------------------------------------- memory and disk


class Sampler(threading.Thread):
    """Looks at the process every few milliseconds: private memory, and files of hidden states that are mapped."""

    def __init__(self, work: Path) -> None:
        super().__init__(daemon=True)
        self.private = self.hidden = self.disk = 0
        self._work, self.done = work, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.005):
            self.private = max(self.private, process_memory())
            ranges = [
                line.split()[0].split("-")
                for line in Path("/proc/self/maps").read_text().splitlines()
                if "/.hidden-" in line
            ]
            self.hidden = max(self.hidden, sum(int(end, 16) - int(start, 16) for start, end in ranges))
            files = (
                [path.stat().st_blocks * 512 for path in self._work.rglob("*") if path.is_file()]
                if self._work.exists()
                else []
            )
            self.disk = max(self.disk, sum(files))


def memory(size: str, recipe: str, stream: bool, hidden: int) -> dict[str, Any]:
    """The dry run's figures and those of the run, of a new process."""
    with tempfile.TemporaryDirectory() as name:
        folder, target = Path(name) / "model", Path(name) / "pruned"
        model(size).save_pretrained(folder)
        gc.collect()
        rows = tokens(size)
        config = SparsityConfig(calibration=rows, num_samples=len(rows), sequence_length=LENGTH, **RECIPES[recipe])
        told = forecast(folder, config, target, stream=stream, hidden_memory=hidden)
        gc.collect()
        malloc_trim()
        before, sampler = process_memory(), Sampler(work_folder(target))
        start = time.perf_counter()
        sampler.start()
        if stream:
            prune_checkpoint(folder, target, config, hidden_memory=hidden)
        else:
            llama = LlamaForCausalLM.from_pretrained(folder)
            prune_(llama, config)
            llama.save_pretrained(target)
        took = time.perf_counter() - start
        sampler.done.set()
        sampler.join()
        written = sum(path.stat().st_blocks * 512 for path in target.rglob("*") if path.is_file())
        return {
            "size": size, "recipe": recipe, "stream": stream, "hidden_memory": hidden, "memory told": told.memory, "memory": sampler.private - before,
            "hidden in files told": told.disk["hidden states"], "hidden in files": sampler.hidden,
            "disk told": told.disk["destination and work folder"], "disk": max(sampler.disk, written),
            "seconds told": told.seconds, "seconds": took,
        }  # fmt: skip


def malloc_trim() -> None:
    """Used again unseen, memory that was freed before would be missing from the growth."""
    ctypes.CDLL(None).malloc_trim(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--memory", choices=list(RECIPES))
    parser.add_argument("--in-memory", action="store_true")
    parser.add_argument("--hidden", type=int, default=2**32, help="bytes of hidden states in memory")
    parser.add_argument("--measured", type=Path, nargs="+", help="take what an earlier run with --keep has measured")
    parser.add_argument("--keep", type=Path, help="write down what was measured")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    if arguments.memory:
        print(
            json.dumps(
                memory(
                    arguments.sizes[0] if len(arguments.sizes) == 1 else "99 M",
                    arguments.memory,
                    not arguments.in_memory,
                    arguments.hidden,
                )
            )
        )
        return
    measured: list[dict[str, Any]] = [one for file in arguments.measured or () for one in json.loads(file.read_text())]
    if not measured:
        for size in arguments.sizes:
            for recipe in RECIPES:
                measured.append(measure(size, recipe, arguments.repeats))
                gc.collect()
                print(f"{size}, {recipe}: {measured[-1]['seconds']}", file=sys.stderr, flush=True)
                if arguments.keep:
                    arguments.keep.write_text(json.dumps(measured))
    result: dict[str, Any] = table(measured)
    result["versions"] = surroundings.versions()
    if arguments.json:
        print(json.dumps(result))
    else:
        show(result)


if __name__ == "__main__":
    main()
