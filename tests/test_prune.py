"""prune_: what is pruned, on which data, what is refused, and what stays as it was."""

import copy
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import VOCABULARY, bert, llama, mixtral, phi3, t5, text, token_rows, tokenizer
from torch import nn

import hf_sparse
from hf_sparse import SparsityConfig, prune_
from hf_sparse.errors import CalibrationError, ConfigError, HfSparseError, ModelError, PruningInterrupted
from hf_sparse.families import find_sites
from hf_sparse.sites import read

ROWS = token_rows()


def config(**changes: Any) -> SparsityConfig:
    return SparsityConfig(**{"metric": "wanda", "calibration": ROWS, "num_samples": len(ROWS), **changes})


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ------------------------------------------------------------------------------------------------ what is pruned


@pytest.mark.parametrize("make", [llama, mixtral, phi3, bert, t5])
@pytest.mark.parametrize("metric", ["magnitude", "wanda", "ria", "dass"])
def test_every_site_of_every_layout_gets_the_pattern(make: Callable[[], nn.Module], metric: str) -> None:
    model = make()
    before = weights(model)
    report = prune_(model, config(metric=metric))
    inventory = find_sites(model)
    axes = {site.name: site.axis for site in report.sites}
    assert set(axes) == {site.name for site in inventory.all()}
    for site in inventory.all():
        kept = read(model, site) != 0
        groups = (kept.T if axes[site.name] == "output" else kept).unflatten(1, (-1, 4)).sum(-1)
        assert bool((groups == 2).all()), site.name
    held = {f"{site.module}.{site.parameter}" for site in inventory.all()}
    assert unchanged(model, {name: value for name, value in before.items() if name not in held} | {
        name: value for name, value in model.state_dict().items() if name in held
    })  # fmt: skip
    assert report.sparsity == 0.5


def test_kept_weights_keep_their_values_without_an_update() -> None:
    model = llama()
    before = weights(model)
    prune_(model, config())
    for name, value in model.state_dict().items():
        assert torch.equal(value[value != 0], before[name][value != 0])


@settings(max_examples=15, suppress_health_check=list(HealthCheck))
@given(
    pattern=st.sampled_from(["1:2", "2:4", "1:4", "4:8", "3:5", "7:16", "unstructured"]),
    sparsity=st.floats(0.05, 0.95),
    axis=st.sampled_from(["input", "output"]),
    metric=st.sampled_from(["magnitude", "wanda", "ria", "dass"]),
)
def test_the_report_counts_what_the_weights_hold(pattern: str, sparsity: float, axis: str, metric: str) -> None:
    model = llama(layers=1)
    given_sparsity = sparsity if pattern == "unstructured" else None
    with pytest.warns() if metric == "dass" and axis == "input" and pattern != "unstructured" else _nothing():
        report = prune_(model, config(pattern=pattern, sparsity=given_sparsity, axis=axis, metric=metric))
    sites = {site.name: site for site in find_sites(model).all()}
    for entry in report.sites:
        assert entry.zeros == int((read(model, sites[entry.name]) == 0).sum())
    if pattern == "unstructured":
        assert report.zeros == round(sparsity * sum(site.size for site in sites.values()))


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        ("all", (), 14),
        ("mlp", (), 6),
        ("attention", (), 8),
        (["*.down_proj"], (), 2),
        ("*.layers.1.*", (), 7),
        ("all", ("*.layers.0.*", "*.o_proj"), 6),
    ],
)
def test_targets_and_exclude_choose_sites(targets: Any, exclude: tuple[str, ...], expected: int) -> None:
    model = llama()
    report = prune_(model, config(targets=targets, exclude=exclude))
    assert len(report.sites) == expected
    assert len(report.left_out) == 14 - expected
    assert set(report.left_out.values()) <= {"not among the targets", "excluded"}


def test_embeddings_heads_norms_and_routers_are_never_touched() -> None:
    model = mixtral()
    before = weights(model)
    report = prune_(model, config(metric="magnitude"))
    for name, value in model.state_dict().items():
        if "gate.weight" in name or "embed" in name or "lm_head" in name or "norm" in name:
            assert torch.equal(value, before[name])
    assert any("gate" in name for name in report.left_out)


def test_minus_zero_becomes_zero_and_weights_that_were_zero_count_as_dropped() -> None:
    model = llama(layers=1)
    weight = model.model.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        weight[:] = 1.0
        weight[0] = -0.0
    report = prune_(model, config(metric="magnitude", targets=["*.down_proj"]))
    assert not bool(torch.signbit(weight).any())
    assert report.sites[0].zeros == weight.numel() // 2 + weight.shape[1] // 2
    assert "count as dropped" in report.sites[0].note


def test_pruning_again_is_allowed_and_said() -> None:
    model = llama()
    prune_(model, config())
    assert any("sparse before: 50.00 %" in note for note in prune_(model, config(pattern="1:4")).notes)


# ------------------------------------------------------------------------------------------------ dass and its fall-backs


def test_dass_groups_along_the_output_for_gate_and_up_and_along_the_input_for_down() -> None:
    report = prune_(llama(), config(metric="dass"))
    found = {(site.role, site.axis, site.metric) for site in report.sites}
    assert found == {
        ("gate", "output", "dass"), ("up", "output", "dass"), ("down", "input", "wanda"),
        *((role, "input", "wanda") for role in "qkvo"),
    }  # fmt: skip
    assert all("wanda instead of dass" in site.note for site in report.sites if site.metric == "wanda")


def test_dass_along_the_input_equals_magnitude_on_gate_and_up_and_warns() -> None:
    by_dass, by_magnitude = llama(), llama()
    with pytest.warns(UserWarning, match="equal to magnitude"):
        report = prune_(by_dass, config(metric="dass", axis="input"))
    prune_(by_magnitude, config(metric="magnitude"))
    assert any("equal to magnitude" in note for note in report.notes)
    for name, mask in hf_sparse.masks(by_magnitude).items():
        if "gate_proj" in name or "up_proj" in name:
            assert torch.equal(mask, hf_sparse.masks(by_dass)[name])


def test_an_expert_that_no_token_reached_is_pruned_by_magnitude_and_named() -> None:
    model = mixtral()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[:] = 0.0  # all logits equal: the same two experts get every token
    report = prune_(model, config(metric="dass"))
    idle = [site for site in report.sites if site.tokens == 0]
    assert idle
    assert {site.metric for site in idle} == {"magnitude"}
    assert all("no calibration token reached this expert" in site.note and ".experts." in site.name for site in idle)


class Foreign(nn.Module):
    """A model that no family describes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 32)
        self.stages = nn.ModuleList(
            nn.ModuleDict({"widen": nn.Linear(32, 48), "narrow": nn.Linear(48, 32)}) for _ in range(2)
        )
        for stage in self.stages:
            stage.forward = lambda x, stage=stage: x + stage["narrow"](torch.relu(stage["widen"](x)))  # type: ignore[method-assign]

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.table(input_ids)
        for stage in self.stages:
            x = stage(x)
        return x


@pytest.mark.parametrize("metric", ["magnitude", "wanda", "dass"])
def test_an_unknown_family_is_pruned_and_dass_says_what_it_could_not_resolve(metric: str) -> None:
    model = Foreign()
    report = prune_(model, config(metric=metric))
    assert len(report.sites) == 4
    assert report.sparsity == 0.5
    if metric == "dass":
        assert all("wanda instead of dass" in site.note for site in report.sites)


# ------------------------------------------------------------------------------------------------ calibration


def test_the_tokens_of_every_site_are_counted_once() -> None:
    for changes in ({"metric": "dass"}, {"metric": "magnitude"}, {"exclude": ("*q_proj",)}, {"batch_size": 3}):
        report = prune_(llama(), config(**changes))
        assert {site.tokens for site in report.sites} == {ROWS.numel()}, changes


def test_a_shared_input_is_added_once_even_where_its_first_reader_needs_nothing() -> None:
    whole, without_q = llama(), llama()
    prune_(whole, config(metric="ria"))
    prune_(without_q, config(metric="ria", exclude=("*q_proj",)))
    name = "model.layers.0.self_attn.k_proj"
    assert torch.equal(hf_sparse.masks(whole)[name], hf_sparse.masks(without_q)[name])


def test_samples_of_different_kinds_meet_at_their_common_blocks() -> None:
    from families_table import FAMILIES

    _, inputs = FAMILIES["llava"].build()
    image = {key: value[:1] for key, value in inputs.items()}
    text_only = {"input_ids": token_rows(1, 10).clamp_max(50)}
    masks = []
    for data in ([image, text_only], [text_only, image]):
        model, _ = FAMILIES["llava"].build()
        report = prune_(model, config(calibration=data, num_samples=2))
        tokens = {site.tokens for site in report.sites if "language_model" in site.name}
        assert tokens == {10 + image["input_ids"].numel()}
        masks.append(hf_sparse.masks(model))
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_an_encoder_decoder_keeps_its_labels_whatever_the_encoders_padding() -> None:
    mask = torch.ones_like(ROWS)
    mask[:, 4:] = 0
    report = prune_(t5(), config(calibration={"input_ids": ROWS, "attention_mask": mask, "labels": ROWS.clone()}))
    tokens = {site.tokens for site in report.sites if site.name.startswith("decoder.block.0.layer.0")}
    assert tokens == {ROWS.numel()}


def test_experts_that_get_only_zeros_count_as_not_reached() -> None:
    from families_table import FAMILIES

    model, inputs = FAMILIES["llama4_text"].build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter.zero_()
    report = prune_(model, config(calibration=[inputs], num_samples=1))
    idle = [site for site in report.sites if site.tokens == 0]
    assert idle
    assert {site.metric for site in idle} == {"magnitude"}


def test_a_float64_model_keeps_its_values() -> None:
    model = llama(layers=1).double()
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = 1e60
    before = weights(model)
    prune_(model, config(metric="magnitude"))
    assert all(torch.equal(value[value != 0], before[name][value != 0]) for name, value in model.state_dict().items())
    assert prune_(llama().double(), config(metric="dass")).sparsity == 0.5


def test_block_sparsity_counts_blocks_that_were_left_alone() -> None:
    assert prune_(llama(), config(exclude=("*.layers.0.*",))).block_sparsity == 0.25


def test_pruning_the_rest_later_keeps_what_was_pruned_before_in_the_report() -> None:
    model = llama()
    prune_(model, config(targets="attention"))
    report = prune_(model, config(targets="mlp"))
    assert len(report.sites) == len(hf_sparse.masks(model)) == 14
    assert report.sparsity == 0.5
    assert len(prune_(llama(), config(targets=["mlp", "*.o_proj"])).sites) == 8


def test_a_shuffling_loader_gives_the_same_samples_for_the_same_seed_and_leaves_the_random_state() -> None:
    from torch.utils.data import DataLoader

    found = []
    for draws in (3, 5):
        model = llama()
        torch.rand(draws)
        state = torch.get_rng_state()
        loader = DataLoader([{"input_ids": row} for row in ROWS], batch_size=2, shuffle=True)
        found.append(prune_(model, config(calibration=loader)).calibration)
        assert torch.equal(torch.get_rng_state(), state)
    assert found[0] == found[1]


def test_each_block_is_measured_on_what_the_pruned_ones_before_it_produce() -> None:
    model, dense = llama(), llama()
    prune_(model, config(exclude=("*.layers.1.*",)))
    inputs: list[torch.Tensor] = []
    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(input_ids=ROWS)
    hook.remove()
    norm = inputs[0].flatten(0, 1).double().pow(2).sum(0).sqrt()
    scores = dense.model.layers[1].mlp.down_proj.weight.abs() * norm
    expected = scores.unflatten(1, (-1, 4)).argsort(-1).argsort(-1).flatten(1) >= 2
    whole = llama()
    prune_(whole, config())
    assert torch.equal(whole.model.layers[1].mlp.down_proj.weight != 0, expected)


def test_padding_is_never_counted() -> None:
    short = [{"input_ids": row[None, : 6 + i]} for i, row in enumerate(ROWS)]
    ids = torch.full((len(ROWS), 20), 5)
    mask = torch.zeros_like(ids)
    for i, sample in enumerate(short):
        length = sample["input_ids"].shape[1]
        ids[i, 20 - length :] = sample["input_ids"]  # padded on the left
        mask[i, 20 - length :] = 1
    alone, padded = llama(), llama()
    first = prune_(alone, config(calibration=short))
    second = prune_(padded, config(calibration={"input_ids": ids, "attention_mask": mask}))
    assert unchanged(padded, weights(alone))
    assert first.calibration is not None
    assert second.calibration is not None
    assert first.calibration["tokens"] == second.calibration["tokens"] == sum(6 + i for i in range(len(ROWS)))


@pytest.mark.parametrize(
    "data",
    [[text(400)], [[{"role": "the", "content": text(8 + i)}] for i in range(4)], [{"text": text(90)}] * 4],
    ids=["texts", "chats", "columns"],
)
def test_text_and_chats_go_through_the_tokenizer(data: Any) -> None:
    report = prune_(llama(), config(calibration=data, num_samples=4, sequence_length=16), tokenizer())
    assert report.calibration is not None
    assert report.calibration["samples"] == 4


def test_text_finds_the_tokenizer_beside_the_model(tmp_path: Any) -> None:
    tokenizer().save_pretrained(tmp_path)
    llama().save_pretrained(tmp_path)
    model = type(llama()).from_pretrained(tmp_path)
    assert prune_(model, config(calibration=[text(300)], num_samples=4, sequence_length=16)).sparsity == 0.5


def test_the_same_seed_gives_the_same_mask_bit_for_bit() -> None:
    models = [llama() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        torch.rand(7)
        prune_(model, config(calibration=[text(4000)], num_samples=4, sequence_length=16, seed=seed), tokenizer())
    assert unchanged(models[0], weights(models[1]))


def test_nothing_is_measured_for_a_metric_that_looks_at_no_data() -> None:
    report = prune_(llama(), SparsityConfig(metric="magnitude"))
    assert report.calibration is None
    assert all(block.output_error is None for block in report.blocks)


def test_output_errors_are_those_of_the_block_and_the_site() -> None:
    dense, model = llama(), llama()
    report = prune_(model, config(batch_size=3))
    captured: dict[str, torch.Tensor] = {}
    layer = dense.model.layers[0]
    layer.register_forward_hook(lambda _, __, out: captured.__setitem__("dense", out))
    layer.mlp.register_forward_pre_hook(lambda _, args: captured.__setitem__("x", args[0]))
    with torch.no_grad():
        dense(input_ids=ROWS)
        model.model.layers[0].register_forward_hook(lambda _, __, out: captured.__setitem__("sparse", out))
        model(input_ids=ROWS)
    expected = (captured["sparse"] - captured["dense"]).norm() / captured["dense"].norm()
    assert report.blocks[0].output_error == pytest.approx(float(expected), rel=1e-4)
    gate = next(site for site in report.sites if site.name == "model.layers.0.mlp.gate_proj")
    before, after = layer.mlp.gate_proj.weight, model.model.layers[0].mlp.gate_proj.weight
    x = captured["x"].flatten(0, 1)
    expected = (x @ (before - after).T).norm() / (x @ before.T).norm()
    assert gate.output_error == pytest.approx(float(expected), rel=1e-4)


# ------------------------------------------------------------------------------------------------ the model's own state


def test_modes_caches_gradients_hooks_and_random_state_are_restored() -> None:
    model = llama()
    model.train()
    model.model.layers[0].mlp.eval()
    model.model.layers[1].self_attn.q_proj.weight.requires_grad_(False)
    model.config.use_cache = True
    calls: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    random = torch.get_rng_state()
    prune_(model, config(metric="dass"))
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    assert model.config.use_cache is True
    assert len(model.model.layers[0]._forward_hooks) == 1
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)
    assert torch.is_grad_enabled()


def test_a_failure_restores_the_state_as_well() -> None:
    model = llama()
    model.train()
    with pytest.raises(HfSparseError):
        prune_(model, config(calibration=torch.full((8, 16), 3), exclude=("*",)))
    assert model.training
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)


def test_a_model_that_runs_its_blocks_under_autocast_leaves_nothing_switched_on() -> None:
    model = llama()
    plain = type(model).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain(model, *args, **kwargs)

    model.forward = forward  # type: ignore[method-assign]
    dtypes: set[torch.dtype] = set()
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda _, __, out: dtypes.add(out.dtype))
    prune_(model, config(batch_size=2))
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()
    assert dtypes == {torch.bfloat16}


def test_inside_inference_mode() -> None:
    model = llama()
    with torch.inference_mode():
        assert prune_(model, config()).sparsity == 0.5


def test_two_prunings_of_one_model_at_once_are_refused_and_other_threads_do_not_matter() -> None:
    model, plain = llama(layers=3), llama(layers=3)
    stop, errors = threading.Event(), []

    def use() -> None:
        while not stop.is_set():
            with torch.no_grad():
                model(input_ids=ROWS)
            try:
                prune_(model, SparsityConfig(metric="magnitude"))
            except ModelError as error:
                errors.append(str(error))

    expected = prune_(plain, config(metric="dass"))
    started = threading.Event()

    def pruned_here(module: nn.Module, args: Any) -> None:
        if not started.is_set() and threading.current_thread() is threading.main_thread():
            started.set()
            thread.start()
            while not errors:
                pass

    thread = threading.Thread(target=use)
    model.model.layers[0].mlp.register_forward_pre_hook(pruned_here)
    report = prune_(model, config(metric="dass"))
    stop.set()
    thread.join()
    assert "another thread" in errors[0]
    assert [site.tokens for site in report.sites] == [site.tokens for site in expected.sites]


# ------------------------------------------------------------------------------------------------ wrapped models


def test_a_model_with_an_adapter_is_pruned_below_the_adapter() -> None:
    from peft import LoraConfig, get_peft_model

    plain = llama()
    wrapped = get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
    before = {name: value.clone() for name, value in wrapped.named_parameters() if "lora" in name}
    expected = prune_(plain, config(metric="dass"))
    report = prune_(wrapped, config(metric="dass"))
    assert [site.name for site in report.sites] == [site.name for site in expected.sites]
    kept = hf_sparse.masks(wrapped)
    assert all(torch.equal(mask, kept[name]) for name, mask in hf_sparse.masks(plain).items())
    assert all(torch.equal(value, before[name]) for name, value in wrapped.named_parameters() if "lora" in name)


def test_a_merged_adapter_is_refused() -> None:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], r=2))
    wrapped.merge_adapter()
    with pytest.raises(ModelError, match="unmerge"):
        prune_(wrapped, config())


def test_a_compiled_model_is_pruned_through_its_wrapper() -> None:
    plain, inner, in_place = llama(), llama(), llama()
    prune_(plain, config())
    prune_(torch.compile(inner, backend="eager"), config())
    in_place.compile(backend="eager")
    for layer in in_place.model.layers:
        layer.compile(backend="eager")
    prune_(in_place, config())
    assert unchanged(inner, weights(plain))
    assert unchanged(in_place, weights(plain))
    assert in_place._compiled_call_impl is not None


# ------------------------------------------------------------------------------------------------ bad input


def _nan_weight(model: nn.Module) -> None:
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")


def _nan_norm(model: nn.Module) -> None:
    model.model.layers[1].input_layernorm.weight.data[3] = float("nan")


def _infinite_activation(model: nn.Module) -> None:
    model.model.embed_tokens.weight.data[7] = float("inf")


def _meta(model: nn.Module) -> None:
    model.to("meta")


def _quantized(model: nn.Module) -> None:
    model.config.quantization_config = {"quant_method": "bitsandbytes"}


SEVEN = torch.full((8, 16), 9)
SEVEN[5, 2] = 7
BAD: list[tuple[str, Callable[[nn.Module], None] | None, dict[str, Any], type[Exception], str]] = [
    ("no calibration", None, {"calibration": None}, CalibrationError, "metric 'wanda'.*needs calibration"),
    ("empty list", None, {"calibration": []}, CalibrationError, "empty"),
    ("empty tensor", None, {"calibration": torch.zeros(0, 4, dtype=torch.long)}, CalibrationError, "samples|empty"),
    ("too few", None, {"num_samples": 9}, CalibrationError, "8 samples.*9 were asked"),
    ("too long", None, {"calibration": token_rows(8, 70)}, CalibrationError, "70 tokens, the model allows 64"),
    ("outside", None, {"calibration": torch.full((8, 4), 64)}, CalibrationError, "token id 64.*0 to 63"),
    ("negative", None, {"calibration": torch.full((8, 4), -3)}, CalibrationError, "token id -3"),
    ("nan weight", _nan_weight, {}, ModelError, r"model\.layers\.1\.mlp\.up_proj.*NaN"),
    ("infinite activation", _infinite_activation, {"calibration": SEVEN}, CalibrationError, "layers.0.*(NaN|infinite).*sample 5"),
    ("no target", None, {"targets": ["*.nothing"]}, ConfigError, "no site.*model.layers.0"),
    ("exclude nothing", None, {"exclude": ["*.nothing"]}, ConfigError, "nothing.*matches no site"),
    ("all excluded", None, {"exclude": ["*"]}, ConfigError, "no site"),
    ("meta", _meta, {}, ModelError, "meta device"),
    ("quantized", _quantized, {}, ModelError, "quantized"),
    ("no such device", None, {"device": "cuda:99"}, ConfigError, "cuda:99"),
    ("meta device", None, {"device": "meta"}, ConfigError, "meta"),
    ("one target", None, {"targets": ["*.down_proj", "*.layers.7.*"]}, ConfigError, "layers.7"),
    ("labels", None, {"calibration": [{"input_ids": row[None], "labels": torch.tensor([1])} for row in ROWS]}, CalibrationError, "labels"),
    ("nan norm", _nan_norm, {}, ModelError, "input_layernorm.*NaN"),
    ("no tokenizer", None, {"calibration": [text(300)]}, CalibrationError, "tokenizer"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "changes", "error", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD]
)
def test_bad_input_gives_one_clear_error_and_changes_nothing(
    spoil: Callable[[nn.Module], None] | None, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = llama()
    if spoil:
        spoil(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message) as caught:
        prune_(model, config(**changes))
    assert "\n" not in str(caught.value)
    if spoil is not _meta:
        assert all(
            torch.equal(value, before[name]) or torch.isnan(before[name]).any()
            for name, value in model.state_dict().items()
        )
    assert not hasattr(model.config, "hf_sparse")


def test_a_failure_on_the_way_names_the_blocks_already_pruned_and_claims_nothing() -> None:
    model = llama(layers=3)

    def fail(module: nn.Module, args: Any) -> None:
        if bool((model.model.layers[0].mlp.up_proj.weight == 0).any()):
            raise RuntimeError("something broke")

    model.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(PruningInterrupted, match=re.escape("[0, 1]")) as caught:
        prune_(model, config())
    assert caught.value.blocks == [0, 1]
    assert not hasattr(model.config, "hf_sparse")
    assert hf_sparse.report(model) is None


def test_a_failure_on_the_way_takes_an_earlier_claim_back_and_any_error_is_named() -> None:
    model = llama()
    prune_(model, config())

    def fail(module: nn.Module, args: Any) -> None:
        if int((model.model.layers[0].mlp.up_proj.weight == 0).sum()) > 32 * 48 // 2:
            raise ValueError("something else broke")

    model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(PruningInterrupted, match="something else broke"):
        prune_(model, config(pattern="1:4"))
    assert not hasattr(model.config, "hf_sparse")
    assert hf_sparse.report(model) is None


@pytest.mark.parametrize("given", ["gpt2", None, 3, llama])
def test_what_is_no_model_is_refused(given: Any) -> None:
    with pytest.raises(ModelError, match="cannot be pruned"):
        prune_(given, config())


def test_running_out_of_memory_halves_the_batch_before_anything_is_changed() -> None:
    model = llama()

    def fail(module: nn.Module, args: Any, kwargs: Any) -> None:
        if len(args[0] if args else kwargs["hidden_states"]) > 2:
            raise torch.OutOfMemoryError("too much")

    model.model.layers[0].register_forward_pre_hook(fail, with_kwargs=True)
    report = prune_(model, config())
    assert report.calibration is not None
    assert report.calibration["batch_size"] == 2
    assert [note for note in report.notes if "halved" in note] == [
        "memory ran out; the batch size was halved to 4", "memory ran out; the batch size was halved to 2",
    ]  # fmt: skip


def test_data_that_never_run_a_part_to_prune_are_refused_with_the_way_out() -> None:
    from families_table import FAMILIES

    model, _ = FAMILIES["llava"].build()
    text_only = token_rows(4, 8).clamp_max(50)
    with pytest.raises(CalibrationError, match=r"exclude=.*vision"):
        prune_(model, config(calibration=text_only, num_samples=4))
    report = prune_(model, config(calibration=text_only, num_samples=4, exclude=["*vision*"]))
    assert report.sites
