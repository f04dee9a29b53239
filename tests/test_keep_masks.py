"""KeepMasks in a Trainer: what is zero when training begins is +0.0 behind every step, at every evaluation and in every checkpoint."""

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import bert, gpt2, llama, mixtral, phi3, t5, token_rows
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_sparse import SparsityConfig, mask_lora_, masks, prune_, report
from hf_sparse.checkpoint import detach, unwrap
from hf_sparse.errors import CheckpointError, ConfigError, ModelError
from hf_sparse.families import find_sites
from hf_sparse.sites import read
from trainer_callbacks import GradualPruning, KeepMasks, Sparsify

# The older name is deprecated, and the newer one unknown to the lowest version.
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)
ROWS = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in token_rows(12)]

pytestmark = pytest.mark.usefixtures("little_garbage", "no_pictures")


def pruned(make: Callable[..., Any] = llama, **changes: Any) -> Any:
    model = make(**changes)
    prune_(model, SparsityConfig(metric="magnitude"))
    return model


def zeros_of(model: Any) -> dict[str, torch.Tensor]:
    """Which weights of each site are zero in memory bit for bit, so +0.0."""
    plain = unwrap(model)
    weights = {site.name: read(plain, site) for site in find_sites(plain).all()}
    return {name: (weight == 0) & ~torch.signbit(weight) for name, weight in weights.items()}


class Watch(TrainerCallback):
    """Stands behind KeepMasks and looks whenever anything else could."""

    def __init__(self, model: Any, behind: bool = True) -> None:
        self.zeros = zeros_of(model)
        self.behind = behind
        self.seen: list[str] = []

    def look(self, event: str, model: Any, folder: Path | None = None) -> None:
        found = zeros_of(model) if folder is None else zeros_of(type(model).from_pretrained(folder))
        assert found.keys() == self.zeros.keys()
        wrong = [name for name, place in self.zeros.items() if not bool(found[name][place].all())]
        assert not wrong, (event, wrong)
        self.seen.append(event)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **events: Any) -> None:
        self.look("step begins", model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **events: Any) -> None:
        if self.behind:
            self.look("step", model)

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any, **events: Any) -> None:
        self.look("evaluation", model)

    def on_save(self, args: Any, state: Any, control: Any, model: Any, **events: Any) -> None:
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        adapters = (folder / "adapter_config.json").is_file()
        self.look("save", model, None if adapters else folder)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any, **events: Any) -> None:
        self.look("end", model)


def settings_for(folder: Path, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "weight_decay": 0.1,
        "logging_steps": 2, "save_steps": 3, "eval_steps": 3, "eval_strategy": "steps", "report_to": [], "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    return {**settings, **changes}


def trainer_for(
    model: Any, folder: Path, *callbacks: Any, rows: Any = ROWS, optimizer: Any = None, **changes: Any
) -> Trainer:
    return Trainer(
        model, TrainingArguments(**settings_for(folder, **changes)), train_dataset=rows, eval_dataset=ROWS[:2], callbacks=list(callbacks),
        optimizers=(optimizer, None),
    )  # fmt: skip


def train(model: Any, folder: Path, **changes: Any) -> Watch:
    """Train with the zeros watched, and see that something was trained."""
    watch = Watch(model)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer_for(model, folder, KeepMasks(), watch, **changes).train()
    moved = [name for name, value in model.named_parameters() if not torch.equal(before[name], value)]
    assert len(moved) > 0.8 * sum(value.requires_grad for value in model.parameters())
    assert watch.seen.count("step") == changes.get("max_steps", 6)
    assert {"evaluation", "save", "end"} <= set(watch.seen)
    return watch


def equal(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


# ------------------------------------------------------------------------------------------------ ways to train


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 3},
        {"bf16": True},
        {"fp16": True},  # which the Trainer leaves out on a CPU; tests/test_kept.py has the loop with a scaler
        {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}},
        {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}},
        {"lr_scheduler_type": "cosine", "warmup_steps": 2, "max_grad_norm": 0.0},
        {"logging_nan_inf_filter": False, "dataloader_drop_last": True, "torch_empty_cache_steps": 1},
        {"neftune_noise_alpha": 5.0},
        {"label_smoothing_factor": 0.1},
        {"bf16_full_eval": True, "eval_on_start": True},
        {"save_strategy": "epoch", "eval_strategy": "epoch"},
        {"save_strategy": "best", "metric_for_best_model": "loss", "eval_steps": 2},
    ],
    ids=str,
)
def test_zeros_stay_in_every_way_to_train(changes: dict[str, Any], tmp_path: Path) -> None:
    model = pruned()
    train(model, tmp_path, **changes)
    assert report(model).recoveries[-1].zeros_lost == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_zeros_stay_in_models_of_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    train(pruned().to(dtype), tmp_path, optim="sgd", learning_rate=1.0)


@pytest.mark.parametrize("make", [phi3, gpt2, mixtral, bert, t5])
def test_zeros_stay_in_every_family(make: Callable[..., Any], tmp_path: Path) -> None:
    train(pruned(make), tmp_path)


def test_zeros_stay_beside_tied_weights(tmp_path: Path) -> None:
    train(pruned(tie_word_embeddings=True), tmp_path)


def test_zeros_that_another_tool_made_stay(tmp_path: Path) -> None:
    model = pruned()
    detach(model)
    train(model, tmp_path)
    assert report(model) is None


@pytest.mark.slow
def test_zeros_stay_under_torch_compile(tmp_path: Path) -> None:
    model = pruned()
    train(model, tmp_path, torch_compile=True)
    assert report(model).recoveries[-1].tokens == 6 * 2 * 16


# ------------------------------------------------------------------------------------------------ optimizers


@pytest.mark.parametrize(
    "changes",
    [
        {"optim": "adamw_torch"},
        {"optim": "adamw_torch_fused"},
        {"optim": "adafactor"},
        {"optim": "adafactor", "optim_args": "scale_parameter=True,relative_step=False"},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=True"},
        {"optim": "adagrad"},
        {"optim": "rmsprop"},
    ],
    ids=str,
)
def test_zeros_stay_with_every_optimizer(changes: dict[str, Any], tmp_path: Path) -> None:
    train(pruned(), tmp_path, **changes)


@pytest.mark.parametrize(
    "name", ["adamw_bnb_8bit", "lion_8bit", "paged_adamw_8bit", "rmsprop_bnb_8bit", "ademamix_8bit"]
)
def test_zeros_stay_with_optimizers_of_8_bits(name: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes, which has the optimizers of 8 bits, is not installed")
    # They keep states of 8 bits for parameters of 4096 weights and more; of smaller ones in 32.
    train(pruned(hidden_size=64, intermediate_size=96), tmp_path, optim=name)


class ScheduleFree(torch.optim.SGD):
    """Evaluates with a mean of sequences that it keeps for itself, as Schedule-Free does (arXiv 2405.15682, section 2)."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.others = [value.detach().clone() for value in self.param_groups[0]["params"]]
        self.aside: list[torch.Tensor] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        with torch.no_grad():
            for value, other in zip(self.param_groups[0]["params"], self.others, strict=True):
                other -= 0.3 * value.grad

    def eval(self) -> None:
        if not self.aside:
            values = self.param_groups[0]["params"]
            self.aside = [value.detach().clone() for value in values]
            for value, other in zip(values, self.others, strict=True):
                value.data.lerp_(other, 0.5)

    def train(self) -> None:
        for value, own in zip(self.param_groups[0]["params"], self.aside, strict=False):
            value.data.copy_(own)
        self.aside = []


def test_zeros_stay_where_the_optimizer_evaluates_with_weights_of_its_own(tmp_path: Path) -> None:
    model = pruned()
    watch = Watch(model)
    trainer_for(model, tmp_path, KeepMasks(), watch, optimizer=ScheduleFree(list(model.parameters()))).train()
    assert watch.seen.count("evaluation") == 2


@pytest.mark.parametrize("name", ["schedule_free_adamw", "schedule_free_sgd", "schedule_free_radam"])
def test_zeros_stay_with_schedule_free_optimizers(name: str, tmp_path: Path) -> None:
    pytest.importorskip("schedulefree", reason="schedulefree is not installed; a sketch of it is tested above")
    train(pruned(), tmp_path, optim=name, lr_scheduler_type="constant")


# ------------------------------------------------------------------------------------------------ resumption


@dataclasses.dataclass
class Runs:
    """A training of six steps, and what it left at the third."""

    whole: Any
    checkpoint: str


def whole_run(folder: Path, *callbacks: Any, **changes: Any) -> Runs:
    model = pruned()
    trainer_for(model, folder, *callbacks, **changes).train()
    return Runs(model, str(folder / "checkpoint-3"))


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize(
    "changes",
    [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}, {"optim": "sgd", "optim_args": "momentum=0.9"}],
    ids=str,
)
def test_a_resumed_run_equals_the_whole_one_bit_for_bit(changes: dict[str, Any], restore: bool, tmp_path: Path) -> None:
    runs = whole_run(tmp_path, KeepMasks(), **changes)
    model = pruned()
    # Where the Trainer restores callbacks, it makes new objects and puts them last; ours is then the one that watches first.
    watch = Watch(model, behind=not restore)
    again = trainer_for(
        model, tmp_path / "again", KeepMasks(), watch, restore_callback_states_from_checkpoint=restore, **changes
    )
    again.train(resume_from_checkpoint=runs.checkpoint)
    assert equal(model, runs.whole)
    assert {"step begins", "evaluation", "save", "end"} <= set(watch.seen)


def test_the_masks_of_a_resumed_run_come_from_its_checkpoint(tmp_path: Path) -> None:
    runs = whole_run(tmp_path, KeepMasks())
    model = llama()  # dense, and without a report
    trainer_for(model, tmp_path / "again", KeepMasks()).train(resume_from_checkpoint=runs.checkpoint)
    assert equal(model, runs.whole)


def test_a_checkpoint_that_was_made_without_the_callback_is_resumed(tmp_path: Path) -> None:
    class OwnKeeper(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **events: Any) -> None:
            for name, mask in kept.items():
                model.get_submodule(name).weight.data *= mask

    kept = masks(pruned())
    runs = whole_run(tmp_path, OwnKeeper())
    assert "KeepMasks" not in json.loads(Path(runs.checkpoint, "trainer_state.json").read_text())["stateful_callbacks"]
    model = pruned()
    watch = Watch(model)
    trainer_for(model, tmp_path / "again", KeepMasks(), watch).train(resume_from_checkpoint=runs.checkpoint)
    assert watch.seen.count("save") == 1
    assert zeros_of(model).keys() == zeros_of(runs.whole).keys()


def test_a_checkpoint_that_was_made_without_the_callback_has_lost_its_zeros(tmp_path: Path) -> None:
    runs = whole_run(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"the checkpoint of step 3 has lost zeros: model\.layers\.0\..* and 11 more"
    ):
        trainer_for(pruned(), tmp_path / "again", KeepMasks()).train(resume_from_checkpoint=runs.checkpoint)


def fill_(checkpoint: str, *names: str) -> None:
    """Make some tensors of a checkpoint dense."""
    file = Path(checkpoint, "model.safetensors")
    weights = load_file(file)
    for name in names:
        weights[name] = torch.full_like(weights[name], 0.01)
    save_file(weights, file, {"format": "pt"})


@pytest.mark.parametrize("make", [pruned, llama])  # with a report; and dense, so that only the checkpoint knows
def test_a_checkpoint_that_was_changed_is_refused_by_the_names_of_its_sites(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    runs = whole_run(tmp_path, KeepMasks())
    fill_(runs.checkpoint, "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(
        CheckpointError, match=r"step 3 has lost zeros: .*model\.layers\.1\.mlp\.up_proj \(0.*resume from an older"
    ):
        trainer_for(make(), tmp_path / "again", KeepMasks()).train(resume_from_checkpoint=runs.checkpoint)


def test_a_run_that_was_warned_about_lost_zeros_can_be_resumed(tmp_path: Path) -> None:
    def lossy() -> Any:
        model = pruned()
        model.model.layers[0].mlp.up_proj.weight.data.fill_(0.01)
        return model

    whole = lossy()
    with pytest.warns(UserWarning, match="fewer zeros than its report says"):
        trainer_for(whole, tmp_path, KeepMasks()).train()
    model = lossy()
    with pytest.warns(UserWarning, match="fewer zeros than its report says"):
        trainer_for(model, tmp_path / "again", KeepMasks()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert equal(model, whole)


def test_the_best_model_that_is_loaded_at_the_end_has_its_zeros(tmp_path: Path) -> None:
    model = pruned()
    watch = Watch(model)
    trainer = trainer_for(
        model, tmp_path, KeepMasks(), watch, load_best_model_at_end=True, metric_for_best_model="loss", eval_steps=2, save_steps=2,
        greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step < 6
    watch.look("best", model)
    assert report(model).recoveries[-1].settings == {"weights_of_step": trainer.state.best_global_step}


# ------------------------------------------------------------------------------------------------ again, and after a crash


def test_two_trainings_in_a_row_with_one_trainer(tmp_path: Path) -> None:
    model = pruned()
    watch = Watch(model)
    trainer = trainer_for(model, tmp_path, KeepMasks(), watch)
    trainer.train()
    trainer.train()
    assert watch.seen.count("step") == 12
    assert [entry.steps for entry in report(model).recoveries] == [6, 6]


class Crash(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args: Any, state: Any, control: Any, **events: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt

    on_pre_optimizer_step = on_substep_end


def test_a_training_that_broke_off_is_taken_up_again(tmp_path: Path) -> None:
    runs = whole_run(tmp_path, KeepMasks())
    model = pruned()
    watch, crash = Watch(model), Crash(4)
    trainer = trainer_for(model, tmp_path / "again", KeepMasks(), watch, crash)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    watch.look("crash", model)
    trainer.remove_callback(crash)
    trainer.train(resume_from_checkpoint=True)
    assert equal(model, runs.whole)
    assert not model._forward_pre_hooks
    assert [entry.steps for entry in report(model).recoveries] == [6]


def test_a_training_that_broke_off_is_begun_anew(tmp_path: Path) -> None:
    model = pruned()
    watch, crash = Watch(model), Crash(2)
    trainer = trainer_for(model, tmp_path, KeepMasks(), watch, crash)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer_for(model, tmp_path, KeepMasks(), watch).train()  # another Trainer, as in the next cell of a notebook
    assert watch.seen.count("step") == 2 + 6
    assert not model._forward_pre_hooks


def test_a_model_from_model_init_is_kept_anew_each_time(tmp_path: Path) -> None:
    args = TrainingArguments(**settings_for(tmp_path, eval_strategy="no"))
    trainer = Trainer(None, args, model_init=lambda: pruned(), train_dataset=ROWS, callbacks=[KeepMasks])
    for _ in range(2):
        trainer.train()
        assert all(bool(place.any()) for place in zeros_of(trainer.model).values())


def test_the_masks_do_not_outlive_the_training(tmp_path: Path) -> None:
    callback = KeepMasks()
    trainer_for(pruned(), tmp_path, callback).train()
    assert callback._kept is None


# ------------------------------------------------------------------------------------------------ bad input


def test_a_dense_model_is_refused_with_how_to_prune(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nothing to keep: 0 of 15360 .*sparsity_config=.*prune_.*Sparsify"):
        trainer_for(llama(), tmp_path, KeepMasks()).train()


class Exchange(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **events: Any) -> None:
        if state.global_step == 2:
            layer = model.model.layers[1].mlp.up_proj
            layer.weight = nn.Parameter(layer.weight.detach().clone())


def test_a_parameter_exchanged_between_start_and_step_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight was a parameter"):
        trainer_for(pruned(), tmp_path, Exchange(), KeepMasks()).train()


class Meddle(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **events: Any) -> None:
        if state.global_step == 6:
            model.model.layers[0].mlp.up_proj.weight.data[0] = 1


def test_a_model_that_lost_zeros_behind_the_last_step_is_not_handed_out_silently(tmp_path: Path) -> None:
    model = pruned()
    with pytest.raises(ModelError, match="16 weights that were zero when training began are not zero at its end"):
        trainer_for(model, tmp_path, KeepMasks(), Meddle()).train()
    assert report(model).recoveries[-1].zeros_lost == 16


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("other", [Sparsify, GradualPruning])
def test_beside_a_callback_that_prunes_it_is_left_out(other: Any, first: bool, tmp_path: Path) -> None:
    callbacks = [KeepMasks(), other({"metric": "magnitude"})][:: 1 if first else -1]
    with pytest.raises(
        ConfigError, match=rf"{other.__name__} prunes the model and keeps its masks itself.*leave KeepMasks out"
    ):
        trainer_for(llama(), tmp_path, *callbacks)


class Halts(TrainerCallback):
    """Ends a training between the optimizer's step and what keeps the masks."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **events: Any) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("interrupted", [True, False])
def test_a_training_that_broke_off_leaves_zeros_and_holds_no_masks(interrupted: bool, tmp_path: Path) -> None:
    model, callback = pruned(), KeepMasks()
    places = zeros_of(model)
    run = trainer_for(model, tmp_path, *([Halts()] if interrupted else []), callback)
    if not interrupted:
        run.create_optimizer()
        run.optimizer.step = lambda *_: exchange(model)
    with pytest.raises(KeyboardInterrupt if interrupted else ModelError):
        run.train()
    assert callback._kept is None
    found = zeros_of(model)
    assert all(torch.equal(found[name], place) for name, place in places.items()) or not interrupted


def exchange(model: Any) -> None:
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach() + 1)


# ------------------------------------------------------------------------------------------------ adapters and TRL


@pytest.mark.filterwarnings("ignore:the adapters are not masked")
@pytest.mark.parametrize("calls", [True, False])  # PEFT before 0.21 runs the forward of what it wraps without a call
def test_adapters_train_while_the_base_stays_as_it_was(
    calls: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTuner

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs) if calls else self.model.forward(*args, **kwargs)

    monkeypatch.setattr(BaseTuner, "forward", forward)
    model = get_peft_model(pruned(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    watch = Watch(model)
    trainer_for(model, tmp_path, KeepMasks(), watch).train()
    assert {"evaluation", "save", "end"} <= set(watch.seen)
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) == ("lora_" not in name), name
    (entry,) = report(model).recoveries
    assert entry.method.startswith("LoRA, r 4; ")
    assert entry.tokens == 6 * 2 * 16


def test_adapters_that_would_fill_in_the_zeros_are_told_of(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(pruned(), LoraConfig(r=4, target_modules=["up_proj"]))
    with pytest.warns(
        UserWarning, match=r"not masked: training leaves the 1,536 zeros .*mask_lora_.*sparse_shira_config"
    ):
        trainer_for(model, tmp_path, KeepMasks(), max_steps=1).train()
    mask_lora_(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not masked")
        trainer_for(model, tmp_path, KeepMasks(), max_steps=1).train()
        injected = pruned()
        injected.add_adapter(LoraConfig(r=4, target_modules=["up_proj"]))
        with pytest.raises(UserWarning, match="1,536 zeros"):
            trainer_for(injected, tmp_path, KeepMasks(), max_steps=1).train()


def test_adapters_on_shards_are_kept_without_a_word(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(pruned(), LoraConfig(r=4, target_modules=["up_proj"]))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        callback, control = KeepMasks(), TrainerControl()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            callback.on_train_begin(TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(), control, model)
        assert callback.figures() == {"sparsity": 0.5}
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("adapters", [False, True])
def test_trl_supervised_fine_tuning(adapters: bool, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset
    from models import tokenizer
    from peft import LoraConfig

    model = pruned()
    watch = Watch(model)
    words = Dataset.from_dict({"text": ["the cat sat on a mat", "a dog ran", "the dog and the cat ran on the mat"] * 4})
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"]) if adapters else None
    args = trl.SFTConfig(**settings_for(tmp_path, max_length=16, bf16=False, **{CHECKPOINTING: False}))
    trainer = trl.SFTTrainer(
        model, args, train_dataset=words, eval_dataset=words.select(range(2)), processing_class=tokenizer(), peft_config=peft_config,
        callbacks=[KeepMasks(), watch],
    )  # fmt: skip
    trainer.train()
    assert watch.seen.count("step") == 6
    assert {"evaluation", "save", "end"} <= set(watch.seen)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["sparsity"] for log in logs] == [0.5] * 3
    assert all("mean_token_accuracy" in log for log in logs)
    assert report(trainer.model).recoveries[-1].zeros_lost == 0
