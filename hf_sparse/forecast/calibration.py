"""Measures in about two seconds what this machine does of each kind of work that `hf_sparse.cost` counts."""

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sparse import cost
from hf_sparse.allot import shares
from hf_sparse.blockwise import Run
from hf_sparse.calibrate import ready, survey
from hf_sparse.config import SparsityConfig
from hf_sparse.cost import Rates, Work
from hf_sparse.data import Batch
from hf_sparse.families import find_sites
from hf_sparse.forwards import full_precision
from hf_sparse.patterns import Pattern
from hf_sparse.plan import needs, select
from hf_sparse.record import Recorder
from hf_sparse.registry import METRICS, STATISTICS, UPDATES
from hf_sparse.room import existing
from hf_sparse.shapes import ModelShape, recipe_of, shape_of
from hf_sparse.sites import count_zeros

_TOKENS = 256
_WIDEST = 2048  # features of what is multiplied here; wider products run at the same rate
_SMALL = (192, 512)  # hidden and intermediate size of the model that is really pruned here
_SMALL_TOKENS = 640  # enough for its Gram matrices
_FILE = 2**25  # bytes written and read


@dataclasses.dataclass(frozen=True)
class Machine:
    """What was measured: rates, and update -> how many times what its law says it took on a small site."""

    rates: Rates
    solvers: dict[str, float]
    seconds: float  # that measuring took


def calibrate(shape: ModelShape, config: SparsityConfig, dtype: torch.dtype, destination: Path | None) -> Machine:
    """Measure; a file that nobody can see is written where `destination` will be, and is gone afterwards."""
    start = time.perf_counter()
    with torch.random.fork_rng([]), torch.no_grad(), full_precision():
        torch.manual_seed(0)
        speeds = {**_products(shape, dtype), **_passes(dtype), **_statistics(shape, config)}
        read, written = (0.0, 0.0) if destination is None else _disk(destination)
        rates = Rates(**speeds, read=read, written=written, exchanged=2 * speeds["moved"])
        weighed, solvers = _pruning(config, rates, dtype)
    return Machine(dataclasses.replace(rates, weighed=weighed), solvers, time.perf_counter() - start)


def _seconds(work: Callable[[], Any], times: int = 2) -> float:
    """The shortest of some runs: what others do meanwhile only makes them longer."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def _products(shape: ModelShape, dtype: torch.dtype) -> dict[str, float]:
    inputs = [one for block in shape.blocks for one in block.inputs]
    columns = min(_WIDEST, max((one.columns for one in inputs), default=_SMALL[0]))
    rows = min(_WIDEST, max((one.rows for one in inputs), default=_SMALL[0]))
    x, weight = torch.randn(_TOKENS, columns).to(dtype), torch.randn(rows, columns).to(dtype)
    product = _seconds(lambda: torch.nn.functional.linear(x, weight)) / (2 * _TOKENS * columns * rows)
    length, width = 512, 64
    heads = torch.randn(1, 4, length, width).to(dtype)
    attend = _seconds(lambda: torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True))
    wide, square = torch.randn(4 * _TOKENS, min(columns, 1024)), torch.randn(512, 512, dtype=torch.float64)
    square = square @ square.T + 512 * torch.eye(512, dtype=torch.float64)
    return {
        "product": product, "attention": attend / (2 * 4 * width * length**2),
        "wide": _seconds(lambda: wide.T @ wide) / (2 * len(wide) * wide.shape[1] ** 2),
        "exact": _seconds(lambda: torch.cholesky_inverse(torch.linalg.cholesky(square))) / 512**3,
    }  # fmt: skip


def _passes(dtype: torch.dtype) -> dict[str, float]:
    one, tiny = torch.randn(2**20).to(dtype), torch.randn(16)
    weights = torch.randn(2**20).to(dtype)

    def scan() -> None:
        torch.isfinite(weights).all()
        count_zeros(weights)

    def small() -> None:
        for _ in range(1000):
            tiny.add_(1)

    return {
        "moved": _seconds(lambda: torch.nn.functional.silu(one) * one) / (5 * one.nbytes),
        "scanned": _seconds(scan) / len(weights),
        "calls": 2 * _seconds(small) / 1000,
    }


def _statistics(shape: ModelShape, config: SparsityConfig) -> dict[str, float]:
    names = recipe_of(config).statistics - {"gram"}
    x = torch.randn(1024, min(_WIDEST, max(shape.hidden, 64)))
    took = 0.0
    for name in names:
        statistic: Any = STATISTICS[name].function(x.shape[1])
        took += _seconds(lambda: statistic.add(x)) / x.numel()  # noqa: B023  (called at once)
    return {"observed": took}


def _disk(destination: Path) -> tuple[float, float]:
    """Seconds to read and to write a byte in the file system of a folder; the system forgets the file in between."""
    folder = existing(destination)
    with tempfile.TemporaryFile(dir=folder) as file:
        block = os.urandom(2**20)
        start = time.perf_counter()
        for _ in range(_FILE // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - start
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.perf_counter()
        while file.read(2**20):
            pass
        return (time.perf_counter() - start) / _FILE, written / _FILE


# ---------------------------------------------------------------------------------------------------- the recipe itself


def _pruning(config: SparsityConfig, rates: Rates, dtype: torch.dtype) -> tuple[float, dict[str, float]]:
    """Seconds for each weight that is scored, chosen, checked and written, and what each update takes against its law.

    A block of a small random Llama is pruned by the very functions that a run calls.
    """
    hidden, intermediate = _SMALL
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=1,
            num_attention_heads=3,
            num_key_value_heads=3,
        )
    ).to(dtype)
    updates = [name for name in config.update if name != "none"]
    # Where the update chooses the mask itself, nothing is scored: what is left of the metric is its choice among magnitudes.
    scored = dataclasses.replace(config, metric="magnitude", update="none") if recipe_of(config).own_choice else config
    plain = _config(scored, "none")
    took, law = _block_seconds(model, plain)
    weights = sum(site.size for site in find_sites(model).all())
    weighed = max(0.0, took - dataclasses.replace(law, weighed=0.0).seconds(rates)) / weights
    rates = dataclasses.replace(rates, weighed=weighed)
    solvers = {}
    for name in updates:
        # What trains blocks is told by its passes; what sets targets cannot be the last, and sees two streams.
        entry = UPDATES[name]
        if entry.traits.get("runs_blocks") or entry.traits.get("sets_target") or "cost" not in entry.traits:
            continue
        took, law = _block_seconds(model, _config(config, name))
        told = law.seconds(rates)
        solvers[name] = took / told if told else 1.0
    return weighed, solvers


def _config(config: SparsityConfig, update: str) -> SparsityConfig:
    """The metric, pattern and one update of a configuration for a model of one block."""
    grouped = Pattern.parse(config.pattern).group is not None
    sparsity = None if grouped else config.sparsity if config.sparsity is not None else 0.5
    return dataclasses.replace(
        config, update=update, sparsity=sparsity, allocation="uniform", targets="all", exclude=(), permute=False, calibration=None,
        predictor=None,
    )  # fmt: skip


def _block_seconds(model: Any, config: SparsityConfig) -> tuple[float, Work]:
    """How long the block's sites take to be pruned, and the work that the formulas count."""
    rows = [{"input_ids": torch.randint(0, 64, (1, _SMALL_TOKENS))}]
    inventory = find_sites(model)
    chosen, _ = select(inventory, config)
    block, rule = inventory.blocks[0], recipe_of(config)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with ready(model):
        run = Run(model, config, inventory, chosen, shares(inventory, chosen, config))
        run.survey = survey(model, inventory, rows, bool(METRICS[config.metric].consumer_needs))
        wanted = needs(run.plans(block), {site.name: site for site in inventory.all()}, config.update)
        recorder = Recorder(inventory.sites[0], wanted, 256)
        with recorder.listening(model, inventory.sites[0], Batch(rows[0], (0,))):
            model.model(**rows[0], use_cache=False)
        start = time.perf_counter()
        run.prune(block, recorder)
        took = time.perf_counter() - start
    model.load_state_dict(state)
    told = shape_of(model, inventory, chosen).blocks[0]
    return took, sum((cost.solves(told, rule) or {}).values(), cost.masks(told, rule))
