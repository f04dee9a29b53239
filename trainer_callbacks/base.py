"""What the callbacks share: figures for the Trainer's logs, and one account of each training for report and card."""

from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer_callbacks.account import Account


class SparsityCallback(TrainerCallback):
    """A callback that takes part in the training of a sparse model.

    `figures()` reach `log_history`, TensorBoard and the progress bar with each training log; the other properties stand
    in the account of the training, which goes into the model's report and card, whoever of the callbacks stands first.
    """

    @property
    def words(self) -> str | None:
        """What trains, where it is not the model as it is: "gradual pruning"."""
        return None

    @property
    def objective(self) -> str | None:
        """What is minimised, where it is not the model's own loss."""
        return None

    @property
    def settings(self) -> dict[str, Any]:
        """The callback's own numbers, as JSON holds them."""
        return {}

    def figures(self) -> dict[str, float]:
        """What the next training log shall tell, by name; called on all processes alike."""
        return {}

    def lost(self) -> int:
        """How many of the zeros to keep are none at this moment; called on all processes alike."""
        return 0

    def begin(self, args: TrainingArguments, state: TrainerState, model: nn.Module, **events: Any) -> None:
        """Join the account of this training; called in `on_train_begin`, once the model is as it shall be trained."""
        Account.of(model, state).join(self, args, state, model=model, **events)

    def _write(self, state: TrainerState, model: nn.Module) -> None:
        account = Account.find(model, state)
        if account is not None and account.last is self:
            account.write(state)

    # A save finds the report up to date. The default callback stands first and has decided by now, but for saves of the
    # best model, which are decided after the evaluation.

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **events: Any
    ) -> None:
        if control.should_save:
            self._write(state, model)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **events: Any
    ) -> None:
        if control.should_save:
            self._write(state, model)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **events: Any
    ) -> None:
        self._write(state, model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **events: Any
    ) -> None:
        Account.of(model, state).close(self, state)


# ---------------------------------------------------------------------------------------------------- logs

_plain_log = Trainer.log


def _log(self: Trainer, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
    if "loss" in logs:  # a log of training, not of an evaluation
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, SparsityCallback):
                logs.update(callback.figures())
    _plain_log(self, logs, *args, **kwargs)


def install() -> None:
    """Let `Trainer.log` add the callbacks' figures, which changes nothing for a Trainer without them.

    Callbacks cannot do it themselves: `on_log` comes after the log has gone into `log_history`, and after TensorBoard's
    callback.
    """
    if Trainer.log is _plain_log:
        Trainer.log = _log


def uninstall() -> None:
    """Give the Trainer its own method back, unless another library has wrapped it since."""
    if Trainer.log is _log:
        Trainer.log = _plain_log


install()
