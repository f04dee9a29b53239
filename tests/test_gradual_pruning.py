"""GradualPruning: from dense to the target while any Trainer trains, exactly, whatever happens on the way."""

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import llama, mixtral, phi3, t5, token_rows
from safetensors.torch import load_file, save_file
from test_gradual import gpt2
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.errors import CheckpointError, ConfigError, ModelError
from hf_sparse.gradual.dormant import FILE_NAME
from trainer_callbacks.gradual_pruning import GradualPruning
from trainer_callbacks.keep_masks import KeepMasks

ROWS = token_rows(16, 12)
DATA = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ROWS]
MAGNITUDE = {"metric": "magnitude"}
FIELDS = TrainingArguments.__dataclass_fields__
CHECKPOINTING = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in FIELDS)


@pytest.fixture(autouse=True)
def nothing_is_warned_about() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="trainer_callbacks")
        warnings.filterwarnings("error", message=".*gradual|.*masks|.*dormant")
        yield


def trainer(model: nn.Module, folder: Path, *callbacks: TrainerCallback, **arguments: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": 10, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "weight_decay": 0.1, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **{**settings, **arguments})  # type: ignore[assignment]
    return Trainer(model, arguments, train_dataset=DATA, eval_dataset=DATA[:2], callbacks=list(callbacks))


def zeros(model: nn.Module) -> dict[str, int]:
    return {name: size[0] for name, size in hf_sparse.checkpoint.count(model).items()}


class Watch(TrainerCallback):
    """What holds behind each step: the zeros of every matrix, and what was zero."""

    def __init__(self) -> None:
        self.shares: list[float] = []
        self.masks: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **events: Any) -> None:
        named = {
            name: value.detach() for name, value in model.named_parameters() if "layers" in name and value.ndim > 1
        }
        self.masks.append({name: value == 0 for name, value in named.items()})
        counted = sum(int(mask.sum()) for mask in self.masks[-1].values())
        self.shares.append(counted / sum(value.numel() for value in named.values()))


def hooked(model: Any) -> list[nn.Module]:
    modules = [model, *model.model.layers.modules()]
    return [module for module in modules if module._forward_pre_hooks or module._forward_hooks]


def same(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return all(torch.equal(left[name], right[name]) for name in left)


# ------------------------------------------------------------------------------------------------ to the target


@pytest.mark.parametrize("make", [llama, phi3, mixtral, gpt2, t5])
@pytest.mark.parametrize(
    "config",
    [
        {"pattern": "2:4"},
        {"pattern": "1:4", "metric": "dass"},
        {"pattern": "unstructured", "sparsity": 0.7, "metric": "magnitude"},
        {"pattern": "unstructured", "sparsity": 0.3, "metric": "ria", "axis": "input"},
    ],
)
def test_the_target_is_met_exactly(make: Any, config: dict[str, Any], tmp_path: Path) -> None:
    model = make()
    trainer(model, tmp_path, GradualPruning(config), max_steps=6).train()
    target = SparsityConfig(**config).target
    report = hf_sparse.report(model)
    assert report.zeros == round(target * sum(block.size for block in report.blocks)) == sum(zeros(model).values())
    assert {site.pattern for site in report.sites} == {config["pattern"]}
    assert model.config.hf_sparse["totals"]["zeros"] == report.zeros
    assert model.config.hf_sparse["config"]["metric"] == config.get("metric", "wanda")
    assert report.recoveries[-1].method == "gradual pruning"
    assert report.recoveries[-1].zeros_after == report.zeros
    assert report.recoveries[-1].zeros_lost == 0


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({}, [0.244, 0.392, 0.468, 0.496, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
        ({"schedule": "linear"}, [0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
        ({"schedule": "linear", "start": 2, "end": 8, "every": 4}, [0, 0, 0, 0, 0, 1 / 3, 1 / 3, 0.5, 0.5, 0.5]),
        ({"schedule": "linear", "start": 0.2, "end": 0.6, "every": 2}, [0, 0, 0, 0.25, 0.25, 0.5, 0.5, 0.5, 0.5, 0.5]),
        ({"start": 4, "end": 4}, [0, 0, 0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
        ({"end": 1.0}, [0.5 * (1 - (1 - step / 10) ** 3) for step in range(1, 11)]),
    ],
)
def test_sparsity_follows_the_schedule_at_every_step(given: dict[str, Any], steps: list[float], tmp_path: Path) -> None:
    watch = Watch()
    trainer(llama(), tmp_path, GradualPruning({"pattern": "2:4"}, **given), watch).train()
    assert watch.shares == pytest.approx(steps, abs=1e-3)  # whole weights in each site


def test_masks_change_until_the_freeze_and_then_no_more(tmp_path: Path) -> None:
    watch = Watch()
    model = llama()
    done = trainer(model, tmp_path, GradualPruning({"pattern": "2:4"}, end=3, freeze=7), watch)
    done.train()
    changed = [
        any(not torch.equal(one[name], other[name]) for name in one)
        for one, other in zip(watch.masks, watch.masks[1:], strict=False)
    ]
    assert changed == [True] * 6 + [False] * 3
    assert watch.shares[2:] == [0.5] * 8
    came_back = (
        watch.masks[3]["model.layers.0.mlp.up_proj.weight"] & ~watch.masks[6]["model.layers.0.mlp.up_proj.weight"]
    )
    assert bool(came_back.any())
    figures = [(log["sparsity"], log["mask_changes"] > 0) for log in done.state.log_history if "loss" in log]
    assert figures == [(share, step < 7) for step, share in enumerate(watch.shares)]
    assert "frozen behind step 7" in hf_sparse.report(model).notes[0]


@pytest.mark.parametrize(
    "arguments",
    [
        {"bf16": True},
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1},
        {CHECKPOINTING: True},
        {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}},
        {"optim": "adafactor"},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"eval_strategy": "steps", "eval_steps": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("metric", ["magnitude", "wanda"])
def test_every_zero_is_exact_behind_every_step(metric: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    watch, model = Watch(), llama()
    trainer(model, tmp_path, GradualPruning({"pattern": "2:4", "metric": metric}), watch, **arguments).train()
    assert watch.shares == pytest.approx([0.244, 0.392, 0.468, 0.496, *[0.5] * 6], abs=1e-3)
    assert len({tuple(mask.sum().item() for mask in masks.values()) for masks in watch.masks[4:]}) == 1
    assert not hooked(model)


def test_a_model_in_half_precision(tmp_path: Path) -> None:
    model = llama().bfloat16()
    trainer(model, tmp_path, GradualPruning({"pattern": "1:4"})).train()
    assert hf_sparse.report(model).sparsity == 0.75


def test_only_batches_of_steps_that_change_masks_are_looked_at(tmp_path: Path) -> None:
    model, listening = llama(), []

    class Look(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **events: Any) -> None:
            listening.append((state.global_step + 1, bool(model.model.layers[0]._forward_hooks)))

    arguments = {"gradient_accumulation_steps": 2, "max_steps": 8}
    trainer(model, tmp_path, GradualPruning({"pattern": "2:4"}, start=1, end=7, every=3), Look(), **arguments).train()
    assert [step for step, found in listening if found] == [4, 7]


def test_the_batches_are_told_of_in_the_report_and_the_card(tmp_path: Path) -> None:
    model = llama()
    trainer(model, tmp_path, GradualPruning({"pattern": "2:4"}, end=4), gradient_accumulation_steps=2).train()
    data = hf_sparse.report(model).calibration
    assert data == {
        "source": "the batches of training step 4 (list, 16 rows)", "fingerprint": "not known", "samples": 4, "tokens": 48, "batch_size": 2,
    }  # fmt: skip
    model.save_pretrained(tmp_path / "sparse")
    card = (tmp_path / "sparse" / "README.md").read_text()
    assert "the batches of training step 4" in card
    assert "gradual pruning" in card


# ------------------------------------------------------------------------------------------------ checkpoints


def saved(make: Any, folder: Path, config: dict[str, Any], **arguments: Any) -> tuple[nn.Module, Trainer]:
    model = make()
    settings = {"save_strategy": "steps", "save_steps": 3, **arguments}
    run = trainer(model, folder, GradualPruning(config, end=5, freeze=7, every=2), **settings)
    run.train()
    return model, run


WHOLE = {
    "wanda": (llama, {"pattern": "2:4"}),
    "magnitude": (llama, {"pattern": "unstructured", "sparsity": 0.6, "metric": "magnitude"}),
    "dass": (phi3, {"pattern": "1:4", "metric": "dass"}),
}


@pytest.fixture(scope="module", params=WHOLE)
def whole(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A training with its checkpoints: how its model is made, its config, its folder, the trained model and its logs."""
    make, config = WHOLE[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    return make, config, folder, *saved(make, folder, config)


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("step", [3, 6, 9])
def test_a_resumed_training_equals_the_one_that_never_stopped(step: int, restore: bool, whole: Any) -> None:
    make, config, folder, model, first = whole
    again = make()
    callback = GradualPruning(config, end=5, freeze=7, every=2)
    run = trainer(again, folder, callback, restore_callback_states_from_checkpoint=restore)
    run.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert same(model, again)
    logs = [[log for log in one.state.log_history if "loss" in log] for one in (first, run)]
    assert logs[0] == logs[1]
    one, other = hf_sparse.report(model), hf_sparse.report(again)
    assert (one.blocks, one.calibration, one.notes) == (other.blocks, other.calibration, other.notes)
    assert [entry.tokens for entry in one.recoveries] == [entry.tokens for entry in other.recoveries]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A trained model, and the folder with its checkpoints."""
    folder = tmp_path_factory.mktemp("done")
    return saved(llama, folder, {"pattern": "2:4"})[0], folder


def resumed(model: Any, folder: Path, step: int) -> Trainer:
    run = trainer(model, folder, GradualPruning({"pattern": "2:4"}, end=5, freeze=7, every=2))
    run.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    return run


def test_until_the_freeze_a_checkpoint_claims_nothing(done: Any) -> None:
    model, folder = done
    for step, files in ((3, {FILE_NAME}), (6, {FILE_NAME}), (9, {"hf_sparse_report.json", "README.md"})):
        names = {path.name for path in (folder / f"checkpoint-{step}").iterdir()}
        assert files <= names
        assert names.isdisjoint({FILE_NAME, "hf_sparse_report.json", "README.md"} - files)
        config = json.loads((folder / f"checkpoint-{step}" / "config.json").read_text())
        assert ("hf_sparse" in config) == (step == 9)
        again = AutoModelForCausalLM.from_pretrained(folder / f"checkpoint-{step}")
        assert (hf_sparse.report(again) is None) == (step < 9)
    assert config["hf_sparse"]["totals"]["zeros"] == hf_sparse.report(model).zeros
    assert hf_sparse.report(again).recoveries[0].steps == 9


@pytest.mark.parametrize("step", [3, 9])
def test_a_model_loaded_from_the_checkpoint_goes_on_too(step: int, done: Any) -> None:
    model, folder = done
    again = AutoModelForCausalLM.from_pretrained(folder / f"checkpoint-{step}")
    resumed(again, folder, step)
    assert same(model, again)
    assert len(hf_sparse.report(again).recoveries) == 1


def test_experts_go_on_where_the_model_is_loaded_from_the_checkpoint(tmp_path: Path) -> None:
    model, _ = saved(mixtral, tmp_path, {"pattern": "2:4"}, max_steps=8)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    run = trainer(again, tmp_path, GradualPruning({"pattern": "2:4"}, end=5, freeze=7, every=2), max_steps=8)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(model, again)


@pytest.mark.parametrize("step", [3, 9])
def test_weights_that_the_trainer_did_not_load_are_noticed(step: int, done: Any) -> None:
    run = trainer(llama(), done[1], GradualPruning({"pattern": "2:4"}, end=5, freeze=7, every=2))
    run._load_from_checkpoint = lambda *_: None  # as Transformers 5.23 does it with the experts of a Mixtral
    with pytest.raises(CheckpointError, match=r"fewer zeros.*down_proj \(0 of \d+\).*11 more sites.*from_pretrained"):
        run.train(resume_from_checkpoint=str(done[1] / f"checkpoint-{step}"))


@pytest.mark.parametrize("damage", ["absent", "of another training"])
def test_without_the_file_it_goes_on_with_zeros_and_says_so(damage: str, done: Any, tmp_path: Path) -> None:
    model, folder = done
    shutil.copytree(folder / "checkpoint-3", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / FILE_NAME).unlink()
    if damage != "absent":
        shutil.copy(folder / "checkpoint-6" / FILE_NAME, tmp_path / "checkpoint-3" / FILE_NAME)
    again = llama()
    with pytest.warns(UserWarning, match=rf"no {FILE_NAME}.*step 3.*come\s+back as zeros"):
        resumed(again, tmp_path, 3)
    assert not same(model, again)
    assert hf_sparse.report(again).sparsity == 0.5


def test_a_checkpoint_in_another_folder_than_the_trainers(done: Any, tmp_path: Path) -> None:
    again, folder = llama(), str(done[1] / "checkpoint-3")
    callback = GradualPruning({"pattern": "2:4"}, end=5, freeze=7, every=2)
    trainer(again, tmp_path, callback, resume_from_checkpoint=folder).train(resume_from_checkpoint=folder)
    assert same(done[0], again)


def test_a_checkpoint_that_has_lost_its_zeros_is_refused(done: Any, tmp_path: Path) -> None:
    shutil.copytree(done[1] / "checkpoint-9", tmp_path / "checkpoint-9")
    file = tmp_path / "checkpoint-9" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"].fill_(1.0)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"fewer zeros.*layers\.1\.mlp\.up_proj \(0 of 768\)"):
        resumed(llama(), tmp_path, 9)


def test_a_checkpoint_of_a_training_without_the_callback(tmp_path: Path) -> None:
    trainer(llama(), tmp_path, save_strategy="steps", save_steps=4, max_steps=4).train()
    model, watch = llama(), Watch()
    run = trainer(
        model, tmp_path, GradualPruning({"pattern": "2:4"}, end=8), watch, save_strategy="steps", save_steps=4
    )
    run.train(resume_from_checkpoint=True)
    assert watch.shares[-3:] == [0.5] * 3
    assert (
        "GradualPruning"
        in json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())["stateful_callbacks"]
    )


@pytest.mark.parametrize("step", [3, 6])
def test_a_training_that_broke_off_leaves_nothing_hooked_and_its_zeros(step: int, tmp_path: Path) -> None:
    class Breaks(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **events: Any) -> None:
            if state.global_step == step:
                assert model.model.layers[0]._forward_hooks  # it is looked at, as the masks change behind this step
                raise KeyboardInterrupt

    model, callback = llama(), GradualPruning({"pattern": "2:4"}, freeze=1.0)
    with pytest.raises(KeyboardInterrupt):
        trainer(model, tmp_path, callback, Breaks(), gradient_accumulation_steps=2).train()
    assert not hooked(model)
    assert callback._gradual is None
    done = sum(zeros(model).values())
    assert done > 0
    again = trainer(model, tmp_path, max_steps=1, learning_rate=0.0)
    again.train()
    assert sum(zeros(model).values()) == done


def test_a_checkpoint_that_is_refused_takes_no_claim_away(tmp_path: Path) -> None:
    trainer(llama(), tmp_path, save_strategy="steps", save_steps=4, max_steps=4).train()
    model = llama()
    hf_sparse.prune_(model, SparsityConfig(metric="magnitude", pattern="unstructured", sparsity=0.1))
    before, claim = hf_sparse.report(model), model.config.hf_sparse
    with pytest.raises(CheckpointError, match="step 4 should hold its target since step 2"):
        trainer(model, tmp_path, GradualPruning({"pattern": "2:4"}, end=2)).train(resume_from_checkpoint=True)
    assert hf_sparse.report(model) is before
    assert model.config.hf_sparse is claim


def test_such_a_checkpoint_behind_the_freeze_is_refused(tmp_path: Path) -> None:
    trainer(llama(), tmp_path, save_strategy="steps", save_steps=4, max_steps=4).train()
    run = trainer(llama(), tmp_path, GradualPruning({"pattern": "2:4"}, end=2))
    with pytest.raises(CheckpointError, match=r"step 4 should hold its target since step 2, and 14 sites do not"):
        run.train(resume_from_checkpoint=True)


def test_the_state_is_plain_and_makes_the_callback_again() -> None:
    callback = GradualPruning(SparsityConfig(pattern="1:4", targets="mlp"), start=0.1, end=40, every=3, freeze=0.9, schedule="linear")  # fmt: skip
    state = json.loads(json.dumps(callback.state()))
    again = GradualPruning.from_state(state)
    assert (again.config, again.timing) == (callback.config, callback.timing)
    assert again.state() == callback.state()


# ------------------------------------------------------------------------------------------------ from sparse, and again


def test_from_a_sparse_model_to_a_sparser_one(tmp_path: Path) -> None:
    model, watch = llama(), Watch()
    hf_sparse.prune_(model, {**MAGNITUDE, "pattern": "2:4"})
    arguments = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    trainer(model, tmp_path, GradualPruning({**MAGNITUDE, "pattern": "1:4"}, start=1, end=5, schedule="linear"), watch, **arguments).train()  # fmt: skip
    assert watch.shares == pytest.approx([0.5, 0.5625, 0.625, 0.6875, 0.75, 0.75], abs=1e-3)
    # what the model was before is no longer true on the way
    assert "hf_sparse" not in json.loads((tmp_path / "checkpoint-2" / "config.json").read_text())
    report = hf_sparse.report(model)
    assert (report.recoveries[0].zeros_before, report.recoveries[0].zeros_after) == (7680, 11520)
    assert model.config.hf_sparse["config"]["pattern"] == "1:4"


def test_earlier_trainings_stay_in_the_report(tmp_path: Path) -> None:
    model = llama()
    hf_sparse.prune_(model, {**MAGNITUDE, "pattern": "3:4"})
    trainer(model, tmp_path, KeepMasks(), max_steps=2).train()
    trainer(model, tmp_path, GradualPruning({"pattern": "2:4"}, end=2), max_steps=3).train()
    trainer(model, tmp_path, KeepMasks(), max_steps=2).train()
    assert [entry.callbacks for entry in hf_sparse.report(model).recoveries] == [["KeepMasks"], ["GradualPruning"], ["KeepMasks"]]  # fmt: skip
    assert hf_sparse.report(model).sparsity == 0.5


def test_train_may_be_called_again(tmp_path: Path) -> None:
    model = llama()
    run = trainer(model, tmp_path, GradualPruning({"pattern": "2:4"}), max_steps=4)
    run.train()
    run.train()
    assert hf_sparse.report(model).sparsity == 0.5
    assert len(hf_sparse.report(model).recoveries) == 2


def test_a_training_that_breaks_off_leaves_no_claim_and_no_hooks(tmp_path: Path) -> None:
    model = llama()

    class Break(TrainerCallback):
        def on_substep_end(self, *_: Any, **events: Any) -> None:
            raise KeyboardInterrupt

    run = trainer(model, tmp_path, GradualPruning({"pattern": "2:4"}), Break(), gradient_accumulation_steps=2)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert not hasattr(model.config, "hf_sparse")
    run.remove_callback(Break)
    run.train()
    assert hf_sparse.report(model).sparsity == 0.5
    assert not hooked(model)


# ------------------------------------------------------------------------------------------------ stopped early


class Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **events: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def test_stopped_before_the_target_it_warns_and_claims_what_was_counted(tmp_path: Path) -> None:
    model = llama()
    run = trainer(model, tmp_path, GradualPruning({"pattern": "2:4"}, schedule="linear", end=8), Stop(4))
    with pytest.warns(UserWarning, match=r"ended before its target was met: 14 of 14 sites.*25\.00 % zeros"):
        run.train()
    report = hf_sparse.report(model)
    assert (report.sparsity, report.config["pattern"], report.config["sparsity"]) == (0.25, "unstructured", 0.25)
    assert "the weights are those of step 4, before the masks were frozen" in report.notes
    assert {site.pattern for site in report.sites} == {"unstructured"}
    assert model.config.hf_sparse["totals"]["sparsity"] == 0.25
    assert report.recoveries[-1].zeros_lost == 0
    model.save_pretrained(tmp_path / "sparse")
    assert hf_sparse.report(AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")).zeros == report.zeros


def test_stopped_before_anything_was_dropped_it_claims_nothing(tmp_path: Path) -> None:
    model = llama()
    run = trainer(model, tmp_path, GradualPruning({"pattern": "2:4"}, start=5, end=8), Stop(4))
    with pytest.warns(UserWarning, match=r"0\.00 % zeros"):
        run.train()
    assert hf_sparse.report(model) is None
    assert not hasattr(model.config, "hf_sparse")


def test_stopped_between_target_and_freeze_the_target_holds(tmp_path: Path) -> None:
    model = llama()
    trainer(model, tmp_path, GradualPruning({"pattern": "2:4"}, end=4, freeze=8), Stop(6)).train()
    report = hf_sparse.report(model)
    assert (report.sparsity, report.config["pattern"]) == (0.5, "2:4")
    assert "the weights are those of step 6, before the masks were frozen" in report.notes


@pytest.mark.parametrize("best", [2, 9])
def test_the_best_models_weights_at_the_end_are_counted(best: int, tmp_path: Path) -> None:
    model = llama()
    arguments = {
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "load_best_model_at_end": True, "metric_for_best_model": "chosen",
        "greater_is_better": True,
    }  # fmt: skip
    run = trainer(model, tmp_path, GradualPruning({"pattern": "2:4"}, schedule="linear", end=8), **arguments)
    plain = run.evaluate
    run.evaluate = lambda *given, **named: (
        plain(*given, **named) | {"eval_chosen": float(run.state.global_step == best)}
    )
    if best == 2:
        with pytest.warns(UserWarning, match=r"12\.50 % zeros"):
            run.train()
    else:
        run.train()
    report = hf_sparse.report(model)
    assert report.zeros == sum(zeros(model).values()) == (1920 if best == 2 else 7680)
    assert report.config["pattern"] == ("unstructured" if best == 2 else "2:4")
    assert report.recoveries[-1].zeros_lost == 0


def test_activations_that_are_not_finite_put_an_update_off(tmp_path: Path) -> None:
    model, watch = llama(), Watch()

    class Overflow(TrainerCallback):
        """As fp16 does it now and then: activations overflow in one step, and the scaler leaves that step out."""

        hook: Any = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **events: Any) -> None:
            if state.global_step + 1 in (4, 5):
                self.hook = model.model.layers[0].register_forward_pre_hook(lambda _, given: (given[0] * torch.inf,))

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **events: Any) -> None:
            if self.hook:
                model.zero_grad()
                self.hook.remove()
                self.hook = None

    run = trainer(model, tmp_path, GradualPruning({"pattern": "2:4"}, schedule="linear", end=4), watch, Overflow(), max_grad_norm=0)  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train()
    late = [str(warning.message) for warning in caught if "activations are NaN or infinite" in str(warning.message)]
    assert [message.partition(":")[0] for message in late] == ["step 4", "step 5"]
    assert watch.shares[2:] == [0.375, 0.375, 0.375, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert hf_sparse.report(model).config["pattern"] == "2:4"


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "wrong", [{"end": 0}, {"start": -1}, {"every": 0}, {"schedule": "quintic"}, {"freeze": "never"}]
)
def test_a_schedule_that_is_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}"):
        GradualPruning({"pattern": "2:4"}, **wrong)


@pytest.mark.parametrize(
    "config", [{"metric": "sparsegpt"}, {"pattern": "5:4"}, {"allocation": "owl", "sparsity": 0.5}, 7]
)
def test_a_config_that_cannot_be_met_step_by_step(config: Any) -> None:
    with pytest.raises(ConfigError):
        GradualPruning(config)


@pytest.mark.parametrize(
    ("given", "arguments", "message"),
    [
        ({"end": 11}, {}, r"0, 11 and 11, but the training ends with step 10"),
        ({"end": 5, "freeze": 30}, {}, r"0, 5 and 30, but the training ends with step 10"),
        ({"start": 0.7}, {}, r"7, 5 and 5 of 10"),
        ({}, {"torch_compile": True}, r"metric='wanda'.*torch\.compile hides them; use metric='magnitude'"),
    ],
)
def test_what_the_training_does_not_fit_is_refused_before_its_first_step(
    given: dict[str, Any], arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = llama()
    hf_sparse.prune_(model, {**MAGNITUDE, "pattern": "3:4"})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        trainer(model, tmp_path, GradualPruning({"pattern": "2:4"}, **given), **arguments).train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.hf_sparse["config"]["pattern"] == "3:4"  # and what it says of itself


def test_a_frozen_model_under_an_adapter(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(ModelError, match=r"does not train \(under an adapter.*prune first"):
        trainer(model, tmp_path, GradualPruning({"pattern": "2:4"})).train()


def test_a_quantized_model(tmp_path: Path) -> None:
    model = llama()
    run = trainer(model, tmp_path, GradualPruning({"pattern": "2:4"}))
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ModelError, match="quantized"):
        run.train()


def test_two_of_them(tmp_path: Path) -> None:
    both = (
        GradualPruning({"pattern": "2:4", "targets": "mlp"}),
        GradualPruning({"pattern": "2:4", "targets": "attention"}),
    )
    with pytest.raises(ConfigError, match=r"2 callbacks of GradualPruning.*mapping"):
        trainer(llama(), tmp_path, *both).train()


def test_an_optimizer_with_weights_of_its_own(tmp_path: Path) -> None:
    class Averaging(torch.optim.SGD):
        def eval(self) -> None: ...

        def train(self) -> None: ...

    model = llama()
    run = trainer(model, tmp_path, GradualPruning({"pattern": "2:4"}))
    run.optimizer = Averaging(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"Averaging evaluates with an average.*AdamW"):
        run.train()


@pytest.mark.slow
def test_magnitude_under_torch_compile(tmp_path: Path) -> None:
    model, watch = llama(layers=1), Watch()
    trainer(model, tmp_path, GradualPruning({**MAGNITUDE, "pattern": "2:4"}), watch, torch_compile=True).train()
    assert watch.shares == pytest.approx([0.244, 0.392, 0.468, 0.496, *[0.5] * 6], abs=1e-3)
