"""GradualPruning: from a dense model to a sparse one over a schedule, while the Trainer trains it."""

import warnings
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_sparse import checkpoint
from hf_sparse.config import SparsityConfig
from hf_sparse.errors import CheckpointError, ConfigError, HfSparseError
from hf_sparse.gradual import Gradual, Schedule, Timing, fitting
from hf_sparse.gradual.account import report_of
from hf_sparse.gradual.dormant import FILE_NAME, load_dormant_, save_dormant
from hf_sparse.gradual.inputs import TrainingInputs
from hf_sparse.report_text import percent
from trainer_callbacks.account import Account, describe
from trainer_callbacks.base import SparsityCallback

_NAMED = 3


class GradualPruning(SparsityCallback, ExportableState):
    """Prunes a model step by step while any `transformers.Trainer` trains it: `callbacks=[GradualPruning(config)]`.

    `config` is the target: a `SparsityConfig`, a dict or the path of a file, with any pattern and axis, an allocation in closed form
    and a metric that needs nothing or norms of inputs, which come from the batches of the training itself (padding not counted).
    metric="auto" and update="auto" stand for wanda without an update here, as the training gives the kept weights new values.

    From `start` on, the share of zeros of each site goes from what it holds when training begins to its target at `end`, along
    s(t) = target + (begin - target) * (1 - (t - start) / (end - start))^3 (Zhu and Gupta, arXiv 1710.01878, equation 1), or linearly
    with schedule="linear". Behind `every`th step the masks are made anew from the present weights and, for those that are dropped,
    from their last values: of what the mask of the target drops, the lowest scores go. Behind `freeze` (by default `end`) the masks
    stay as they are. Steps are whole numbers; floats are shares of the training.

    Until the freeze it takes, beside one byte for each weight of the targeted matrices, a copy of the dropped ones. A checkpoint keeps
    it in `hf_sparse_dormant.safetensors`, so that a resumed training goes on as if it had never stopped; it carries a report and a
    claim of sparsity in its config from the freeze on.

    Raises ConfigError for what cannot be met step by step; when training begins, for a schedule that ends after it does, a site that is
    sparser than its target, torch.compile or several devices in one process with a metric that needs activations, and optimizers that
    hold other weights than the model; ModelError for weights that do not train (under an adapter), are quantized, flattened or empty;
    CheckpointError for a resumed checkpoint that has lost zeros. Where training stops before the target is met, a warning and the
    report say what holds.
    """

    keeps_zeros = True

    def __init__(
        self, config: SparsityConfig | Mapping[str, Any] | str | Path, *, start: float = 0.0, end: float = 0.5,
        every: int | None = None, freeze: float | None = None, schedule: str = "cubic",
    ) -> None:  # fmt: skip
        self.config = fitting(SparsityConfig.of(config))
        self.timing = Timing(start, end, every, freeze, schedule)
        self._gradual: Gradual | None = None
        self._inputs: TrainingInputs | None = None
        self._schedule: Schedule | None = None
        self._late = False  # whether masks could not be made when they were due
        self._data: dict[str, Any] | None = None  # what the activations of the last update were

    # ------------------------------------------------------------------------------------------------ begin

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **events: Any
    ) -> None:
        self._close()  # a training that broke off
        saved = self._saved(state)
        schedule = self.timing.over(state.max_steps)
        gradual = Gradual(model, self.config, saved)
        self._refuse(args, gradual, events.get("optimizer"))
        self._gradual, self._schedule = gradual, schedule
        self._inputs = gradual.inputs() if gradual.needs_inputs else None
        self._late, self._data = saved.get("late", False), saved.get("data")
        if state.global_step:
            self._resume(args, state)
        if not gradual.frozen:
            self._attach_under_way()
        self._account = Account.of(model, state)
        self._account.earlier.update(saved.get("so_far") or {})
        # The Trainer keeps states under the names that the checkpoint has, and fails at its next save without this one.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.begin(args, state, model, **events)

    def _saved(self, state: TrainerState) -> dict[str, Any]:
        """What the checkpoint keeps of this callback; nothing unless the training was resumed from one that was saved with it."""
        found = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(found, list):
            raise ConfigError(
                f"{len(found)} callbacks of {type(self).__name__} cannot share a training; give one config for all sites, with a mapping from "
                "globs over site names as allocation where they shall differ."
            )
        return dict(found.get("attributes", {}).get("progress") or {}) if state.global_step and found else {}

    def _refuse(self, args: TrainingArguments, gradual: Gradual, optimizer: Any) -> None:
        if getattr(args, "deepspeed_plugin", None) is not None:
            raise ConfigError(
                "GradualPruning cannot run under DeepSpeed, whose optimizers train a copy of the weights in which dropped ones go on; use DDP or "
                "FSDP version 2, or prune before the Trainer is made and use KeepMasks."
            )
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        if callable(getattr(optimizer, "eval", None)):
            raise ConfigError(
                f"{type(optimizer).__name__} evaluates with an average of weights that it keeps for itself, so masks cannot change under it; use an "
                "optimizer such as AdamW, or prune with Sparsify when training begins."
            )
        modules = list(gradual.model.modules())
        compiled = args.torch_compile or any(module._compiled_call_impl is not None for module in modules)
        compiled = compiled or any(hasattr(module, "_orig_mod") for module in modules)
        if gradual.needs_inputs and (compiled or args.n_gpu > 1):
            why = "torch.compile hides them" if compiled else "one process drives several devices (start one for each)"
            raise ConfigError(
                f"metric={self.config.metric!r} needs activations of the training, and {why}; use metric='magnitude', which needs none."
            )

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        """Go on where the checkpoint was: with its masks for good, or with masks that still move."""
        gradual, schedule, step = self._running(), self._planned(), state.global_step
        if step >= schedule.freeze and not self._late:
            gradual.freeze_()
            if unmet := gradual.unmet():
                raise CheckpointError(
                    f"the checkpoint of step {step} should hold its target since step {schedule.freeze}, and {len(unmet)} sites do not, such as "
                    f"{', '.join(unmet[:_NAMED])}: it was written by a training that did not keep the masks. Resume from an older one, or start anew."
                )
            self._attach(())
            return
        folders = [args.resume_from_checkpoint, Path(args.output_dir) / f"checkpoint-{step}"]
        files = [Path(folder) / FILE_NAME if isinstance(folder, str | Path) else None for folder in folders]
        # Whether one can be used is agreed on by all processes, so they try the same ones.
        if not any(load_dormant_(gradual.held, file) for file in dict.fromkeys(files)) and gradual.sparsity():
            warnings.warn(
                f"no {FILE_NAME} that belongs to the checkpoint of step {step} was found in {folders[-1]}: weights that are dropped now come "
                "back as zeros where they come back, so this training is not quite what it would have been.",
                stacklevel=3,
            )

    # ------------------------------------------------------------------------------------------------ step by step

    def _due(self, step: int) -> bool:
        return (
            self._gradual is not None and not self._gradual.frozen and (self._late or self._planned().changes_at(step))
        )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **events: Any
    ) -> None:
        if self._inputs is not None and self._due(state.global_step + 1):
            self._inputs.listen_()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **events: Any
    ) -> None:
        if self._gradual is None:
            return
        gradual, step = self._gradual, state.global_step + 1
        if self._due(step):
            self._update(step, events.get("train_dataloader"))
        else:
            gradual.apply_()
        if step >= self._planned().freeze and not gradual.frozen and not self._late:
            gradual.freeze_()
            self._attach(())

    def _update(self, step: int, loader: Any) -> None:
        """Make the masks anew; activations that are not finite, as fp16 may have them, put it off to the next step."""
        gradual = self._running()
        measured = self._inputs.collect_() if self._inputs is not None else None
        self._late = measured is not None and not measured.finite
        if self._late:
            warnings.warn(
                f"step {step}: activations are NaN or infinite, so the masks stay as they are until the next step",
                stacklevel=3,
            )
            gradual.apply_()
            return
        gradual.update_(self._planned().remaining(step), measured)
        if measured is not None:
            source, fingerprint = describe(getattr(loader, "dataset", None))
            self._data = {
                "source": f"the batches of training step {step} ({source})", "fingerprint": fingerprint or "not known",
                "samples": measured.sequences, "tokens": max(measured.tokens.values()), "batch_size": measured.batch_size,
            }  # fmt: skip

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **events: Any) -> None:
        if self._gradual is not None and not self._gradual.frozen and not args.save_only_model:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            save_dormant(self._gradual.held, folder, writes=args.should_save and folder.is_dir())

    # ------------------------------------------------------------------------------------------------ end

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **events: Any
    ) -> None:
        if self._gradual is not None:
            unmet = self._gradual.unmet()
            if unmet or not self._gradual.frozen:
                best = args.load_best_model_at_end and state.best_global_step
                self._attach(unmet, best or state.global_step)
            if unmet:
                self._close()  # these masks are not those of the weights
        super().on_train_end(args, state, control, model, **events)
        self._close()

    def _attach(self, unmet: Collection[str], stopped: int | None = None) -> None:
        """Let the model know, and its config claim, what was reached."""
        gradual, schedule = self._running(), self._planned()
        notes = [f"gradual pruning: {schedule}"]
        if stopped is not None:
            notes.append(f"the weights are those of step {stopped}, before the masks were frozen")
        report = self._with_past(report_of(gradual, unmet, notes, self._data))
        if unmet:
            warnings.warn(
                f"gradual pruning ended before its target was met: {len(unmet)} of {len(gradual.plans)} sites do not hold it, such as "
                f"{', '.join(list(unmet)[:_NAMED])}; {percent(report.sparsity)} zeros were counted, and report and config claim no more.",
                stacklevel=3,
            )
        if report.zeros:
            checkpoint.attach(gradual.model, report)
        else:
            checkpoint.detach(gradual.model)

    def _attach_under_way(self) -> None:
        """What the model was is not what it is going to be: until the freeze it has a report at most, and no claim."""
        gradual = self._running()
        checkpoint.detach(gradual.model)
        if gradual.sparsity():
            notes = [f"gradual pruning is under way: {self._planned()}"]
            checkpoint.attach_report(gradual.model, self._with_past(report_of(gradual, set(gradual.plans), notes)))

    def _with_past(self, report: Any) -> Any:
        """The report with the trainings that the model has gone through."""
        gradual = self._running()
        known = checkpoint.report(gradual.model) or gradual.earlier
        report.recoveries = list(known.recoveries) if known else []
        return report

    def abandon_(self) -> None:
        # Perhaps between the optimizer's step and ours; no error of ours may hide the one that broke the training off.
        with suppress(HfSparseError, RuntimeError):
            if self._gradual is not None:
                self._gradual.apply_()
        self._close()
        super().abandon_()

    def _close(self) -> None:
        if self._inputs is not None:
            self._inputs.stop_()
        self._gradual = self._inputs = None

    # ------------------------------------------------------------------------------------------------ telling

    def _running(self) -> Gradual:
        if self._gradual is None:
            raise ConfigError("the training has not begun; the Trainer calls on_train_begin.")
        return self._gradual

    def _planned(self) -> Schedule:
        if self._schedule is None:
            raise ConfigError("the training has not begun; the Trainer calls on_train_begin.")
        return self._schedule

    @property
    def words(self) -> str:
        return "gradual pruning"

    @property
    def settings(self) -> dict[str, Any]:
        """The schedule in steps."""
        numbers = self._schedule.to_dict() if self._schedule is not None else {}
        return {f"pruning_{name}": value for name, value in numbers.items()}

    def figures(self) -> dict[str, float]:
        if self._gradual is None:
            return {}
        return {"sparsity": self._gradual.sparsity(), "mask_changes": self._gradual.changed_()}

    def lost(self) -> int:
        return 0 if self._gradual is None else self._gradual.lost()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the callback; masks are in its weights, and beside them until the freeze."""
        timing = self.timing
        given = {
            "config": self.config.to_dict(), "start": timing.start, "end": timing.end, "every": timing.every, "freeze": timing.freeze,
            "schedule": timing.shape,
        }  # fmt: skip
        if self._gradual is None:
            return {"args": given, "attributes": {}}
        progress = {
            **self._gradual.progress(), "late": self._late, "data": self._data,
            "so_far": dict(self._account.so_far) if self._account else {},
        }  # fmt: skip
        return {"args": given, "attributes": {"progress": progress}}
