"""KeepMasks: what is zero in a model's sites when training begins stays so in every step, evaluation and checkpoint."""

import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_sparse.errors import ConfigError, HfSparseError, ModelError
from hf_sparse.kept import KeptMasks
from trainer_callbacks.account import Account
from trainer_callbacks.base import SparsityCallback

_PRUNING = (
    "GradualPruning",
    "Sparsify",
)  # the callbacks that prune, by the names under which the Trainer has their states


class KeepMasks(SparsityCallback, ExportableState):
    """Keeps the zeros of a sparse model while any Trainer trains it: `Trainer(..., callbacks=[KeepMasks()])`.

    The masks are read from the live weights when training begins, on every process for what it holds (DDP, FSDP
    version 2), and written behind each optimizer step, before anything can evaluate, log or save. Only sites have masks:
    matrices inside the model's blocks, never norms, biases, embeddings, heads or adapters. They take one byte for each
    weight of those matrices. For loops without the Trainer see `hf_sparse.KeptMasks`.

    Raises when the Trainer is made: ConfigError beside a callback that prunes, which keeps its masks itself. Raises when
    training begins: ModelError for a model without zeros, or whose weights are quantized, offloaded,
    flattened or empty (FSDP version 1, DeepSpeed ZeRO stage 3); CheckpointError for a resumed checkpoint that has lost
    zeros. While it runs: ModelError where a parameter was exchanged.
    """

    keeps_zeros = True

    def __init__(self) -> None:
        self._kept: KeptMasks | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **events: Any) -> None:
        others = [name for name in _PRUNING if name in state.stateful_callbacks]
        if others and type(self).__name__ not in _PRUNING:
            raise ConfigError(
                f"{type(self).__name__} and {others[0]} are in one training: {others[0]} prunes the model and keeps its masks "
                f"itself, and {type(self).__name__} would keep those of the model before; leave {type(self).__name__} out."
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **events: Any
    ) -> None:
        self._kept = None  # of a training that broke off
        resumed = f"the checkpoint of step {state.global_step}" if state.global_step else None
        saved = self._saved(state)
        zeros = saved.get("zeros")
        self._kept = KeptMasks(model, resumed=resumed, zeros=zeros if isinstance(zeros, Mapping) else None)
        self._kept.apply_()  # other tools leave -0.0
        self._look_at_adapters(model)
        self._account = Account.of(model, state)
        self._account.earlier.update(saved.get("so_far") or {})
        # The Trainer keeps states under the names that the checkpoint has, and fails at its next save without this one.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.begin(args, state, model, **events)

    def _look_at_adapters(self, model: nn.Module) -> None:
        """Tell of adapters that would fill in the zeros when they are merged, but in shards, where nothing can be merged."""
        whole = not any(isinstance(parameter, DTensor) for parameter in model.parameters())
        if whole and has_adapters(model) and (lost := stake(model)):
            warnings.warn(
                f"the adapters are not masked: training leaves the {lost:,} zeros of the matrices under them alone, but a "
                "merge fills them in, or cuts what was trained there. Call hf_sparse.mask_lora_(model) before training, or "
                "train with hf_sparse.sparse_shira_config.",
                stacklevel=3,
            )

    def _saved(self, state: TrainerState) -> dict[str, Any]:
        """What the checkpoint keeps of this callback; nothing where none was resumed, or one saved without it."""
        found = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        found = found[-1] if isinstance(found, list) and found else found
        return dict(found.get("attributes") or {}) if isinstance(found, dict) else {}

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **events: Any,
    ) -> None:
        # Schedule-free optimizers evaluate with an average of weights that they keep for themselves.
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        if self._kept is not None and callable(getattr(optimizer, "eval", None)):
            self._kept.apply_to_gradients_()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **events: Any
    ) -> None:
        if self._kept is not None:
            self._kept.apply_()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **events: Any
    ) -> None:
        super().on_train_end(args, state, control, model, **events)
        lost, self._kept = self.lost(), None  # the masks' memory
        if lost:
            raise ModelError(
                f"{lost} weights that were zero when training began are not zero at its end: something changed them behind "
                "the optimizer's steps. Do not use this model; look for other callbacks that write into weights."
            )

    def abandon_(self) -> None:
        # Perhaps between the optimizer's step and ours; no error of ours may hide the one that broke the training off.
        with suppress(HfSparseError, RuntimeError):
            if self._kept is not None:
                self._kept.apply_()
        self._kept = None
        super().abandon_()

    def figures(self) -> dict[str, float]:
        return {} if self._kept is None else {"sparsity": self._kept.sparsity()}

    def lost(self) -> int:
        return 0 if self._kept is None else self._kept.lost()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the callback; the masks are in its weights."""
        so_far = dict(self._account.so_far) if self._account else {}
        counts = self._kept.counts if self._kept else {}
        zeros = {name: zeros for name, (zeros, _) in counts.items() if zeros} if self._kept else None
        return {"args": {}, "attributes": {"so_far": so_far, "zeros": zeros}}


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT has changed the model, by whatever of its functions; PEFT takes seconds to import and is not."""
    return any(getattr(module, "peft_config", None) for module in model.modules())


def stake(model: nn.Module) -> int:
    """How many zeros a plain merge of the adapters would fill in."""
    from hf_sparse.adapters.adapted import zeros_at_stake

    return zeros_at_stake(model, None)
