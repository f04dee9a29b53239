"""What a training tells: figures in the logs of any Trainer, and an entry in the report and the card of the model."""

import copy
import gc
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from models import bert, llama, phi3, t5, token_rows, tokenizer
from torch import nn
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaForCausalLM,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from hf_sparse import SparsityConfig, hooks, prune_, report
from hf_sparse.checkpoint import detach
from hf_sparse.recovery import Recovery
from hf_sparse.report import Report
from trainer_callbacks import KeepMasks, Sparsify, base
from trainer_callbacks.account import Account, describe
from trainer_callbacks.base import SparsityCallback

ROWS = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in token_rows(12)]
LENGTHS = (5, 9, 7, 12, 6, 10, 8, 11, 9, 5, 12, 7)
LISTS = [{"input_ids": token_rows(1, length, seed)[0].clamp(max=12).tolist()} for seed, length in enumerate(LENGTHS)]

pytestmark = pytest.mark.usefixtures("little_garbage", "no_pictures")


def pruned(make: Callable[..., Any] = llama) -> Any:
    model = make()
    prune_(model, SparsityConfig(metric="magnitude"))
    return model


def trainer_for(
    model: Any,
    folder: Path,
    *callbacks: Any,
    rows: Any = ROWS,
    collator: Any = None,
    kind: Any = Trainer,
    **changes: Any,
) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 2,
        "save_steps": 3, "report_to": [], "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    args = TrainingArguments(**{**settings, **changes})
    return kind(
        model, args, train_dataset=rows, eval_dataset=ROWS[:2], data_collator=collator, callbacks=list(callbacks)
    )


def entry(model: Any) -> Recovery:
    (only,) = report(model).recoveries
    return only


class Plain(SparsityCallback):
    """A callback with something to say of itself."""

    words, objective, settings = "plain training", "half the loss", {"share": 0.5}

    def __init__(self) -> None:
        self.asked = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **events: Any) -> None:
        self.begin(args, state, model, **events)

    def figures(self) -> dict[str, float]:
        self.asked += 1
        return {"asked": self.asked}


# ------------------------------------------------------------------------------------------------ logs


def training_logs(trainer: Any) -> list[dict[str, Any]]:
    return [log for log in trainer.state.log_history if "loss" in log]


def test_counted_sparsity_reaches_the_log_history(tmp_path: Path) -> None:
    class Fill(TrainerCallback):
        """Takes some zeros away between a step and its log, and puts them back."""

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **events: Any) -> None:
            if state.global_step == 4:
                self.weight = model.model.layers[0].mlp.up_proj.weight.data
                self.own = self.weight.clone()
                self.weight.fill_(1)

        def on_log(self, args: Any, state: Any, control: Any, **events: Any) -> None:
            if state.global_step == 4:
                self.weight.copy_(self.own)

    trainer = trainer_for(pruned(), tmp_path, KeepMasks(), Fill(), save_strategy="no")
    trainer.train()
    sparsities = [log["sparsity"] for log in training_logs(trainer)]
    assert sparsities == [0.5, 0.5 - 768 / 15360, 0.5]


def test_only_training_logs_have_figures(tmp_path: Path) -> None:
    trainer = trainer_for(pruned(), tmp_path, KeepMasks(), eval_strategy="steps", eval_steps=2)
    trainer.train()
    trainer.evaluate()
    assert all(("sparsity" in log) == ("loss" in log) for log in trainer.state.log_history)
    assert len(training_logs(trainer)) == 3


def test_a_trainer_without_our_callbacks_logs_as_ever(tmp_path: Path) -> None:
    trainer = trainer_for(pruned(), tmp_path)
    trainer.train()
    assert all("sparsity" not in log for log in trainer.state.log_history)


def test_tensorboard_has_it_too(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
        trainer_for(pruned(), tmp_path, KeepMasks(), Plain(), report_to=["tensorboard"]).train()
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/sparsity")] == [(2, 0.5), (4, 0.5), (6, 0.5)]
    assert [event.value for event in events.Scalars("train/asked")] == [1, 2, 3]


@pytest.mark.parametrize(("disable_tqdm", "kind"), [(True, PrinterCallback), (False, ProgressCallback)])
def test_what_is_shown_while_it_trains_has_it_too(
    disable_tqdm: bool, kind: type, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = trainer_for(pruned(), tmp_path, KeepMasks(), disable_tqdm=disable_tqdm)
    assert any(isinstance(callback, kind) for callback in trainer.callback_handler.callbacks)
    trainer.train()
    assert capsys.readouterr().out.count("'sparsity': '0.5'") == 3


class Wordy(Trainer):
    """Has a log of its own, as TRL's trainers have."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, "own": 1.0}, start_time)


class Loud(Trainer):
    def log(self, logs: dict[str, float], *args: Any) -> None:
        logs["own"] = 1.0
        return super().log(logs, *args)


@pytest.mark.parametrize("kind", [Wordy, Loud])
def test_trainers_with_a_log_of_their_own_have_it_too(kind: type[Trainer], tmp_path: Path) -> None:
    trainer = trainer_for(pruned(), tmp_path, KeepMasks(), kind=kind)
    trainer.train()
    assert [(log["own"], log["sparsity"]) for log in training_logs(trainer)] == [(1.0, 0.5)] * 3


def test_the_trainers_own_log_can_be_given_back() -> None:
    assert (Trainer.log, Trainer.train) == (base._log, base._train)
    try:
        base.uninstall()
        assert (Trainer.log, Trainer.train) == (base._plain_log, base._plain_train)
        base.uninstall()
        base.install()
        base.install()
        assert (Trainer.log, Trainer.train) == (base._log, base._train)
    finally:
        base.install()


def test_uninstalling_the_package_gives_them_back_as_well() -> None:
    try:
        hooks.uninstall()
        assert (Trainer.log, Trainer.train) == (base._plain_log, base._plain_train)
    finally:
        hooks.install()
    assert (Trainer.log, Trainer.train) == (base._log, base._train)


@pytest.mark.parametrize("module", [None, SimpleNamespace(uninstall=None, install=None)])
def test_without_our_callbacks_the_package_leaves_the_trainer_alone(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if module is None:
        monkeypatch.delitem(sys.modules, "trainer_callbacks.base")
    else:  # a user's own
        monkeypatch.setitem(sys.modules, "trainer_callbacks.base", module)
    try:
        hooks.uninstall()
        assert Trainer.log is base._log
        assert sys.modules.get("trainer_callbacks.base") is module
    finally:
        hooks.install()


@pytest.mark.parametrize("name", ["log", "train"])
def test_another_librarys_wrapper_stays(name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, name, theirs := lambda self: None)
        base.install()
        base.uninstall()
        assert getattr(Trainer, name) is theirs
    base.install()


# ------------------------------------------------------------------------------------------------ one training


def test_the_report_tells_of_the_training(tmp_path: Path) -> None:
    model = pruned()
    trainer_for(
        model, tmp_path, KeepMasks(), gradient_accumulation_steps=2, bf16=True, eval_strategy="steps", eval_steps=3, eval_on_start=True,
        lr_scheduler_type="cosine", rows=ROWS * 2,
    ).train()  # fmt: skip
    found = entry(model)
    told = {
        name: getattr(found, name)
        for name in ("method", "callbacks", "data", "steps", "schedule", "optimizer", "processes", "loss")
    }
    assert told == {
        "method": "full fine-tuning", "callbacks": ["KeepMasks"], "data": "list, 24 rows", "steps": 6, "schedule": "cosine",
        "optimizer": "AdamW", "processes": 1, "loss": "the model's own loss",
    }  # fmt: skip
    assert (found.tokens, found.sequences, found.batch_size) == (6 * 4 * 16, 6 * 4, 4)
    assert (found.learning_rate, found.precision, found.metric) == (1e-2, "bf16 mixed", "eval_loss")
    assert found.before > found.after > 0
    assert (found.zeros_before, found.zeros_after, found.size, found.zeros_lost) == (7680, 7680, 15360, 0)
    assert found.seconds > 0
    assert found.versions["torch"] == torch.__version__


def test_the_metric_before_and_after_is_that_of_the_evaluations(tmp_path: Path) -> None:
    model = pruned()
    trainer = trainer_for(model, tmp_path, KeepMasks(), eval_strategy="steps", eval_steps=2, eval_on_start=True)
    trainer.train()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert (entry(model).before, entry(model).after) == (losses[0], losses[-1])
    trainer.evaluate(ROWS[5:])  # which may be on any data, so it is nobody's "after"
    assert entry(model).after == losses[-1]


@pytest.mark.parametrize(("evaluate", "metric"), [({}, None), ({"eval_strategy": "epoch"}, "eval_loss")], ids=str)
def test_what_was_not_evaluated_is_not_told(evaluate: dict[str, Any], metric: str | None, tmp_path: Path) -> None:
    model = pruned()
    trainer_for(model, tmp_path, KeepMasks(), **evaluate).train()
    assert (entry(model).metric, entry(model).before) == (metric, None)
    assert (entry(model).after is None) == (metric is None)


def test_the_metric_after_is_that_of_the_best_model_where_that_is_loaded(tmp_path: Path) -> None:
    model = pruned()
    trainer = trainer_for(
        model, tmp_path, KeepMasks(), eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True, greater_is_better=True,
        metric_for_best_model="loss",
    )  # fmt: skip
    trainer.train()
    losses = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    assert max(losses, key=losses.__getitem__) == trainer.state.best_global_step < 6
    assert entry(model).after == max(losses.values())
    assert (entry(model).steps, entry(model).settings) == (6, {"weights_of_step": trainer.state.best_global_step})


def rates(model: Any) -> Any:
    values = list(model.parameters())
    return torch.optim.SGD([{"params": values[:3], "lr": 0.25}, {"params": values[3:], "lr": 0.125}])


def test_optimizer_and_rate_are_those_that_trained(tmp_path: Path) -> None:
    model = pruned()
    trainer = trainer_for(model, tmp_path, KeepMasks())
    trainer.optimizer = rates(model)
    trainer.train()
    assert (entry(model).optimizer, entry(model).learning_rate) == ("SGD", 0.25)


def test_an_optimizer_without_a_rate_has_none(tmp_path: Path) -> None:
    model = pruned()
    trainer_for(
        model, tmp_path, KeepMasks(), optim="adafactor", optim_args="relative_step=True,scale_parameter=True"
    ).train()
    assert entry(model).optimizer == "Adafactor"
    json.dumps(entry(model).to_dict(), allow_nan=False)


def test_all_callbacks_share_one_entry(tmp_path: Path) -> None:
    model = pruned()
    trainer_for(model, tmp_path, Plain(), KeepMasks()).train()
    found = entry(model)
    assert found.callbacks == ["Plain", "KeepMasks"]
    assert (found.method, found.loss, found.settings) == ("plain training", "half the loss", {"share": 0.5})
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("order", [[Plain, Sparsify], [Sparsify, Plain]], ids=["before", "behind"])
def test_zeros_before_the_training_are_those_behind_the_pruning(order: list[type], tmp_path: Path) -> None:
    model = llama()
    callbacks = [kind({"metric": "magnitude"}) if kind is Sparsify else kind() for kind in order]
    trainer_for(model, tmp_path, *callbacks).train()
    assert (entry(model).zeros_before, entry(model).zeros_after, entry(model).size) == (7680, 7680, 15360)


def test_a_callback_without_keep_masks_tells_how_many_zeros_were_lost(tmp_path: Path) -> None:
    model = pruned()
    trainer_for(model, tmp_path, Plain()).train()
    assert (entry(model).zeros_before, entry(model).zeros_after) == (7680, 0)


def test_figures_that_were_evaluated_before_are_set_aside(tmp_path: Path) -> None:
    model = pruned()
    figure = {"metric": "perplexity", "dense": 10.0, "sparse": 12.0}
    report(model).add_evaluation(figure)
    trainer_for(model, tmp_path, KeepMasks(), eval_strategy="steps", eval_steps=2).train()
    (found,) = report(model).evaluations
    assert (found["sparse"], found["before_recovery"]) == (None, 12.0)


def test_a_model_without_a_report_has_nowhere_to_tell(tmp_path: Path) -> None:
    model = pruned()
    detach(model)
    trainer_for(model, tmp_path, KeepMasks()).train()
    assert report(model) is None
    assert not (tmp_path / "checkpoint-6" / "hf_sparse_report.json").exists()


# ------------------------------------------------------------------------------------------------ what is counted


@pytest.mark.parametrize(
    "changes",
    [{}, {"gradient_accumulation_steps": 3}, {"bf16": True}, {"eval_strategy": "steps", "eval_steps": 1}],
    ids=str,
)
def test_padding_and_evaluations_are_not_counted(changes: dict[str, Any], tmp_path: Path) -> None:
    model = pruned()
    settings = {"max_steps": -1, "num_train_epochs": 2, **changes}
    trainer_for(
        model,
        tmp_path,
        KeepMasks(),
        rows=LISTS,
        collator=DataCollatorForLanguageModeling(tokenizer(), mlm=False),
        **settings,
    ).train()
    assert (entry(model).tokens, entry(model).sequences) == (2 * sum(LENGTHS), 2 * len(LENGTHS))


def test_the_last_batch_of_an_epoch_may_be_smaller(tmp_path: Path) -> None:
    model = pruned()
    trainer_for(model, tmp_path, KeepMasks(), rows=ROWS[:5], per_device_train_batch_size=4, max_steps=4).train()
    assert (entry(model).steps, entry(model).sequences, entry(model).tokens) == (4, 10, 160)


IDS = token_rows(3, 8)
HALF = torch.tensor([[1] * 4 + [0] * 4] * 3)
WIDE = torch.randn(3, 8, 32)


@pytest.mark.parametrize(
    ("make", "inputs", "tokens"),
    [
        (llama, {"input_ids": IDS}, 24),
        (llama, {"input_ids": IDS, "attention_mask": HALF}, 12),
        (llama, {"input_ids": IDS, "attention_mask": HALF.bool()}, 12),
        (llama, {"inputs_embeds": WIDE}, 24),
        (llama, {"inputs_embeds": WIDE, "attention_mask": HALF}, 12),
        (
            llama,
            {"input_ids": IDS, "attention_mask": torch.zeros(3, 1, 8, 8)},
            24,
        ),  # made by hand; it does not tell padding
        (bert, {"input_ids": IDS, "attention_mask": HALF}, 12),
        (t5, {"input_ids": IDS, "labels": IDS}, 24),  # of the encoder
    ],
)
def test_positions_are_counted_in_every_form_of_input(
    make: Callable[[], Any], inputs: dict[str, Any], tokens: int
) -> None:
    model = make().train()
    account = Account(model, TrainerState())
    model(**inputs)
    assert account._counted.tolist() == [tokens, 3]
    model.eval()(**inputs)
    assert account._counted.tolist() == [tokens, 3]
    model.train()(**inputs)
    assert account._counted.tolist() == [2 * tokens, 6]


def test_inputs_by_position_are_counted_and_pictures_are_one_each() -> None:
    llm = llama().train()
    account = Account(llm, TrainerState())
    llm(IDS)
    assert account._counted.tolist() == [24, 3]

    class Sees(nn.Module):
        main_input_name = "pixel_values"

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return pixel_values

    eyes = Sees().train()
    account = Account(eyes, TrainerState())
    eyes(pixel_values=torch.zeros(5, 3, 8, 8))
    assert account._counted.tolist() == [5, 5]


def test_a_copy_of_a_model_in_training_is_not_in_training() -> None:
    model = llama().train()
    account = Account(model, TrainerState())
    teacher = copy.deepcopy(model)
    teacher(input_ids=IDS)
    assert account._counted is None
    assert all(
        hook.__self__ is account for hook in teacher._forward_pre_hooks.values()
    )  # and not a copy, which would hold all masks


@pytest.mark.parametrize("make", [phi3, t5])
def test_zeros_are_those_of_the_pruned_sites(make: Callable[[], Any]) -> None:
    model = make()
    prune_(model, SparsityConfig(metric="magnitude", targets="mlp"))
    told = report(model)
    size = sum(site.shape[0] * site.shape[1] for site in told.sites)
    assert Account(model, TrainerState()).zeros() == (told.zeros, size)


# ------------------------------------------------------------------------------------------------ data


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(ROWS)


def named() -> datasets.Dataset:
    data = datasets.Dataset.from_list([{"input_ids": [1, 2]}] * 3, split=datasets.Split.TRAIN)
    data.info.dataset_name = "tales"
    return data


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (ROWS, "list, 12 rows"),
        (Stream(), "Stream"),
        (named(), "tales train, 3 rows"),
        (named().to_iterable_dataset(), "IterableDataset"),
        (type("IterableDatasetShard", (), {"dataset": Stream()})(), "Stream"),  # as accelerate gives a process its part
        (None, "NoneType"),
    ],
    ids=["list", "stream", "hub", "hub stream", "shard", "none"],
)
def test_data_are_called_what_they_are(data: Any, words: str) -> None:
    assert describe(data)[0] == words


def test_data_of_the_hub_have_a_fingerprint(tmp_path: Path) -> None:
    model, data = pruned(), datasets.Dataset.from_list(LISTS)
    collator = DataCollatorForLanguageModeling(tokenizer(), mlm=False)
    trainer_for(model, tmp_path, KeepMasks(), rows=data, collator=collator).train()
    assert entry(model).fingerprint
    assert describe(ROWS)[1] is None


# ------------------------------------------------------------------------------------------------ checkpoints and resumption


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"save_steps": 3}, [3, 6]),
        ({"save_strategy": "epoch", "max_steps": 12}, [6, 12]),
        (
            {
                "save_strategy": "best",
                "metric_for_best_model": "loss",
                "eval_strategy": "steps",
                "eval_steps": 3,
                "greater_is_better": True,
            },
            [3],
        ),
        ({"save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}, [3, 6]),
    ],
    ids=str,
)
def test_every_checkpoint_and_the_final_save_tell_what_had_happened_by_then(
    changes: dict[str, Any], steps: list[int], tmp_path: Path
) -> None:
    model = pruned()
    trainer = trainer_for(model, tmp_path, KeepMasks(), **changes)
    trainer.train()
    losses = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    for step in steps:
        folder = tmp_path / f"checkpoint-{step}"
        (found,) = Report.load(folder).recoveries
        assert (found.steps, found.tokens, found.after) == (step, step * 32, losses.get(step))
        assert f"tokens (without padding) | {step * 2}, {step * 32} |" in (folder / "README.md").read_text()
        assert report(LlamaForCausalLM.from_pretrained(folder)).recoveries == [found]
    trainer.save_model(str(tmp_path / "final"))
    assert Report.load(tmp_path / "final").recoveries == [entry(model)]


@pytest.mark.parametrize(
    "callback", [KeepMasks, lambda: Sparsify({"metric": "magnitude"})], ids=["KeepMasks", "Sparsify"]
)
@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("source", ["original", "checkpoint"])
def test_a_resumed_run_goes_on_counting_and_renews_its_entry(
    callback: Callable[[], Any], restore: bool, source: str, tmp_path: Path
) -> None:
    make = pruned if callback is KeepMasks else llama
    whole = make()
    settings = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
    trainer_for(whole, tmp_path, callback(), **settings).train()
    folder = tmp_path / "checkpoint-3"
    model = make() if source == "original" else LlamaForCausalLM.from_pretrained(folder)
    again = trainer_for(
        model, tmp_path / "again", callback(), restore_callback_states_from_checkpoint=restore, **settings
    )
    again.train(resume_from_checkpoint=str(folder))
    found, wanted = entry(model), entry(whole)
    assert found.seconds > Report.load(folder).recoveries[0].seconds
    found.seconds = wanted.seconds
    assert found == wanted


def test_earlier_trainings_stay_when_a_later_one_is_resumed(tmp_path: Path) -> None:
    model = pruned()
    trainer_for(model, tmp_path / "first", KeepMasks(), max_steps=2).train()
    trainer_for(model, tmp_path / "second", KeepMasks()).train()
    assert [one.steps for one in report(model).recoveries] == [2, 6]
    trainer_for(model, tmp_path / "second", KeepMasks()).train(
        resume_from_checkpoint=str(tmp_path / "second" / "checkpoint-3")
    )
    assert [one.steps for one in report(model).recoveries] == [2, 6]
    # What was trained behind the checkpoint, and with what came behind that, is in no weight any more.
    trainer_for(model, tmp_path / "third", KeepMasks(), max_steps=2).train()
    assert [one.steps for one in report(model).recoveries] == [2, 6, 2]
    trainer_for(model, tmp_path / "second", KeepMasks()).train(
        resume_from_checkpoint=str(tmp_path / "second" / "checkpoint-3")
    )
    assert [one.steps for one in report(model).recoveries] == [2, 6]


def test_a_checkpoint_without_our_state_begins_an_entry_of_its_own(tmp_path: Path) -> None:
    model = pruned()
    trainer_for(model, tmp_path, KeepMasks()).train()
    folder = tmp_path / "checkpoint-3"
    values = json.loads((folder / "trainer_state.json").read_text())
    values["stateful_callbacks"].pop("KeepMasks")
    (folder / "trainer_state.json").write_text(json.dumps(values))
    model = pruned()
    trainer_for(model, tmp_path / "again", KeepMasks()).train(resume_from_checkpoint=str(folder))
    assert (entry(model).steps, entry(model).tokens) == (6, 3 * 32)  # the others were not counted
    state = json.loads((tmp_path / "again" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["KeepMasks"]["attributes"]["so_far"]["tokens"] == 3 * 32


# ------------------------------------------------------------------------------------------------ hooks


class Crash(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **events: Any) -> None:
        raise KeyboardInterrupt


def test_no_hook_is_left_at_the_end(tmp_path: Path) -> None:
    model = pruned()
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    trainer_for(model, tmp_path, KeepMasks(), Plain()).train()
    assert [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()] == hooks


def test_no_hook_of_a_training_that_broke_off_is_left(tmp_path: Path) -> None:
    model = pruned()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            trainer_for(model, tmp_path, KeepMasks(), Plain(), Crash()).train()
        assert not model._forward_pre_hooks
    trainer_for(model, tmp_path, KeepMasks()).train()
    assert not model._forward_pre_hooks
    assert entry(model).tokens == 6 * 32


def test_a_model_whose_training_broke_off_can_go(tmp_path: Path) -> None:
    import weakref

    model = pruned()
    gone = weakref.ref(model)
    account = Account.of(model, TrainerState())
    assert Account.find(model, account.state) is account
    del model, account
    gc.collect()
    assert gone() is None


def test_an_account_is_found_by_its_training_alone() -> None:
    model, state = llama(), TrainerState()
    account = Account.of(model, state)
    assert Account.of(model, state) is account
    assert Account.find(model, TrainerState()) is None  # which ends the first
    assert not model._forward_pre_hooks
    assert Account.find(llama(), state) is None


def test_an_account_that_nobody_joined_tells_nothing() -> None:
    model = pruned()
    account = Account.of(model, TrainerState())
    account.write(account.state)
    assert report(model).recoveries == []
    assert account.so_far == {}


def test_a_callback_that_never_began_does_not_write(tmp_path: Path) -> None:
    model, control = pruned(), SimpleNamespace(should_save=True)
    SparsityCallback().on_step_end(TrainingArguments(str(tmp_path)), TrainerState(), control, model)  # type: ignore[arg-type]
    assert report(model).recoveries == []
    assert not model._forward_pre_hooks
