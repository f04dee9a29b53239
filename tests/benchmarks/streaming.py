"""What pruning from disk to disk costs: `python -P tests/benchmarks/streaming.py memory | time [--json]`.

memory: a random Llama of 3 billion parameters (6.4 GB on disk) is pruned 2:4 with dass by `hf-sparse prune --stream` in a process
that may not have more than 3 GB of memory of its own (RLIMIT_DATA); the most that it had (RssAnon) is looked at all the while.
time: a random Llama of 0.5 billion parameters is pruned from disk to disk and in memory (load, prune, save, sync), interleaved.
`--folder` says where the models lie meanwhile; they are removed at the end.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_sparse import environment, prune_
from hf_sparse.destination import complete_folder
from hf_sparse.stream import prune_checkpoint

LIMIT = 3 * 10**9  # bytes
RATIO = 1.25
SHARD = 10**9
TOKENS = (4, 256)  # samples, and the length of each: little to compute shows most of what reading and writing costs
SIZES = {
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8,
           "vocab_size": 128256, "tie_word_embeddings": True},
    "0.5B": {"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 12, "num_attention_heads": 24, "num_key_value_heads": 8,
             "vocab_size": 32000, "tie_word_embeddings": False},
}  # fmt: skip


def make(size: str, folder: Path) -> int:
    """Write a random bfloat16 model, shard by shard; returns its number of parameters."""
    config = LlamaConfig(**SIZES[size], max_position_embeddings=2048, dtype=torch.bfloat16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.config.architectures = ["LlamaForCausalLM"]
    folder.mkdir(parents=True)
    shards: list[dict[str, torch.Size]] = [{}]
    total = count = 0
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if total + 2 * tensor.numel() > SHARD:
            shards.append({})
            total = 0
        shards[-1][name] = tensor.shape
        total, count = total + 2 * tensor.numel(), count + tensor.numel()
    generator = np.random.default_rng(0)
    names: dict[str, str] = {}
    for number, shapes in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        made = {name: _values(name, shape, generator) for name, shape in shapes.items()}
        save_file(made, folder / file, {"format": "pt"})
        names |= dict.fromkeys(shapes, file)
    index = {"metadata": {"total_size": 2 * count}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    return count


def _values(name: str, shape: torch.Size, generator: np.random.Generator) -> torch.Tensor:
    """Random bits with exponents of weights, 2**-10 to 2**-6 in size: billions of normal ones would take longer than pruning them."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    bits = np.frombuffer(generator.bytes(2 * shape.numel()), dtype=np.uint16).copy()
    exponents = bits >> 7
    exponents &= 3
    exponents += 117
    exponents <<= 7
    bits &= 0x807F
    bits |= exponents
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).view(shape)


def tokens(folder: Path, vocabulary: int, rows: int, length: int) -> Path:
    file = folder / "tokens.npy"
    np.save(file, np.random.default_rng(0).integers(3, vocabulary, (rows, length)))
    return file


def memory(folder: Path) -> dict[str, Any]:
    """Prune under the limit, and look at what the process takes."""
    parameters = make("3B", folder / "dense")
    data = tokens(folder, SIZES["3B"]["vocab_size"], *TOKENS)
    command = [
        sys.executable, "-m", "hf_sparse", "prune", str(folder / "dense"), str(folder / "sparse"), "--stream", "--pattern", "2:4",
        "--metric", "dass", "--update", "none", "--calibration", str(data), "--num-samples", str(TOKENS[0]), "--sequence-length", str(TOKENS[1]), "--hidden-memory", "100MB",
    ]  # fmt: skip
    start, peak = time.perf_counter(), 0
    # The limit is set in the child itself, before torch is imported.
    setting = f"import resource, os, sys; resource.setrlimit(resource.RLIMIT_DATA, ({LIMIT}, {LIMIT})); os.execv(sys.argv[1], sys.argv[1:])"
    child = subprocess.Popen([sys.executable, "-c", setting, *command], stdout=subprocess.DEVNULL)
    while child.poll() is None:
        peak = max(peak, private(child.pid))
        time.sleep(0.02)
    source, result = (
        sum(f.stat().st_size for f in (folder / name).glob("*.safetensors")) for name in ("dense", "sparse")
    )
    return {
        "parameters": parameters, "bytes on disk": source, "bytes of the result": result, "limit (RLIMIT_DATA)": LIMIT,
        "exit code": child.returncode, "peak of RssAnon": peak, "seconds": time.perf_counter() - start,
        "met": child.returncode == 0 and peak <= LIMIT and source == result,
    }  # fmt: skip


def private(process: int) -> int:
    """Bytes of memory of its own that a process has now."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def times(folder: Path, repeats: int) -> dict[str, Any]:
    """Prune in both ways, one after the other."""
    parameters = make("0.5B", folder / "dense")
    config = {
        "pattern": "2:4", "metric": "dass", "update": "none", "calibration": str(tokens(folder, 32000, *TOKENS)), "num_samples": TOKENS[0], "sequence_length": TOKENS[1],
    }  # fmt: skip
    found: dict[str, list[tuple[float, float]]] = {"in memory": [], "from disk to disk": []}
    for _ in range(repeats):
        for name, measured in found.items():
            shutil.rmtree(folder / "sparse", ignore_errors=True)
            wall, cpu = time.perf_counter(), time.process_time()
            if name == "in memory":
                model = AutoModelForCausalLM.from_pretrained(folder / "dense")
                prune_(model, config)
                with complete_folder(folder / "sparse") as fresh:
                    model.save_pretrained(fresh, max_shard_size="1GB")
                del model
            else:
                prune_checkpoint(folder / "dense", folder / "sparse", config)
            measured.append((time.perf_counter() - wall, time.process_time() - cpu))
            print(name, measured[-1], file=sys.stderr)
    pairs = list(zip(found["from disk to disk"], found["in memory"], strict=True))
    ratios = {kind: [one[place] / other[place] for one, other in pairs] for place, kind in enumerate(("wall", "cpu"))}
    return {
        "parameters": parameters, "threads": torch.get_num_threads(),
        **{f"seconds {name}": [round(wall, 1) for wall, _ in measured] for name, measured in found.items()},
        **{f"ratio ({kind})": round(statistics.median(values), 3) for kind, values in ratios.items()},
        **{f"ratios ({kind})": [round(value, 3) for value in values] for kind, values in ratios.items()},
        "at most": RATIO, "met": statistics.median(ratios["wall"]) <= RATIO, "peak memory of both": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("memory", "time"))
    parser.add_argument("--folder", type=Path, default=Path("streaming-benchmark"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    arguments.folder.mkdir(parents=True)
    try:
        found = memory(arguments.folder) if arguments.what == "memory" else times(arguments.folder, arguments.repeats)
    finally:
        shutil.rmtree(arguments.folder)
    found["versions"] = environment.versions()
    if arguments.json:
        print(json.dumps(found))
    else:
        print("\n".join(f"{name}: {value}" for name, value in found.items()))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
