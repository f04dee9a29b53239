"""Launched by tests/test_processes.py: trainings of models that accelerate shards with FSDP version 2."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from models import llama, mixtral, phi3
from processes import trainings
from torch.distributed.fsdp import FullyShardedDataParallel

from hf_sparse.kept import KeptMasks
from trainer_callbacks.keep_masks import KeepMasks
from trainer_callbacks.sparsify import Sparsify

FIRST = trainings.SAVED_AT
SHARDED = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
# What large models are trained with: bfloat16 beside single precision, recomputed activations, weights read by one process.
LARGE = {
    "fsdp": True, "bf16": True,
    "fsdp_config": {
        "version": 2, "activation_checkpointing": True, "cpu_ram_efficient_loading": True, "state_dict_type": "FULL_STATE_DICT",
    },
}  # fmt: skip


def let_fsdp_run_on_a_cpu() -> None:
    """Accelerate uses FSDP with accelerators only, and with a CPU it silently trains with DDP in its stead.

    What it calls, `torch.distributed.fsdp.fully_shard` and all around it, runs on a CPU, so only that condition (at the end of
    `AcceleratorState.__init__`) is taken away.
    """
    original = AcceleratorState.__init__

    def made(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **settings: Any) -> None:
        is_first = not AcceleratorState._shared_state
        original(self, *args, fsdp_plugin=fsdp_plugin, **settings)
        if is_first and fsdp_plugin is not None:
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = made


def loop(folder: Path) -> trainings.Result:
    AcceleratorState._reset_state(reset_partial_state=True)
    return trainings.loop(folder, Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2)))


def saved(folder: Path, model: Any, callbacks: list[Any], **changes: Any) -> trainings.Result:
    return trainings.train(folder, model, callbacks, save_strategy="steps", **changes)


def flat(folder: Path) -> trainings.Result:
    """The first version of FSDP, as torch has it: accelerate's plugin for it wants an accelerator to exist."""
    model = FullyShardedDataParallel(trainings.sparse(), use_orig_params=True, device_id=torch.device("cpu"))
    return trainings.refusal(lambda: KeptMasks(model))


def dense(folder: Path) -> trainings.Result:
    return trainings.refusal(lambda: trainings.train(folder, llama(), [Sparsify(trainings.SPARSE)]))


# Where nothing else is said, the flags of the launch hold.
PHASES: dict[str, Callable[[Path], trainings.Result]] = {
    "full": lambda folder: saved(folder, trainings.uneven(), [KeepMasks()]),
    "full_resumed": lambda folder: saved(
        folder, trainings.uneven(), [KeepMasks()], resume=folder.parent / "full" / f"checkpoint-{FIRST}"
    ),
    "sharded": lambda folder: trainings.keep_masks(folder, **SHARDED),
    "sharded_resumed": lambda folder: trainings.resumed(
        folder, folder.parent / "sharded" / f"checkpoint-{FIRST}", **SHARDED
    ),
    "phi3": lambda folder: trainings.train(folder, trainings.sparse(phi3), [KeepMasks()]),
    "mixtral": lambda folder: trainings.train(folder, trainings.sparse(mixtral), [KeepMasks()]),
    "large": lambda folder: trainings.train(folder, trainings.sparse(phi3), [KeepMasks()], **LARGE),
    "distillation": trainings.distillation,
    "gradual": lambda folder: trainings.gradual(folder, phi3),
    "gradual_resumed": lambda folder: trainings.gradual_resumed(folder.parent / "gradual", phi3),
    "loop": loop,
    "dense": dense,
    "flat": flat,
}


def main(folder: Path, wanted: list[str]) -> None:
    let_fsdp_run_on_a_cpu()
    for name, phase in PHASES.items():
        if not wanted or name in wanted:
            trainings.tell(folder, name, phase(folder / name))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
