"""Distillation: the loss is the formula, normalised as the Trainer normalises, whatever wraps the model; nothing else changes."""

import copy
import gc
import math
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import bert, gpt2, llama, mixtral, t5, token_rows
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hf_sparse import SparsityConfig, prune_, report
from hf_sparse.blocks import find_blocks
from hf_sparse.errors import ConfigError, HfSparseError, ModelError
from trainer_callbacks import KeepMasks, Sparsify, distillation_loss
from trainer_callbacks.distillation import Distillation
from trainer_callbacks.distillation_loss import counted_positions, divergence_, relative_error
from trainer_callbacks.distillation_teacher import copied

VOCABULARY = 64
MAGNITUDE = SparsityConfig(metric="magnitude")
# The Trainer's name for it since 5.2x.
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)

pytestmark = pytest.mark.usefixtures("little_garbage", "no_pictures")


# ------------------------------------------------------------------------------------------------ models and batches


def other(model: Any) -> Any:
    """A model of the same kind with other weights, far enough away for losses that are not tiny."""
    made = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


def bert_for(kind: Any, labels: int) -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=labels,
    )  # fmt: skip
    return kind(config).eval()


def still(make: Callable[[], Any]) -> Any:
    """Without dropout, so that a step can be worked out a second time."""
    model = make()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=5,
    )
    return ViTForImageClassification(config).eval()


def text_rows(number: int = 4, length: int = 12, seed: int = 0, hidden: int = 3) -> list[dict[str, torch.Tensor]]:
    """Rows of unequal length, padded on the right; the first `hidden` tokens of each have no label."""
    rows = []
    for index, ids in enumerate(token_rows(number, length, seed)):
        mask = (torch.arange(length) < length - 2 * index).long()
        labels = ids.masked_fill(mask == 0, -100)
        labels[:hidden] = -100
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return rows


def class_rows(number: int = 4, classes: int = 5) -> list[dict[str, torch.Tensor]]:
    return [{**row, "labels": torch.tensor(index % classes)} for index, row in enumerate(text_rows(number))]


def image_rows() -> list[dict[str, torch.Tensor]]:
    pixels = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return [{"pixel_values": image, "labels": torch.tensor(index)} for index, image in enumerate(pixels)]


KINDS: dict[str, tuple[Callable[[], Any], Callable[[], list[dict[str, torch.Tensor]]]]] = {
    "causal": (llama, text_rows),
    "causal without a loss by name": (partial(still, gpt2), text_rows),
    "experts": (mixtral, text_rows),
    "masked": (partial(still, bert), text_rows),
    "tokens": (partial(bert_for, BertForTokenClassification, VOCABULARY), text_rows),
    "sequences": (partial(bert_for, BertForSequenceClassification, 5), class_rows),
    # the labels are as long as the inputs: only what is known of the model tells their positions apart
    "encoder-decoder": (partial(still, t5), text_rows),
    "images": (vit, image_rows),
}


def batch_of(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


# ------------------------------------------------------------------------------------------------ training


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True,
        **{
            "max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1.0, "optim": "sgd", "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0, "save_strategy": "no", "logging_steps": 1, "seed": 1, **changes,
        },
    )  # fmt: skip


def trainer(model: Any, rows: Any, folder: Path, *callbacks: TrainerCallback, **changes: Any) -> Trainer:
    return Trainer(model=model, args=arguments(folder, **changes), train_dataset=rows, callbacks=list(callbacks))


def trained(model: Any, rows: Any, folder: Path, *callbacks: TrainerCallback, **changes: Any) -> Trainer:
    made = trainer(model, rows, folder, *callbacks, **changes)
    made.train()
    return made


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def gradients(
    model: Any, rows: Any, folder: Path, *callbacks: TrainerCallback, **changes: Any
) -> dict[str, torch.Tensor]:
    """Of one step: what plain gradient descent with rate 1 takes away."""
    before = weights(model)
    trained(model, rows, folder, *callbacks, **changes)
    return {name: before[name] - value for name, value in weights(model).items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], tolerance: float = 1e-5) -> bool:
    """To rounding, against the largest value of each tensor."""
    assert one.keys() == two.keys()
    largest = max(float(value.abs().max()) for value in two.values())
    return all(torch.allclose(one[name], two[name], rtol=1e-3, atol=tolerance * largest) for name in one)


def losses(made: Trainer) -> list[dict[str, float]]:
    return [log for log in made.state.log_history if "loss" in log]


# ------------------------------------------------------------------------------------------------ the formula


def naive(
    student: Any, teacher: Any, batch: dict[str, torch.Tensor], temperature: float, weight: float, block_weight: float
) -> Any:
    """The formula of the docstring, written down as plainly as can be."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if student.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = student.prepare_decoder_input_ids_from_labels(batch["labels"])
    kept: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    handles = [
        block.module.register_forward_hook(
            lambda module, args, output, which=which: kept[which].append(
                output[0] if isinstance(output, tuple) else output
            )
        )
        for which, model in enumerate((student, teacher))
        for block in find_blocks(model)
    ]
    outputs = student(**inputs, labels=batch["labels"])
    with torch.no_grad():
        wanted = teacher(**inputs).logits
    for handle in handles:
        handle.remove()
    labels, logits = batch["labels"], outputs.logits
    shifts = type(student).__name__ in ("LlamaForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM")
    if shifts:
        labels, logits, wanted = labels[:, 1:], logits[:, :-1], wanted[:, :-1]
    counted = labels != -100
    divergence = functional.kl_div(
        functional.log_softmax(logits[counted] / temperature, -1),
        functional.softmax(wanted[counted] / temperature, -1),
        reduction="sum",
    )
    terms = []
    for index, (own, theirs) in enumerate(zip(kept[0], kept[1], strict=True)):
        if shifts:
            own, theirs = own[:, :-1], theirs[:, :-1]
        beside = own.shape[:-1] == counted.shape and not (
            student.config.is_encoder_decoder and index < len(kept[0]) // 2
        )
        padded = batch.get("attention_mask", torch.ones(own.shape[:-1]))
        positions = counted if beside else padded != 0
        ratio = (own - theirs)[positions].square().sum(-1) / theirs[positions].square().sum(-1)
        terms.append(ratio.mean())
    loss = (1 - weight) * outputs.loss + weight * temperature**2 * divergence / counted.sum()
    return loss + block_weight * torch.stack(terms).mean() if block_weight else loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("temperature", "weight", "block_weight"), [(1.0, 1.0, 0.0), (2.0, 0.25, 0.0), (1.0, 0.5, 2.0), (0.5, 0.0, 1.0)]
)
def test_a_step_follows_the_formula(
    kind: str, temperature: float, weight: float, block_weight: float, tmp_path: Path
) -> None:
    make, rows = KINDS[kind]
    student, teacher = make(), other(make())
    batch = batch_of(rows())
    student.train()
    loss = naive(student, teacher, batch, temperature, weight, block_weight)
    loss.backward()
    expected = {
        name: torch.zeros_like(value) if value.grad is None else value.grad.clone()
        for name, value in student.named_parameters()
    }
    student.zero_grad()
    callback = Distillation(teacher, temperature=temperature, weight=weight, block_weight=block_weight)
    made = trainer(student, rows(), tmp_path, callback)
    before = weights(student)
    made.train()
    assert same({name: before[name] - value for name, value in weights(student).items()}, expected)
    assert losses(made)[0]["loss"] == pytest.approx(loss.item(), rel=1e-3)  # the log rounds


@pytest.mark.parametrize("kind", ["causal", "sequences", "encoder-decoder"])
def test_the_figures_in_the_log_add_up(kind: str, tmp_path: Path) -> None:
    make, rows = KINDS[kind]
    made = trained(
        make(), rows(), tmp_path, Distillation(other(make()), weight=0.25, block_weight=0.5), max_steps=4, logging_steps=2,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=0.01,
    )  # fmt: skip
    assert len(losses(made)) == 2
    for log in losses(made):
        total = 0.75 * log["task_loss"] + 0.25 * log["distillation_loss"] + 0.5 * log["block_loss"]
        assert log["loss"] == pytest.approx(total, rel=2e-3)


def test_without_block_weight_or_labels_there_are_no_figures_of_them(tmp_path: Path) -> None:
    rows = [{name: value for name, value in row.items() if name != "labels"} for row in text_rows()]
    log = losses(trained(llama(), rows, tmp_path, Distillation(other(llama()))))[0]
    assert log["loss"] == pytest.approx(log["distillation_loss"])
    assert not {"task_loss", "block_loss"} & set(log)


def test_without_labels_all_positions_count_that_are_not_padding(tmp_path: Path) -> None:
    student, teacher = llama(), other(llama())
    batch = batch_of(text_rows())
    labels, mask = batch.pop("labels"), batch["attention_mask"] != 0
    difference = functional.kl_div(
        student(**batch).logits[mask].log_softmax(-1), teacher(**batch).logits[mask].softmax(-1), reduction="sum"
    )
    rows = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in text_rows()]
    log = losses(trained(student, rows, tmp_path, Distillation(teacher)))[0]
    assert log["distillation_loss"] == pytest.approx(difference.item() / int(mask.sum()), rel=1e-3)
    assert labels.shape == mask.shape


# ------------------------------------------------------------------------------------------------ accumulation


@pytest.mark.parametrize(
    ("kind", "block_weight"),
    [
        ("causal", 0.0),
        ("causal", 1.0),
        ("masked", 0.0),
        ("masked", 1.0),
        ("tokens", 0.0),
        ("encoder-decoder", 0.0),
        ("sequences", 0.0),
    ],
)
def test_accumulated_micro_batches_of_unequal_length_give_the_gradient_of_one_batch(
    kind: str, block_weight: float, tmp_path: Path
) -> None:
    make, rows = KINDS[kind]
    # Of these, only causal language models divide their own loss by the labels of the accumulated batch; KL always is.
    weight = 0.5 if kind == "causal" else 1.0
    found = [
        gradients(
            make(), rows(), tmp_path, Distillation(other(make()), weight=weight, block_weight=block_weight),
            per_device_train_batch_size=size, gradient_accumulation_steps=4 // size,
        )
        for size in (4, 2, 1)
    ]  # fmt: skip
    assert same(found[1], found[0])
    assert same(found[2], found[0])


# ------------------------------------------------------------------------------------------------ what it must leave alone


def test_with_weight_0_the_plain_run_is_reproduced_bit_for_bit(tmp_path: Path) -> None:
    settings = {"max_steps": 3, "optim": "adamw_torch", "learning_rate": 0.01}
    plain, taught = llama(attention_dropout=0.1), llama(attention_dropout=0.1)
    trained(plain, text_rows(8), tmp_path, **settings)
    made = trained(taught, text_rows(8), tmp_path, Distillation(other(llama()), weight=0), **settings)
    assert all(
        torch.equal(one, two) for one, two in zip(weights(plain).values(), weights(taught).values(), strict=True)
    )
    assert losses(made)[0]["distillation_loss"] > 0.01  # measured all the same


@pytest.mark.parametrize("block_weight", [0.0, 1.0])
def test_a_teacher_with_the_same_weights_changes_nothing(block_weight: float, tmp_path: Path) -> None:
    model = llama()
    before = weights(model)
    made = trained(
        model, text_rows(), tmp_path, Distillation(copy.deepcopy(model), block_weight=block_weight), optim="adamw_torch"
    )
    assert losses(made)[0]["distillation_loss"] == 0
    assert all(torch.equal(one, before[name]) for name, one in weights(model).items())


def test_the_teacher_is_left_as_it_was(tmp_path: Path) -> None:
    student, teacher = llama(), other(llama(attention_dropout=0.5))
    teacher.train()
    teacher.model.layers[0].eval()
    teacher.model.norm.weight.requires_grad_(False)
    modes = [module.training for module in teacher.modules()]
    before = weights(teacher)
    trained(
        student, text_rows(), tmp_path, Distillation(teacher, block_weight=1.0), save_strategy="steps", save_steps=1
    )
    assert [module.training for module in teacher.modules()] == modes
    assert all(
        torch.equal(value, before[name]) and teacher.get_parameter(name).grad is None
        for name, value in weights(teacher).items()
    )
    assert not teacher.model.norm.weight.requires_grad
    assert teacher.lm_head.weight.requires_grad
    assert LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-1").num_parameters() == student.num_parameters()
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for model in (student, teacher) for module in model.modules()
    )


def test_the_teacher_answers_without_dropout(tmp_path: Path) -> None:
    found = []
    for dropout in (0.9, 0.0):
        teacher = other(llama(attention_dropout=dropout)).train()
        found.append(losses(trained(llama(), text_rows(), tmp_path, Distillation(teacher)))[0]["distillation_loss"])
    assert found[0] == found[1] > 0.01


def test_evaluation_keeps_the_plain_loss(tmp_path: Path) -> None:
    plain = trainer(llama(), text_rows(), tmp_path).evaluate(text_rows())["eval_loss"]
    made = Trainer(
        llama(), arguments(tmp_path, learning_rate=0.0, eval_strategy="steps", eval_steps=1), train_dataset=text_rows(),
        eval_dataset=text_rows(), callbacks=[Distillation(other(llama()))],
    )  # fmt: skip
    made.train()
    assert [log["eval_loss"] for log in made.state.log_history if "eval_loss" in log] == [plain]


# ------------------------------------------------------------------------------------------------ where the teacher comes from


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    other(llama()).save_pretrained(folder)
    return folder


def sparse(folder: Path, **changes: Any) -> Any:
    config = SparsityConfig(metric="magnitude", **changes)
    return LlamaForCausalLM.from_pretrained(folder, sparsity_config=config)


def test_a_sparse_student_is_taught_by_the_model_that_it_was_made_from(saved: Path, tmp_path: Path) -> None:
    told = losses(trained(sparse(saved), text_rows(), tmp_path, Distillation(LlamaForCausalLM.from_pretrained(saved))))
    student = sparse(saved)
    found = losses(trained(student, text_rows(), tmp_path, KeepMasks(), Distillation()))
    assert found[0]["distillation_loss"] == told[0]["distillation_loss"] > 0.01
    record = report(student).recoveries[-1]
    assert record.loss == "distillation from base, temperature 1, weight 1"
    assert record.settings == {"teacher": "base", "temperature": 1.0, "distillation_weight": 1.0, "block_weight": 0.0}
    assert record.callbacks == ["KeepMasks", "Distillation"]
    assert record.zeros_lost == 0


@pytest.mark.parametrize("form", [str, Path])
def test_a_path_is_loaded_as_the_students_class(form: Any, saved: Path, tmp_path: Path) -> None:
    told = losses(trained(llama(), text_rows(), tmp_path, Distillation(LlamaForCausalLM.from_pretrained(saved))))
    assert losses(trained(llama(), text_rows(), tmp_path, Distillation(form(saved)))) == told


class PruneAtTheBeginning(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **events: Any) -> None:
        prune_(model, SparsityConfig(metric="magnitude"))


@pytest.mark.parametrize("order", [1, -1])
def test_a_dense_student_is_taught_by_what_it_was_when_the_trainer_was_made(order: int, tmp_path: Path) -> None:
    student = other(llama())
    callbacks = [PruneAtTheBeginning(), Distillation(block_weight=1.0)][::order]
    expected = other(llama())
    prune_(expected, SparsityConfig(metric="magnitude"))
    loss = naive(expected, student, batch_of(text_rows()), 1.0, 1.0, 1.0)
    made = trained(student, text_rows(), tmp_path, *callbacks)
    assert losses(made)[0]["loss"] == pytest.approx(loss.item(), rel=1e-3)
    assert losses(made)[0]["distillation_loss"] > 0.01


def test_a_callback_added_later_copies_the_student_when_training_begins(tmp_path: Path) -> None:
    made = trainer(other(llama()), text_rows(), tmp_path, max_steps=2, learning_rate=0.01)
    made.add_callback(Distillation(weight=0.5))
    made.train()
    first, second = losses(made)
    assert first["distillation_loss"] == 0 < second["distillation_loss"]


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_loaded_teacher_may_have_another_number_format(dtype: Any, saved: Path, tmp_path: Path) -> None:
    plain = losses(trained(llama(), text_rows(), tmp_path, Distillation(saved)))[0]["distillation_loss"]
    rounded = losses(trained(llama(), text_rows(), tmp_path, Distillation(saved, teacher_dtype=dtype)))[0][
        "distillation_loss"
    ]
    assert rounded != plain
    assert rounded == pytest.approx(plain, rel=0.05)


class Draws(LlamaForCausalLM):
    """Draws random numbers when it is made, as models do that make their own tables."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.drawn = torch.rand(1, device="cpu")


def test_loading_a_teacher_leaves_the_random_numbers_of_the_training_alone(saved: Path, tmp_path: Path) -> None:
    runs = []
    for callbacks in ([], [Distillation(saved, weight=0)]):
        student = Draws(llama(attention_dropout=0.1).config)
        student.load_state_dict(llama().state_dict())
        trained(student, text_rows(), tmp_path, *callbacks, max_steps=2, learning_rate=0.01)
        runs.append(weights(student))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_a_copy_runs_neither_the_students_forward_nor_its_hooks() -> None:
    model = llama()
    plain = type(model).forward

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the student's")

    model.forward = wrapper
    model.model.layers[0].register_forward_hook(wrapper)
    model.model.register_forward_pre_hook(wrapper, with_kwargs=True)
    made = copied(model, None)
    assert made.forward.__func__ is plain
    assert made(token_rows(1)).logits.shape == (1, 16, VOCABULARY)
    assert len(model.model.layers[0]._forward_hooks) == len(model.model._forward_pre_hooks) == 1
    assert not any(parameter.requires_grad for parameter in made.parameters())


# ------------------------------------------------------------------------------------------------ ways to train


def lora(model: Any, task: str | None = "CAUSAL_LM") -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type=task)
    return get_peft_model(model, config)


@pytest.mark.filterwarnings("ignore:the adapters are not masked")
@pytest.mark.parametrize(
    "task", ["CAUSAL_LM", None]
)  # PEFT has a wrapper for each, which call the model in ways of their own
def test_adapters_on_a_sparse_base_are_taught_by_its_dense_model(task: str | None, saved: Path, tmp_path: Path) -> None:
    student = lora(sparse(saved), task)
    loss = naive(
        student.get_base_model(), LlamaForCausalLM.from_pretrained(saved), batch_of(text_rows()), 1.0, 1.0, 0.0
    )
    before = weights(student)
    made = trained(student, text_rows(), tmp_path, KeepMasks(), Distillation())
    assert losses(made)[0]["loss"] == pytest.approx(loss.item(), rel=1e-3)
    changed = {name for name, value in weights(student).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_a_dense_student_with_adapters_is_taught_by_its_base(tmp_path: Path) -> None:
    base = other(llama())
    loss = naive((student := lora(copy.deepcopy(base))).get_base_model(), base, batch_of(text_rows()), 1.0, 1.0, 0.0)
    assert losses(trained(student, text_rows(), tmp_path, Distillation()))[0]["loss"] == pytest.approx(
        loss.item(), rel=1e-3
    )


@pytest.mark.parametrize("block_weight", [0.0, 1.0])
@pytest.mark.parametrize("reentrant", [False, True, None])
def test_gradient_checkpointing_changes_nothing(reentrant: bool | None, block_weight: float, tmp_path: Path) -> None:
    def found(**changes: Any) -> dict[str, torch.Tensor]:
        student = llama(attention_dropout=0.1)
        return gradients(
            student, text_rows(), tmp_path, Distillation(other(llama()), block_weight=block_weight), **changes
        )

    if reentrant and block_weight and "__call__" in vars(GradientCheckpointingLayer):
        pytest.skip("this version of Transformers checkpoints what runs a block's hooks; the next test is about that")
    how = {} if reentrant is None else {f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}}
    assert same(found(**{CHECKPOINTING: True}, **how), found(), 1e-6)


class Reentrant(LlamaDecoderLayer):
    """Checkpoints what runs its hooks, as Transformers did until 5.2x and code outside it does."""

    def __call__(self, hidden: torch.Tensor, **kwargs: Any) -> Any:
        return checkpoint(partial(super().__call__, **kwargs), hidden, use_reentrant=True)


def test_checkpointing_that_hides_block_outputs_is_refused(tmp_path: Path) -> None:
    student = llama()
    student.model.gradient_checkpointing = True
    for layer in student.model.layers:
        layer.__class__ = Reentrant
    student.enable_input_require_grads()
    with pytest.raises(ModelError, match='"use_reentrant": False'):
        trained(student, text_rows(), tmp_path, Distillation(other(llama()), block_weight=1.0))


def test_mixed_precision_holds_for_the_teacher_too(tmp_path: Path) -> None:
    seen = []
    teacher = other(llama())
    teacher.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    mixed = losses(trained(llama(), text_rows(), tmp_path, Distillation(teacher, block_weight=1.0), bf16=True))[0]
    plain = losses(trained(llama(), text_rows(), tmp_path, Distillation(teacher, block_weight=1.0)))[0]
    assert seen == [torch.bfloat16, torch.float32]
    assert mixed["distillation_loss"] == pytest.approx(plain["distillation_loss"], rel=0.05)
    assert mixed["block_loss"] == pytest.approx(plain["block_loss"], rel=0.05)


def test_a_resumed_run_equals_the_uninterrupted_one(saved: Path, tmp_path: Path) -> None:
    settings = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "optim": "adamw_torch",
        "learning_rate": 0.01,
    }
    rows = text_rows(12)
    whole, resumed = sparse(saved), sparse(saved)
    made = trained(whole, rows, tmp_path, KeepMasks(), Distillation(block_weight=0.5), **settings)
    again = trainer(resumed, rows, tmp_path, KeepMasks(), Distillation(block_weight=0.5), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(again) == losses(made)
    assert all(
        torch.equal(one, two) for one, two in zip(weights(whole).values(), weights(resumed).values(), strict=True)
    )


def test_a_callback_may_be_used_again_for_another_model(saved: Path, tmp_path: Path) -> None:
    callback = Distillation()
    trainer(llama(), text_rows(), tmp_path, callback)  # never begins, so its copy is still there
    again = losses(trained(sparse(saved), text_rows(), tmp_path, callback))
    assert again == losses(trained(sparse(saved), text_rows(), tmp_path, Distillation()))


class Breaks(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **events: Any) -> None:
        raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore:the adapters are not masked")
@pytest.mark.parametrize("block_weight", [0.0, 1.0])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_training_that_broke_off_leaves_the_plain_model_behind(
    wrapped: bool, block_weight: float, saved: Path, tmp_path: Path
) -> None:
    def student() -> Any:
        return lora(sparse(saved)) if wrapped else sparse(saved)

    model, teacher = student(), other(llama()).train()
    callback, held = Distillation(teacher, block_weight=block_weight), weakref.ref(teacher)
    with pytest.raises(KeyboardInterrupt):
        trained(model, text_rows(), tmp_path, callback, Breaks(), learning_rate=0.0)
    assert teacher.training
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in (*model.modules(), *teacher.modules()))
    own = trained(model, text_rows(), tmp_path, KeepMasks(), learning_rate=0.0)  # another Trainer, without the callback
    assert losses(own) == losses(trained(student(), text_rows(), tmp_path, KeepMasks(), learning_rate=0.0))
    del teacher, callback
    gc.collect()
    assert held() is None  # though the model is there


@pytest.mark.parametrize("fails", [False, True])
def test_a_second_training_has_the_same_teacher(fails: bool, tmp_path: Path) -> None:
    model, callback = llama(), Distillation()
    run = trainer(model, text_rows(), tmp_path, Sparsify(MAGNITUDE), callback, *([Breaks()] if fails else []))
    dense = weights(callback._dense)  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt) if fails else nullcontext():
            run.train()
        assert same(weights(callback._dense), dense, 0.0)  # type: ignore[arg-type]
    assert report(model).zeros == Sparsify(MAGNITUDE).config.target * 15360


def test_another_student_is_not_taught_by_the_first_ones_copy(tmp_path: Path) -> None:
    callback, seen = Distillation(weight=1.0), []
    run = trainer(llama(), text_rows(), tmp_path, callback, learning_rate=0.0)
    for make in (lambda: llama(), lambda: other(llama())):
        run.model_init, run.model = make, None
        run.train()
        seen += [log["distillation_loss"] for log in losses(run)]
    assert max(seen) < 1e-6


def test_a_quantized_student_may_be_taught(tmp_path: Path) -> None:
    model = llama()
    model.config.quantization_config = {"quant_method": "gptq"}  # its zeros cannot be counted
    run = trained(model, text_rows(), tmp_path, Distillation(other(llama())))
    assert losses(run)[-1]["distillation_loss"] > 0
    with pytest.raises(ModelError, match="quantized"):
        trained(model, text_rows(), tmp_path, KeepMasks())


@pytest.mark.parametrize("fresh", [True, False])
def test_after_a_training_that_broke_off_the_loss_is_changed_once(fresh: bool, saved: Path, tmp_path: Path) -> None:
    student, callback = llama(), Distillation(saved, weight=0.5)
    with pytest.raises(KeyboardInterrupt):
        trained(student, text_rows(), tmp_path, callback, Breaks(), learning_rate=0.0)
    again = losses(trained(student, text_rows(), tmp_path, Distillation(saved, weight=0.5) if fresh else callback))
    assert again == losses(trained(llama(), text_rows(), tmp_path, Distillation(saved, weight=0.5)))
    assert not student._forward_hooks


@pytest.mark.slow
@pytest.mark.parametrize(("block_weight", "backend"), [(0.0, "inductor"), (1.0, "aot_eager")])
def test_a_compiled_model_is_taught_alike(block_weight: float, backend: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    found = [
        trained(
            llama(), text_rows(), tmp_path, Distillation(other(llama()), weight=0.5, block_weight=block_weight), max_steps=3,
            learning_rate=0.01, torch_compile=compiled, torch_compile_backend=backend if compiled else None,
        )
        for compiled in (True, False)
    ]  # fmt: skip
    for one, two in zip(losses(found[0]), losses(found[1]), strict=True):
        assert one == pytest.approx(two, rel=1e-3)


# ------------------------------------------------------------------------------------------------ TRL


def supervised(model: Any, folder: Path, *callbacks: TrainerCallback, **changes: Any) -> Any:
    from datasets import Dataset
    from models import tokenizer
    from trl import SFTConfig, SFTTrainer

    texts = ["the cat sat on a mat", "the dog ran", "a cat and a dog sat on the mat and ran"] * 4
    config = SFTConfig(
        output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True, bf16=False,
        **{"max_steps": 1, "per_device_train_batch_size": 3, "learning_rate": 1.0, "optim": "sgd", "max_grad_norm": 0.0, "save_strategy": "no",
           "lr_scheduler_type": "constant", "logging_steps": 1, "max_length": 16, "seed": 1, **changes},
    )  # fmt: skip
    data = Dataset.from_dict({"text": texts})
    made = SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer(), callbacks=list(callbacks))
    made.train()
    return made


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL 1.16 sets it
@pytest.mark.parametrize(
    "changes", [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, {"packing": True}]
)
def test_trl_trains_on_the_formula_and_keeps_its_own_figures(
    changes: dict[str, Any], saved: Path, tmp_path: Path
) -> None:
    student, teacher = llama(), LlamaForCausalLM.from_pretrained(saved)
    before, batches = weights(student), []
    handle = student.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(kwargs) if module.training else None, with_kwargs=True
    )
    made = supervised(student, tmp_path, Distillation(teacher, weight=0.5, temperature=2.0), **changes)
    handle.remove()
    again, total, items = llama(), torch.zeros(()), 0
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "fused_lm_head")}
        counted = batch["labels"][:, 1:] != -100
        logits, wanted = again(**inputs).logits[:, :-1][counted], teacher(**inputs).logits[:, :-1][counted].detach()
        total = total + 0.5 * functional.cross_entropy(logits, batch["labels"][:, 1:][counted], reduction="sum")
        total = total + 0.5 * 4 * functional.kl_div(
            (logits / 2).log_softmax(-1), (wanted / 2).softmax(-1), reduction="sum"
        )
        items += int(counted.sum())
    (total / items).backward()
    assert same(
        {name: before[name] - value for name, value in weights(student).items()},
        {n: w.grad for n, w in again.named_parameters()},
    )
    plain, log = losses(supervised(llama(), tmp_path, **changes))[0], losses(made)[0]
    assert log["loss"] == pytest.approx(0.5 * log["task_loss"] + 0.5 * log["distillation_loss"], rel=2e-3)
    assert log["task_loss"] == pytest.approx(plain["loss"], rel=2e-3)
    for name in ("entropy", "mean_token_accuracy", "num_tokens"):
        assert log[name] == pytest.approx(plain[name], rel=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL 1.16 sets it
def test_what_of_trl_does_not_fit_is_refused(saved: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from models import tokenizer
    from trl import DPOConfig, DPOTrainer

    with pytest.raises(ConfigError, match='loss_type="nll"'):
        supervised(llama(), tmp_path, Distillation(saved), loss_type="dft")
    data = Dataset.from_dict({"prompt": ["the cat"] * 4, "chosen": [" sat"] * 4, "rejected": [" ran"] * 4})
    config = DPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, bf16=False, max_steps=1)
    with pytest.raises(ModelError, match="SFTTrainer"):
        DPOTrainer(
            LlamaForCausalLM.from_pretrained(saved),
            args=config,
            train_dataset=data,
            processing_class=tokenizer(),
            callbacks=[Distillation(saved)],
        ).train()


# ------------------------------------------------------------------------------------------------ what it refuses


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"temperature": 0}, "temperature is 0; .* greater than 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": "2"}, "temperature is '2'"),
        ({"weight": 1.5}, "weight is 1.5; .* from 0 to 1"),
        ({"weight": -0.1}, "weight is -0.1"),
        ({"weight": math.nan}, "weight is nan"),
        ({"weight": True}, "weight is True"),
        ({"block_weight": -1}, "block_weight is -1; .* 0 or greater"),
        ({"block_weight": None}, "block_weight is None"),
        ({"teacher": 7}, "teacher is a int; give a path"),
        ({"teacher_dtype": "bfloat15"}, "'bfloat15' does not exist. Did you mean 'bfloat16'"),
        ({"teacher_dtype": torch.int8}, "'int8' does not exist"),
        ({"teacher": nn.Linear(1, 1), "teacher_dtype": "bfloat16"}, "convert a model of your own"),
    ],
)
def test_bad_values(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Distillation(**bad)


def named(model: Any, name: str) -> Any:
    """As if it had been loaded from there."""
    model.config.name_or_path = name
    return model


def pruned(model: Any, **changes: Any) -> Any:
    prune_(model, SparsityConfig(metric="magnitude", **changes))
    return model


def sharing(model: Any) -> Any:
    made = llama()
    made.model.embed_tokens.weight = model.model.embed_tokens.weight
    return made


class Tuples(LlamaForCausalLM):
    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **others: Any) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **others).to_tuple()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda student: student, "shares parameters with the student"),
        (sharing, "shares parameters with the student"),
        (lambda student: llama(vocab_size=72), r"\(4, 12, 64\), the teacher of shape \(4, 12, 72\)"),
        (lambda student: vit(), "reads 'pixel_values', the student 'input_ids'"),
        (lambda student: llama().model, "the teacher LlamaModel returns no logits"),
        (lambda student: Tuples(student.config), "returns a tuple"),
        (lambda student: llama().to("meta"), "meta device"),
    ],
)
def test_teachers_that_do_not_fit(make: Any, message: str, tmp_path: Path) -> None:
    student = llama()
    with pytest.raises(HfSparseError, match=message):
        trained(student, text_rows(), tmp_path, Distillation(make(student)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: llama(layers=3), "2 blocks, the teacher 3"),
        (lambda: llama(hidden_size=48), r"outputs of shape \(4, 12, 32\) in the student and \(4, 12, 48\)"),
    ],
)
def test_teachers_whose_blocks_do_not_fit(make: Any, message: str, tmp_path: Path) -> None:
    teacher = make().train()
    trained(llama(), text_rows(), tmp_path, Distillation(teacher))  # for logits they do
    with pytest.raises(ModelError, match=message):
        trained(llama(), text_rows(), tmp_path, Distillation(teacher, block_weight=1.0))


def test_a_teacher_that_is_refused_is_left_as_it_was(tmp_path: Path) -> None:
    teacher = llama(layers=3).train()
    with pytest.raises(ModelError, match="2 blocks, the teacher 3"):
        trained(llama(), text_rows(), tmp_path, Distillation(teacher, block_weight=1.0))
    assert all(module.training for module in teacher.modules())


def zeroed() -> Any:
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
        model.model.layers[1].mlp.up_proj.weight.zero_()
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: pruned(named(llama(), "")), "was pruned in memory, without a path"),
        (lambda folder: pruned(named(llama(), str(folder / "gone"))), "gone' cannot be loaded as LlamaForCausalLM"),
        (lambda folder: zeroed(), "carries no report"),
    ],
)
def test_a_sparse_student_whose_dense_model_is_not_known(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"{message}.*Pass the dense model or its path"):
        trained(make(tmp_path), text_rows(), tmp_path, Distillation())


def test_a_base_that_is_sparse_itself_is_no_dense_teacher(saved: Path, tmp_path: Path) -> None:
    sparse(saved).save_pretrained(saved)  # over the dense model
    with pytest.raises(ModelError, match="sparse itself"):
        trained(pruned(named(llama(), str(saved))), text_rows(), tmp_path, KeepMasks(), Distillation())


def test_a_path_with_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="is no LlamaForCausalLM: it lacks weights"):
        trained(llama(), text_rows(), tmp_path, Distillation(tmp_path / "bert"))


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="gone' cannot be loaded"):
        trained(llama(), text_rows(), tmp_path, Distillation(tmp_path / "gone"))


def test_a_dense_run_resumed_without_its_constructor_needs_a_teacher(tmp_path: Path) -> None:
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.01}
    trained(llama(), text_rows(), tmp_path, Distillation(), **settings)
    late = trainer(llama(), text_rows(), tmp_path, **settings)
    late.add_callback(Distillation())
    with pytest.raises(ModelError, match=r"resumed at step 1 .*constructor.*teacher="):
        late.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_block_outputs_of_a_permuted_student_are_refused(saved: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"calibration": token_rows(), "num_samples": 8, "permute": True}
    student = LlamaForCausalLM.from_pretrained(saved, sparsity_config=SparsityConfig(metric="wanda", **settings))
    assert report(student).permutations
    trained(copy.deepcopy(student), text_rows(), tmp_path, Distillation(saved), learning_rate=0.0)
    with pytest.raises(ModelError, match=r"permute.*leave block_weight at 0"):
        trained(student, text_rows(), tmp_path, Distillation(saved, block_weight=1.0))


def smoothing(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return functional.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten())


class Own(Trainer):
    """Trains on the logits, as many Trainers of users do."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        loss = outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize(
    ("make", "error"),
    [
        (partial(trainer, label_smoothing_factor=0.1), ConfigError),
        (lambda *given: Trainer(given[0], arguments(given[2]), train_dataset=given[1], callbacks=[given[3]], compute_loss_func=smoothing), ModelError),
        (lambda *given: Own(given[0], arguments(given[2]), train_dataset=given[1], callbacks=[given[3]]), ModelError),
    ],
)  # fmt: skip
def test_a_loss_outside_the_model_is_refused_not_ignored(make: Any, error: Any, weight: float, tmp_path: Path) -> None:
    with pytest.raises(
        error, match=r"the Trainer works its loss out itself \(compute_loss_func, label_smoothing_factor"
    ):
        make(llama(), text_rows(), tmp_path, Distillation(other(llama()), weight=weight)).train()


def test_without_labels_the_weight_has_to_be_1(tmp_path: Path) -> None:
    rows = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in text_rows()]
    with pytest.raises(ModelError, match="no labels"):
        trained(llama(), rows, tmp_path, Distillation(other(llama()), weight=0.5))


def test_a_student_that_returns_tuples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="student Tuples returns a tuple"):
        trained(Tuples(llama().config), text_rows(), tmp_path, Distillation(other(llama())))


@pytest.mark.parametrize("labels", [1, 3])
def test_regression_is_refused(labels: int, tmp_path: Path) -> None:
    rows = [{**row, "labels": torch.zeros(labels)} for row in text_rows()]
    make = partial(bert_for, BertForSequenceClassification, labels)
    with pytest.raises(ModelError, match="no distribution over classes"):
        trained(make(), rows, tmp_path, Distillation(other(make())))


def test_learned_prompts_are_refused(saved: Path, tmp_path: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model

    student = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ConfigError, match="learns a prompt"):
        trained(student, text_rows(), tmp_path, Distillation(saved))


def test_two_teachers_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two Distillation callbacks"):
        trained(llama(), text_rows(), tmp_path, Distillation(saved), Distillation(saved, weight=0.5))


# ------------------------------------------------------------------------------------------------ the divergence


def by_torch(student: torch.Tensor, teacher: torch.Tensor, counted: torch.Tensor, temperature: float) -> torch.Tensor:
    own, given = student.to(torch.float64)[counted] / temperature, teacher.to(torch.float64)[counted] / temperature
    return temperature**2 * functional.kl_div(
        own.log_softmax(-1), given.log_softmax(-1), reduction="sum", log_target=True
    )


def pair(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(*shape, generator=generator) for _ in range(2))
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("chunk", [1, 100, 2**17])
def test_the_divergence_is_that_of_torch(
    chunk: int, dtype: torch.dtype, tolerance: float, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation_loss, "_CPU_CHUNK", chunk)
    student, teacher = pair(3, 7, 33, dtype=dtype)
    counted = torch.rand(3, 7, generator=torch.Generator().manual_seed(2)) < 0.6
    expected = by_torch(student, teacher, counted, temperature) / 5
    (wanted,) = torch.autograd.grad(expected, student)
    found = divergence_(student, teacher.clone(), counted, temperature, 1 / 5)
    assert found.dtype == torch.promote_types(dtype, torch.float32)  # single precision at least, also for bfloat16
    assert found.item() == pytest.approx(expected.item(), rel=max(1e-5, tolerance / 1e3))
    (gradient,) = torch.autograd.grad(7 * found, student)
    assert torch.allclose(gradient, 7 * wanted, rtol=tolerance, atol=tolerance)


def test_the_gradient_is_that_of_the_value() -> None:
    student, teacher = pair(4, 6, dtype=torch.float64)
    counted = torch.tensor([True, True, False, True])
    assert torch.autograd.gradcheck(lambda logits: divergence_(logits, teacher.clone(), counted, 2.0, 0.3), student)
    hidden, given = pair(4, 6, dtype=torch.float64, seed=1)
    assert torch.autograd.gradcheck(lambda states: relative_error(states, given, counted, 0.3), hidden)


def test_the_gradient_takes_the_place_of_the_teachers_logits() -> None:
    student, teacher = pair(4, 6)
    divergence_(student, teacher, torch.ones(4, dtype=torch.bool)).backward()
    assert torch.equal(student.grad, teacher)


@given(
    seed=st.integers(0, 2**31), rows=st.integers(1, 5), width=st.integers(2, 40), temperature=st.floats(0.3, 8), scale=st.floats(0.01, 30),
)  # fmt: skip
def test_properties_of_the_divergence(seed: int, rows: int, width: int, temperature: float, scale: float) -> None:
    student, teacher = (scale * values.detach() for values in pair(rows, width, seed=seed))
    student.requires_grad_()
    every = torch.ones(rows, dtype=torch.bool)
    found = divergence_(student, teacher.clone(), every, temperature)
    (gradient,) = torch.autograd.grad(found, student)
    size = 1e-5 * temperature**2 * (1 + scale / temperature) * rows
    assert found.item() >= -size  # never negative
    assert found.item() == pytest.approx(by_torch(student, teacher, every, temperature).item(), rel=1e-4, abs=size)
    assert gradient.sum(-1).abs().max().item() < 1e-4 * temperature  # probabilities add up to 1 on both sides
    assert divergence_(student.detach(), student.detach().clone(), every, temperature).item() == 0  # of equals, exactly
    moved = divergence_(student.detach() + 3, teacher.clone(), every, temperature)
    assert moved.item() == pytest.approx(found.item(), rel=1e-3, abs=4 * size)  # logits have no zero point


def test_what_is_not_counted_may_be_anything() -> None:
    student, teacher = pair(3, 5)
    counted = torch.tensor([True, False, True])
    clean = divergence_(student, teacher.clone(), counted)
    (expected,) = torch.autograd.grad(clean, student)
    with torch.no_grad():
        student[1], teacher[1] = math.nan, math.inf
    found = divergence_(student, teacher.clone(), counted)
    (gradient,) = torch.autograd.grad(found, student)
    assert found == clean
    assert torch.equal(gradient, expected)
    assert divergence_(student, teacher.clone(), torch.zeros(3, dtype=torch.bool)).item() == 0


def test_holes_in_the_vocabulary_do_no_harm() -> None:
    student, teacher = pair(2, 6)
    every = torch.ones(2, dtype=torch.bool)
    expected = divergence_(student[:, 1:], teacher[:, 1:].clone(), every)
    with torch.no_grad():
        student[:, 0] = teacher[:, 0] = -math.inf
    found = divergence_(student, teacher, every)
    assert found.item() == pytest.approx(expected.item())
    assert bool(torch.autograd.grad(found, student)[0].isfinite().all())


def test_the_relative_error_of_hidden_states() -> None:
    own, given = pair(2, 4, 8)
    counted = torch.tensor([[True, True, False, True], [False, True, True, False]])
    expected = 0.5 * ((own - given).square().sum(-1) / given.square().sum(-1))[counted].mean()
    (wanted,) = torch.autograd.grad(expected, own)
    found = relative_error(own, given.clone(), counted, 0.5)
    assert found.item() == pytest.approx(expected.item())
    assert torch.allclose(torch.autograd.grad(found, own)[0], wanted)
    assert relative_error(own, given, torch.zeros_like(counted)).item() == 0


# ------------------------------------------------------------------------------------------------ positions

LABELS = torch.tensor([[5, 6, 7, -100], [-100, -100, 8, 9]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
SHIFTED = [[True, True, False, False], [False, True, True, False]]
ALIGNED = [[True, True, True, False], [False, False, True, True]]


@pytest.mark.parametrize(
    ("make", "inputs", "expected"),
    [
        (llama, {"labels": LABELS}, SHIFTED),
        (gpt2, {"labels": LABELS}, SHIFTED),
        (llama, {"labels": LABELS, "shift_labels": LABELS}, ALIGNED),
        (bert, {"labels": LABELS}, ALIGNED),
        (t5, {"labels": LABELS}, ALIGNED),
        (llama, {"attention_mask": MASK}, MASK.bool().tolist()),
        (t5, {"decoder_attention_mask": MASK, "attention_mask": 1 - MASK}, MASK.bool().tolist()),
        (llama, {}, torch.ones(2, 4).bool().tolist()),
        (llama, {"attention_mask": torch.zeros(2, 1, 4, 4)}, torch.ones(2, 4).bool().tolist()),
    ],
)
def test_counted_positions_are_those_of_the_models_own_loss(make: Any, inputs: Any, expected: Any) -> None:
    assert counted_positions(make(), inputs, torch.zeros(2, 4, 64)).tolist() == expected


@pytest.mark.parametrize("labels", [torch.tensor([1, -100]), torch.tensor([[1], [-100]])])
def test_rows_with_one_label_each_count_where_they_have_one(labels: torch.Tensor) -> None:
    model = bert_for(BertForSequenceClassification, 3)
    assert counted_positions(model, {"labels": labels}, torch.zeros(2, 3)).tolist() == [True, False]


@pytest.mark.parametrize(
    "labels", [torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, dtype=torch.long), [{"class": 1}]]
)
def test_labels_that_do_not_lie_beside_the_logits_are_refused(labels: Any) -> None:
    with pytest.raises(ModelError, match=r"logits of shape \(2, 4, 64\) for labels of"):
        counted_positions(llama(), {"labels": labels}, torch.zeros(2, 4, 64))
