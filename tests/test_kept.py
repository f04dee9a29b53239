"""KeptMasks, for loops of one's own: what is zero when it is made is zero again behind every `apply_()`, and nothing else."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from models import bert, gpt2, llama, mixtral, phi3, t5, token_rows
from torch import nn

from hf_sparse import SparsityConfig, prune_, report
from hf_sparse.checkpoint import CONFIG_KEY, attach_report, detach
from hf_sparse.errors import CheckpointError, ModelError
from hf_sparse.families import find_sites
from hf_sparse.kept import KeptMasks, missing_zeros
from hf_sparse.sites import parameter_of, read, view, write_

ROWS = token_rows()
MAGNITUDE = SparsityConfig(metric="magnitude")


def pruned(make: Callable[..., Any] = llama, config: SparsityConfig = MAGNITUDE, **changes: Any) -> Any:
    model = make(**changes)
    prune_(model, config)
    return model


def elsewhere(make: Callable[..., Any] = llama, **changes: Any) -> Any:
    """A model with the same zeros that another tool has made: nothing tells of them but the weights."""
    model = pruned(make, **changes)
    detach(model)
    return model


def dropped(model: nn.Module) -> dict[str, torch.Tensor]:
    """Where each site is zero now."""
    return {site.name: read(model, site) == 0 for site in find_sites(model).all()}


def assert_zero(model: nn.Module, places: dict[str, torch.Tensor]) -> None:
    """Every bit is zero at these places, so it is +0.0, and at no other place of a site."""
    for site in find_sites(model).all():
        weight = read(model, site)
        assert torch.equal(weight == 0, places[site.name]), site.name
        assert not torch.signbit(weight[places[site.name]]).any(), site.name


def loss_of(model: Any) -> torch.Tensor:
    labels = {"labels": ROWS}
    return model(input_ids=ROWS, **labels).loss


def steps(model: Any, optimizer: Any, number: int = 3) -> Iterator[int]:
    """A plain loop; the caller does what has to be done behind each step."""
    model.train()
    for step in range(number):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield step


def shake_(model: nn.Module) -> None:
    """What a step of training does at its worst: no weight stays as it was."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)).to(parameter.dtype)


# ------------------------------------------------------------------------------------------------ loops


@pytest.mark.parametrize("make", [llama, phi3, gpt2, mixtral, bert, t5])
def test_two_lines_keep_the_zeros_in_a_plain_loop(make: Callable[..., Any]) -> None:
    model = pruned(make)
    places = dropped(model)
    kept = KeptMasks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in steps(model, optimizer):
        kept.apply_()
        assert_zero(model, places)
    assert kept.lost() == 0


def test_without_them_they_are_lost() -> None:
    model = pruned()
    kept = KeptMasks(model)
    list(steps(model, torch.optim.AdamW(model.parameters(), lr=1e-2)))
    assert kept.lost() == kept.zeros == report(model).zeros


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_number_format(dtype: torch.dtype) -> None:
    model = pruned().to(dtype)
    places = dropped(model)
    kept = KeptMasks(model)
    for _ in steps(model, torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)):
        kept.apply_()
        assert_zero(model, places)


def test_mixed_precision_in_fp16_with_a_gradient_scaler() -> None:
    # The Trainer leaves fp16 out on a CPU, so that only a loop can show it there.
    model = pruned()
    places = dropped(model)
    kept = KeptMasks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # overflows, so that the first steps are skipped
    model.train()
    done = 0
    for _ in range(40):
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model)
        scaler.scale(loss).backward()
        before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        kept.apply_()
        optimizer.zero_grad()
        done += not torch.equal(before, model.model.layers[0].mlp.up_proj.weight)
        assert_zero(model, places)
    assert 0 < done < 40


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps its settings for the whole process, and other tests train with other ones."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
def test_the_same_two_lines_with_accelerate() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = pruned()
    places = dropped(model)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    kept = KeptMasks(model)
    for _ in range(3):
        accelerator.backward(loss_of(model))
        optimizer.step()
        kept.apply_()
        optimizer.zero_grad()
        assert_zero(model, places)


@pytest.mark.slow
def test_a_compiled_model() -> None:
    model = pruned(layers=1)
    places = dropped(model)
    compiled = torch.compile(model)
    kept = KeptMasks(compiled)
    for _ in steps(compiled, torch.optim.AdamW(compiled.parameters(), lr=1e-2)):
        kept.apply_()
        assert_zero(model, places)


def test_a_peft_model_trains_its_adapters_and_leaves_the_base_alone() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(pruned(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    base = model.get_base_model()
    places = dropped(base)
    kept = KeptMasks(model)
    adapters = {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" in name}
    assert any(not value.any() for value in adapters.values())  # a LoRA begins with a matrix of zeros
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-2)
    for _ in steps(model, optimizer):
        kept.apply_()
    assert_zero(base, places)
    trained = dict(model.named_parameters())
    assert all(not torch.equal(value, trained[name]) for name, value in adapters.items())


def test_a_base_that_trains_beside_its_adapters_is_kept() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(pruned(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"])).requires_grad_(True)
    base = model.get_base_model()
    places = dropped(base)
    kept = KeptMasks(model)
    for _ in steps(model, torch.optim.AdamW(model.parameters(), lr=1e-2)):
        kept.apply_()
        assert_zero(base, places)


# ------------------------------------------------------------------------------------------------ what is kept, and what is not


@pytest.mark.parametrize("make", [llama, phi3, gpt2, mixtral, bert, t5])
def test_nothing_but_sites_is_touched(make: Callable[..., Any]) -> None:
    model = pruned(make)
    kept = KeptMasks(model)
    sites = {id(parameter_of(model, site)) for site in find_sites(model).all()}
    others = {name: value for name, value in model.named_parameters() if id(value) not in sites}
    assert any("norm" in name.lower() or "ln_" in name for name in others)
    for value in others.values():
        value.data.fill_(0)  # zeros that are nobody's mask
    shake_(model)
    before = {name: value.detach().clone() for name, value in others.items()}
    kept.apply_()
    assert all(torch.equal(value, before[name]) for name, value in others.items())
    assert all(bool(value.all()) for value in others.values())


def test_biases_and_norms_of_zeros_train() -> None:
    model = pruned(bert)
    zeros = {name: value for name, value in model.named_parameters() if not value.any()}
    assert {name.rpartition(".")[2] for name in zeros} == {"bias"}
    kept = KeptMasks(model)
    for _ in steps(model, torch.optim.AdamW(model.parameters(), lr=1e-2)):
        kept.apply_()
    # The bias of the keys moves all scores of a softmax alike; the loss does not depend on it.
    assert all(bool(value.any()) for name, value in zeros.items() if "key" not in name)


def test_tied_weights_train() -> None:
    model = pruned(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.lm_head.weight.data[:, :16] = 0
    places = dropped(model)
    kept = KeptMasks(model)
    for _ in steps(model, torch.optim.AdamW(model.parameters(), lr=1e-2)):
        kept.apply_()
        assert_zero(model, places)
    assert bool(model.lm_head.weight.all())


def test_the_zeros_of_sites_that_were_not_pruned_stay_as_well() -> None:
    model = pruned(config=SparsityConfig(metric="magnitude", targets="mlp"))
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data[3, 5] = 0
    kept = KeptMasks(model)
    shake_(model)
    kept.apply_()
    assert weight[3, 5] == 0
    assert int((weight == 0).sum()) == 1


def test_the_rest_of_a_parameter_that_is_a_site_in_part_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned(phi3)
    inventory = find_sites(model)
    left = {index: [site for site in sites if site.role != "k"] for index, sites in inventory.sites.items()}
    monkeypatch.setattr("hf_sparse.stored.find_sites", lambda model: replace(inventory, sites=left))
    places = dropped(model)
    kept = KeptMasks(model)
    shake_(model)
    kept.apply_()
    for name, place in dropped(model).items():
        assert torch.equal(place, torch.zeros_like(place) if name.endswith(".k") else places[name]), name


def test_weights_that_turn_zero_later_are_free() -> None:
    model = pruned()
    kept = KeptMasks(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    row = weight[0].detach().clone()
    weight.data[0] = 0
    weight.data[0] = row + 1
    kept.apply_()
    assert torch.equal(weight[0] == 0, row == 0)


def test_minus_zero_counts_and_becomes_plus_zero() -> None:
    model = elsewhere()
    places = dropped(model)
    for site in find_sites(model).all():
        write_(model, site, torch.where(places[site.name], -0.0, read(model, site)))
    KeptMasks(model).apply_()
    assert_zero(model, places)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_training_that_diverged_has_its_zeros_all_the_same(bad: float) -> None:
    model = pruned()
    places = dropped(model)
    kept = KeptMasks(model)
    for parameter in model.parameters():
        parameter.data.fill_(bad)
    kept.apply_()
    assert_zero(model, places)


@pytest.mark.parametrize("make", [llama, mixtral])  # a parameter of its own, and a slice of a parameter
def test_a_fresh_site_of_zeros_is_left_free_with_a_warning(make: Callable[..., Any]) -> None:
    model = elsewhere(make)
    site = find_sites(model).all()[-1]
    write_(model, site, torch.zeros(site.shape))
    with pytest.warns(UserWarning, match=f"{site.name}: all weights are zero, so they are left free"):
        kept = KeptMasks(model)
    shake_(model)
    kept.apply_()
    places = dropped(model)
    assert not places.pop(site.name).any()
    assert all(bool(place.any()) for place in places.values())


def test_many_fresh_sites_are_named_in_short() -> None:
    model = elsewhere(layers=3)
    for site in find_sites(model).all()[7:]:
        write_(model, site, torch.zeros(site.shape))
    with pytest.warns(UserWarning, match=r"^model\.layers\.1\.self_attn\.q_proj, .* and 11 more: all weights"):
        KeptMasks(model)


@pytest.mark.parametrize("make", [llama, mixtral])
def test_a_site_that_the_report_calls_pruned_stays_zero_as_a_whole(make: Callable[..., Any]) -> None:
    names = {"*.down*": 1.0 - 1e-9, "*": 0.5}
    model = pruned(make, SparsityConfig(metric="magnitude", pattern="unstructured", allocation=names))
    places = dropped(model)
    whole = [name for name, place in places.items() if bool(place.all())]
    assert whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = KeptMasks(model)
    shake_(model)
    kept.apply_()
    assert_zero(model, places)


def test_frozen_parameters_are_left_to_whoever_froze_them() -> None:
    model = pruned()
    kept = KeptMasks(model)
    weight = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    weight.data.fill_(1)
    kept.apply_()
    assert bool((weight == 1).all())
    assert kept.lost() == int(weight.numel() / 2)


def test_gradients_of_dropped_weights_can_be_zeroed() -> None:
    model = pruned()
    places = dropped(model)
    kept = KeptMasks(model)
    loss_of(model).backward()
    kept.apply_to_gradients_()
    for site in find_sites(model).all():
        gradient = view(parameter_of(model, site).grad, site).reshape(site.shape)
        assert not gradient[places[site.name]].any()
        assert bool(gradient[~places[site.name]].any())


# ------------------------------------------------------------------------------------------------ figures


def test_counts_are_those_of_the_report() -> None:
    model = pruned(config=SparsityConfig(metric="magnitude", targets="mlp"))
    kept = KeptMasks(model)
    counted = {site.name: (site.zeros, site.shape[0] * site.shape[1]) for site in report(model).sites}
    assert {name: kept.counts[name] for name in counted} == counted
    assert kept.zeros == report(model).zeros
    assert kept.size == sum(site.size for site in find_sites(model).all())
    assert kept.sparsity() == report(model).sparsity == 0.5


def test_lost_zeros_and_sparsity_are_counted_anew() -> None:
    model = pruned()
    kept = KeptMasks(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data.fill_(1)
    assert kept.lost() == weight.numel() / 2
    assert kept.sparsity() == (kept.zeros - weight.numel() / 2) / kept.size
    kept.apply_()
    assert kept.lost() == 0
    assert kept.sparsity() == 0.5


# ------------------------------------------------------------------------------------------------ bad input


def few_zeros() -> Any:
    model = llama()
    model.model.layers[0].mlp.up_proj.weight.data[0, :5] = 0
    return model


def only_fresh_zeros() -> Any:
    model = llama()
    model.model.layers[0].mlp.up_proj.weight.data.fill_(0)
    return model


@pytest.mark.filterwarnings("ignore:.*left free to train")
@pytest.mark.parametrize(("make", "zeros"), [(llama, 0), (few_zeros, 5), (only_fresh_zeros, 48 * 32)])
def test_a_model_with_nothing_to_keep_is_refused(make: Callable[[], Any], zeros: int) -> None:
    words = rf"{zeros} of 15360 weights in the sites of LlamaForCausalLM are zero.*sparsity_config=.*prune_.*Sparsify"
    with pytest.raises(ModelError, match=words):
        KeptMasks(make())


def test_a_model_with_a_report_may_have_few_zeros() -> None:
    model = pruned(config=SparsityConfig(metric="magnitude", pattern="unstructured", sparsity=0.001))
    assert 0 < KeptMasks(model).zeros < 0.01 * KeptMasks(model).size


def test_a_parameter_exchanged_between_steps_is_an_error() -> None:
    model = pruned()
    kept = KeptMasks(model)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    for work in (kept.apply_, kept.lost, kept.sparsity):
        with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
            work()


def zeros_of_sites(model: nn.Module) -> dict[str, int]:
    return {name: int(place.sum()) for name, place in dropped(model).items()}


def refill_(model: Any, layer: int = 0) -> None:
    model.model.layers[layer].mlp.up_proj.weight.data.fill_(1)


def test_fewer_zeros_than_the_report_says_are_told_and_the_others_kept() -> None:
    model = pruned()
    refill_(model)
    with pytest.warns(
        UserWarning, match=r"fewer zeros than its report says: model\.layers\.0\.mlp\.up_proj \(0 of 768\)"
    ):
        kept = KeptMasks(model)
    assert kept.zeros == report(model).zeros - 768
    assert kept.lost() == 0


def test_a_claim_without_a_report_is_compared_in_total() -> None:
    model = pruned()
    attach_report(model, None)  # type: ignore[arg-type]  # as where the report's file was not kept
    assert missing_zeros(model, KeptMasks(model).counts) is None
    refill_(model)
    with pytest.warns(
        UserWarning, match=r"6912 of 7680 zeros are there; the least have model\.layers\.0\.mlp\.up_proj \(0\)"
    ):
        KeptMasks(model)
    delattr(model.config, CONFIG_KEY)
    assert missing_zeros(model, KeptMasks(model).counts) is None


@pytest.mark.parametrize("layers", [[0], [0, 1]])
def test_a_resumed_checkpoint_with_fewer_zeros_is_refused_by_the_names_of_its_sites(layers: list[int]) -> None:
    model = pruned()
    for layer in layers:
        refill_(model, layer)
    words = r"the checkpoint of step 4 has lost zeros: model\.layers\.0\.mlp\.up_proj \(0 of 768\).*resume from an older one"
    with pytest.raises(CheckpointError, match=words):
        KeptMasks(model, resumed="the checkpoint of step 4")


def test_one_that_lost_all_of_them_is_no_dense_model() -> None:
    model = pruned()
    shake_(model)
    with pytest.raises(CheckpointError, match=r"\(0 of \d+\), .* and 11 more"):
        KeptMasks(model, resumed="the checkpoint of step 4")


def test_one_whose_writer_had_no_more_is_resumed() -> None:
    model = pruned()
    refill_(model)
    with pytest.warns(UserWarning, match="fewer zeros"):
        kept = KeptMasks(model, resumed="the checkpoint of step 4", zeros=zeros_of_sites(model))
    assert kept.zeros == 7680 - 768
    with pytest.raises(CheckpointError, match=r"lost zeros: model\.layers\.1\.mlp\.up_proj \(768 of 769\)\."):
        KeptMasks(
            model,
            resumed="the checkpoint of step 4",
            zeros=zeros_of_sites(model) | {"model.layers.1.mlp.up_proj": 769},
        )


@pytest.mark.filterwarnings("ignore:.*fewer zeros than its report")
def test_a_site_that_lost_its_zeros_is_noticed_though_another_has_as_many_more() -> None:
    model = pruned()
    zeros = zeros_of_sites(model)
    refill_(model)
    model.model.layers[1].mlp.up_proj.weight.data.fill_(0)
    assert sum(zeros_of_sites(model).values()) == sum(zeros.values())
    words = r"step 4 has lost zeros: model\.layers\.0\.mlp\.up_proj \(0 of 768\)\. "
    with pytest.raises(CheckpointError, match=words):
        KeptMasks(model, resumed="the checkpoint of step 4", zeros=zeros)
    with pytest.raises(CheckpointError, match=r"model\.gone \(0 of 1\)"):
        KeptMasks(pruned(), resumed="the checkpoint of step 4", zeros={"model.gone": 1})


def test_its_writers_count_is_known_where_there_is_no_report() -> None:
    model = elsewhere()
    zeros = zeros_of_sites(model)
    KeptMasks(model, resumed="the checkpoint of step 4", zeros=zeros)
    refill_(model)
    with pytest.raises(CheckpointError, match=r"lost zeros: model\.layers\.0\.mlp\.up_proj \(0 of 768\)\."):
        KeptMasks(model, resumed="the checkpoint of step 4", zeros=zeros)


def test_under_adapters_another_reason_is_likelier() -> None:
    model = pruned().requires_grad_(False)
    shake_(model)
    with pytest.raises(CheckpointError, match="it holds adapters, and the model under them is not the sparse one"):
        KeptMasks(model, resumed="the checkpoint of step 4")
