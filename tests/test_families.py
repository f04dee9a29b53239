"""Every matrix of every family is found, named, split as the model computes, and nothing else is."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families_table import FAMILIES, expected_roles
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig

from hf_sparse.errors import HfSparseError
from hf_sparse.families import Inventory, find_sites, fused, names
from hf_sparse.observe import Observer, Operand, eager_experts, operand_of
from hf_sparse.sites import Site, parameter_of, plain_name, read, stored_rows, view, write_

_made: dict[str, tuple[nn.Module, dict[str, torch.Tensor], Inventory]] = {}

# Left alone for now although the model multiplies with them: tensors that no table knows, by the end of their names.
UNKNOWN = {
    "xlnet": {"q", "k", "v", "o", "r"},
    "convbert": {"weight"},
    "zamba": {"x_proj_weight", "dt_proj_weight"},
    "recurrent_gemma": {"input_gate_weight", "recurrent_gate_weight"},
    "inkling_text": {"proj"},
}
FUSED_ATTENTION = [
    "phi3", "gpt2", "gpt2_cross", "gpt_neox", "gpt_neox_japanese", "codegen", "bloom", "falcon", "falcon_multi_query", "falcon_new",
    "mpt", "gpt_bigcode", "gpt_bigcode_heads", "persimmon", "dbrx", "modernbert", "openai-gpt", "imagegpt", "qwen2_vl", "qwen3_vl",
    "sam_vision_model", "hiera", "timesformer", "blip", "deepseek_v3", "minimax", "jetmoe",
]  # fmt: skip


def made(name: str) -> tuple[nn.Module, dict[str, torch.Tensor], Inventory]:
    if name not in _made:
        model, inputs = FAMILIES[name].build()
        _made[name] = (model, inputs, find_sites(model))
    return _made[name]


def run(name: str) -> Callable[[], object]:
    model, inputs, _ = made(name)

    def call() -> object:
        with torch.no_grad(), eager_experts(model):
            return model(**inputs)

    return call


@pytest.mark.parametrize("name", FAMILIES)
def test_names_and_roles(name: str) -> None:
    _, _, inventory = made(name)
    found = {}
    for block in inventory.blocks:
        for site in inventory.sites[block.index]:
            short = site.name.removeprefix(plain_name(block.name) + ".")
            found[re.sub(r"(?<=\.)(expert_)?\d+(?=\.|$)", "#", short)] = site.role
    assert found == expected_roles(name)
    names = [site.name for site in inventory.all()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_is_partitioned_into_sites_or_left_out(name: str) -> None:
    model, _, inventory = made(name)
    by_parameter: dict[int, list[Site]] = {}
    for site in inventory.all():
        by_parameter.setdefault(id(parameter_of(model, site)), []).append(site)
    for block in inventory.blocks:
        for path, parameter in block.module.named_parameters(prefix=block.name, remove_duplicate=False):
            if parameter.ndim < 2:
                continue
            if id(parameter) not in by_parameter:
                assert inventory.left_out[path].endswith(".")
                continue
            covered = torch.zeros_like(parameter)
            for site in by_parameter[id(parameter)]:
                view(covered, site).add_(1)
            assert bool((covered == 1).all()), path


@pytest.mark.parametrize("name", FAMILIES)
def test_read_and_write_round_trip(name: str) -> None:
    model, _, inventory = made(name)
    for site in inventory.all()[:40]:
        before = parameter_of(model, site).detach().clone()
        matrix = read(model, site).clone()
        assert tuple(matrix.shape) == site.shape
        write_(model, site, matrix + 1)
        assert torch.equal(read(model, site), matrix + 1)
        assert int((parameter_of(model, site) != before).sum()) == site.size  # and nothing else
        write_(model, site, matrix)
        assert torch.equal(parameter_of(model, site), before)


class _Operands(TorchFunctionMode):
    """Names every parameter that a product of any kind takes, found without the help of the code under test."""

    PRODUCTS = frozenset(
        {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "tensordot"}
    )

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters() if p.ndim >= 2}
        self.seen: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.PRODUCTS:
            for value in (*args, *(kwargs or {}).values()):
                for tensor in value if isinstance(value, (list, tuple)) else [value]:
                    if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() in self.names:
                        self.seen.add(self.names[tensor.untyped_storage().data_ptr()])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_operand_of_a_product_is_a_site_or_known_to_be_none(name: str) -> None:
    model, _, inventory = made(name)
    with _Operands(model) as operands:
        run(name)()
    inside = {seen for seen in operands.seen if any(seen.startswith(block.name + ".") for block in inventory.blocks)}
    owned = {f"{site.module}.{site.parameter}" for site in inventory.all()}
    assert inside - owned <= set(inventory.left_out)
    unknown = {path.rsplit(".", 1)[-1] for path in inside - owned if "not known" in inventory.left_out[path]}
    assert unknown == UNKNOWN.get(name, set())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_observer_sees_the_products_of_sites(name: str) -> None:
    model, _, inventory = made(name)
    sites = {operand_of(site): site for site in inventory.all()}
    wrong: list[str] = []

    def look(operand: Operand, x: torch.Tensor, product: torch.Tensor) -> None:
        site = sites[operand]
        rows = product[..., stored_rows(site)].float()
        expected = x.float() @ read(model, site).float().T
        bias = getattr(model.get_submodule(site.module), "bias", None)  # a linear product has its bias in already
        shifted = (
            expected + bias.float()[stored_rows(site)]
            if isinstance(bias, torch.Tensor) and bias.ndim == 1
            else expected
        )
        if not any(torch.allclose(rows, candidate, atol=1e-4, rtol=1e-3) for candidate in (expected, shifted)):
            wrong.append(site.name)

    with Observer(model, inventory.all(), look):
        run(name)()
    assert wrong == []


def _inputs_of(name: str, consumers: list[Site], change: dict[str, float]) -> list[torch.Tensor]:
    """What the consumers read the first time when sites are scaled meanwhile."""
    model, _, inventory = made(name)
    scaled = [site for site in inventory.all() if site.name in change]
    before = [read(model, site).clone() for site in scaled]
    found: dict[Operand, torch.Tensor] = {}
    try:
        for site, matrix in zip(scaled, before, strict=True):
            write_(model, site, matrix * change[site.name])
        with Observer(model, consumers, lambda operand, x, _: (found.setdefault(operand, x.double()), None)[1]):
            run(name)()
    finally:
        for site, matrix in zip(scaled, before, strict=True):
            write_(model, site, matrix)
    return list(found.values())


def _last_block(name: str, role: str) -> list[Site]:
    """The sites of the last block, of those run on the input, that has the role."""
    _, _, inventory = made(name)
    return next(
        inventory.sites[b.index]
        for b in reversed(inventory.blocks)
        if role in {s.role for s in inventory.sites[b.index]}
    )


@pytest.mark.parametrize("name", [name for name in FAMILIES if "gate" in expected_roles(name).values()])
def test_down_reads_something_affine_in_up_and_not_in_gate(name: str) -> None:
    sites = _last_block(name, "gate")
    for parent in {_parent(site) for site in sites if site.role == "gate"}:
        near = [site for site in sites if _parent(site) == parent]
        consumers = [site for site in near if site.role == "down"]
        for role, affine in (("up", True), ("gate", False)):
            scaled = [site.name for site in near if site.role == role]
            ends = [_inputs_of(name, consumers, dict.fromkeys(scaled, scale)) for scale in (1.0, 0.0, -1.0)]
            bend = max(
                float((a + c - 2 * b).abs().max()) / float(a.abs().max())
                for a, b, c in zip(*ends, strict=True)
                if a.any()
            )
            assert (bend < 1e-3) == affine, f"{parent}.{role}: {bend}"


def _parent(site: Site) -> str:
    return site.module.rpartition(".")[0]


@pytest.mark.parametrize("name", FUSED_ATTENTION)
def test_without_queries_keys_do_not_matter(name: str) -> None:
    """Splits of q and k are right if what o reads no longer depends on k once the rows of q are zero."""
    model, _, _ = made(name)
    sites = _last_block(name, "v")
    if name == "minimax":  # the fused one is its linear attention
        sites = made(name)[2].sites[0]
    biases = [b for s in sites if isinstance(b := getattr(model.get_submodule(s.module), "bias", None), nn.Parameter)]
    saved = [bias.detach().clone() for bias in biases]
    consumers = [site for site in sites if site.role == "o"]
    no_queries = {site.name: 0.0 for site in sites if site.role == "q"}
    other_keys = {site.name: -2.0 for site in sites if site.role == "k"}
    try:
        for bias in biases:
            bias.detach().zero_()
        without = _inputs_of(name, consumers, no_queries)
        other = _inputs_of(name, consumers, {**no_queries, **other_keys})
        usual = _inputs_of(name, consumers, {})
    finally:
        for bias, value in zip(biases, saved, strict=True):
            bias.detach().copy_(value)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(without, other, strict=True))
    assert any(not torch.allclose(a, b, atol=1e-6) for a, b in zip(without, usual, strict=True))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for it
def test_adapters_are_looked_through() -> None:
    from peft import LoraConfig, get_peft_model

    plain, inputs = FAMILIES["phi3"].build()
    expected = [(site.name, site.role, site.rows) for site in find_sites(plain).all()]
    adapted = get_peft_model(plain, LoraConfig(r=2, target_modules="all-linear"))
    inventory = find_sites(adapted)
    assert [(site.name, site.role, site.rows) for site in inventory.all()] == expected
    assert all(site.module.endswith(".base_layer") for site in inventory.all())
    assert all("lora_" in path and "adapter" in reason for path, reason in inventory.left_out.items())
    seen: set[Operand] = set()
    with Observer(adapted, inventory.all(), lambda operand, x, product: (seen.add(operand), None)[1]):
        adapted(**inputs)
    assert seen == {operand_of(site) for site in inventory.all()}


def test_wrappers_do_not_change_names() -> None:
    model, _ = FAMILIES["mixtral"].build()
    names = [site.name for site in find_sites(model).all()]
    assert [site.name for site in find_sites(nn.DataParallel(model)).all()] == names
    assert [site.name for site in find_sites(torch.compile(model)).all()] == names  # type: ignore[arg-type]


def test_a_model_without_memory_has_the_same_sites() -> None:
    family = FAMILIES["mixtral"]
    expected = find_sites(family.build()[0])
    with torch.device("meta"):
        empty = family.make.from_config(AutoConfig.for_model(family.model_type, **family.settings))
    found = find_sites(empty)
    assert found.all() == expected.all()
    assert found.left_out == expected.left_out


def test_tied_quantized_and_full_precision_weights_are_left_out() -> None:
    model, _ = FAMILIES["llama"].build()
    first, second = model.get_submodule("model.layers.0"), model.get_submodule("model.layers.1")
    embeddings = model.get_input_embeddings().weight  # type: ignore[operator]
    first.mlp.tied = nn.Linear(32, 64, bias=False)  # type: ignore[union-attr]
    first.mlp.tied.weight = embeddings  # type: ignore[union-attr]
    second.mlp.up_proj.weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)  # type: ignore[union-attr]
    second.mlp.gate_proj.to(torch.float8_e4m3fn)  # type: ignore[union-attr, operator]
    model._keep_in_fp32_modules_strict = {"k_proj"}
    left_out = find_sites(model).left_out
    assert "tied" in left_out["model.layers.0.mlp.tied.weight"]
    assert "quantized" in left_out["model.layers.1.mlp.up_proj.weight"]
    assert "quantized" in left_out["model.layers.1.mlp.gate_proj.weight"]
    assert "full precision" in left_out["model.layers.0.self_attn.k_proj.weight"]


def test_rows_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Linear(8, 24)
            self.back = nn.Linear(12, 8)

    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = nn.ModuleList(Cell() for _ in range(2))

    monkeypatch.setattr(names, "ROLE_PATTERNS", list(names.ROLE_PATTERNS))
    monkeypatch.setattr(fused, "FUSED_PATTERNS", list(fused.FUSED_PATTERNS))
    names.register_role("back", "down")
    fused.register_fused("both", ("gate", "up"), "halves", owner="Cell")
    found = {site.name: site.role for site in find_sites(Mine()).sites[0]}
    assert found == {"cells.0.both.gate": "gate", "cells.0.both.up": "up", "cells.0.back": "down"}
    with pytest.raises(HfSparseError, match="Allowed"):
        names.register_role("back", "downwards")
    with pytest.raises(HfSparseError, match="Allowed"):
        fused.register_fused("both", ("gate", "up"), "thirds")


def test_torch_attention_is_split() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 12) for _ in range(2))

    roles = {site.name: site.role for site in find_sites(Model()).sites[1]}
    assert roles == {
        "layers.1.self_attn.in_proj_weight.q": "q",
        "layers.1.self_attn.in_proj_weight.k": "k",
        "layers.1.self_attn.in_proj_weight.v": "v",
        "layers.1.self_attn.out_proj": "o",
        "layers.1.linear1": "up",
        "layers.1.linear2": "down",
    }
