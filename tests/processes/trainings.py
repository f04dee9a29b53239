"""Trainings that run in one process or in many: the launched scripts and the tests that compare with them share these."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from models import llama, token_rows
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_sparse
from hf_sparse.kept import KeptMasks
from trainer_callbacks.distillation import Distillation
from trainer_callbacks.gradual_pruning import GradualPruning
from trainer_callbacks.keep_masks import KeepMasks
from trainer_callbacks.sparsify import Sparsify

STEPS, SAVED_AT, BATCH, LENGTH = 4, 2, 8, 16
SPARSE = {"metric": "magnitude", "pattern": "2:4"}
WANDA = {"metric": "wanda", "pattern": "2:4"}
DEFAULT = {"pattern": "2:4"}
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ.get("RANK", "0"))

Rows = list[dict[str, torch.Tensor]]
Result = dict[str, Any]  # what JSON holds, but for "weights": tensors by name


# ------------------------------------------------------------------------------------------------ models and data


def sparse(make: Callable[..., nn.Module] = llama, **changes: Any) -> nn.Module:
    model = make(**changes)
    hf_sparse.prune_(model, hf_sparse.SparsityConfig(**SPARSE))
    return model


def uneven() -> nn.Module:
    """Pruned, with matrices whose rows two processes cannot share out evenly."""
    return sparse(llama, intermediate_size=45)


def rows(padded: bool = True) -> Rows:
    """As many rows as all steps take; where some are padded, processes see different numbers of tokens and labels."""
    found = []
    for number, row in enumerate(token_rows(STEPS * BATCH, LENGTH)):
        mask = (torch.arange(LENGTH) < (LENGTH - 3 * (number % 4) if padded else LENGTH)).long()
        found.append({"input_ids": row * mask, "attention_mask": mask, "labels": row.masked_fill(mask == 0, -100)})
    return found


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return iter(rows(padded=False))


def local(parameter: torch.Tensor) -> torch.Tensor:
    data = parameter.detach()
    return data.to_local() if isinstance(data, DTensor) else data


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters, gathered; all processes have to call it."""
    found = {}
    for name, parameter in model.named_parameters():
        data = parameter.detach()
        plain = name.replace("_checkpoint_wrapped_module.", "")
        found[plain] = (data.full_tensor() if isinstance(data, DTensor) else data).float().clone()
    return found


# ------------------------------------------------------------------------------------------------ what is told


def wait() -> None:
    if WORLD > 1:
        torch.distributed.barrier()


def tell(folder: Path, phase: str, result: Result) -> None:
    """Write down what a phase of a script found, each process for itself."""
    save_file(result.pop("weights", {}), folder / f"{phase}-{RANK}.safetensors")
    (folder / f"{phase}-{RANK}.json").write_text(json.dumps(result))
    wait()


def told(folder: Path, phase: str, rank: int) -> Result:
    result: Result = json.loads((folder / f"{phase}-{rank}.json").read_text())
    return {**result, "weights": load_file(folder / f"{phase}-{rank}.safetensors")}


# ------------------------------------------------------------------------------------------------ with the Trainer


class Watch(TrainerCallback):
    """Looks at this process's part of every matrix of the blocks, after each step: is what was zero +0.0 still?

    After the step, not the optimizer's: callbacks that are restored from a checkpoint stand behind this one.
    """

    def __init__(self) -> None:
        self.lost: list[int] = []
        self.kinds: set[str] = set()
        self._zeros: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **events: Any) -> None:
        matrices = {name: one for name, one in model.named_parameters() if "layers." in name and one.ndim > 1}
        self.kinds = {type(one.data).__name__ for one in matrices.values()}
        self._zeros = {name: local(one) == 0 for name, one in matrices.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **events: Any) -> None:
        live = dict(model.named_parameters())
        bits = {name: local(live[name]).float().view(torch.int32) for name in self._zeros}
        self.lost.append(sum(int(torch.count_nonzero(bits[name][zeros])) for name, zeros in self._zeros.items()))

    @property
    def zeros(self) -> int:
        return sum(int(zeros.sum()) for zeros in self._zeros.values())


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Every training sees `BATCH` rows a step, however many processes and micro-batches share them."""
    settings: dict[str, Any] = {
        "use_cpu": True, "max_steps": STEPS, "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "weight_decay": 0.1,
        "logging_steps": 1, "save_steps": SAVED_AT, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "ddp_find_unused_parameters": False, "eval_strategy": "steps", "eval_steps": SAVED_AT, "eval_on_start": True,
    }  # fmt: skip
    settings |= changes
    shared = WORLD * settings["gradient_accumulation_steps"]
    return TrainingArguments(str(folder), per_device_train_batch_size=BATCH // shared, **settings)


def train(
    folder: Path, model: nn.Module, callbacks: list[Any], data: Any = None, resume: Any = None, **changes: Any
) -> Result:
    """What a training with these callbacks logged, what `Watch` saw, and the weights at its end; the model is in `folder/final`."""
    torch.manual_seed(RANK)  # the processes must not agree by chance
    watch, args = Watch(), arguments(folder, **changes)
    trainer = Trainer(
        model=model, args=args, train_dataset=rows() if data is None else data, eval_dataset=rows(padded=False)[:BATCH],
        callbacks=[*callbacks, watch],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume and str(resume))
    trainer.save_model(str(folder / "final"))
    wait()
    history = trainer.state.log_history
    figures = {
        name: [log[name] for log in history if name in log]
        for name in ("loss", "eval_loss", "sparsity", "mask_changes", "distillation_loss", "task_loss", "block_loss")
    }
    return {
        **figures, "lost": watch.lost, "zeros": watch.zeros, "kinds": sorted(watch.kinds), "model": type(trainer.model).__name__,
        "distributed": trainer.accelerator.distributed_type.value, "weights": whole(trainer.model),
    }  # fmt: skip


def keep_masks(folder: Path, **changes: Any) -> Result:
    return train(folder, sparse(), [KeepMasks()], save_strategy="steps", **changes)


def resumed(folder: Path, checkpoint: Path, **changes: Any) -> Result:
    """The second half of `keep_masks`, by a callback that the Trainer makes anew from its state."""
    changes |= {"restore_callback_states_from_checkpoint": True, "eval_on_start": False}
    return train(folder, sparse(), [KeepMasks()], resume=checkpoint, **changes)


def sparsify(folder: Path, config: dict[str, Any], data: Any = None, **changes: Any) -> Result:
    return train(folder, llama(), [Sparsify(config)], data, save_strategy="steps", **changes)


def distillation(folder: Path, **changes: Any) -> Result:
    return train(folder, sparse(), [KeepMasks(), Distillation(llama(), block_weight=1.0)], **changes)


def gradual(folder: Path, make: Callable[..., nn.Module] = llama, **changes: Any) -> Result:
    """Plain gradient descent: rounding grows under Adam, where gradients are nearly zero, and would change masks."""
    callback = GradualPruning(WANDA, end=0.75)
    changes |= {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1, "save_strategy": "steps"}
    return train(folder, make(), [callback], **changes)


def gradual_resumed(folder: Path, make: Callable[..., nn.Module] = llama) -> Result:
    """From a checkpoint in the midst of it; what is dropped there waits in a file in the training's own folder."""
    return gradual(folder, make, resume=folder / f"checkpoint-{SAVED_AT}", eval_on_start=False)


# ------------------------------------------------------------------------------------------------ without the Trainer


def steps(model: nn.Module, batch: Rows) -> Result:
    """A loop with nothing around it, all rows in each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)  # tensor parallelism leaves norms whole
    kept, losses, lost = KeptMasks(model), [], []
    together = {name: torch.stack([row[name] for row in batch]) for name in batch[0]}
    for _ in range(STEPS):
        loss = model(**together).loss
        loss.backward()
        optimizer.step()
        kept.apply_()
        optimizer.zero_grad()
        losses.append(loss.item())
        lost.append(kept.lost())
    return {"loss": losses, "lost": lost, "zeros": kept.zeros, "weights": whole(model)}


def loop(folder: Path, accelerator: Accelerator) -> Result:
    """The two lines that the documentation gives for loops of one's own, in one."""
    model = sparse()
    data = torch.utils.data.DataLoader(rows(padded=False), batch_size=BATCH // WORLD)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2), data)
    kept, losses, lost = KeptMasks(model), [], []
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        kept.apply_()
        optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach().reshape(1)).mean().item())
        lost.append(kept.lost())
    inner, state = accelerator.unwrap_model(model), accelerator.get_state_dict(model)
    inner.save_pretrained(folder / "final", state_dict=state, is_main_process=accelerator.is_main_process)
    wait()
    found = {"loss": losses, "lost": lost, "zeros": kept.zeros, "share": kept.sparsity()}
    return {**found, "distributed": accelerator.distributed_type.value, "weights": whole(inner)}


def refusal(attempt: Callable[[], object]) -> Result:
    """The error that an attempt ends in, which has to be the same in all processes."""
    try:
        attempt()
    except hf_sparse.errors.HfSparseError as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"error": "", "message": ""}
