"""How much faster two processes prune than one: `python tests/benchmarks/processes.py [--json]`.

Both processes have one thread each and stay alive; in turns the first prunes by itself while the second waits, and both prune
together. So each pair of times is taken close together on the same machine, and their ratio is what counts. On a machine that others
use as well, the CPU seconds of one process over those of the busier of two tell what two cores of one's own would give.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import distributed
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sparse import SparsityConfig, environment, prune_, ranks

ROOT = Path(__file__).resolve().parents[2]
TARGET = 1.6
RECIPES: dict[str, dict[str, Any]] = {
    "wanda": {"metric": "wanda"},
    "dass": {"metric": "dass"},
    "sparsegpt": {"metric": "sparsegpt"},
    "wanda, admm": {"metric": "wanda", "update": "admm"},
    "default (wanda, dense_stream, admm)": {},
}


def model(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4000, hidden_size=512, intermediate_size=1376, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tokens() -> torch.Tensor:
    return torch.randint(0, 4000, (16, 512), generator=torch.Generator().manual_seed(1))


def measure(layers: int, repeats: int, wanted: list[str]) -> dict[str, Any]:
    llama, rows = model(layers), tokens()
    state = copy.deepcopy(llama.state_dict())
    found: dict[str, Any] = {}
    for name in wanted:
        config = SparsityConfig(calibration=rows, num_samples=len(rows), batch_size=2, **RECIPES[name])
        times: dict[str, list[float]] = {"one": [], "two": []}
        busy: dict[str, list[float]] = {"one": [], "two": []}
        masks = {}
        for _ in range(repeats):
            for which in times:
                llama.load_state_dict(state)
                distributed.barrier()
                start, spent = time.perf_counter(), time.process_time()
                if which == "two":
                    prune_(llama, config)
                elif distributed.get_rank() == 0:
                    with ranks.alone():
                        prune_(llama, config)
                cpu = torch.tensor(time.process_time() - spent)
                distributed.all_reduce(cpu, distributed.ReduceOp.MAX)
                busy[which].append(float(cpu))
                times[which].append(time.perf_counter() - start)
                masks[which] = [parameter != 0 for parameter in llama.parameters()]
        bits = sum(int((one != other).sum()) for one, other in zip(masks["one"], masks["two"], strict=True))
        pairs = [one / two for one, two in zip(times["one"], times["two"], strict=True)]
        found[name] = {
            "speed-up": statistics.median(pairs), "best pair": max(pairs), "best by best": min(times["one"]) / min(times["two"]),
            "CPU": statistics.median(one / two for one, two in zip(busy["one"], busy["two"], strict=True)), "CPU seconds": busy,
            "mask bits that differ": bits, "weights": sum(mask.numel() for mask in masks["one"]), "seconds": times,
        }  # fmt: skip
        if distributed.get_rank() == 0:
            print(f"{name}: {found[name]['speed-up']:.2f}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            __file__,
            *sys.argv[1:],
        ]
        raise SystemExit(subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT).returncode)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    distributed.init_process_group("gloo")
    found = measure(arguments.layers, arguments.repeats, arguments.recipes)
    if distributed.get_rank() == 0 and arguments.json:
        print(json.dumps({"recipes": found, "versions": environment.versions()}))
    elif distributed.get_rank() == 0:
        print(
            f"random Llama, hidden size 512, MLP 1376, {arguments.layers} blocks; {tokens().numel()} tokens, batches of 2; one thread a process"
        )
        for name, values in found.items():
            pair = ", ".join(f"{which} {statistics.median(times):.1f} s" for which, times in values["seconds"].items())
            print(
                f"{name}: {values['speed-up']:.2f} times as fast in two processes (median of {arguments.repeats} pairs; best pair "
                f"{values['best pair']:.2f}, best times {values['best by best']:.2f}; {pair}; target {TARGET}), by CPU seconds {values['CPU']:.2f}; "
                f"{values['mask bits that differ']} of {values['weights']} mask bits differ"
            )
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
