"""Gradual pruning without a Trainer: schedule, masks on their way, dormant weights, and what is measured while a model trains."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import VOCABULARY, bert, llama, mixtral, phi3, t5, token_rows
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.errors import CheckpointError, ConfigError, ModelError
from hf_sparse.gradual import Gradual, Schedule, Timing, fitting
from hf_sparse.gradual.account import report_of
from hf_sparse.gradual.dormant import FILE_NAME, load_dormant_, save_dormant
from hf_sparse.gradual.inputs import Measured, TrainingInputs
from hf_sparse.gradual.masks import due, partial_mask
from hf_sparse.observe import operand_of
from hf_sparse.patterns import Pattern
from hf_sparse.sites import read, write_

MAGNITUDE = {"metric": "magnitude"}


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2, loss_type="ForCausalLM",
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def gradual(model: nn.Module, **fields: Any) -> Gradual:
    return Gradual(model, SparsityConfig(**{**MAGNITUDE, **fields}))


def weights(engine: Gradual) -> dict[str, torch.Tensor]:
    return {name: read(engine.model, engine.sites[name]).clone() for name in engine.plans}


def zeros(engine: Gradual) -> dict[str, int]:
    return {name: int((weight == 0).sum()) for name, weight in weights(engine).items()}


def shake_(engine: Gradual, seed: int) -> None:
    """What an optimizer step does: all weights change, dropped ones too, and the zeros are written behind it."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in weights(engine).items():
        write_(engine.model, engine.sites[name], weight + 0.02 * torch.randn(weight.shape, generator=generator))
    engine.apply_()


# ------------------------------------------------------------------------------------------------ schedule


@pytest.mark.parametrize(
    ("timing", "steps", "wanted"),
    [
        (Timing(), 100, Schedule(0, 50, 50, 1, "cubic")),
        (Timing(), 10_000, Schedule(0, 5000, 5000, 50, "cubic")),
        (Timing(0.1, 0.8, 5, 0.9), 100, Schedule(10, 80, 90, 5, "cubic")),
        (Timing(3, 7, shape="linear"), 9, Schedule(3, 7, 7, 1, "linear")),
        (Timing(3, 0.5, 2, 1.0), 20, Schedule(3, 10, 20, 2, "cubic")),
        (Timing(0, 1), 50, Schedule(0, 1, 1, 1, "cubic")),  # a whole number is a step
        (Timing(0, 1.0), 50, Schedule(0, 50, 50, 1, "cubic")),  # the same number with a point is a share
        (Timing(5, 5), 9, Schedule(5, 5, 5, 1, "cubic")),  # at once
        (Timing(0.0, 0.1), 2, Schedule(0, 1, 1, 1, "cubic")),  # there is no change before the first step
    ],
)
def test_a_schedule_in_steps_of_a_training(timing: Timing, steps: int, wanted: Schedule) -> None:
    assert timing.over(steps) == wanted


@pytest.mark.parametrize(
    "wrong",
    [
        {"start": -1}, {"start": -0.1}, {"start": 1.5}, {"start": True}, {"start": "0"}, {"start": None}, {"start": math.nan},
        {"end": 0}, {"end": 0.0}, {"end": 1.01}, {"end": math.inf}, {"end": False}, {"end": None}, {"end": [5]},
        {"freeze": 0}, {"freeze": 2.0}, {"freeze": "end"}, {"freeze": math.nan},
        {"every": 0}, {"every": -3}, {"every": 1.0}, {"every": True}, {"every": "2"},
        {"shape": "cubik"}, {"shape": None}, {"shape": ["cubic"]},
    ],
)  # fmt: skip
def test_numbers_that_make_no_schedule(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="schedule" if "shape" in wrong else next(iter(wrong))):
        Timing(**wrong)


@pytest.mark.parametrize(
    ("timing", "message"),
    [
        (Timing(0, 11), r"ends with step 10.*train longer"),
        (Timing(0, 5, freeze=11), r"0, 5 and 11, but the training ends with step 10"),
        (Timing(12, 13), "ends with step 10"),
        (Timing(6, 5), r"6, 5 and 5 of 10.*order"),
        (Timing(0.8, 0.2), r"8, 2 and 2 of 10.*order"),
        (Timing(0, 0.9, freeze=0.5), r"0, 9 and 5 of 10.*order"),
    ],
)
def test_a_schedule_that_the_training_does_not_hold(timing: Timing, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        timing.over(10)


@given(
    st.integers(0, 50), st.integers(1, 50), st.integers(0, 50), st.integers(1, 20), st.sampled_from(["cubic", "linear"])
)
def test_the_way_to_the_target(start: int, length: int, after: int, every: int, shape: str) -> None:
    schedule = Schedule(start, start + length, start + length + after, every, shape)
    ways = [schedule.remaining(step) for step in range(schedule.freeze + 2)]
    assert ways == sorted(ways, reverse=True)
    assert ways[: start + 1] == [1.0] * (start + 1)
    assert set(ways[schedule.end :]) == {0.0}
    for step in range(start, schedule.end):  # equation 1, with s_start = 1 and s_target = 0
        assert ways[step] == pytest.approx((1 - (step - start) / length) ** (3 if shape == "cubic" else 1))
    changes = [step for step in range(schedule.freeze + 100) if schedule.changes_at(step)]
    on_grid = range(start + every, schedule.freeze + 1, every)
    assert changes == sorted({*on_grid, schedule.end})


def test_the_published_equation() -> None:
    schedule = Schedule(10, 30, 30, 1, "cubic")
    assert [due(0, 1000, schedule.remaining(step)) for step in (5, 10, 15, 20, 30, 35)] == [0, 0, 578, 875, 1000, 1000]
    assert [due(400, 1000, schedule.remaining(step)) for step in (10, 20, 30)] == [400, 925, 1000]


# ------------------------------------------------------------------------------------------------ masks on their way

PATTERNS = [("2:4", "input"), ("1:4", "output"), ("3:5", "input"), *(("unstructured", axis) for axis in ("input", "output", "site"))]  # fmt: skip


@pytest.mark.parametrize(("pattern", "axis"), PATTERNS)
@given(st.integers(1, 6), st.integers(1, 13), st.floats(0.05, 0.95), st.floats(0, 1), st.integers(0, 2**31))
def test_a_partial_mask_drops_the_lowest_of_what_the_target_drops(
    pattern: str, axis: str, rows: int, columns: int, sparsity: float, way: float, seed: int
) -> None:
    scores = torch.randint(
        0, 9, (rows, columns), generator=torch.Generator().manual_seed(seed)
    ).float()  # many are equal
    final = Pattern.parse(pattern).mask(scores, sparsity, axis)
    target = int((~final).sum())
    count = round(way * target)
    mask = partial_mask(scores, final, count)
    assert int((~mask).sum()) == count
    assert bool((mask | ~final).all())  # nothing else goes
    if 0 < count < target:
        assert scores[~mask].max() <= scores[mask & ~final].min()
    assert torch.equal(partial_mask(scores, final, target), final)


def test_of_equal_scores_the_lower_index_goes_first() -> None:
    final = torch.tensor([[False, True, False, True], [False, False, True, True]])
    mask = partial_mask(torch.ones(2, 4), final, 2)
    assert mask.tolist() == [[False, True, False, True], [True, True, True, True]]


@pytest.mark.parametrize("make", [llama, phi3, mixtral, gpt2])
@pytest.mark.parametrize(
    "fields",
    [
        {"pattern": "2:4"},
        {"pattern": "1:4", "axis": "output"},
        {"pattern": "unstructured", "sparsity": 0.37},
        {"pattern": "unstructured", "sparsity": 0.6, "axis": "input", "options": {"unstructured": {"rounding": "truncate"}}},
        {"pattern": "2:4", "allocation": [0.25, 0.5]},
        {"pattern": "unstructured", "allocation": {"*": 0.3, "*.1.*": 0.0}},
        {"pattern": "unstructured", "sparsity": 0.5, "allocation": "atp", "options": {"atp": {"step": 0.2}}},
    ],
)  # fmt: skip
def test_counts_are_exact_at_every_update_and_the_last_mask_is_the_patterns_own(
    make: Any, fields: dict[str, Any]
) -> None:
    engine = gradual(make(), **fields)
    for step, remaining in enumerate((0.75, 0.3125, 0.0625)):
        shake_(engine, step)
        engine.update_(remaining)
        for name, plan in engine.plans.items():
            target = plan.site.size - int(plan.pattern.mask(torch.zeros(plan.site.shape), plan.sparsity, plan.axis, engine.rounding).sum()) if plan.sparsity else 0  # fmt: skip
            assert zeros(engine)[name] == round((1 - remaining) * target)
    shake_(engine, 9)
    awake = waking(engine)
    engine.update_(0.0)
    for name, weight in weights(engine).items():
        plan = engine.plans[name]
        mask = plan.pattern.mask(awake[name].abs(), plan.sparsity, plan.axis, engine.rounding)
        mask = torch.ones_like(mask) if plan.dense else mask
        assert torch.equal(weight, awake[name] * mask)  # final scores, final mask, and no kept weight changes
    assert engine.unmet() == []


def waking(engine: Gradual) -> dict[str, torch.Tensor]:
    """The weights with the dormant ones in their places, as an update is going to see them."""
    before = {id(held): held.stored.whole().clone() for held in engine.held}
    for held in engine.held:
        held.wake_()
    awake = weights(engine)
    for held in engine.held:
        held.stored.parameter.data.copy_(before[id(held)])
    return awake


def test_the_total_is_that_of_a_pruning_at_once() -> None:
    fields = {"pattern": "unstructured", "sparsity": 0.4321, "allocation": "atp", "options": {"atp": {"step": 0.1}}}
    engine, at_once = gradual(llama(), **fields), llama()
    engine.update_(0.0)
    hf_sparse.prune_(at_once, {**MAGNITUDE, **fields})
    assert all(
        torch.equal(one, other) for one, other in zip(engine.model.parameters(), at_once.parameters(), strict=True)
    )


# ------------------------------------------------------------------------------------------------ dropped weights


def test_what_is_dropped_comes_back_with_its_last_value() -> None:
    engine = gradual(llama(), pattern="unstructured", sparsity=0.5, targets=("*.0.mlp.up_proj",))
    name = "model.layers.0.mlp.up_proj"
    before = weights(engine)[name]
    engine.update_(0.0)
    dropped = weights(engine)[name] == 0
    write_(engine.model, engine.sites[name], weights(engine)[name] * 1e-6)  # now the dropped ones are the larger
    engine.apply_()
    engine.changed_()
    engine.update_(0.0)
    after = weights(engine)[name]
    assert torch.equal(after[dropped], before[dropped])
    assert bool((after[~dropped] == 0).all())
    assert engine.changed_() == after.numel()
    assert engine.changed_() == 0


def test_one_copy_of_what_is_dropped_is_held_until_the_freeze() -> None:
    engine = gradual(llama().bfloat16(), pattern="1:4")
    engine.update_(0.0)
    held = {tensor for one in engine.held for tensor in (one.dormant,)}
    assert sum(tensor.numel() for tensor in held) == sum(zeros(engine).values())
    assert {tensor.dtype for tensor in held} == {torch.bfloat16}
    engine.freeze_()
    assert [one.dormant for one in engine.held] == [None] * len(engine.held)
    assert engine.frozen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_zeros_are_written_whatever_a_step_made_of_them(dtype: torch.dtype) -> None:
    engine = gradual(llama().to(dtype))
    engine.update_(0.0)
    masks = {name: weight != 0 for name, weight in weights(engine).items()}
    shake_(engine, 0)
    for parameter in (engine.sites[name] for name in masks):
        weight = read(engine.model, parameter)
        write_(engine.model, parameter, torch.where(masks[parameter.name], weight, torch.nan))
    assert engine.lost() == sum(int((~mask).sum()) for mask in masks.values())
    engine.apply_()
    assert engine.lost() == 0
    assert all(bool((weight[~masks[name]] == 0).all()) for name, weight in weights(engine).items())
    assert engine.sparsity() == 0.5


def test_nothing_else_is_touched() -> None:
    model, dense = llama(), llama()
    engine = gradual(model, targets="mlp", exclude=("*.down_proj",))
    engine.update_(0.0)
    engine.freeze_()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, dense.state_dict()[name])}
    assert changed == {
        f"model.layers.{block}.mlp.{part}.weight" for block in (0, 1) for part in ("gate_proj", "up_proj")
    }


def test_weights_that_are_not_finite_end_it() -> None:
    engine = gradual(llama())
    with torch.no_grad():
        engine.model.model.layers[1].self_attn.k_proj.weight[3, 3] = torch.inf
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.k_proj.*diverged"):
        engine.update_(0.5)


# ------------------------------------------------------------------------------------------------ from a sparse model


def test_from_sparse_it_begins_where_the_model_is() -> None:
    model = llama()
    hf_sparse.prune_(model, {**MAGNITUDE, "pattern": "3:4"})
    engine = gradual(model, pattern="1:4")
    shake_(engine, 0)
    assert engine.sparsity() == 0.25  # kept from the beginning on
    for remaining, sparsity in ((1.0, 0.25), (0.5, 0.5), (0.0, 0.75)):
        engine.update_(remaining)
        shake_(engine, 1)
        assert engine.sparsity() == sparsity


def test_zeros_that_the_pattern_has_to_keep_stay_zero() -> None:
    model = llama()
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[:, :8] = 0.0  # whole groups of four
    engine = gradual(model, pattern="2:4", targets=("*.0.mlp.up_proj",))
    engine.update_(0.0)
    engine.freeze_()
    shake_(engine, 0)
    assert bool((weight[:, :8] == 0).all())
    assert engine.unmet() == []
    assert engine.sparsity() == (8 + 12) / 32


def test_a_target_below_what_is_zero_already_is_refused() -> None:
    model = llama()
    hf_sparse.prune_(model, {**MAGNITUDE, "pattern": "1:4"})
    with pytest.raises(
        ConfigError,
        match=r"less sparse.*q_proj \(768 of 1024, target 512\).* and 11 more sites; give a higher sparsity",
    ):
        gradual(model, pattern="2:4")
    with pytest.raises(ConfigError, match=r"less sparse.*0\.mlp\.up_proj.*target 0"):
        gradual(model, pattern="1:4", allocation={"*": 0.75, "*.0.mlp.up_proj": 0.0})


def test_sites_that_were_sparse_before_and_are_not_targeted_stay_sparse() -> None:
    model = phi3()  # q, k and v lie in one parameter
    hf_sparse.prune_(model, {**MAGNITUDE, "pattern": "2:4", "targets": ("*.k", "*.down_proj")})
    engine = gradual(model, pattern="1:4", targets=("*.q", "*.v"))
    keys = [site for name, site in engine.sites.items() if name.endswith((".k", "down_proj"))]
    zero = {site.name: read(model, site) == 0 for site in keys}
    for remaining in (0.5, 0.0):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
        engine.apply_()
        engine.update_(remaining)
    engine.freeze_()
    engine.apply_()
    assert all(torch.equal(read(model, site) == 0, zero[site.name]) for site in keys)
    assert set(zeros(engine).values()) == {768, 384}
    report = report_of(engine, (), [])
    assert report.notes == ["4 sites were pruned before and left as they are now"]
    assert report.zeros == 2 * (768 + 384) + sum(int(mask.sum()) for mask in zero.values())


def test_a_few_zeros_of_a_dense_model_are_no_sparsity() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, :3] = 0.0
    engine = gradual(model, pattern="unstructured", allocation={"*": 0.5, "*.0.mlp.*": 0.0})
    engine.update_(0.0)
    assert engine.unmet() == []


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metric": "sparsegpt", "update": "none"}, r"metric='sparsegpt', which needs the gram.*use one of dass, magnitude, ria, wanda"),
        ({"metric": "magnitude", "update": "admm"}, r"update=\['admm'\].*\"none\""),
        ({"metric": "magnitude", "update": ("dense_stream", "sparsegpt")}, "update="),
        ({"metric": "wanda", "allocation": "owl", "pattern": "unstructured", "sparsity": 0.5}, r"'owl', which looks at the dense model; use \"uniform\""),
        ({"metric": "wanda", "allocation": "atp", "sparsity": 0.5}, r"'atp' without a step.*a list or a mapping"),
        ({"metric": "wanda", "allocation": "search", "sparsity": 0.5}, "'search'"),
        ({"metric": "magnitude", "permute": True}, "permute=True"),
        ({"metric": "wanda", "calibration": ["text"]}, r"calibration=.*training itself; leave it out"),
        ({"metric": "magnitude", "device": "cpu"}, "device='cpu'"),
    ],
)  # fmt: skip
def test_what_a_training_cannot_meet_step_by_step_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fitting(SparsityConfig(**fields))


@pytest.mark.parametrize("fields", [{}, {"metric": "auto", "update": "auto"}, {"pattern": "1:4", "targets": "mlp"}, {"metric": "wanda"}])  # fmt: skip
def test_the_default_recipe_becomes_its_metric(fields: dict[str, Any]) -> None:
    found = fitting(SparsityConfig(**fields))
    assert (found.metric, found.update) == ("wanda", ("none",))
    assert fitting(found) == fitting(SparsityConfig.from_dict(found.to_dict())) == found  # as a checkpoint keeps it


def test_weights_that_do_not_train_are_refused() -> None:
    model = llama()
    model.model.layers[1].mlp.up_proj.requires_grad_(False)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj does not train.*prune first"):
        gradual(model)
    assert gradual(model, exclude=("*.1.mlp.up_proj",)).began


# ------------------------------------------------------------------------------------------------ activations of the training


def trained(make: Any) -> Any:
    """A model in training mode, without dropout."""
    model = make().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def measure(model: Any, batches: list[dict[str, torch.Tensor]], **fields: Any) -> Measured:
    inputs = gradual(model, **{"metric": "wanda", **fields}).inputs()
    inputs.listen_()
    for batch in batches:
        model(**batch).loss.backward()
    return inputs.collect_()


LENGTHS = (12, 7, 9, 3)
ROWS = token_rows(len(LENGTHS), 12)
MASK = torch.tensor([[1] * length + [0] * (12 - length) for length in LENGTHS])
PADDED = {"input_ids": ROWS, "attention_mask": MASK, "labels": ROWS.masked_fill(MASK == 0, -100)}
ALONE = [
    {"input_ids": row[None, :length], "labels": row[None, :length], "attention_mask": torch.ones(1, length, dtype=torch.long)}
    for row, length in zip(ROWS, LENGTHS, strict=True)
]  # fmt: skip


@pytest.mark.parametrize("make", [llama, phi3, mixtral, gpt2, bert])
def test_padding_is_not_counted_and_micro_batches_are_added_up(make: Any) -> None:
    padded, alone = measure(trained(make), [PADDED]), measure(trained(make), ALONE)
    assert padded.tokens == alone.tokens
    assert max(padded.tokens.values()) == sum(LENGTHS)
    assert (padded.sequences, padded.batch_size, alone.sequences, alone.batch_size) == (4, 4, 4, 1)
    for operand, norm in padded.norms.items():
        torch.testing.assert_close(norm, alone.norms[operand], rtol=1e-5, atol=1e-6)


def test_the_norm_is_that_of_the_modules_inputs() -> None:
    model, seen = trained(llama), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers" in name:
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.update({name: args[0].detach()[MASK.bool()]})
            )
    for operand, norm in measure(model, [PADDED]).norms.items():
        torch.testing.assert_close(norm, seen.pop(operand.module).norm(dim=0), rtol=1e-5, atol=1e-6)
    assert seen == {}


def test_each_side_of_an_encoder_decoder_has_its_own_padding() -> None:
    labels = token_rows(4, 12, seed=1)  # as long as the other side, so that lengths do not tell them apart
    found = measure(trained(t5), [{**PADDED, "labels": labels}]).tokens
    across = {key.module: tokens for key, tokens in found.items() if "EncDecAttention" in key.module}
    assert {tokens for key, tokens in found.items() if key.module.startswith("encoder")} == {sum(LENGTHS)}
    assert {tokens for key, tokens in found.items() if "decoder" in key.module and "EncDec" not in key.module} == {48}
    assert {name[-1]: tokens for name, tokens in across.items()} == {"q": 48, "o": 48, "k": 31, "v": 31}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [llama, mixtral])
def test_the_second_run_of_a_checkpointed_block_is_not_counted(make: Any, reentrant: bool) -> None:
    plain, model = measure(trained(make), [PADDED]), trained(make)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again = measure(model, [PADDED])
    assert plain.tokens == again.tokens
    assert all(torch.equal(norm, again.norms[operand]) for operand, norm in plain.norms.items())


def test_nothing_is_hooked_or_changed_at_other_times() -> None:
    model, plain = trained(mixtral), trained(mixtral)
    inputs = gradual(model, metric="wanda").inputs()
    implementation = model.config._experts_implementation
    inputs.listen_()
    assert model(**PADDED).loss == plain(**PADDED).loss
    with torch.no_grad():
        model(**PADDED)  # not a pass of the training
    model.eval()(**PADDED)
    assert inputs.collect_().sequences == 4
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.config._experts_implementation == implementation


def test_a_pass_that_fails_leaves_nothing_behind() -> None:
    model = trained(llama)
    inputs = gradual(model, metric="wanda").inputs()
    inputs.listen_()
    broken = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**PADDED)
    broken.remove()
    assert torch._C._len_torch_function_stack() == 0
    inputs.stop_()
    assert not model._forward_hooks


def test_a_step_without_a_pass_of_the_model_is_an_error() -> None:
    model = trained(llama)
    inputs = gradual(model, metric="wanda").inputs()
    inputs.listen_()
    model.model(ROWS)  # its inside alone
    with pytest.raises(ModelError, match=r"no training pass.*magnitude"):
        inputs.collect_()


def test_activations_that_are_not_finite_can_be_told() -> None:
    model = trained(llama)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.inf
    assert not measure(model, [PADDED]).finite


# ------------------------------------------------------------------------------------------------ metrics


@pytest.mark.parametrize("metric", ["wanda", "ria"])
def test_scores_are_those_of_a_pruning_on_the_same_batch(metric: str) -> None:
    """The first block of a dense model sees the same inputs in both, so it is pruned in the same way."""
    model, at_once = trained(llama), llama()
    engine = gradual(model, metric=metric)
    inputs = engine.inputs()
    inputs.listen_()
    model(input_ids=ROWS, labels=ROWS)
    engine.update_(0.0, inputs.collect_())
    hf_sparse.prune_(at_once, {"metric": metric, "pattern": "2:4", "calibration": ROWS, "num_samples": 4})
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        one, other = (tree.model.layers[0].get_submodule(name).weight for tree in (model, at_once))
        assert torch.equal(one, other), name


@pytest.mark.parametrize("make", [llama, mixtral, phi3])
def test_dass_weighs_rows_by_what_their_consumer_reads(make: Any) -> None:
    model = trained(make)
    engine = gradual(model, metric="dass")
    inputs = engine.inputs()
    inputs.listen_()
    state = torch.get_rng_state()
    model(**PADDED).loss.backward()
    assert torch.equal(torch.get_rng_state(), state)
    measured = inputs.collect_()
    awake = weights(engine)
    engine.update_(0.0, measured)
    gates = [plan for plan in engine.plans.values() if plan.feed is not None]
    assert len(gates) == sum(plan.site.role in ("gate", "up") for plan in engine.plans.values())
    assert {plan.metric.name for plan in engine.plans.values()} == {"dass", "wanda"}
    for plan in gates:
        norm = measured.norms[operand_of(engine.sites[plan.feed.consumer])]
        if plan.site.name in engine.fell_back:
            continue
        scores = awake[plan.site.name].abs() * norm.sqrt()[:, None]  # rows of gate and up are the columns of down
        assert torch.equal(weights(engine)[plan.site.name] != 0, plan.pattern.mask(scores, 0.5, "output"))


def test_a_resumed_training_knows_what_feeds_what() -> None:
    model = trained(llama)
    engine = gradual(model, metric="dass")
    inputs = engine.inputs()
    inputs.listen_()
    model(**PADDED).loss.backward()
    engine.update_(0.5, inputs.collect_())
    again = Gradual(model, engine.config, json.loads(json.dumps(engine.progress())))
    assert again.plans == engine.plans


def test_what_a_probe_refutes_falls_back_to_the_other_metric() -> None:
    model = trained(llama)
    mlp = model.model.layers[1].mlp
    plain = mlp.down_proj.forward
    mlp.down_proj.forward = lambda x: plain(x.flip(-1))  # a row of gate ends in another column than its name tells
    engine = gradual(model, metric="dass")
    inputs = engine.inputs()
    inputs.listen_()
    model(**PADDED).loss.backward()
    engine.update_(0.0, inputs.collect_())
    assert {name: plan.metric.name for name, plan in engine.plans.items() if plan.site.role == "up"} == {
        "model.layers.0.mlp.up_proj": "dass", "model.layers.1.mlp.up_proj": "wanda",
    }  # fmt: skip
    assert "wanda instead of dass" in engine.plans["model.layers.1.mlp.up_proj"].note


def test_experts_without_tokens_are_scored_by_magnitude_and_named() -> None:
    model = trained(mixtral)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()  # of equals the same two experts are taken for all tokens
    engine = gradual(model, metric="wanda")
    inputs = engine.inputs()
    inputs.listen_()
    model(**PADDED).loss.backward()
    awake, measured = weights(engine), inputs.collect_()
    engine.update_(0.0, measured)
    unreached = {name for name, plan in engine.plans.items() if not measured.tokens[operand_of(plan.site)]}
    assert engine.fell_back == unreached
    assert len(unreached) == 2 * 2 * 3  # two experts in each of two blocks, with gate, up and down
    for name in unreached:
        assert torch.equal(weights(engine)[name] != 0, engine.plans[name].pattern.mask(awake[name].abs(), 0.5, "input"))
    notes = {site.name: (site.metric, site.note, site.tokens) for site in report_of(engine, (), []).sites}
    assert {notes[name] for name in unreached} == {
        ("magnitude", "magnitude instead of wanda: no token of the last update's batches reached it", 0)
    }


# ------------------------------------------------------------------------------------------------ the report


def test_the_report_counts_what_holds() -> None:
    engine = gradual(llama(), pattern="2:4", allocation={"*": 0.5, "*.down_proj": 0.0})
    engine.update_(0.0)
    report = report_of(engine, (), ["a note"])
    assert {site.pattern for site in report.sites} == {"2:4", "dense"}
    assert report.zeros == sum(zeros(engine).values())
    assert report.config == engine.config.resolved().to_dict()
    assert [block.all_matrices for block in report.blocks] == [7680, 7680]
    assert type(report).from_dict(report.to_dict()).to_dict() == report.to_dict()


def test_a_report_before_the_target_claims_no_pattern() -> None:
    engine = gradual(llama(), pattern="2:4")
    engine.update_(0.5)
    unmet = engine.unmet()
    report = report_of(engine, unmet, [])
    assert unmet == list(engine.plans)
    assert {site.pattern for site in report.sites} == {"unstructured"}
    assert (report.config["pattern"], report.config["sparsity"], report.sparsity) == ("unstructured", 0.25, 0.25)
    assert report.notes == ["14 of 14 sites do not hold their target 2:4; 25.00 % zeros were counted"]


# ------------------------------------------------------------------------------------------------ beside a checkpoint


@pytest.mark.parametrize("make", [llama, phi3, mixtral])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_and_dormant_weights_survive_a_file(make: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    engine = gradual(make().to(dtype), pattern="unstructured", sparsity=0.6, targets=("*.0.*",))
    for step in range(3):
        shake_(engine, step)
        engine.update_(0.3)
    save_dormant(engine.held, tmp_path, writes=True)
    model = make().to(dtype)
    model.load_state_dict(engine.model.state_dict())
    again = Gradual(model, engine.config, engine.progress())
    assert load_dormant_(again.held, tmp_path / FILE_NAME)
    for one in (engine, again):
        shake_(one, 7)
        one.update_(0.1)
    assert all(torch.equal(weights(engine)[name], weights(again)[name]) for name in engine.plans)
    assert list(tmp_path.iterdir()) == [tmp_path / FILE_NAME]


def test_a_kept_weight_that_is_zero_by_chance_stays_kept(tmp_path: Path) -> None:
    engine = gradual(llama(), pattern="2:4")
    engine.update_(0.5)
    site = engine.sites["model.layers.0.mlp.up_proj"]
    weight = read(engine.model, site).clone()
    at = tuple((weight != 0).nonzero()[5].tolist())
    weight[at] = 0.0
    write_(engine.model, site, weight)
    save_dormant(engine.held, tmp_path, writes=True)
    again = Gradual(engine.model, engine.config, engine.progress())
    assert load_dormant_(again.held, tmp_path / FILE_NAME)
    shake_(again, 0)
    assert read(again.model, site)[at] != 0


def test_without_its_file_dropped_weights_come_back_as_zeros(tmp_path: Path) -> None:
    engine = gradual(llama(), pattern="2:4")
    engine.update_(0.5)
    again = Gradual(engine.model, engine.config, engine.progress())
    assert not load_dormant_(again.held, tmp_path / FILE_NAME)
    assert not load_dormant_(again.held, None)
    again.update_(0.2)
    assert again.sparsity() == 0.4


def test_a_file_of_another_training_is_not_taken(tmp_path: Path) -> None:
    engine = gradual(llama(), pattern="2:4")
    engine.update_(0.5)
    save_dormant(engine.held, tmp_path, writes=True)
    dense = gradual(llama(), pattern="2:4")
    assert not load_dormant_(dense.held, tmp_path / FILE_NAME)
    assert dense.sparsity() == 0.0


NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors: tensors.pop(NAME),
        lambda tensors: tensors.pop(NAME + ".mask"),
        lambda tensors: tensors.update({NAME: tensors[NAME].half()}),
        lambda tensors: tensors.update({NAME: tensors[NAME][:-1]}),
        lambda tensors: tensors.update({NAME: tensors[NAME].view(2, -1)}),
        lambda tensors: tensors.update({NAME: torch.zeros(10**5)}),
        lambda tensors: tensors.update({NAME + ".mask": tensors[NAME + ".mask"][:-1]}),
        lambda tensors: tensors.update({NAME + ".mask": torch.zeros(192, dtype=torch.int8)}),
        lambda tensors: tensors.update({NAME + ".mask": torch.zeros(192, dtype=torch.uint8)}),
    ],
)
def test_a_damaged_file_is_an_error(damage: Any, tmp_path: Path) -> None:
    engine = gradual(llama(), pattern="2:4")
    engine.update_(0.5)
    save_dormant(engine.held, tmp_path, writes=True)
    tensors = load_file(tmp_path / FILE_NAME)
    damage(tensors)
    save_file(tensors, tmp_path / FILE_NAME)
    with pytest.raises(CheckpointError, match=r"cannot be used.*Delete it"):
        load_dormant_(engine.held, tmp_path / FILE_NAME)


def test_a_truncated_file_is_an_error(tmp_path: Path) -> None:
    engine = gradual(llama(), pattern="2:4")
    engine.update_(0.5)
    save_dormant(engine.held, tmp_path, writes=True)
    (tmp_path / FILE_NAME).write_bytes((tmp_path / FILE_NAME).read_bytes()[:500])
    with pytest.raises(CheckpointError, match="Delete it"):
        load_dormant_(engine.held, tmp_path / FILE_NAME)


def test_inputs_of_what_is_left_dense_are_not_measured() -> None:
    engine = gradual(trained(llama), metric="wanda", allocation={"*": 0.5, "*.0.mlp.*": 0.0})
    measured = _listened(engine.inputs(), engine.model)
    assert not [key for key in measured.norms if key.module.startswith("model.layers.0.mlp")]
    engine.update_(0.0, measured)
    assert engine.unmet() == []


def _listened(inputs: TrainingInputs, model: nn.Module) -> Measured:
    inputs.listen_()
    model(**PADDED)
    return inputs.collect_()
