"""What the callbacks share: figures for the Trainer's logs, and one account of each training for report and card."""

import functools
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer_callbacks.account import Account


class SparsityCallback(TrainerCallback):
    """A callback that takes part in the training of a sparse model.

    `figures()` reach `log_history`, TensorBoard and the progress bar with each training log; the other properties stand
    in the account of the training, which goes into the model's report and card, whoever of the callbacks stands first.
    """

    keeps_zeros = False  # whether it needs weights whose zeros can be counted
    _account: Account | None = None

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
        self._account = Account.of(model, state)
        self._account.join(self, args, state, model=model, **events)

    def abandon_(self) -> None:
        """The training broke off: take back what was hooked to the model, and let go what is held of it.

        Called in place of `on_train_end`, on every process that sees an exception, so without communication.
        """
        if self._account is not None:
            self._account.abandon_()
        self._account = None

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


# ---------------------------------------------------------------------------------------------------- the Trainer

_plain_log, _plain_train = Trainer.log, Trainer.train


def _log(self: Trainer, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
    if "loss" in logs:  # a log of training, not of an evaluation
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, SparsityCallback):
                logs.update(callback.figures())
    _plain_log(self, logs, *args, **kwargs)


@functools.wraps(_plain_train)
def _train(self: Trainer, *args: Any, **kwargs: Any) -> Any:
    try:
        return _plain_train(self, *args, **kwargs)
    except BaseException:  # Ctrl-C too
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, SparsityCallback):
                callback.abandon_()
        raise


def install() -> None:
    """Let `Trainer.log` add the callbacks' figures, and `Trainer.train` tell them when it breaks off.

    It changes nothing for a Trainer without them. Callbacks cannot do it themselves: `on_log` comes after the log has gone
    into `log_history`, and after TensorBoard's callback, and no event tells of an exception.
    """
    if Trainer.log is _plain_log:
        Trainer.log = _log
    if Trainer.train is _plain_train:
        Trainer.train = _train


def uninstall() -> None:
    """Give the Trainer its own methods back, but for those that another library has wrapped since."""
    if Trainer.log is _log:
        Trainer.log = _plain_log
    if Trainer.train is _train:
        Trainer.train = _plain_train


install()
