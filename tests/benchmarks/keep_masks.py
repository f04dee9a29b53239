"""What keeping masks costs, as a share of a training step: `python tests/benchmarks/keep_masks.py [--json]`.

Steps of AdamW on a random Llama of about 100 M parameters, 2:4 in all sites, with and without `KeptMasks.apply_` in turn, in one
process; medians. And what counting the sparsity adds to a training log.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from pruning import model, seconds
from transformers import LlamaForCausalLM

from hf_sparse import SparsityConfig, environment, prune_
from hf_sparse.kept import KeptMasks

TARGET = 0.03
SEQUENCES, LENGTH = 4, 512


def step(
    llama: LlamaForCausalLM, optimizer: torch.optim.Optimizer, rows: torch.Tensor, behind: Callable[[], object]
) -> float:
    """Seconds of one step of training, from the forward pass on."""
    start = time.perf_counter()
    llama(input_ids=rows, labels=rows).loss.backward()
    optimizer.step()
    behind()
    optimizer.zero_grad()
    return time.perf_counter() - start


def measure(repeats: int) -> dict[str, Any]:
    llama = model().train()
    prune_(llama, SparsityConfig(metric="magnitude"))
    kept = KeptMasks(llama)
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-5)
    rows = torch.randint(0, 16000, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
    times: dict[str, list[float]] = {"plain step": [], "step with masks": [], "apply_": [], "sparsity": []}
    step(llama, optimizer, rows, kept.apply_)  # the optimizer makes its state
    for number in range(2 * repeats):
        with_masks = number % 2 == 1
        apply_seconds: list[float] = []
        behind = (lambda: apply_seconds.append(seconds(kept.apply_))) if with_masks else (lambda: None)  # noqa: B023
        times["step with masks" if with_masks else "plain step"].append(step(llama, optimizer, rows, behind))
        times["apply_"] += apply_seconds
        if not with_masks:
            kept.apply_()
        times["sparsity"].append(seconds(kept.sparsity))
    found = {name: statistics.median(values) for name, values in times.items()}
    return {
        "parameters": llama.num_parameters(), "weights_in_sites": kept.size, "tokens": rows.numel(), "lost": kept.lost(),
        "median_seconds": found, "apply_ / plain step": found["apply_"] / found["plain step"],
        "step with masks / plain step": found["step with masks"] / found["plain step"],
        "sparsity / plain step": found["sparsity"] / found["plain step"], "all_seconds": times,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    result = {**measure(arguments.repeats), "versions": environment.versions(), "threads": arguments.threads}
    if arguments.json:
        print(json.dumps(result))
        return
    print(
        f"random Llama, {result['parameters']:,} parameters, {result['weights_in_sites']:,} of them in sites, 2:4, {result['tokens']} tokens a "
        f"step, AdamW, {arguments.threads} threads, medians of {arguments.repeats}"
    )
    for name, value in result["median_seconds"].items():
        print(f"{name}: {value:.4f} s")
    print(f"apply_ takes {100 * result['apply_ / plain step']:.2f} % of a plain step (target {100 * TARGET:.0f} %)")
    print(
        f"a step with masks takes {result['step with masks / plain step']:.4f} of a plain one, noise of the machine included"
    )
    print(f"counting the sparsity for a log takes {100 * result['sparsity / plain step']:.2f} % of a step")
    print(f"zeros lost: {result['lost']}")


if __name__ == "__main__":
    main()
