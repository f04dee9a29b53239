"""Keeps account of a training: on what, with what and for how long; it ends up in the model's report."""

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn
from transformers import TrainerState, TrainingArguments

from hf_sparse import checkpoint, environment
from hf_sparse.recovery import Recovery
from hf_sparse.stored import over_processes, stored_parameters, zeros_and_size
from trainer_callbacks.training_data import as_given

if TYPE_CHECKING:
    from trainer_callbacks.base import SparsityCallback

_METRIC = "eval_loss"


class Account:
    """One training of one model, shared by the callbacks that take part in it.

    It lives where it counts tokens, as a hook of the model, until the last of them closes it or another training begins.
    """

    def __init__(self, model: nn.Module, state: TrainerState) -> None:
        self.model, self.state = checkpoint.unwrap(model), state
        self._called = _called(model)
        self.earlier: dict[str, Any] = {}  # `so_far` in the checkpoint that the training was resumed from
        self.so_far: dict[str, Any] = {}  # as of the last `write`, over all processes; JSON can hold it
        self._callbacks: list[SparsityCallback] = []
        self._left: set[int] = set()
        self._counted: torch.Tensor | None = None  # tokens and sequences
        self._start = time.monotonic()
        self._facts: dict[str, Any] = {}
        self._best = False  # whether the training ends with the weights of its best checkpoint
        self._zeros = (0, 0)
        self._entry: int | None = None  # which of the report's entries is this training's
        self._hook = self._called.register_forward_pre_hook(self._count, with_kwargs=True)

    @classmethod
    def find(cls, model: nn.Module, state: TrainerState) -> Self | None:
        """The account of the training that the model is in; None outside of trainings and where none was opened."""
        for hook in list(_called(model)._forward_pre_hooks.values()):
            account = getattr(hook, "__self__", None)
            if isinstance(account, cls):
                if account.state is state:
                    return account
                account._hook.remove()  # that training broke off
        return None

    @classmethod
    def of(cls, model: nn.Module, state: TrainerState) -> Self:
        """The account of the training that the model is in; a new one for a new training."""
        return cls.find(model, state) or cls(model, state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a copy of the model is not in training

    # ------------------------------------------------------------------------------------------------ taking part

    def join(self, callback: "SparsityCallback", args: TrainingArguments, state: TrainerState, **events: Any) -> None:
        if not self._callbacks:
            self._facts = _facts(args, events) | {"method": _trains(events.get("model", self.model))}
            self._best = args.load_best_model_at_end
        if callback.keeps_zeros or checkpoint.report(self.model) is not None:  # quantized weights cannot be counted
            self._zeros = self.zeros()  # the callback may have pruned
        self._callbacks.append(callback)

    @property
    def last(self) -> "SparsityCallback | None":
        """The callback that is called after all others of this training, and so writes for them."""
        return self._callbacks[-1] if self._callbacks else None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Positions trained on; padding is not counted. It stays a tensor, so that no accelerator is waited for."""
        if not module.training or module is not self._called:
            return
        mask = kwargs.get("attention_mask")
        given = kwargs.get(getattr(module, "main_input_name", "input_ids"), args[0] if args else None)
        given = kwargs.get("inputs_embeds") if given is None else given
        if not isinstance(given, torch.Tensor):
            return
        sequences = len(given)
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            tokens = mask.detach().sum()
        elif (given.ndim == 2 and not given.is_floating_point()) or given is kwargs.get("inputs_embeds"):
            tokens = torch.tensor(given.shape[0] * given.shape[1], device=given.device)
        else:
            tokens = torch.tensor(sequences, device=given.device)  # pictures and the like
        counted = torch.stack([tokens.long(), torch.full_like(tokens, sequences, dtype=torch.long)])
        self._counted = counted if self._counted is None else self._counted + counted

    def zeros(self) -> tuple[int, int]:
        """Zeros and size of the parameters with pruned sites (all sites, where nothing is known), of all processes."""
        known = checkpoint.report(self.model)
        names = {site.name for site in known.sites} if known else set()
        return zeros_and_size(
            stored
            for stored in stored_parameters(self.model)
            if not names or any(site.name in names for site in stored.sites)
        )

    # ------------------------------------------------------------------------------------------------ telling

    def write(self, state: TrainerState, *, best: bool = False) -> None:
        """Put the account, as of now, into the model's report; all processes have to call it.

        `best`: the weights are those of the best checkpoint. A model without a report has no card to put it in.
        """
        if not self._callbacks:
            return
        known = checkpoint.report(self.model)
        entries = len(known.recoveries) if known else 0
        if self._entry is None:
            self._entry = self.earlier.get("entry", entries)
        self._entry = min(self._entry, entries)
        counted = torch.zeros(2, dtype=torch.long) if self._counted is None else self._counted.cpu()
        tokens, sequences = over_processes(counted).tolist()
        self.so_far = {
            "tokens": self.earlier.get("tokens", 0) + tokens, "sequences": self.earlier.get("sequences", 0) + sequences,
            "seconds": self.earlier.get("seconds", 0.0) + time.monotonic() - self._start,
            "zeros_before": self.earlier.get("zeros_before", self._zeros[0]), "entry": self._entry,
        }  # fmt: skip
        if known is not None:
            record = self._record(state, best)
            # After a resumption the entries from there on are this training's as it was, or of weights that are no more.
            del known.recoveries[self._entry :]
            known.add_recovery(record)

    def _record(self, state: TrainerState, best: bool) -> Recovery:
        zeros, size = self.zeros()
        settings = {key: value for callback in self._callbacks for key, value in callback.settings.items()}
        if best:
            settings["weights_of_step"] = state.best_global_step
        words = [callback.words for callback in self._callbacks if callback.words]
        objectives = [callback.objective for callback in self._callbacks if callback.objective]
        losses = {log["step"]: log[_METRIC] for log in state.log_history if _METRIC in log}
        after = [loss for step, loss in losses.items() if step and (not best or step == state.best_global_step)]
        counted = {key: value for key, value in self.so_far.items() if key != "entry"}
        return Recovery(
            **{**self._facts, **counted, "method": ", ".join(words) or self._facts["method"]},
            callbacks=[type(callback).__name__ for callback in self._callbacks], steps=state.global_step, settings=settings,
            loss="; ".join(objectives) or "the model's own loss", metric=_METRIC if losses else None, before=losses.get(0),
            after=after[-1] if after else None, zeros_after=zeros, size=size,
            zeros_lost=max(callback.lost() for callback in self._callbacks),
        )  # fmt: skip

    def close(self, callback: "SparsityCallback", state: TrainerState) -> None:
        """One callback's training is over; with the last one's the account is closed."""
        self.write(state, best=self._best and state.best_model_checkpoint is not None)
        self._left.add(id(callback))
        if len(self._left) >= len(self._callbacks):
            self._hook.remove()

    def abandon_(self) -> None:
        """The training broke off; what was written last stays in the report."""
        self._hook.remove()


# ---------------------------------------------------------------------------------------------------- what does not change


def _called(model: nn.Module) -> nn.Module:
    """The module whose call is a forward pass, whatever compiles or spreads it; PEFT may run what it wraps without a call."""
    while True:
        parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
        inner = model.module if parallel else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _trains(model: nn.Module) -> str:
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    every = sum(parameter.numel() for parameter in model.parameters())
    if trained == every:
        return "full fine-tuning"
    named = []
    masked = any(getattr(module, "masked_adapters", None) for module in model.modules())
    for config in (getattr(model, "peft_config", None) or {}).values():
        kind, rank = getattr(config, "peft_type", None), getattr(config, "r", None)
        words = {"LORA": "masked LoRA" if masked else "LoRA"}.get(
            str(getattr(kind, "value", kind)), getattr(kind, "value", kind)
        )
        named.append(f"{words}" + (f", r {rank}" if isinstance(rank, int) else ""))
    return "; ".join([*named, f"{trained} of {every} parameters"])


def _facts(args: TrainingArguments, events: dict[str, Any]) -> dict[str, Any]:
    data, fingerprint = describe(getattr(events.get("train_dataloader"), "dataset", None))
    optimizer = events.get("optimizer")
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    rates = [group.get("initial_lr", group.get("lr")) for group in getattr(optimizer, "param_groups", [])]
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    scheduler = args.lr_scheduler_type
    half = args.fp16 and args.device.type != "cpu"  # where the Trainer leaves fp16 out without a word
    return {
        "data": data, "fingerprint": fingerprint,
        "learning_rate": max((float(rate) for rate in rates if rate is not None), default=None),
        "schedule": str(getattr(scheduler, "value", scheduler)), "optimizer": type(optimizer).__name__ if optimizer is not None else "unknown",
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * processes, "processes": processes,
        "precision": "bf16 mixed" if args.bf16 else "fp16 mixed" if half else "as loaded", "versions": environment.versions(),
    }  # fmt: skip


def describe(dataset: Any) -> tuple[str, str | None]:
    """What to call a data set, and its fingerprint where it has one."""
    dataset = as_given(dataset)
    parts = [
        getattr(getattr(dataset, "info", None), "dataset_name", None),
        getattr(dataset, "config_name", None),
        getattr(dataset, "split", None),
    ]
    name = getattr(dataset, "source", None) or " ".join(str(part) for part in parts if part) or type(dataset).__name__
    with suppress(TypeError, NotImplementedError):  # streams have no length
        name = f"{name}, {len(dataset)} rows"
    fingerprint = getattr(dataset, "_fingerprint", None)
    return name, fingerprint if isinstance(fingerprint, str) else None
