"""Launched by tests/test_processes.py: trainings under DDP, and of models that Transformers has sharded as it loaded them."""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from processes import trainings
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from trainer_callbacks.keep_masks import KeepMasks


def at_load(folder: Path, name: str) -> trainings.Result:
    """FSDP version 2 as Transformers has it itself; such trainings save no optimizer and cannot be resumed."""
    model = AutoModelForCausalLM.from_pretrained(
        folder.parent / name, distributed_config=DistributedConfig(fsdp_size=2)
    )
    return trainings.train(folder, model, [KeepMasks()], save_strategy="steps", save_only_model=True)


def tensor_parallel(folder: Path, name: str) -> trainings.Result:
    """Matrices cut along their inputs, and experts with each half of gate and up in two pieces; all processes see all rows."""
    model = AutoModelForCausalLM.from_pretrained(folder.parent / name, distributed_config=DistributedConfig(tp_size=2))
    return trainings.steps(model, trainings.rows(padded=False))


def loop(folder: Path) -> trainings.Result:
    AcceleratorState._reset_state(reset_partial_state=True)
    return trainings.loop(folder, Accelerator(cpu=True))


PHASES: dict[str, Callable[[Path], trainings.Result]] = {
    "keep_masks": trainings.keep_masks,
    "resumed": lambda folder: trainings.resumed(
        folder, folder.parent / "keep_masks" / f"checkpoint-{trainings.SAVED_AT}"
    ),
    "sparsify_magnitude": lambda folder: trainings.sparsify(folder, trainings.SPARSE),
    "sparsify_default": lambda folder: trainings.sparsify(folder, trainings.DEFAULT),
    "sparsify_resumed": lambda folder: trainings.sparsify(
        folder, trainings.DEFAULT, resume=folder.parent / "sparsify_default" / f"checkpoint-{trainings.SAVED_AT}"
    ),
    "sparsify_stream": lambda folder: trainings.sparsify(folder, trainings.WANDA, trainings.Stream()),
    "distillation": trainings.distillation,
    "gradual": trainings.gradual,
    "gradual_resumed": lambda folder: trainings.gradual_resumed(folder.parent / "gradual"),
    "loop": loop,
    "at_load_uneven": lambda folder: at_load(folder, "sparse-uneven"),
    "at_load_phi3": lambda folder: at_load(folder, "sparse-phi3"),
    "at_load_mixtral": lambda folder: at_load(folder, "sparse-mixtral"),
    "tensor_parallel": lambda folder: tensor_parallel(folder, "sparse-mixtral"),
}


def main(folder: Path, wanted: list[str]) -> None:
    for name, phase in PHASES.items():
        if not wanted or name in wanted:
            trainings.tell(folder, name, phase(folder / name))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
