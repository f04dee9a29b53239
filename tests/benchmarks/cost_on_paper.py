"""What pruning large models would cost, computed and not measured: `python -P tests/benchmarks/cost_on_paper.py`.

The same formulas as the dry run's, with rates from data sheets times a stated utilisation. Models are made on the meta device.
"""

import dataclasses
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from hf_sparse import SparsityConfig
from hf_sparse.cost import Rates, Work, bitmask_bytes
from hf_sparse.families import find_sites
from hf_sparse.forecast import data_of
from hf_sparse.forecast.phases import Job, peak, phases, private_peak, spilled
from hf_sparse.plan import select
from hf_sparse.room import shown
from hf_sparse.shapes import ModelShape, shape_of

# name -> hidden, intermediate (of an expert), blocks, heads, key-value heads, vocabulary, experts, chosen experts
MODELS = {
    "7B": (4096, 11008, 32, 32, 32, 32000, 0, 0), "70B": (8192, 28672, 80, 64, 8, 32000, 0, 0),
    "405B": (16384, 53248, 126, 128, 8, 128256, 0, 0), "1T, 8 of 256 experts": (7168, 3072, 60, 64, 8, 128256, 256, 8),
}  # fmt: skip
RECIPES = {
    "2:4 dass": {"metric": "dass", "pattern": "2:4"},
    "50 % sparsegpt": {"metric": "sparsegpt", "pattern": "unstructured", "sparsity": 0.5},
}
HIDDEN = 4 * 10**9
_SAMPLED, _PASSES, _SORT = (
    1024,
    100,
    300,
)  # for each weight: FLOPs of the error sample, bytes of passes, bytes of a sort


@dataclass(frozen=True)
class Hardware:
    """Rates that are assumed, after utilisation, of one process."""

    ranks: int
    product: float  # FLOP/s, bf16 (fp32 on the small CPU)
    wide: float  # FLOP/s, fp32
    exact: float  # FLOP/s, fp64 factorisations
    bandwidth: float  # bytes/s of memory
    disk: float  # bytes/s
    call: float  # seconds
    network: float = 50e9  # bytes/s between processes
    link: float | None = None  # bytes/s between host and accelerator
    device: float | None = None  # bytes of an accelerator's memory


HARDWARE = {
    # as measured on one core by tests/benchmarks/cost.py: 77 GFLOP/s; two cores
    "2-core Xeon": Hardware(1, 2 * 77e9, 2 * 77e9, 2 * 25e9, 2 * 5e9, 0.5e9, 5e-6),
    # AMX bf16 262 TFLOP/s x 30 %, AVX-512 fp32 10 TFLOP/s x 60 %, fp64 5 TFLOP/s x 40 %, 8 channels of DDR5-4800 307 GB/s x 70 %
    "64-core CPU": Hardware(1, 79e12, 6e12, 2e12, 215e9, 5e9, 5e-6),
    # bf16 989 TFLOP/s x 45 %, fp32 67 x 70 %, fp64 67 x 30 %, HBM 3.35 TB/s x 70 %, PCIe 5 at 50 GB/s
    "1 H100": Hardware(1, 445e12, 47e12, 20e12, 2.3e12, 6e9, 6e-6, 300e9, 50e9, 80e9),
    "8 H100": Hardware(8, 445e12, 47e12, 20e12, 2.3e12, 6e9, 6e-6, 300e9, 50e9, 80e9),
    # four nodes, 400 Gbit/s for each accelerator
    "4 x 8 H100": Hardware(32, 445e12, 47e12, 20e12, 2.3e12, 6e9, 6e-6, 40e9, 50e9, 80e9),
}


def rates(told: Hardware, sorts: bool) -> Rates:
    bytes_each = _PASSES + (_SORT if sorts else 0)
    return Rates(
        product=1 / told.product, attention=2 / told.product, wide=1 / told.wide, exact=1 / told.exact, moved=1 / told.bandwidth,
        observed=8 / told.bandwidth, weighed=bytes_each / told.bandwidth + _SAMPLED / told.wide, scanned=8 / told.bandwidth,
        calls=told.call, read=1 / told.disk, written=1 / told.disk, exchanged=1 / told.network,
    )  # fmt: skip


def shape(name: str, config: SparsityConfig) -> ModelShape:
    hidden, intermediate, blocks, heads, groups, vocabulary, experts, chosen = MODELS[name]
    common = {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": blocks, "num_attention_heads": heads,
        "num_key_value_heads": groups, "vocab_size": vocabulary, "head_dim": 128,
    }  # fmt: skip
    with torch.device("meta"):
        model = (
            MixtralForCausalLM(MixtralConfig(**common, num_local_experts=experts, num_experts_per_tok=chosen))
            if experts
            else LlamaForCausalLM(LlamaConfig(**common))
        )
    inventory = find_sites(model)
    sites, _ = select(inventory, config)
    return dataclasses.replace(shape_of(model, inventory, sites), itemsize=2)


def main() -> None:
    print(
        "| model | recipe | hardware | time | of it: passes, statistics, masks, updates, disk | memory of a process | of it statistics | hidden states in files |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for recipe, fields in RECIPES.items():
        config = SparsityConfig(calibration="text", **fields)
        data = data_of(config, None)
        for name in MODELS:
            told = shape(name, config)
            size = told.parameters * 2
            for machine, hardware in HARDWARE.items():
                speed = rates(hardware, sorts="sparsegpt" in recipe)
                job = Job(
                    shape=told, config=config, data=data, rates=speed, solvers={}, stream=True, ranks=hardware.ranks, hidden_memory=HIDDEN,
                    files=size, mapped=0, compress=False, sparsity=0.5,
                )  # fmt: skip
                found = {phase.name: phase.seconds or 0.0 for phase in phases(job)}
                disk = Work(read=4 * size, written=size).seconds(speed)
                link = 0.0
                if hardware.link and data:
                    states = 4 * data.tokens // hardware.ranks * told.hidden * 2 * len(told.blocks)
                    link = (states + 3 * size) / hardware.link
                parts = [found[key] for key in ("forward passes", "statistics", "scores and masks", "updates")]
                parts[0] -= Work(read=2 * sum(block.parameters for block in told.blocks) * 2).seconds(speed)
                top, held = peak(job), private_peak(job)
                fits = ""
                if hardware.device:
                    on_device = max(block.parameters for block in told.blocks) * 2 + top.statistics + top.work
                    held, fits = on_device, "" if on_device < 0.95 * hardware.device else ", does not fit"
                shares = ", ".join(hours(part) for part in (*parts, disk))
                print(
                    f"| {name} ({told.parameters / 1e9:.0f}) | {recipe} | {machine} | {hours(sum(found.values()) + link)} | {shares} | "
                    f"{shown(held)}{fits} | {shown(top.statistics)} | {shown(spilled(job)) if spilled(job) else '-'} |"
                )
            print(
                f"<!-- {name}: plain result {shown(size)}, bitmask {shown(bitmask_bytes(told.parameters, 2, 0.5))} -->"
            )


def hours(seconds: float) -> str:
    for unit, name in ((86400 * 365, "years"), (86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"


if __name__ == "__main__":
    main()
