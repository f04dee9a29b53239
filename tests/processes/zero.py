"""Launched by tests/test_processes.py where DeepSpeed is installed: trainings with its ZeRO optimizers."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from models import llama
from processes import trainings

from trainer_callbacks.keep_masks import KeepMasks
from trainer_callbacks.sparsify import Sparsify


def stage(number: int, **more: Any) -> dict[str, Any]:
    same = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {
        "deepspeed": {
            **dict.fromkeys(same, "auto"),
            "zero_optimization": {"stage": number},
            "zero_allow_untested_optimizer": True,
            **more,
        }
    }


def whole_models_only(folder: Path) -> trainings.Result:
    return trainings.refusal(lambda: trainings.train(folder, llama(), [Sparsify(trainings.SPARSE)], **stage(1)))


def no_parameters(folder: Path) -> trainings.Result:
    return trainings.refusal(lambda: trainings.train(folder, trainings.sparse(), [KeepMasks()], **stage(3)))


def resumed(folder: Path, number: int) -> trainings.Result:
    earlier = folder.parent / f"stage_{number}" / f"checkpoint-{trainings.SAVED_AT}"
    return trainings.resumed(folder, earlier, **stage(number))


def converted(folder: Path, number: int) -> trainings.Result:
    """What DeepSpeed's own `zero_to_fp32.py` makes of a checkpoint: the copy in single precision that its optimizer holds."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    checkpoint = folder.parent / f"stage_{number}" / f"checkpoint-{trainings.STEPS}"
    return {"weights": dict(get_fp32_state_dict_from_zero_checkpoint(str(checkpoint)))}


PHASES: dict[str, Callable[[Path], trainings.Result]] = {
    "stage_1": lambda folder: trainings.keep_masks(folder, **stage(1)),
    "stage_1_resumed": lambda folder: resumed(folder, 1),
    "stage_1_converted": lambda folder: converted(folder, 1),
    "stage_2": lambda folder: trainings.keep_masks(folder, **stage(2)),
    "stage_2_resumed": lambda folder: resumed(folder, 2),
    "stage_2_converted": lambda folder: converted(folder, 2),
    "mixed": lambda folder: trainings.keep_masks(folder, bf16=True, **stage(2, bf16={"enabled": "auto"})),
    "dense": whole_models_only,
    "stage_3": no_parameters,
}


def main(folder: Path, wanted: list[str]) -> None:
    for name, phase in PHASES.items():
        if not wanted or name in wanted:
            trainings.tell(folder, name, phase(folder / name))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
