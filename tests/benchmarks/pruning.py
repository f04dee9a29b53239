"""What pruning costs, as ratios within one run: `python tests/benchmarks/pruning.py [--json]`.

Time: pruning all sites 2:4 against one plain forward pass of the blocks over the same tokens in the same batches, interleaved.
Memory: the peak above the loaded model against what block-sequential pruning has to hold.
Import: what `import hf_sparse` adds to `from transformers import PreTrainedModel`.
"""

import argparse
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sparse import SparsityConfig, prune_
from hf_sparse import environment as surroundings
from hf_sparse.calibrate import make_batches, ready
from hf_sparse.patterns import Pattern
from hf_sparse.record import Recorder

ROOT = Path(__file__).resolve().parents[2]
# glibc keeps freed tensors of a few MiB in holes that aligned requests of the same size do not fit; with a low threshold every
# tensor goes back to the system when it is freed, which shows what is really held.
ALLOCATORS = {"default allocator": {}, "every tensor returned": {"MALLOC_MMAP_THRESHOLD_": "65536"}}
TARGETS = {"time": 2.3, "import seconds": 0.3}


def model() -> LlamaForCausalLM:
    """A random Llama of about 100 M parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=4, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tokens() -> torch.Tensor:
    return torch.randint(0, 16000, (32, 512), generator=torch.Generator().manual_seed(1))


def plain_pass(llama: LlamaForCausalLM, rows: torch.Tensor, batch_size: int) -> None:
    with torch.no_grad():
        for batch in rows.split(batch_size):
            llama.model(input_ids=batch, use_cache=False)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@contextmanager
def stopwatch(found: dict[str, float], **methods: tuple[type, str]) -> Iterator[None]:
    """Add up the time spent in some methods, to say what the rest is."""
    originals = {name: getattr(owner, method) for name, (owner, method) in methods.items()}

    def timed(name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                found[name] = found.get(name, 0.0) + time.perf_counter() - start

        return call

    for name, (owner, method) in methods.items():
        setattr(owner, method, timed(name, originals[name]))
    try:
        yield
    finally:
        for name, (owner, method) in methods.items():
            setattr(owner, method, originals[name])


def time_ratios(repeats: int) -> dict[str, Any]:
    dense, rows = model(), tokens()
    state = copy.deepcopy(dense.state_dict())
    _, batch_size = make_batches([{"input_ids": row[None]} for row in rows], "auto")
    times: dict[str, list[float]] = {"forward": [], "wanda": [], "dass": []}
    parts: dict[str, float] = {}
    plain_pass(dense, rows[:batch_size], batch_size)
    for _ in range(repeats):
        times["forward"].append(seconds(lambda: plain_pass(dense, rows, batch_size)))
        for metric in ("wanda", "dass"):
            dense.load_state_dict(state)
            config = SparsityConfig(metric=metric, calibration=rows, num_samples=len(rows))
            watched = (
                stopwatch(parts, statistics=(Recorder, "seen"), masks=(Pattern, "mask"))
                if metric == "wanda"
                else stopwatch(parts)
            )
            with watched:
                times[metric].append(seconds(lambda: prune_(dense, config)))  # noqa: B023  (called at once)
    forward = statistics.median(times["forward"])
    wanda = statistics.median(times["wanda"])
    named = {name: value / repeats / forward for name, value in parts.items()}
    return {
        "parameters": dense.num_parameters(), "tokens": rows.numel(), "batch_size": batch_size, "forward_seconds": forward,
        **{f"{metric} / forward": statistics.median(times[metric]) / forward for metric in ("wanda", "dass")},
        "rest of wanda, in forward passes": {**named, "site errors, survey, scan, counting": wanda / forward - 2 - sum(named.values())},
        "all_seconds": times,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------- memory


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system has no /proc/self/status; memory is not measured")


def _peak_above(work: Callable[[], object]) -> int:
    """Bytes that the process grows by at most while it works."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # makes the present size the new high-water mark
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def memory(metric: str) -> dict[str, Any]:
    dense, rows = model(), tokens()
    batches, batch_size = make_batches([{"input_ids": row[None]} for row in rows], "auto")
    layer = dense.model.layers[0]
    prune_(
        model_of_two(), SparsityConfig(metric=metric, calibration=rows[:2], num_samples=2)
    )  # libraries are loaded once
    hidden_bytes = rows.numel() * dense.config.hidden_size * 4
    x = torch.randn(batch_size, rows.shape[1], dense.config.hidden_size)
    places = dense.model.rotary_emb(x, torch.arange(rows.shape[1])[None])
    with ready(dense):
        activations = _peak_above(lambda: layer(x, position_embeddings=places))
    weights = sum(parameter.numel() * 4 for parameter in layer.parameters())
    features = 3 * dense.config.hidden_size + dense.config.intermediate_size
    del batches
    peak = _peak_above(lambda: prune_(dense, SparsityConfig(metric=metric, calibration=rows, num_samples=len(rows))))
    allowed = weights + features * 8 + 2 * hidden_bytes + activations
    return {
        "peak_bytes": peak, "allowed_bytes": allowed, "peak / allowed": peak / allowed,
        "allowed is": {"one block's weights": weights, "statistics": features * 8, "twice the hidden states": 2 * hidden_bytes, "one batch through one block": activations},
    }  # fmt: skip


def model_of_two() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=16000, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=2048,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


# ---------------------------------------------------------------------------------------------------- import


def import_seconds(repeats: int) -> dict[str, Any]:
    code = "import time; from transformers import PreTrainedModel; start = time.perf_counter(); import hf_sparse; print(time.perf_counter() - start)"
    run = [sys.executable, "-c", code]
    subprocess.run(run, check=True, capture_output=True, cwd=ROOT)  # bytecode is written once
    found = [
        float(subprocess.run(run, check=True, capture_output=True, text=True, cwd=ROOT).stdout) for _ in range(repeats)
    ]
    return {"median_seconds": statistics.median(found), "all": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory-of", choices=("wanda", "dass"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    if arguments.memory_of:
        print(json.dumps(memory(arguments.memory_of)))
        return
    result: dict[str, Any] = {"time": time_ratios(arguments.repeats)}
    for metric in ("wanda", "dass"):
        for allocator, variables in ALLOCATORS.items():
            command = [sys.executable, __file__, "--memory-of", metric, "--threads", str(arguments.threads)]
            environment = {**os.environ, **variables}
            done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment)
            result[f"memory, {metric}, {allocator}"] = json.loads(done.stdout.splitlines()[-1])
    result["import"] = import_seconds(2 * arguments.repeats + 1)
    result["versions"], result["threads"] = surroundings.versions(), arguments.threads
    if arguments.json:
        print(json.dumps(result))
        return
    took = result["time"]
    print(
        f"random Llama, {took['parameters']:,} parameters, {took['tokens']} tokens, batches of {took['batch_size']}, {arguments.threads} threads"
    )
    for metric in ("wanda", "dass"):
        print(f"pruning 2:4 with {metric}: {took[f'{metric} / forward']:.2f} forward passes (target {TARGETS['time']})")
    for name, value in took["rest of wanda, in forward passes"].items():
        print(f"  beside the two passes, {name}: {value:.3f}")
    for name, held in result.items():
        if name.startswith("memory"):
            peak, allowed = held["peak_bytes"] / 2**20, held["allowed_bytes"] / 2**20
            print(
                f"{name}: {peak:.0f} MiB above the model, {held['peak / allowed']:.2f} of the allowed {allowed:.0f} MiB"
            )
    print(f"import hf_sparse adds {result['import']['median_seconds']:.3f} s (target {TARGETS['import seconds']})")


if __name__ == "__main__":
    main()
