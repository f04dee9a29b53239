"""permute=True: the dense model's function stays, the groups keep more importance, and every kept weight can be traced."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families_table import FAMILIES
from models import bert, llama, mixtral, phi3, t5, token_rows
from torch import nn

import hf_sparse
from hf_sparse import SparsityConfig, prune_
from hf_sparse.blockwise import Run
from hf_sparse.calibrate import make_batches, read_calibration, ready, survey
from hf_sparse.errors import CheckpointError, ConfigError, PruningInterrupted
from hf_sparse.families import find_sites
from hf_sparse.permute import Permutations, permute_, permuted_state_dict
from hf_sparse.permute.order import Part, _assigned, best_order, kept_importance
from hf_sparse.permute.places import Place, spaced
from hf_sparse.plan import select
from hf_sparse.sites import read

ROWS = token_rows()


def config(**changes: Any) -> SparsityConfig:
    given = {"metric": "wanda", "calibration": ROWS, "num_samples": len(ROWS), "permute": True}
    return SparsityConfig(**{**given, **changes})


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def enliven(model: nn.Module) -> nn.Module:
    """Norm weights and biases start as ones and zeros, which no order could spoil."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def permuted(model: nn.Module, rows: Any = None, **changes: Any) -> tuple[Permutations, list[str]]:
    """Reorder a model without pruning it."""
    settings = config(**{"calibration": ROWS if rows is None else rows, **changes})
    inventory = find_sites(model)
    chosen, _ = select(inventory, settings)
    run = Run(model, settings, inventory, chosen, dict.fromkeys((s.name for s in inventory.all()), settings.target))
    found = Permutations()
    samples = read_calibration(model, settings)
    with ready(model):
        run.survey = survey(model, inventory, samples.rows, True)
        permute_(run, samples.rows, make_batches(samples.rows, 4)[0], found)
    return found, run.notes


def answer(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        output = model(**inputs)
    return output.logits if "logits" in output else output[0]


# ------------------------------------------------------------------------------------------------ the order


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 4), (4, 8), (3, 5), (1, 2)])
@pytest.mark.parametrize("channels", [8, 40, 46, 300])
def test_an_order_holds_each_channel_once_and_keeps_no_less(keep: int, group: int, channels: int) -> None:
    torch.manual_seed(channels)
    part = Part(torch.rand(30, channels) ** 2 * torch.rand(channels), keep)
    order = best_order([part], group)
    assert order.sort().values.tolist() == list(range(channels))
    assert kept_importance([part], order, group) >= kept_importance([part], None, group)
    tail = channels // group * group
    assert order[tail:].tolist() == list(range(tail, channels))


def test_columns_that_crowd_one_group_are_spread() -> None:
    scores = torch.full((3, 16), 0.1)
    scores[:, :8] = 1.0  # the first two groups are strong, of which half would be lost
    order = best_order([Part(scores, 2)], 4)
    assert kept_importance([Part(scores, 2)], order, 4) == pytest.approx(24.0)


def test_a_best_order_stays() -> None:
    scores = torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(4)[None]
    assert best_order([Part(scores, 2)], 4).tolist() == list(range(16))


def test_rows_are_sampled_for_the_search_only() -> None:
    torch.manual_seed(0)
    part = Part(torch.rand(400, 32) * torch.rand(32), 2)
    order = best_order([part], 4, rows=20)
    assert kept_importance([part], order, 4) > kept_importance([part], None, 4)


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_the_assignment_is_scipys(size: int) -> None:
    from scipy.optimize import linear_sum_assignment

    gain = torch.randn(size, size, generator=torch.Generator().manual_seed(size))
    placed, won = _assigned(gain)
    rows, columns = linear_sum_assignment(gain.numpy(), maximize=True)
    best = float(gain[rows, columns].sum())
    assert float(gain[placed, torch.arange(size)].sum()) == pytest.approx(best, abs=1e-5)
    assert won == pytest.approx(best - float(gain.diagonal().sum()), abs=1e-5)


# ------------------------------------------------------------------------------------------------ places


@pytest.mark.parametrize("text", ["a.weight[0:8]", "a.weight[:, 4:8]", "a.up[3, :, 0:96:2]", "a.down[3, 1:96:2]"])
def test_places_are_written_as_numpy_writes_them(text: str) -> None:
    assert str(Place.parse(text)) == text


@pytest.mark.parametrize("text", ["", "a", "a[]", "a[:]", "a[0:8", "a[0:8, :]", "a[-1:3]", "a[x:3]", "a[1][0:3]"])
def test_what_is_no_place_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match="no place"):
        Place.parse(text)


def test_spaced() -> None:
    assert spaced([3, 5, 7]) == slice(3, 8, 2)
    assert spaced([4]) == slice(4, 5, 1)
    assert spaced([0, 2, 3]) is None
    assert spaced([3, 2, 1]) is None


# ------------------------------------------------------------------------------------------------ models

# What must have been reordered in each; families whose outputs are hidden states, say, keep their residual stream.
MODELS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "llama": (llama, {"mlp", "heads", "residual"}),
    "llama_tied": (lambda: llama(tie_word_embeddings=True), {"mlp", "heads", "residual"}),
    "llama_biases": (lambda: llama(attention_bias=True, mlp_bias=True), {"mlp", "heads", "residual"}),
    "mixtral": (mixtral, {"mlp", "heads", "residual"}),
    "phi3": (phi3, {"mlp", "heads", "residual"}),
    "bert": (bert, {"mlp", "heads", "residual"}),
    "t5": (t5, {"mlp", "heads", "residual"}),
}
NAMED = {
    "gpt2": {"mlp", "heads", "residual"},
    "gpt_neox": {"mlp", "heads", "residual"},
    "qwen2": {"mlp", "heads", "residual"},
    "qwen3": {"mlp", "residual"},  # heads of 6 values do not fit groups of four
    "gemma2": {"mlp", "heads", "residual"},
    "gemma3_text": {"mlp", "heads", "residual"},
    "olmo2": {"mlp", "heads", "residual"},
    "bloom": {"mlp", "heads", "residual"},
    "falcon_new": {"mlp", "heads", "residual"},
    "gpt_oss": {"mlp", "heads", "residual"},
    "dbrx": {"mlp", "heads", "residual"},
}


def sorts(names: Any) -> set[str]:
    return {"residual" if name == "residual" else "heads" if name[-1].isdigit() else "mlp" for name in names}


class _Orders:
    """As much of a report as tracing needs."""

    def __init__(self, found: Permutations) -> None:
        self.permutations, self.permuted = found.orders, found.places


def check(model: nn.Module, inputs: dict[str, torch.Tensor], rows: Any) -> tuple[Permutations, list[str]]:
    before, dense = weights(model), answer(model, inputs)
    found, notes = permuted(model, rows, num_samples=1 if isinstance(rows, list) else len(ROWS))
    after = answer(model, inputs)
    assert float((after - dense).norm()) <= 1e-4 * float(dense.norm())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    places = {Place.parse(text).tensor for texts in found.places.values() for text in texts}
    assert changed <= places
    moved = permuted_state_dict(_Orders(found), before)  # type: ignore[arg-type]
    assert all(torch.equal(value, moved[name]) for name, value in model.state_dict().items())
    assert bool(changed) == bool(found.orders)
    return found, notes


@pytest.mark.parametrize("name", MODELS)
def test_the_dense_model_answers_the_same(name: str) -> None:
    make, expected = MODELS[name]
    model = enliven(make())
    inputs = {"input_ids": token_rows(2, seed=5)}
    if name == "t5":
        inputs["decoder_input_ids"] = token_rows(2, 6, seed=6)
    found, notes = check(model, inputs, ROWS)
    assert sorts(found.orders) == expected, notes


@pytest.mark.parametrize("name", NAMED)
def test_so_do_other_families(name: str) -> None:
    model, inputs = FAMILIES[name].build()
    found, notes = check(enliven(model), inputs, [inputs])
    assert sorts(found.orders) == NAMED[name], notes


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(NAMED)))
def test_no_family_is_broken(name: str) -> None:
    model, inputs = FAMILIES[name].build()
    check(enliven(model), inputs, [inputs])


# ------------------------------------------------------------------------------------------------ what stays in order


def test_a_model_whose_answers_are_hidden_states_keeps_its_residual_stream() -> None:
    model = enliven(llama().model)
    dense = answer(model, {"input_ids": ROWS})
    found, notes = permuted(model)
    assert sorts(found.orders) == {"mlp", "heads"}
    assert any("residual stream stays in order: the model's output would change" in note for note in notes)
    assert torch.allclose(answer(model, {"input_ids": ROWS}), dense, atol=1e-5)


class Scaled(nn.Module):
    """Weighs its input's last dimension, as IA3 and norms do; what it holds is no site and no bias."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 2.0, size)[None])  # two dimensions: found by numbers only

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


class Before(nn.Linear):
    """A linear layer with something before it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.first(x))


def scaled(model: nn.Module, name: str, size: int) -> nn.Module:
    for layer in model.model.layers:
        site = layer.get_submodule(name)
        site.__class__ = Before
        site.first = Scaled(size)
    return model


@pytest.mark.parametrize(("name", "size", "left"), [("mlp.down_proj", 48, "mlp"), ("self_attn.o_proj", 32, "heads")])
def test_what_fails_the_proof_is_put_back_bit_for_bit(name: str, size: int, left: str) -> None:
    model = scaled(enliven(llama(hidden_size=40, head_dim=8)), name, size)
    before = weights(model)
    found, notes = check(model, {"input_ids": ROWS}, ROWS)
    assert sorts(found.orders) == {"mlp", "heads", "residual"} - {left}
    assert sum("would change" in note for note in notes) == 2
    held = {Place.parse(text).tensor for texts in found.places.values() for text in texts}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if key not in held)
    columns = "model.layers.0." + name + ".weight"
    assert torch.equal(model.state_dict()[columns].sort(0).values, before[columns].sort(0).values)


def test_a_residual_stream_that_fails_the_proof_is_put_back_bit_for_bit() -> None:
    model = enliven(llama())
    plain = type(model).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = plain(model, *args, **kwargs)
        output.logits = output.logits + model.model.embed_tokens.weight[3, 5]  # one channel is read by its number
        return output

    model.forward = forward  # type: ignore[method-assign]
    before = weights(model)
    found, notes = permuted(model)
    assert sorts(found.orders) == {"mlp", "heads"}
    assert any("residual stream stays in order: the model's output would change" in note for note in notes)
    for name in (
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "lm_head.weight",
    ):
        assert torch.equal(model.state_dict()[name], before[name])


def test_adapters_keep_the_channels_around_them() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(target_modules=["down_proj"], r=2, init_lora_weights=False))
    dense = answer(model, {"input_ids": ROWS})
    report = prune_(copy.deepcopy(model), config(exclude=("*.layers.1.*",)))
    assert sorts(report.permutations) == {"heads"}
    assert sum("adapter" in note for note in report.notes) == 2
    found, _ = permuted(model.base_model.model)
    assert sorts(found.orders) == {"heads"}
    assert torch.allclose(answer(model, {"input_ids": ROWS}), dense, atol=1e-5)


def test_a_prompt_around_the_model_is_refused() -> None:
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ConfigError, match="around the model"):
        prune_(model, config())


def test_data_that_do_not_run_a_part_leave_the_residual_stream() -> None:
    model, _ = FAMILIES["llava"].build()
    text = token_rows(4, 8).clamp_max(50)
    found, notes = permuted(model, text, num_samples=4, exclude=("*vision*",))
    assert "residual" not in found.orders
    assert any("no sample ran" in note for note in notes)


def test_offloaded_weights_are_written_back(tmp_path: Any) -> None:
    from accelerate import cpu_offload

    plain, model = enliven(llama()), enliven(llama())
    cpu_offload(model, torch.device("cpu"))
    found, notes = permuted(model)
    assert sorts(found.orders) == {"mlp", "heads"}
    assert any("offloaded" in note for note in notes)
    assert torch.allclose(answer(model, {"input_ids": ROWS}), answer(plain, {"input_ids": ROWS}), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = enliven(llama()).to(dtype)
    dense = answer(model, {"input_ids": ROWS})
    found, notes = permuted(model)
    assert sorts(found.orders) == {"mlp", "heads", "residual"}, notes
    assert float((answer(model, {"input_ids": ROWS}) - dense).norm()) <= 0.03 * float(dense.norm())


def test_sites_that_are_sparse_already_keep_their_groups() -> None:
    model = llama()
    prune_(model, config(permute=False, targets=["*.down_proj", "*.q_proj"]))
    report = prune_(model, config(targets=["*.o_proj", "*.k_proj"]))
    assert sorts(report.permutations) == {"heads"}
    for name, mask in hf_sparse.masks(model).items():
        assert bool((mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()), name


# ------------------------------------------------------------------------------------------------ pruning


@pytest.mark.parametrize("make", [llama, mixtral, phi3, bert, t5, lambda: llama(tie_word_embeddings=True)])
@pytest.mark.parametrize("metric", ["magnitude", "wanda", "ria", "dass"])
def test_every_kept_weight_is_traced_to_the_dense_models(make: Callable[[], nn.Module], metric: str) -> None:
    model = enliven(make())
    dense = weights(model)
    report = prune_(model, config(metric=metric))
    assert report.permutations
    assert any(
        not torch.equal(value[value != 0], dense[name][value != 0]) for name, value in model.state_dict().items()
    )
    moved = permuted_state_dict(report, dense)
    for name, value in model.state_dict().items():
        assert torch.equal(value[value != 0], moved[name][value != 0]), name
    for site in find_sites(model).all():
        axis = next(one.axis for one in report.sites if one.name == site.name)
        kept = read(model, site) != 0
        assert bool(((kept.T if axis == "output" else kept).unflatten(1, (-1, 4)).sum(-1) == 2).all())


@pytest.mark.parametrize("metric", ["wanda", "dass", "magnitude", "sparsegpt"])
def test_the_notes_tell_that_no_less_importance_is_kept(metric: str) -> None:
    report = prune_(enliven(llama()), config(metric=metric))
    told = [note for note in report.notes if "importance kept" in note]
    assert len(told) == 3
    for note in told:
        before, after = (float(part.split(" %")[0].split()[-1]) for part in note.split(" -> "))
        assert after > before


def test_pruning_errs_less_in_the_permuted_model() -> None:
    torch.manual_seed(0)
    errors = []
    for permute in (False, True):
        model = llama()
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.down_proj.weight *= torch.linspace(0.01, 1.0, 48)  # neighbours are alike, so groups lose much
        dense = copy.deepcopy(model)
        prune_(model, config(permute=permute, targets=["*.down_proj"]))
        error = answer(model, {"input_ids": ROWS}) - answer(dense, {"input_ids": ROWS})
        errors.append(float(error.norm()))
    assert errors[1] < 0.8 * errors[0]


def test_magnitude_needs_no_data() -> None:
    report = prune_(llama(), SparsityConfig(metric="magnitude", permute=True))
    assert sorts(report.permutations) == {"mlp", "heads", "residual"}
    assert report.calibration is None


@pytest.mark.parametrize("update", ["admm", "sparsegpt"])
def test_updates_follow(update: str) -> None:
    report = prune_(llama(), config(update=update))
    assert report.permutations
    assert report.sparsity == 0.5


def test_orders_survive_saving_and_pruning_again(tmp_path: Any) -> None:
    model = llama()
    dense = weights(model)
    report = prune_(model, config(targets="mlp"))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    known = hf_sparse.report(loaded)
    assert known is not None
    assert (known.permutations, known.permuted) == (report.permutations, report.permuted)
    assert torch.equal(answer(loaded, {"input_ids": ROWS}), answer(model, {"input_ids": ROWS}))
    again = prune_(loaded, config(targets="attention"))
    assert again.permutations == report.permutations
    moved = permuted_state_dict(again, dense)
    assert all(torch.equal(value[value != 0], moved[name][value != 0]) for name, value in loaded.state_dict().items())


def test_older_reports_have_no_orders() -> None:
    report = prune_(llama(), config(permute=False))
    values = report.to_dict()
    del values["permutations"], values["permuted"]
    assert hf_sparse.Report.from_dict(values).permutations == {}


@pytest.mark.parametrize(
    "wrong",
    [{"x": [0, 0]}, {"x": [0, 2]}, {"x": [0]}],
)
def test_orders_that_are_none_are_refused(wrong: dict[str, list[int]]) -> None:
    report = prune_(llama(), config(permute=False))
    report.permutations, report.permuted = wrong, {"x": ["model.norm.weight[0:2]"]}
    with pytest.raises(CheckpointError):
        permuted_state_dict(report, llama().state_dict())
    report.permuted = {}
    with pytest.raises(CheckpointError, match="none of the tensors"):
        permuted_state_dict(report, llama().state_dict())


def test_the_seed_settles_the_orders() -> None:
    orders = [permuted(llama(), seed=seed)[0].orders for seed in (0, 0)]
    assert orders[0] == orders[1]


def test_a_failure_before_pruning_puts_everything_back() -> None:
    model = llama()
    before = weights(model)

    def fail(module: nn.Module, args: Any) -> None:
        if not torch.equal(model.model.layers[1].mlp.down_proj.weight, before["model.layers.1.mlp.down_proj.weight"]):
            raise ValueError("something broke")

    model.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="something broke"):
        prune_(model, config())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_failure_while_pruning_is_named() -> None:
    model = llama()

    def fail(module: nn.Module, args: Any) -> None:
        if bool((model.model.layers[0].mlp.up_proj.weight == 0).any()):
            raise RuntimeError("something broke")

    model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(PruningInterrupted):
        prune_(model, config())


def test_unstructured_patterns_have_no_groups() -> None:
    with pytest.raises(ConfigError, match=r"permute=True.*unstructured"):
        config(pattern="unstructured", sparsity=0.5)
