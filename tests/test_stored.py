"""The parameters that hold the sites of a model, and the zeros written into them: exact in every number format."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis.extra.numpy as arrays
import numpy
import pytest
import torch
from accelerate import cpu_offload
from hypothesis import given
from hypothesis import strategies as st
from models import bert, gpt2, llama, mixtral, phi3, t5
from torch import nn
from torch.distributed.fsdp import fully_shard

from hf_sparse.errors import ModelError
from hf_sparse.families import find_sites
from hf_sparse.sites import count_zeros, view
from hf_sparse.stored import bits, member_mask, over_processes, stored_parameters, zero_, zeros_and_size

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
SPECIAL = [0.0, -0.0, float("nan"), float("inf"), float("-inf"), 1e-45, 1.5, -2.0]


def as_bits(values: torch.Tensor) -> torch.Tensor:
    """What is in memory: tells -0.0 from 0.0, and one NaN from another."""
    return values.contiguous().view(INTEGERS[values.element_size()])


@st.composite
def tensors(draw: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Weights of any format, shape and memory layout, with all that a float can be."""
    shape = draw(st.one_of(arrays.array_shapes(min_dims=1, max_dims=3, max_side=9), st.just((0, 4)), st.just((3, 0))))
    values = draw(arrays.arrays(numpy.float64, shape, elements=st.sampled_from(SPECIAL) | st.floats(width=16)))
    weights = torch.tensor(values).to(dtype or draw(st.sampled_from(DTYPES)))
    layout = draw(st.sampled_from(["plain", "transposed", "part"]))
    if layout == "transposed":
        return weights.movedim(0, -1).contiguous().movedim(-1, 0)
    return torch.stack([weights, weights], -1)[..., 0] if layout == "part" else weights


# ------------------------------------------------------------------------------------------------ zeros


@given(tensors(), st.data())
def test_dropped_weights_become_plus_zero_and_all_others_keep_every_bit(weights: torch.Tensor, data: Any) -> None:
    kept = torch.tensor(data.draw(arrays.arrays(bool, tuple(weights.shape))))
    before = as_bits(weights).clone()
    zero_(weights, bits(kept))
    assert torch.equal(as_bits(weights), torch.where(kept, before, 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_parameters_are_written_in_pieces(dtype: torch.dtype) -> None:
    weights = torch.randn(700, 1001, generator=torch.Generator().manual_seed(0)).to(dtype)
    kept = torch.rand(700, 1001, generator=torch.Generator().manual_seed(1)) < 0.5
    wanted = torch.where(kept, weights, 0)
    zero_(weights, bits(kept))
    assert torch.equal(as_bits(weights), as_bits(wanted))


@given(tensors())
def test_zeros_are_counted_as_torch_counts_them(weights: torch.Tensor) -> None:
    assert count_zeros(weights) == weights.numel() - int(torch.count_nonzero(weights))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int32, torch.bool])
def test_large_tensors_are_counted_in_pieces(dtype: torch.dtype) -> None:
    weights = torch.randint(-1, 2, (300, 1001), generator=torch.Generator().manual_seed(0)).to(dtype)
    assert count_zeros(weights) == int((weights == 0).sum()) > 0


def test_one_process_adds_up_what_it_has() -> None:
    values = torch.tensor([3, 4])
    assert over_processes(values) is values


# ------------------------------------------------------------------------------------------------ which parameters


@pytest.mark.parametrize("make", [llama, phi3, gpt2, mixtral, bert, t5])
def test_every_site_lies_in_one_live_parameter(make: Callable[[], nn.Module]) -> None:
    model = make()
    found = stored_parameters(model)
    names = [site.name for stored in found for site in stored.sites]
    assert sorted(names) == sorted(site.name for site in find_sites(model).all())
    live = {id(parameter) for parameter in model.parameters()}
    assert all(id(stored.parameter) in live for stored in found)
    assert len({id(stored.parameter) for stored in found}) == len(found)


@pytest.mark.parametrize("make", [llama, phi3, gpt2, mixtral, bert, t5])
def test_the_sites_of_a_parameter_are_told_from_the_rest_of_it(make: Callable[[], nn.Module]) -> None:
    for stored in stored_parameters(make()):
        assert member_mask(stored) is None  # these families have no parameter that is a site in part
        member = member_mask(type(stored)(stored.module, stored.attribute, stored.parameter, stored.sites[1:]))
        if len(stored.sites) > 1:
            assert member is not None
            assert not view(member, stored.sites[0]).any()
            assert all(bool(view(member, site).all()) for site in stored.sites[1:])


def test_it_shares_the_memory_of_the_parameter() -> None:
    model = llama()
    stored = stored_parameters(model)[0]
    stored.local().fill_(3.0)
    assert bool((stored.parameter == 3).all())
    assert not stored.sharded
    assert stored.whole().data_ptr() == stored.piece(stored.whole()).data_ptr() == stored.parameter.data_ptr()


def test_zeros_and_size_are_those_of_the_whole_parameters() -> None:
    model = llama()
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data[:5] = 0
    found = stored_parameters(model)
    assert zeros_and_size(found) == (5 * 32, sum(site.size for site in find_sites(model).all()))
    assert zeros_and_size([]) == (0, 0)


# ------------------------------------------------------------------------------------------------ what cannot be kept


def replaced(layer: Any) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().clone())


def taken_away(layer: Any) -> None:
    layer.weight = None


def enlarged(layer: Any) -> None:
    layer.weight.data = torch.zeros(100, 32)


@pytest.mark.parametrize(
    ("change", "found"),
    [(replaced, r"another, of shape \(48, 32\)"), (taken_away, "none"), (enlarged, r"another, of shape \(100, 32\)")],
)
def test_another_parameter_in_its_place_is_an_error(change: Callable[[Any], None], found: str) -> None:
    model = llama()
    layer = model.model.layers[1].mlp.gate_proj
    stored = next(one for one in stored_parameters(model) if one.module is layer)
    change(layer)
    with pytest.raises(
        ModelError, match=rf"layers\.1\.mlp\.gate_proj\.weight was .*\(48, 32\).* is {found} now.*before training"
    ):
        stored.local()


def test_other_values_dtypes_and_devices_are_none() -> None:
    model = llama()
    stored = stored_parameters(model)[0]
    model.half()
    assert stored.local().dtype == torch.float16


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def sharded(*, parts: bool) -> Any:
    """A model whose forward pass leaves its parameters gathered until a backward pass: all, or those of its blocks alone."""
    model, mesh = llama(), torch.distributed.init_device_mesh("cpu", (1,))
    for layer in model.model.layers if parts else ():
        fully_shard(layer, mesh=mesh, reshard_after_forward=False)
    return fully_shard(model, mesh=mesh, reshard_after_forward=False)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("parts", [True, False])
def test_shards_that_a_pass_without_gradients_has_gathered_are_the_parameters_still(parts: bool) -> None:
    model = sharded(parts=parts)
    before = stored_parameters(model)
    shards = [one.parameter for one in before]
    with torch.no_grad():
        model(input_ids=torch.ones(1, 4, dtype=torch.long))
    linear = model.model.layers[0].mlp.up_proj
    assert type(linear.weight) is nn.Parameter  # gathered
    name = "model.layers.0.mlp.up_proj.weight"
    (one,) = [stored for stored in before if stored.name == name]
    one.local().fill_(2)
    assert one.parameter is linear.weight
    with torch.no_grad():
        model(input_ids=torch.ones(1, 4, dtype=torch.long))
    assert bool((linear.weight == 2).all())
    assert all(one.sharded for one in stored_parameters(model))
    assert all(one.parameter is shard for one, shard in zip(stored_parameters(model), shards, strict=True))


@pytest.mark.usefixtures("one_process")
def test_another_parameter_in_the_place_of_shards_is_an_error() -> None:
    model = sharded(parts=True)
    linear = model.model.layers[0].mlp.up_proj
    (one,) = [stored for stored in stored_parameters(model) if stored.module is linear]
    linear.weight = nn.Parameter(torch.zeros(48, 32))
    with pytest.raises(ModelError, match=r"another, of shape \(48, 32\) now"):
        one.local()


class FullyShardedDataParallel(nn.Module):
    """Has the name of FSDP's first version, which cannot be made without a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module


def fsdp1() -> nn.Module:
    model = llama()
    model.model.layers[0] = FullyShardedDataParallel(model.model.layers[0])
    return model


def zero3() -> nn.Module:
    model = llama()
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = torch.empty(0)
    weight.ds_id = 7
    return model


def meta() -> nn.Module:
    with torch.device("meta"):
        return llama()


def quantized(method: Any) -> nn.Module:
    model = llama()
    model.config.quantization_config = method
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (fsdp1, r"model\.layers\.0 is wrapped by the first version of FSDP.*fsdp_version: 2"),
        (zero3, r"layers\.0\.mlp\.up_proj\.weight is partitioned by DeepSpeed ZeRO stage 3.*stage 1 or 2"),
        (meta, r"layers\.0\..* is offloaded or on the meta device.*device_map"),
        (lambda: cpu_offload(llama()), r"layers\.0\..* is offloaded or on the meta device.*device_map"),
        (lambda: quantized({"quant_method": "gptq"}), r"LlamaForCausalLM is quantized \(gptq\).*without quantization"),
        (lambda: quantized(SimpleNamespace(quant_method="awq")), r"quantized \(awq\)"),
    ],
)
def test_weights_that_cannot_be_kept_are_refused_with_the_way_out(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        stored_parameters(make())
