"""Sparsify: one callback from a dense model to a sparse one; it prunes as `prune_` would have before the training, once."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy
import pytest
import torch
from models import bert, llama, mixtral, phi3, t5, token_rows, tokenizer
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_sparse import SparsityConfig, is_sparse, masks, prune_, report
from hf_sparse.checkpoint import CONFIG_KEY, unwrap
from hf_sparse.data import fingerprint
from hf_sparse.errors import CalibrationError, CheckpointError, ConfigError, ModelError
from hf_sparse.families import find_sites
from hf_sparse.sites import read
from trainer_callbacks import KeepMasks, Sparsify
from trainer_callbacks.training_data import training_samples

MAGNITUDE = SparsityConfig(metric="magnitude")
WANDA = SparsityConfig(metric="wanda", num_samples=8)
ROWS = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in token_rows(12)]
LENGTHS = (5, 9, 7, 12, 6, 10, 8, 11, 9, 5, 12, 7)
LISTS = [{"input_ids": token_rows(1, length, seed)[0].clamp(max=12).tolist()} for seed, length in enumerate(LENGTHS)]

pytestmark = pytest.mark.usefixtures("little_garbage", "no_pictures")


def classifier() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    return LlamaForSequenceClassification(config).eval()


def dropping() -> Any:
    """A Llama whose training draws random numbers."""
    return llama(attention_dropout=0.2)


def trainer_for(
    model: Any, folder: Path, *callbacks: Any, rows: Any = ROWS, collator: Any = None, **changes: Any
) -> Trainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 2,
        "save_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    args = TrainingArguments(**{**settings, **changes})
    return Trainer(
        model, args, train_dataset=rows, eval_dataset=ROWS[:1], data_collator=collator, callbacks=list(callbacks)
    )


def equal(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


class Catch(TrainerCallback):
    """Keeps the weights that the training begins with, and counts steps at which a dropped weight was not +0.0."""

    def __init__(self) -> None:
        self.start: dict[str, torch.Tensor] = {}
        self.wrong = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **events: Any) -> None:
        self.start = {site.name: read(unwrap(model), site).clone() for site in find_sites(unwrap(model)).all()}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **events: Any) -> None:
        for site in find_sites(unwrap(model)).all():
            weight = read(unwrap(model), site)[self.start[site.name] == 0]
            self.wrong += bool(weight.any() or torch.signbit(weight).any())


def trained_both_ways(
    make: Callable[[], Any],
    config: SparsityConfig,
    folder: Path,
    collator: Callable[[], Any] = lambda: None,
    **options: Any,
) -> tuple[Any, Any]:
    """A dense model trained with Sparsify; and one pruned by hand, on the rows that Sparsify takes, and trained with KeepMasks."""
    by_callback, by_hand = make(), make()
    options = {"save_strategy": "no", **options}
    trainer_for(by_callback, folder / "callback", Sparsify(config), collator=collator(), **options).train()
    if config.calibration is None and config.metric != "magnitude":
        loader = trainer_for(by_hand, folder, collator=collator(), **options).get_train_dataloader()
        rows = training_samples(by_hand, loader, config)
        config = replace(config, calibration=rows, num_samples=len(rows))
    prune_(by_hand, config)
    # Made last, so that no random number of its training is drawn before.
    trainer_for(by_hand, folder / "hand", KeepMasks(), collator=collator(), **options).train()
    return by_callback, by_hand


# ------------------------------------------------------------------------------------------------ configurations


@pytest.mark.parametrize(
    "config",
    [
        MAGNITUDE,
        SparsityConfig(metric="magnitude", pattern="unstructured", sparsity=0.6, targets="mlp"),
        WANDA,
        SparsityConfig(metric="dass", pattern="1:4", num_samples=4),
        SparsityConfig(num_samples=12),  # the default recipe, which follows the dense model's stream
        SparsityConfig(metric="sparsegpt", num_samples=12),
        SparsityConfig(metric="wanda", pattern="unstructured", allocation=(0.3, 0.7), num_samples=8),
        SparsityConfig(metric="wanda", pattern="unstructured", sparsity=0.5, allocation="owl", num_samples=8),
        SparsityConfig(metric="wanda", permute=True, num_samples=8),
    ],
    ids=lambda config: f"{config.pattern}, {config.metric}, {config.allocation}, {config.update}",
)
@pytest.mark.filterwarnings("ignore:.*calibration tokens cannot determine")
def test_it_prunes_and_trains_as_a_model_pruned_beforehand_bit_for_bit(config: SparsityConfig, tmp_path: Path) -> None:
    by_callback, by_hand = trained_both_ways(dropping, config, tmp_path)
    assert equal(by_callback, by_hand)
    found, wanted = report(by_callback), report(by_hand)
    assert found.config == wanted.config
    assert found.calibration == wanted.calibration
    assert [site.zeros for site in found.sites] == [site.zeros for site in wanted.sites]
    assert found.recoveries[-1].zeros_lost == 0
    assert all(torch.equal(mask, masks(by_hand)[name]) for name, mask in masks(by_callback).items())


@pytest.mark.parametrize("make", [phi3, mixtral, bert, t5])
def test_every_family(make: Callable[[], Any], tmp_path: Path) -> None:
    assert equal(*trained_both_ways(make, WANDA, tmp_path))


@pytest.mark.parametrize("given", [MAGNITUDE, MAGNITUDE.to_dict(), "file"], ids=["object", "dict", "file"])
def test_the_config_may_be_an_object_a_dict_or_a_file(given: Any, tmp_path: Path) -> None:
    MAGNITUDE.save_pretrained(tmp_path)
    assert Sparsify(tmp_path if given == "file" else given).config == MAGNITUDE


def test_bad_configs_are_refused_before_any_training() -> None:
    with pytest.raises(ConfigError, match="wnda"):
        Sparsify({"metric": "wnda"})


@pytest.mark.parametrize("changes", [{"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_it_prunes_in_the_models_own_precision(changes: dict[str, Any], tmp_path: Path) -> None:
    catch, by_hand = Catch(), dropping()
    trainer_for(dropping(), tmp_path, Sparsify(WANDA), catch, **changes).train()
    rows = [{"input_ids": row["input_ids"][None], "attention_mask": row["attention_mask"][None]} for row in ROWS]
    chosen = sorted(random.Random(0).sample(range(len(rows)), 8))
    prune_(by_hand, replace(WANDA, calibration=[rows[index] for index in chosen]))
    assert all(torch.equal(catch.start[site.name], read(by_hand, site)) for site in find_sites(by_hand).all())
    assert catch.wrong == 0


def test_evaluation_at_the_start_is_of_the_pruned_model(tmp_path: Path) -> None:
    pruned = llama()
    prune_(pruned, MAGNITUDE)
    with torch.no_grad():
        wanted = float(pruned(input_ids=ROWS[0]["input_ids"][None], labels=ROWS[0]["input_ids"][None]).loss)
    model = llama()
    trainer_for(model, tmp_path, Sparsify(MAGNITUDE), eval_on_start=True, eval_strategy="epoch").train()
    assert report(model).recoveries[-1].before == pytest.approx(wanted, rel=1e-6)


# ------------------------------------------------------------------------------------------------ data


class MapStyle(Dataset[Any]):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        random.random(), numpy.random.rand(), torch.rand(1)  # as augmentation does
        return self.rows[index]


class Stream(IterableDataset[Any]):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


def hub(rows: list[Any]) -> datasets.Dataset:
    return datasets.Dataset.from_list([{"input_ids": list(map(int, row["input_ids"])), "comment": "x"} for row in rows])


def padding() -> Any:
    return DataCollatorForLanguageModeling(tokenizer(), mlm=False)


def masking(seed: int | None = None) -> Any:
    return DataCollatorForLanguageModeling(tokenizer(), mlm=True, mlm_probability=0.3, seed=seed)


@pytest.mark.parametrize(
    ("make", "rows", "collator"),
    [
        (dropping, MapStyle(ROWS), lambda: None),
        (dropping, Stream(ROWS), lambda: None),
        (dropping, LISTS, padding),
        (dropping, Stream(LISTS), padding),
        (dropping, hub(LISTS), padding),
        (dropping, hub(LISTS).to_iterable_dataset(), padding),
        (bert, LISTS, masking),
        (bert, LISTS, lambda: masking(seed=3)),  # a collator with random numbers of its own
    ],
    ids=["map", "stream", "padded", "padded stream", "hub", "hub stream", "masked", "masked with a seed"],
)
def test_training_data_of_every_kind_are_calibrated_on(
    make: Callable[[], Any], rows: Any, collator: Callable[[], Any], tmp_path: Path
) -> None:
    by_callback, by_hand = trained_both_ways(make, WANDA, tmp_path, collator, rows=rows)
    assert equal(by_callback, by_hand)
    told = report(by_callback).calibration
    assert told["samples"] == 8
    assert told["source"] == "TrainingSamples of 8"
    assert "calibrated on the training data: " in report(by_callback).notes[-1]


@pytest.mark.parametrize("rows", [LISTS, Stream(LISTS), hub(LISTS)], ids=["list", "stream", "hub"])
def test_the_rows_are_those_of_the_data_without_padding(rows: Any, tmp_path: Path) -> None:
    wanted = list(range(8)) if isinstance(rows, Stream) else sorted(random.Random(0).sample(range(12), 8))
    model = dropping()
    trainer = trainer_for(model, tmp_path, rows=rows, collator=padding())
    found = training_samples(model, trainer.get_train_dataloader(), WANDA)
    assert [row["input_ids"].tolist() for row in found] == [[LISTS[index]["input_ids"]] for index in wanted]
    assert all(set(row) == {"input_ids", "attention_mask"} for row in found)
    assert all(bool(row["attention_mask"].all()) for row in found)


def test_few_training_data_are_all_taken(tmp_path: Path) -> None:
    model = dropping()
    trainer_for(model, tmp_path, Sparsify(SparsityConfig(metric="wanda")), rows=ROWS[:5]).train()
    assert report(model).calibration["samples"] == report(model).config["num_samples"] == 5


def test_another_seed_takes_other_rows(tmp_path: Path) -> None:
    model = dropping()
    loader = trainer_for(model, tmp_path).get_train_dataloader()
    drawn = [fingerprint(training_samples(model, loader, replace(WANDA, seed=seed))) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_random_numbers_go_on_as_if_none_had_been_drawn(tmp_path: Path) -> None:
    model, collator = bert(), masking(seed=3)
    loader = trainer_for(model, tmp_path, rows=MapStyle(LISTS), collator=collator).get_train_dataloader()
    collator([LISTS[0]])  # has made its generator
    before = (
        random.getstate(),
        numpy.random.get_state()[1].copy(),
        torch.get_rng_state(),
        collator.generator.get_state(),
    )
    first = training_samples(model, loader, WANDA)
    after = (random.getstate(), numpy.random.get_state()[1], torch.get_rng_state(), collator.generator.get_state())
    assert before[0] == after[0]
    assert all(bool((left == right).all()) for left, right in zip(before[1:], after[1:], strict=True))
    assert any(bool((row["input_ids"] == 3).any()) for row in first)  # [MASK]


def test_calibration_data_of_the_config_are_used_instead(tmp_path: Path) -> None:
    given = token_rows(8, seed=5)
    by_callback, by_hand = trained_both_ways(dropping, replace(WANDA, calibration=given), tmp_path)
    assert equal(by_callback, by_hand)
    assert report(by_callback).calibration["source"] == "a tensor of (8, 16) token ids"
    assert not any("training data" in note for note in report(by_callback).notes)


def test_calibration_text_of_the_config_is_read_with_the_trainers_tokenizer(tmp_path: Path) -> None:
    config = replace(WANDA, calibration=["the cat sat on a mat and the dog ran " * 20], sequence_length=16)
    model = dropping()
    trainer = trainer_for(model, tmp_path, Sparsify(config), rows=LISTS, collator=padding())
    trainer.callback_handler.processing_class = tokenizer()
    trainer.train()
    assert report(model).calibration["tokens"] == 8 * 16


def test_labels_of_a_classifier_are_not_calibrated_on(tmp_path: Path) -> None:
    rows = [{**row, "labels": index % 3} for index, row in enumerate(LISTS)]
    by_callback, by_hand = trained_both_ways(
        classifier, WANDA, tmp_path, lambda: DataCollatorWithPadding(tokenizer()), rows=rows
    )
    assert equal(by_callback, by_hand)
    assert is_sparse(by_callback)
    assert bool(by_callback.score.weight.all())


def test_labels_of_an_encoder_decoder_are_what_its_decoder_reads(tmp_path: Path) -> None:
    rows = [{**row, "labels": row["input_ids"][:4]} for row in LISTS]
    by_callback, by_hand = trained_both_ways(
        t5, WANDA, tmp_path, lambda: DataCollatorForSeq2Seq(tokenizer(), padding=True), rows=rows
    )
    assert equal(by_callback, by_hand)
    assert all(site.tokens for site in report(by_callback).sites if site.name.startswith("decoder"))


@pytest.mark.parametrize("rows", [[], Stream([])], ids=["list", "stream"])
def test_empty_training_data_are_told(rows: Any) -> None:
    loader = SimpleNamespace(dataset=rows, collate_fn=padding())
    with pytest.raises(CalibrationError, match=r"training data are empty.*calibration=..."):
        training_samples(llama(), loader, WANDA)


def test_collators_that_make_no_mapping_are_told(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"makes a tuple of a row.*calibration=..."):
        trainer_for(llama(), tmp_path, Sparsify(WANDA), collator=tuple).train()


@pytest.mark.parametrize("rank", [0, 1])
def test_where_process_0_cannot_read_all_processes_raise(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes played one after the other: what process 0 sends is what process 1 gets."""

    def unreadable(rows: Any) -> Any:
        raise OSError("the disk is gone")

    sent: list[Any] = []
    loader = SimpleNamespace(dataset=ROWS, collate_fn=unreadable)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr(
        "trainer_callbacks.training_data.broadcast_object_list", lambda values: sent.append(values) or sent[0]
    )
    expected: list[Any] = [
        (OSError, "^the disk is gone"),
        (CalibrationError, "process 0 .*OSError: the disk is gone.*collator"),
    ]
    for process in range(rank + 1):
        monkeypatch.setattr("torch.distributed.get_rank", lambda number=process: number)
        with pytest.raises(expected[process][0], match=expected[process][1]):
            training_samples(llama(), loader, WANDA)
    assert len(sent) == rank + 1


# ------------------------------------------------------------------------------------------------ once


def test_a_second_training_does_not_prune_again(tmp_path: Path) -> None:
    model, catch = dropping(), Catch()
    callback = Sparsify(WANDA)
    trainer = trainer_for(model, tmp_path, callback, catch)
    trainer.train()
    first, trained = callback.report, {name: value.clone() for name, value in model.state_dict().items()}
    trainer.train()
    assert report(model) is first
    assert all(torch.equal(weight, trained[f"{name}.weight"]) for name, weight in catch.start.items())
    assert [entry.steps for entry in first.recoveries] == [4, 4]


def test_each_model_of_model_init_is_pruned(tmp_path: Path) -> None:
    args = TrainingArguments(
        str(tmp_path), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    trainer = Trainer(None, args, model_init=lambda: llama(), train_dataset=ROWS, callbacks=[Sparsify(MAGNITUDE)])
    for _ in range(2):
        trainer.train()
        assert report(trainer.model).sparsity == 0.5


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("config", [MAGNITUDE, WANDA], ids=lambda config: config.metric)
def test_a_resumed_run_is_not_pruned_again_and_equals_the_whole_one(
    config: SparsityConfig, restore: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, model = dropping(), dropping()
    trainer_for(whole, tmp_path, Sparsify(config)).train()
    monkeypatch.setattr("trainer_callbacks.sparsify.prune_", None)
    again = trainer_for(model, tmp_path / "again", Sparsify(config), restore_callback_states_from_checkpoint=restore)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert equal(model, whole)
    found, wanted = report(model).to_dict(), report(whole).to_dict()
    entries = [values.pop("recoveries") for values in (found, wanted)]
    assert found == wanted
    for entry in (*entries[0], *entries[1]):
        entry.pop("seconds")
    assert entries[0] == entries[1]
    assert getattr(model.config, CONFIG_KEY)["config"] == report(whole).config


def test_a_crash_in_the_middle_and_a_second_training(tmp_path: Path) -> None:
    class Crash(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **events: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    whole, model = dropping(), dropping()
    trainer_for(whole, tmp_path / "whole", Sparsify(WANDA)).train()
    trainer = trainer_for(model, tmp_path, Sparsify(WANDA), Crash())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Crash)
    trainer.train(resume_from_checkpoint=True)
    assert equal(model, whole)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"pattern": "1:4"},
            r"step 2 was pruned with pattern='2:4', the config says pattern='1:4'.*same config, or start anew",
        ),
        ({"exclude": ("*.q_proj",)}, r"exclude=\[\].*exclude=\['\*\.q_proj'\]"),
        ({"metric": "magnitude"}, "metric='wanda'.*metric='magnitude'"),
    ],
)
def test_another_config_on_resumption_is_an_error(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    trainer_for(dropping(), tmp_path, Sparsify(WANDA)).train()
    model = dropping()
    with pytest.raises(ConfigError, match=words):
        trainer_for(model, tmp_path / "again", Sparsify(replace(WANDA, **change))).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )
    assert report(model) is None


@pytest.mark.parametrize("change", [{"device": "cpu"}, {"num_samples": 3}, {"calibration": token_rows()}], ids=str)
def test_what_it_was_calibrated_with_need_not_be_there_on_resumption(change: dict[str, Any], tmp_path: Path) -> None:
    whole, model = dropping(), dropping()
    trainer_for(whole, tmp_path, Sparsify(WANDA)).train()
    again = trainer_for(model, tmp_path / "again", Sparsify(replace(WANDA, **change)))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert equal(model, whole)


@pytest.mark.parametrize("callbacks", [[], [KeepMasks()]], ids=["none", "KeepMasks"])
def test_a_checkpoint_of_another_training_was_not_pruned(callbacks: list[Any], tmp_path: Path) -> None:
    model = llama()
    prune_(model, MAGNITUDE)
    trainer_for(model, tmp_path, *callbacks).train()
    with pytest.raises(CheckpointError, match=r"step 2 was not written by a training with Sparsify.*start anew"):
        trainer_for(llama(), tmp_path / "again", Sparsify(MAGNITUDE)).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


def test_a_checkpoint_with_fewer_zeros_than_its_report_is_refused_and_leaves_no_claim(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    trainer_for(llama(), tmp_path, Sparsify(MAGNITUDE)).train()
    file = tmp_path / "checkpoint-2" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"].fill_(1)
    save_file(weights, file, {"format": "pt"})
    model = llama()
    with pytest.raises(CheckpointError, match=r"step 2 has lost zeros: model\.layers\.1\.mlp\.up_proj \(0 of 768\)"):
        trainer_for(model, tmp_path / "again", Sparsify(MAGNITUDE)).train(resume_from_checkpoint=str(file.parent))
    assert report(model) is None
    assert not hasattr(model.config, CONFIG_KEY)


def test_a_report_in_the_checkpoint_that_is_none_is_refused(tmp_path: Path) -> None:
    trainer_for(llama(), tmp_path, Sparsify(MAGNITUDE)).train()
    file = tmp_path / "checkpoint-2" / "trainer_state.json"
    values = json.loads(file.read_text())
    values["stateful_callbacks"]["Sparsify"]["attributes"]["stored_report"]["blocks"] = "none"
    file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="no report of hf_sparse"):
        trainer_for(llama(), tmp_path / "again", Sparsify(MAGNITUDE)).train(resume_from_checkpoint=str(file.parent))


def test_a_model_in_deepspeeds_hands_is_refused(tmp_path: Path) -> None:
    model = llama()
    trainer = trainer_for(model, tmp_path, Sparsify(MAGNITUDE))
    trainer.args.deepspeed_plugin = object()  # DeepSpeed itself is not needed to be told so
    with pytest.raises(ModelError, match=r"in DeepSpeed's hands.*before the Trainer is made.*KeepMasks"):
        trainer.train()
    assert not is_sparse(model)


def test_what_prune_refuses_is_refused(tmp_path: Path) -> None:
    model = llama()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match="NaN"):
        trainer_for(model, tmp_path, Sparsify(MAGNITUDE)).train()


# ------------------------------------------------------------------------------------------------ adapters


def adapted(model: Any, **changes: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    settings: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}
    return get_peft_model(model, LoraConfig(**{**settings, **changes}))


def test_the_base_is_pruned_and_its_adapters_are_masked(tmp_path: Path) -> None:
    model, catch = adapted(llama()), Catch()
    trainer_for(model, tmp_path, Sparsify(MAGNITUDE), catch).train()
    assert report(model.get_base_model()).sparsity == 0.5
    assert catch.wrong == 0
    assert report(model.get_base_model()).recoveries[-1].method.startswith("masked LoRA, r 4; ")
    ids = ROWS[0]["input_ids"][None]
    with torch.no_grad():
        before = model.eval()(input_ids=ids).logits
        merged = model.merge_and_unload()
        assert torch.allclose(before, merged(input_ids=ids).logits, atol=1e-5)
    assert all(not read(merged, site)[catch.start[site.name] == 0].any() for site in find_sites(merged).all())


def test_adapters_on_dense_sites_train_as_they_are(tmp_path: Path) -> None:
    model = adapted(llama(), target_modules=["q_proj"])
    trainer_for(model, tmp_path, Sparsify(replace(MAGNITUDE, targets="mlp"))).train()
    assert is_sparse(model)
    assert type(model.base_model.model.model.layers[0].self_attn.q_proj).__module__ == "peft.tuners.lora.layer"


def test_a_checkpoint_of_adapters_is_resumed_on_the_pruned_model_and_refused_on_the_dense_one(tmp_path: Path) -> None:
    whole = adapted(llama())
    trainer_for(whole, tmp_path, Sparsify(MAGNITUDE)).train()
    folder = str(tmp_path / "checkpoint-2")
    model = adapted(llama())
    with pytest.raises(CheckpointError, match="it holds adapters, and the model under them is not the sparse one"):
        trainer_for(model, tmp_path / "again", Sparsify(MAGNITUDE)).train(resume_from_checkpoint=folder)
    base = llama()
    prune_(base, MAGNITUDE)
    model = adapted(base)
    trainer_for(model, tmp_path / "again", Sparsify(MAGNITUDE)).train(resume_from_checkpoint=folder)
    assert equal(model, whole)
