"""Models on sparse kernels give what the dense model with its zeros gives, are saved as that, and go back to it bit for bit."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from kernel_cases import sparse
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import hf_sparse
from hf_sparse import SparsityConfig, native, prune_, use_dense_kernels_, use_sparse_kernels_
from hf_sparse.embedded import model_path
from hf_sparse.errors import ConfigError, HfSparseError, KernelError, ModelError
from hf_sparse.runtime import (
    ArrangedForm,
    PackedForm,
    SparseModule,
    choices,
    copies,
    hold_,
    release_,
    semi_structured,
    sources,
    sparse_modules,
)
from hf_sparse.runtime.choices import Choices

FAMILIES = ("llama", "mixtral", "phi3", "gpt2", "bert", "t5")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SPARSE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def pruned(family: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Any:
    model = getattr(models, family)()
    prune_(model, SparsityConfig(metric="magnitude"))
    return model.to(dtype)


def on_sparse_kernels(family: str = "llama") -> Any:
    model = pruned(family)
    use_sparse_kernels_(model, choose="always")
    return model


def logits(model: nn.Module, rows: torch.Tensor | None = None) -> torch.Tensor:
    rows = models.token_rows() if rows is None else rows
    extra = {"decoder_input_ids": rows[:, :5]} if model.config.is_encoder_decoder else {}
    return model(input_ids=rows, **extra).logits


def linear(dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Linear, nn.Linear]:
    """A dense Linear with zeros, and one that holds the same weight packed."""
    torch.manual_seed(0)
    dense = nn.Linear(40, 24, dtype=dtype).eval()
    dense.weight.copy_(sparse("2:4 input", 24, 40, 0))
    held = copy.deepcopy(dense)
    hold_(held, PackedForm(native.pack(dense.weight.bfloat16())))
    return dense, held


# ---------------------------------------------------------------------------------------------------- one module


@pytest.mark.parametrize("shape", [(40,), (1, 40), (3, 2, 40), (0, 40), (2, 0, 40)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_linear_of_any_leading_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    dense, held = linear(dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    torch.testing.assert_close(held(x), dense(x))


def test_conv1d() -> None:
    torch.manual_seed(0)
    dense = Conv1D(24, 40).bfloat16().eval()
    dense.weight.copy_(sparse("unstructured 50 %", 40, 24, 0))
    held = copy.deepcopy(dense)
    hold_(held, PackedForm(native.pack(dense.weight.T)))
    x = torch.randn(2, 3, 40).bfloat16()
    torch.testing.assert_close(held(x), dense(x))
    assert torch.equal(held.state_dict()["weight"], dense.weight)
    release_(held)
    assert torch.equal(held.weight, dense.weight)
    assert type(held) is Conv1D


def test_the_dense_control_goes_back_too() -> None:
    dense, _ = linear()
    form = ArrangedForm(native.arrange(dense.weight.detach())) if native.available() else None
    if form is None:
        pytest.skip(native.why_not())
    assert torch.equal(form.unpack(), dense.weight)


@pytest.mark.parametrize("inner", [torch.bfloat16, torch.float16])
def test_autocast(inner: torch.dtype) -> None:
    dense, held = linear(torch.float32)
    x = torch.randn(5, 40)
    with torch.autocast("cpu", dtype=inner):
        torch.testing.assert_close(held(x), dense(x), rtol=1e-2, atol=5e-3)


def test_a_module_stays_what_it_is() -> None:
    dense, held = linear()
    seen: list[int] = []
    held.register_forward_hook(lambda module, given, result: seen.append(len(result)))
    held(torch.zeros(3, 40).bfloat16())
    assert seen == [3]
    assert isinstance(held, nn.Linear)
    assert list(held.state_dict()) == list(dense.state_dict())
    assert held.weight.dtype == torch.bfloat16
    assert held.weight.shape == (24, 40)
    assert torch.equal(held.weight + 0, dense.weight)
    assert {name for name, _ in held.named_buffers()} == {
        "weight_packed_masks",
        "weight_packed_offsets",
        "weight_packed_values",
    }


def test_state_dicts_go_both_ways() -> None:
    dense, held = linear()
    other = {name: tensor * 2 for name, tensor in dense.state_dict().items()}
    held.load_state_dict(other)
    assert torch.equal(held.state_dict()["weight"], other["weight"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        held.load_state_dict({**other, "weight": torch.zeros(2, 2)})
    with pytest.raises(RuntimeError, match="Missing key"):
        held.load_state_dict({"bias": other["bias"]})


def test_a_copy_has_weights_of_its_own() -> None:
    dense, held = linear()
    copied = copy.deepcopy(held)
    held.weight_packed_values.zero_()
    assert torch.equal(copied.state_dict()["weight"], dense.weight)


def test_dtypes_that_the_kernels_know_are_no_hindrance() -> None:
    dense, held = linear()
    held.float()
    assert held.state_dict()["weight"].dtype == torch.float32
    x = torch.randn(4, 40)
    torch.testing.assert_close(held(x), dense.float()(x))
    assert held.weight_packed_values.dtype == torch.bfloat16


WRITES: dict[str, Callable[[Any], object]] = {
    "in place": lambda module: module.weight.mul_(2),
    "data": lambda module: module.weight.data.mul_(2),
    "other data": lambda module: setattr(module.weight, "data", torch.zeros(24, 40).bfloat16()),
    "tensor": lambda module: setattr(module, "weight", torch.zeros(24, 40)),
    "parameter": lambda module: setattr(module, "weight", nn.Parameter(torch.zeros(24, 40))),
    "half": lambda module: module.half(),
    "double": lambda module: module.double(),
    "device": lambda module: module.to("meta"),
    "float16 input": lambda module: module(torch.zeros(1, 40).half()),
    "width": lambda module: module(torch.zeros(1, 39).bfloat16()),
    "again": lambda module: hold_(module, module._form),
}


@pytest.mark.parametrize("name", WRITES)
def test_refused(name: str) -> None:
    dense, held = linear()
    with pytest.raises(HfSparseError):
        WRITES[name](held)
    assert torch.equal(held.state_dict()["weight"], dense.weight)


def test_gradients_are_refused_with_the_way_back() -> None:
    _, held = linear()
    with torch.enable_grad():
        result = held(torch.zeros(2, 40, dtype=torch.bfloat16, requires_grad=True))
        with pytest.raises(KernelError, match="use_dense_kernels_"):
            result.sum().backward()
        held.train()
        with pytest.raises(KernelError, match="use_dense_kernels_"):
            held(torch.zeros(2, 40, dtype=torch.bfloat16))


def test_a_module_that_never_had_its_dense_weight() -> None:
    dense, _ = linear()
    module = nn.Linear(40, 24, dtype=torch.bfloat16, device="meta").eval()
    module.bias = nn.Parameter(dense.bias.clone())
    kept = dense.weight != 0
    bits = kept.flatten().view(-1, 8).to(torch.uint8)
    bitmask = (bits << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    hold_(module, PackedForm(native.pack_stored(dense.weight[kept].detach(), bitmask, (24, 40))))
    x = torch.randn(3, 40).bfloat16()
    torch.testing.assert_close(module(x), dense(x))


def test_adapters_run_but_do_not_merge() -> None:
    model = on_sparse_kernels()
    expected = logits(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"], r=2))
    torch.testing.assert_close(adapted(input_ids=models.token_rows()).logits, expected)
    with pytest.raises(KernelError, match="use_dense_kernels_"):
        adapted.merge_and_unload()


def test_forms_must_fit() -> None:
    with pytest.raises(KernelError, match="cannot stand for"):
        hold_(nn.Linear(8, 8), PackedForm(native.pack(torch.ones(4, 8).bfloat16())))


# ---------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    model = pruned(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    masks, expected = hf_sparse.masks(model), logits(model)
    table = use_sparse_kernels_(model, choose="always")
    assert table.sparse
    assert {name for row in table.rows for name in row.sites} == set(masks)
    assert all(row.sparse or row.reason for row in table.rows)
    torch.testing.assert_close(logits(model), expected, rtol=2e-2, atol=2e-2)
    assert all(torch.equal(mask, masks[name]) for name, mask in hf_sparse.masks(model).items())
    assert hf_sparse.is_sparse(model)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in before.items()
    }
    use_dense_kernels_(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert list(model.state_dict()) == list(before)
    assert not list(sparse_modules(model))


def embedded() -> Any:
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.bfloat16).eval()
    prune_(model, SparsityConfig(metric="magnitude", pattern="unstructured", sparsity=0.5))
    return model


@pytest.mark.parametrize("cache", [None, "static"])
def test_the_embedded_model_says_the_same(cache: str | None) -> None:
    model = embedded()
    rows = torch.randint(3, 200, (3, 12), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache, "pad_token_id": 0}
    expected = model.generate(rows, **settings)
    single = model.generate(rows[:1], **settings)
    use_sparse_kernels_(model, choose="always")
    assert torch.equal(model.generate(rows, **settings), expected)
    assert torch.equal(model.generate(rows[:1], **settings), single)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_compiled(family: str) -> None:
    model = on_sparse_kernels(family)
    expected = logits(model)
    compiled = torch.compile(model.forward, fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=models.token_rows()).logits, expected, rtol=2e-2, atol=2e-2)


def test_a_compiled_product() -> None:
    _, held = linear()
    x = torch.randn(3, 40).bfloat16()
    assert torch.equal(torch.compile(held.forward, fullgraph=True, backend="eager")(x), held(x))


@pytest.mark.parametrize("format", ["dense", None])
def test_saved_as_plain_weights(format: str | None, tmp_path: Path) -> None:
    model = pruned()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    use_sparse_kernels_(model, choose="always")
    model.save_pretrained(tmp_path, **({"sparse_format": format} if format else {}))
    again = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())
    claim = json.loads((tmp_path / "config.json").read_text())
    assert claim["architectures"] == ["LlamaForCausalLM"]
    assert claim["hf_sparse"]["totals"]["zeros"] == hf_sparse.report(model).zeros


def test_copied_model() -> None:
    model = on_sparse_kernels()
    copied = copy.deepcopy(model)
    use_dense_kernels_(model)
    assert list(sparse_modules(copied))
    torch.testing.assert_close(logits(copied), logits(model), rtol=2e-2, atol=2e-2)
    with pytest.raises(KernelError):
        copied.half()


def test_a_refused_move_moves_nothing() -> None:
    model = on_sparse_kernels()
    with pytest.raises(KernelError, match="use_dense_kernels_"):
        model.to("meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    use_dense_kernels_(model)
    assert model.half().dtype == torch.float16


def test_neither_pruned_nor_trained() -> None:
    model = on_sparse_kernels()
    with pytest.raises(ModelError, match="use_dense_kernels_"):
        prune_(model, SparsityConfig(metric="magnitude"))
    with pytest.raises(ModelError, match="use_dense_kernels_"):
        hf_sparse.KeptMasks(model)


def test_again_changes_nothing() -> None:
    model = on_sparse_kernels()
    expected = logits(model)
    table = use_sparse_kernels_(model, choose="always")
    assert {row.reason for row in table.rows if row.sparse} == {"as before"}
    assert torch.equal(logits(model), expected)


# ---------------------------------------------------------------------------------------------------- the choice


def reasons(table: Any) -> str:
    return " ".join(row.reason for row in table.rows)


def test_float32_is_rounded_only_where_that_is_allowed() -> None:
    model = pruned(dtype=torch.float32)
    table = use_sparse_kernels_(model, choose="always")
    assert not table.sparse
    assert "round_weights=True" in reasons(table)
    assert use_sparse_kernels_(model, choose="always", round_weights=True).sparse
    use_dense_kernels_(model)
    assert use_sparse_kernels_(model, choose="always").sparse  # nothing is lost any more


def test_why_dense() -> None:
    assert "float16" in reasons(use_sparse_kernels_(pruned(dtype=torch.float16), choose="always"))
    assert "no zeros" in reasons(use_sparse_kernels_(models.llama().bfloat16(), choose="always"))
    assert "never" in reasons(use_sparse_kernels_(pruned(), choose="never"))
    model = pruned()
    first, second = model.model.layers
    first.mlp.up_proj.weight = second.mlp.up_proj.weight
    assert "same tensor" in reasons(use_sparse_kernels_(model, choose="always"))
    model = pruned()
    first = model.model.layers[0].mlp
    first.up_proj.forward = first.up_proj.forward
    assert "replaced" in reasons(use_sparse_kernels_(model, choose="always"))


def test_measured_once_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def measure(matrix: torch.Tensor, tokens: list[int], transposed: bool, bias: bool) -> choices.Speedups:
        asked.extend(tokens)
        return {count: choices.Speedup(2.0 if count == 1 else 0.5, 0.75 if count > 99 else 0.1) for count in tokens}

    monkeypatch.setattr(choices, "measure", measure)
    table = use_sparse_kernels_(pruned(), tokens=(1, 16, 512))
    assert table.sparse
    assert "2.00x for 1" in str(table)
    assert "slower than dense for 16 and 512 tokens" in str(table)
    assert "made dense for each product from 512 tokens on" in str(table)
    assert {row.speedups[512] for row in table.rows} == {0.75}
    shapes = len({row.shape for row in table.rows})
    assert len(asked) == 3 * shapes
    again = use_sparse_kernels_(pruned(), tokens=(16,))
    assert not again.sparse
    assert "slower" not in str(again)
    assert len(asked) == 3 * shapes
    json.dumps(table.to_dict())


def test_times_of_another_instruction_set_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(
        choices, "measure", lambda weight, tokens, *_: {count: choices.Speedup(2.0, 1.0) for count in tokens}
    )
    for name in ("avx512", "amx", "amx"):
        monkeypatch.setattr(choices, "instruction_set", lambda name=name: name)
        known = Choices()
        found.append(len(known._known))
        known.speedups(sources.InMemory(torch.zeros(8, 8), False), (1,))
        known.save()
    assert found == [0, 0, 2]


def test_without_compiled_kernels_nothing_is_packed_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "why_not", lambda: "no compiler was there")
    assert "no compiler" in reasons(use_sparse_kernels_(pruned()))


def test_a_measurement() -> None:
    state = torch.get_rng_state()
    for transposed in (False, True):
        found = choices.measure(sparse("2:4 input", 64, 48, 0), (2, 5), transposed, bias=True)
        assert set(found) == {2, 5}
        assert min(min(both) for both in found.values()) > 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("expanded", "start"),
    [((0.1, 0.1, 0.1), None), ((0.1, 2.0, 0.1), None), ((0.1, 0.1, 2.0), 512), ((2.0, 2.0, 2.0), 1)],
)
def test_from_how_many_tokens_on_a_matrix_is_expanded(expanded: tuple[float, ...], start: int | None) -> None:
    speedups = {count: choices.Speedup(1.0, speedup) for count, speedup in zip((1, 16, 512), expanded)}
    assert choices.expands_from(speedups) == start


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_matrix_is_expanded_for_many_tokens(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, held = linear(dtype)
    hold_(module := copy.deepcopy(dense), PackedForm(held._form.packed, expands_from=4))
    module.load_state_dict(dense.state_dict())  # packs anew, but remembers
    asked: list[torch.Size] = []
    own = native.matmul
    monkeypatch.setattr("hf_sparse.runtime.forms.matmul", lambda x, *rest: asked.append(x.shape) or own(x, *rest))
    for shape in ((3, 40), (4, 40), (2, 2, 40), (0, 40), (40,)):
        x = torch.linspace(-1, 1, max(1, torch.Size(shape).numel()))[: torch.Size(shape).numel()].view(shape).to(dtype)
        torch.testing.assert_close(module(x), dense(x))
    assert asked == [(3, 40), (0, 40), (40,)]


def test_what_is_timed_is_what_runs() -> None:
    matrix = sparse("2:4 input", 24, 40, 0)
    forms: dict[str, Any] = {"dense": lambda: None, "sparse": lambda: PackedForm(native.pack(matrix))}
    for transposed, kind in ((False, nn.Linear), (True, Conv1D)):
        modules = copies.in_modules(matrix, forms, transposed=transposed, bias=True)
        dense, held = modules["dense"][0], modules["sparse"][0]
        assert type(dense) is kind
        assert dense.bias is not None
        assert isinstance(held, SparseModule)
        assert len(modules["dense"]) == len(modules["sparse"]) > 1
        x = torch.ones(2, 40).bfloat16()
        torch.testing.assert_close(held(x), dense(x))


def test_copies_exceed_the_caches(tmp_path: Path) -> None:
    for index, size in enumerate(("48K", "2048K", "300M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert copies.copies_bytes(str(tmp_path)) == 450 * 2**20
    (tmp_path / "index3").mkdir()
    (tmp_path / "index3" / "size").write_text("2G")
    assert copies.copies_bytes(str(tmp_path)) == 512 * 2**20
    assert copies.copies_bytes(str(tmp_path / "none")) == 64 * 2**20


def test_what_a_time_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {choices.machine()}
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "another")
    seen.add(choices.machine())
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    seen.add(choices.machine())
    monkeypatch.setattr(choices, "_build", lambda: "another")
    seen.add(choices.machine())
    monkeypatch.setattr(choices, "clock_name", lambda: "another")
    seen.add(choices.machine())
    monkeypatch.setattr(choices, "_flags", lambda: ["another"])
    seen.add(choices.machine())
    assert len(seen) == 6


def test_without_a_home_nothing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("HF_SPARSE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(choices, "measure", lambda matrix, tokens, *rest: dict.fromkeys(tokens, choices.Speedup(2, 1)))
    assert use_sparse_kernels_(pruned()).sparse


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"format": 1, "machines": []}', '{"format": 1, "machines": {"a": 3}}']
)
def test_a_damaged_memory_counts_as_empty(content: str, tmp_path: Path) -> None:
    file = tmp_path / "timings.json"
    file.write_text(content)
    assert Choices(file)._known == {}


@pytest.mark.parametrize("value", ["true", '"2"', "NaN", "0", "-1", "null", "1e999", "9" * 400, "9" * 5000])
def test_a_damaged_time_is_not_believed(value: str, tmp_path: Path) -> None:
    file = tmp_path / "timings.json"
    file.write_text(json.dumps({"format": 1, "machines": {choices.machine(): {"a": 0}}}).replace("0}", f"{value}}}"))
    assert Choices(file)._known == {}


@pytest.mark.parametrize("options", [{"choose": "sometimes"}, {"tokens": ()}, {"tokens": (0,)}, {"tokens": (True,)}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        use_sparse_kernels_(pruned(), **options)


# ---------------------------------------------------------------------------------------------------- on a GPU


def test_what_a_gpu_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert semi_structured.why_not(sparse("2:4 input", 64, 64, 0)) == ""
    assert "2:4 along the input" in semi_structured.why_not(torch.ones(64, 64).bfloat16())
    assert "multiples" in semi_structured.why_not(sparse("2:4 input", 24, 64, 0))
    assert "float32" in semi_structured.why_not(torch.ones(64, 64))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "no 2:4" in semi_structured.why_not(sparse("2:4 input", 64, 64, 0))


def test_a_module_with_the_form_of_a_gpu() -> None:
    weight = sparse("2:4 input", 64, 64, 0)

    class StandIn(torch.Tensor):
        def to_dense(self) -> torch.Tensor:  # type: ignore[override]
            return weight.clone()

    module = nn.Linear(64, 64, dtype=torch.bfloat16).eval()
    module.weight.copy_(weight)
    expected = module(torch.ones(2, 64).bfloat16())
    hold_(module, semi_structured.SemiStructuredForm(weight.as_subclass(StandIn)))
    assert torch.equal(module(torch.ones(2, 64).bfloat16()), expected)
    assert torch.equal(module.state_dict()["weight"], weight)
    with pytest.raises(KernelError):
        module.float()
    release_(module)
    assert torch.equal(module.weight, weight)
