"""Models saved compressed load as they were, with every way to load; they run sparse at once, and never load wrong without hf_sparse."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from families_table import FAMILIES
from hub.client import Hub
from models import bert, gpt2, llama, mixtral, phi3, t5, token_rows
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaForCausalLM,
)

import hf_sparse
from hf_sparse import SparsityConfig, prune_
from hf_sparse.errors import CheckpointError, ConfigError, ModelError
from hf_sparse.runtime import sparse_modules
from hf_sparse.storage.names import INDEX, WEIGHTS
from hf_sparse.verify import DIFFERS, verify


def gpt_oss() -> GptOssForCausalLM:
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return GptOssForCausalLM(config).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama, "mixtral": mixtral, "gpt_oss": gpt_oss, "phi3": phi3, "gpt2": gpt2, "bert": bert, "t5": t5,
}  # fmt: skip
SHARDS = {"one file": "50GB", "shards": "6KB"}


def pruned(name: str = "llama", dtype: torch.dtype = torch.float32, pattern: str = "2:4") -> Any:
    model = MODELS[name]().to(dtype)
    prune_(model, SparsityConfig(pattern=pattern, metric="magnitude"))
    return model


def weights_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if ".safetensors" in path.name)


def same(first: Any, second: Any, dtype: torch.dtype | None = None) -> bool:
    """Every tensor, bit for bit; the first one in another number format if one is given."""
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(
        torch.equal(tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype), two[key])
        for key, tensor in one.items()
    )


# ---------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded(name: str, dtype: torch.dtype, shards: str, tmp_path: Path) -> None:
    model = pruned(name, dtype)
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "small", sparse_format="bitmask", max_shard_size=SHARDS[shards])
    assert (INDEX if shards == "shards" else WEIGHTS) in weights_in(tmp_path / "small")
    size = {folder: sum(path.stat().st_size for path in (tmp_path / folder).glob("*.safetensors")) for folder in ("plain", "small")}  # fmt: skip
    assert size["small"] < size["plain"]
    loaded, told = type(model).from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert same(model, loaded)
    assert loaded.dtype == dtype
    assert hf_sparse.report(loaded).zeros == hf_sparse.report(model).zeros
    # It is an ordinary model, which saves in each format again.
    assert getattr(loaded.config, "quantization_config", None) is None
    for format in ("dense", "bitmask"):
        loaded.save_pretrained(tmp_path / format, sparse_format=format)
        assert same(model, type(model).from_pretrained(tmp_path / format))
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family(family: str, tmp_path: Path) -> None:
    model, _ = FAMILIES[family].build()
    prune_(model, SparsityConfig(metric="magnitude"))
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "small", sparse_format="bitmask")
    plain, small = (type(model).from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("plain", "small"))
    assert same(plain, small)
    running = type(model).from_pretrained(tmp_path / "small", dtype=torch.bfloat16, use_sparse_kernels=ALWAYS)
    assert not any(parameter.is_meta for parameter in running.parameters())
    # Some models keep a few weights in float32.
    assert same(type(model).from_pretrained(tmp_path / "plain", dtype=torch.bfloat16), running)
    small.save_pretrained(tmp_path / "again", sparse_format="bitmask")
    assert same(plain, type(model).from_pretrained(tmp_path / "again", dtype=torch.float32))


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "unstructured"])
@pytest.mark.parametrize("axis", ["input", "output"])
def test_every_pattern(pattern: str, axis: str, tmp_path: Path) -> None:
    model = llama()
    sparsity = 0.7 if pattern == "unstructured" else None
    prune_(model, SparsityConfig(pattern=pattern, sparsity=sparsity, axis=axis, metric="magnitude"))
    model.save_pretrained(tmp_path, sparse_format="bitmask")
    assert same(model, LlamaForCausalLM.from_pretrained(tmp_path))


WAYS: dict[str, dict[str, Any]] = {
    "auto class": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "dtype auto": {"dtype": "auto"},
    "device_map cpu": {"device_map": "cpu"},
    "device_map auto": {"device_map": "auto"},
    "one block on disk": {
        "device_map": {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
                       "model.rotary_emb": "cpu", "lm_head": "cpu"},
    },
    "sdpa": {"attn_implementation": "sdpa"},
    "safetensors asked for": {"use_safetensors": True},
}  # fmt: skip


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_load(way: str, shards: str, tmp_path: Path) -> None:
    model = pruned()
    model.save_pretrained(tmp_path / "plain", max_shard_size=SHARDS[shards])
    model.save_pretrained(tmp_path / "small", sparse_format="bitmask", max_shard_size=SHARDS[shards])
    given = {**WAYS[way], **({"offload_folder": tmp_path / "offload"} if "disk" in way else {})}
    plain, small = (AutoModelForCausalLM.from_pretrained(tmp_path / name, **given) for name in ("plain", "small"))
    rows = token_rows()
    assert torch.equal(plain(rows).logits, small(rows).logits)
    if "disk" not in way:
        assert same(plain, small)


def test_the_model_in_memory_is_trained_and_pruned_like_any_other(tmp_path: Path) -> None:
    pruned(dtype=torch.bfloat16).save_pretrained(tmp_path, sparse_format="bitmask")
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    rows = token_rows()
    model(rows, labels=rows).loss.backward()
    assert model.half().dtype == torch.float16
    again = LlamaForCausalLM.from_pretrained(
        tmp_path, sparsity_config={"pattern": "1:4", "metric": "magnitude"}, use_sparse_kernels={"choose": "always"}
    )
    assert hf_sparse.report(again).sparsity == 0.75
    assert any(True for _ in sparse_modules(again))


def test_a_model_that_others_pruned_is_saved_compressed(tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight[:, ::2] = 0
    model.save_pretrained(tmp_path, sparse_format="bitmask")
    assert same(model, LlamaForCausalLM.from_pretrained(tmp_path))
    assert not (tmp_path / "hf_sparse_report.json").exists()


def test_a_config_of_a_compressed_folder_makes_new_models(tmp_path: Path) -> None:
    model = pruned(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "small", sparse_format="bitmask")
    model.save_pretrained(tmp_path / "plain")
    config = AutoConfig.from_pretrained(tmp_path / "small")
    assert same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "plain", config=config))
    given = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=model.state_dict())
    assert same(model, given)
    fresh = AutoModelForCausalLM.from_config(config)
    fresh.save_pretrained(tmp_path / "fresh")
    assert same(fresh, AutoModelForCausalLM.from_pretrained(tmp_path / "fresh"))
    prune_(fresh, SparsityConfig(pattern="2:4", metric="magnitude"))
    hf_sparse.use_sparse_kernels_(fresh, choose="always")


def test_several_saves_of_one_model_at_once(tmp_path: Path) -> None:
    model = pruned()
    with ThreadPoolExecutor(4) as pool:
        saves = [
            pool.submit(model.save_pretrained, tmp_path / f"{format}-{number}", sparse_format=format)
            for number in range(4)
            for format in ("dense", "bitmask")
        ]
        for save in saves:
            save.result()
    for folder in tmp_path.iterdir():
        compressed = "quantization_config" in json.loads((folder / "config.json").read_text())
        assert compressed == folder.name.startswith("bitmask")
        assert same(model, LlamaForCausalLM.from_pretrained(folder))


def test_a_given_state_dict_is_what_is_saved(tmp_path: Path) -> None:
    model = pruned()
    given = {key: tensor * 2 for key, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, sparse_format="bitmask", state_dict=given)
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path).lm_head.weight, 2 * model.lm_head.weight)


# ---------------------------------------------------------------------------------------------------- no wrong model, ever


def test_without_hf_sparse_it_fails_loudly(tmp_path: Path) -> None:
    for shards, size in SHARDS.items():
        pruned().save_pretrained(tmp_path / shards, sparse_format="bitmask", max_shard_size=size)
    code = f"""
import sys
from transformers import AutoModelForCausalLM
for folder in {[str(tmp_path / shards) for shards in SHARDS]!r}:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except OSError as error:
        assert "model.safetensors" in str(error)
    else:
        sys.exit("a model was made up")
assert "hf_sparse" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def test_uninstalled_it_fails_as_loudly(tmp_path: Path) -> None:
    pruned().save_pretrained(tmp_path, sparse_format="bitmask")
    hf_sparse.uninstall()
    try:
        with pytest.raises(OSError, match=r"model\.safetensors"):
            LlamaForCausalLM.from_pretrained(tmp_path)
    finally:
        hf_sparse.install()
    assert LlamaForCausalLM.from_pretrained(tmp_path) is not None


@pytest.mark.parametrize("first", ["bitmask", "dense"])
def test_no_weights_of_the_save_before_are_left(first: str, tmp_path: Path) -> None:
    second = "dense" if first == "bitmask" else "bitmask"
    pruned().save_pretrained(tmp_path, sparse_format=first, max_shard_size="6KB")
    model = pruned(pattern="1:4")
    model.save_pretrained(tmp_path, sparse_format=second)
    assert weights_in(tmp_path) == [WEIGHTS if second == "bitmask" else "model.safetensors"]
    assert same(model, LlamaForCausalLM.from_pretrained(tmp_path))


def test_a_dense_model_takes_the_place_of_a_compressed_one(tmp_path: Path) -> None:
    pruned().save_pretrained(tmp_path, sparse_format="bitmask")
    dense = llama()
    dense.save_pretrained(tmp_path)
    assert weights_in(tmp_path) == ["model.safetensors"]
    assert not (tmp_path / "hf_sparse_report.json").exists()
    assert same(dense, LlamaForCausalLM.from_pretrained(tmp_path))


def test_an_index_names_files_of_its_own_folder_only(tmp_path: Path) -> None:
    pruned().save_pretrained(tmp_path / "model", sparse_format="bitmask", max_shard_size="6KB")
    index = tmp_path / "model" / INDEX
    told = json.loads(index.read_text())
    first = next(iter(told["weight_map"].values()))
    (tmp_path / "model" / first).rename(tmp_path / first)
    told["weight_map"] = {key: f"../{name}" if name == first else name for key, name in told["weight_map"].items()}
    index.write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match="no file of this checkpoint"):
        LlamaForCausalLM.from_pretrained(tmp_path / "model")


def test_a_save_that_fails_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned()
    model.save_pretrained(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match="No space left"):
        pruned(pattern="1:4").save_pretrained(tmp_path, sparse_format="bitmask")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert getattr(model.config, "quantization_config", None) is None


def test_a_format_that_is_not_there_is_refused_before_a_repository_is_made(hub: Hub) -> None:
    with pytest.raises(ConfigError, match="'bitmsk'"):
        pruned().push_to_hub("user/typo", sparse_format="bitmsk")
    assert not hub.exists("user/typo")


def wrong_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("way", ["dense", "kernels"])
def test_a_damaged_file_is_told(way: str, tmp_path: Path) -> None:
    pruned(dtype=torch.bfloat16).save_pretrained(tmp_path, sparse_format="bitmask")
    file = tmp_path / WEIGHTS
    content = bytearray(file.read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    start = 8 + int.from_bytes(content[:8], "little")
    content[start + header["model.layers.0.mlp.up_proj.weight_bitmask"]["data_offsets"][0]] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"up_proj.weight.*damaged: .*marks"):
        LlamaForCausalLM.from_pretrained(
            tmp_path, use_sparse_kernels={"choose": "always"} if way == "kernels" else False
        )


@pytest.mark.parametrize(
    "change", [{"version": 99}, {"format": "zip"}, {"weights": "../model.safetensors"}, {"new": 1}], ids=str
)
def test_a_format_that_is_not_known_is_told(change: dict[str, Any], tmp_path: Path) -> None:
    pruned().save_pretrained(tmp_path, sparse_format="bitmask")
    wrong_config(tmp_path, **change)
    with pytest.raises(CheckpointError, match="quantization_config"):
        LlamaForCausalLM.from_pretrained(tmp_path)


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = {
    "variant": (pruned, {"variant": "fp16"}, ConfigError, "variant='fp16'"),
    "layout of the model": (pruned, {"save_original_format": False}, ConfigError, "save_original_format"),
    "no zeros": (llama, {}, CheckpointError, "nothing to compress"),
    "a name that is taken": (lambda: renamed(), {}, CheckpointError, "extra_shape"),
}  # fmt: skip


def renamed() -> Any:
    model = pruned()
    model.register_buffer("extra_shape", torch.ones(3))
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    make, given, kind, message = REFUSED[case]
    model = make()
    with pytest.raises(kind, match=message):
        model.save_pretrained(tmp_path / "new", sparse_format="bitmask", **given)
    assert not (tmp_path / "new").exists()
    assert getattr(model.config, "quantization_config", None) is None


def test_an_offloaded_model_is_refused_with_the_way_out(tmp_path: Path) -> None:
    pruned().save_pretrained(tmp_path / "plain")
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "plain", device_map=WAYS["one block on disk"]["device_map"], offload_folder=tmp_path / "offload"
    )
    with pytest.raises(ModelError, match=r"offloaded.*hf-sparse convert"):
        model.save_pretrained(tmp_path / "new", sparse_format="bitmask")


def test_another_quantization_on_top_is_refused(tmp_path: Path) -> None:
    pruned().save_pretrained(tmp_path, sparse_format="bitmask")
    with pytest.raises(ValueError, match="quantiz"):
        LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


# ---------------------------------------------------------------------------------------------------- straight into kernels

ALWAYS = {"choose": "always"}


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("name", sorted(MODELS))
def test_compressed_weights_stay_compressed(name: str, shards: str, tmp_path: Path) -> None:
    model = pruned(name, torch.bfloat16)
    model.save_pretrained(tmp_path, sparse_format="bitmask", max_shard_size=SHARDS[shards])
    running, told = type(model).from_pretrained(tmp_path, use_sparse_kernels=ALWAYS, output_loading_info=True)
    assert not told["missing_keys"]
    other = type(model).from_pretrained(tmp_path)
    table = hf_sparse.use_sparse_kernels_(other, choose="always")
    assert {module for module, _ in sparse_modules(running)} == {row.module for row in table.sparse}
    for (_, one), (_, two) in zip(sparse_modules(running), sparse_modules(other)):
        assert one._held.keys() == two._held.keys()
        for held, form in one._held.items():
            parts = two._held[held].tensors()
            assert all(torch.equal(tensor, parts[key]) for key, tensor in form.tensors().items())
    assert same(model, running)
    inputs = {"input_ids": token_rows()} | ({"decoder_input_ids": token_rows()} if name == "t5" else {})
    with torch.no_grad():
        assert torch.equal(running(**inputs).logits, other(**inputs).logits)


@pytest.mark.parametrize("format", ["dense", "bitmask"])
def test_running_models_are_saved_in_each_format(format: str, tmp_path: Path) -> None:
    model = pruned(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "first", sparse_format="bitmask")
    running = LlamaForCausalLM.from_pretrained(tmp_path / "first", use_sparse_kernels=ALWAYS)
    running.save_pretrained(tmp_path / "second", sparse_format=format)
    assert same(model, LlamaForCausalLM.from_pretrained(tmp_path / "second"))
    if format == "bitmask":
        assert (tmp_path / "first" / WEIGHTS).read_bytes() == (tmp_path / "second" / WEIGHTS).read_bytes()
    assert same(model, hf_sparse.use_dense_kernels_(running))


def test_dense_weights_never_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned(dtype=torch.bfloat16).save_pretrained(tmp_path, sparse_format="bitmask")

    def spread(*_: Any) -> None:
        raise AssertionError("a matrix was made dense")

    monkeypatch.setattr("hf_sparse.storage.bitmask.spread_bits", spread)
    running = LlamaForCausalLM.from_pretrained(tmp_path, use_sparse_kernels=ALWAYS)
    assert len(list(sparse_modules(running))) == 14


@pytest.mark.parametrize(
    ("stored", "wanted", "sparse"),
    [
        (torch.bfloat16, torch.float32, True),  # rounding loses nothing
        (torch.float32, torch.bfloat16, True),
        (torch.float32, torch.float32, False),
        (torch.bfloat16, torch.float16, False),
    ],
    ids=str,
)
def test_number_formats(stored: torch.dtype, wanted: torch.dtype, sparse: bool, tmp_path: Path) -> None:
    model = pruned(dtype=stored)
    model.save_pretrained(tmp_path, sparse_format="bitmask")
    running = LlamaForCausalLM.from_pretrained(tmp_path, dtype=wanted, use_sparse_kernels=ALWAYS)
    assert any(True for _ in sparse_modules(running)) == sparse
    assert same(model, running, wanted)


def test_a_plain_checkpoint_runs_sparse_too(tmp_path: Path) -> None:
    model = pruned(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    running = AutoModelForCausalLM.from_pretrained(tmp_path, use_sparse_kernels=ALWAYS)
    assert len(list(sparse_modules(running))) == 14
    assert same(model, running)


def test_generated_tokens_are_those_of_the_dense_model(tmp_path: Path) -> None:
    model = pruned(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, sparse_format="bitmask")
    running = AutoModelForCausalLM.from_pretrained(tmp_path, use_sparse_kernels=ALWAYS)
    rows = token_rows(2, 5)
    settings: dict[str, Any] = {
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(rows),
    }
    assert torch.equal(model.generate(rows, **settings), running.generate(rows, **settings))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("yes", "use_sparse_kernels is 'yes'"),
        ({"chose": 1}, "Did you mean 'choose'"),
        ({"choose": "fast"}, "'fast'"),
        ({"tokens": []}, "tokens"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_read(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LlamaForCausalLM.from_pretrained("nowhere", use_sparse_kernels=given)


# ---------------------------------------------------------------------------------------------------- the Hub and the rest


@pytest.mark.parametrize("shards", SHARDS)
def test_pushed_and_loaded(shards: str, hub: Hub, tmp_path: Path) -> None:
    model = pruned()
    model.push_to_hub("user/plain-first")
    model.push_to_hub("user/plain-first", sparse_format="bitmask", max_shard_size=SHARDS[shards])
    names = [name for name in hub.files("user/plain-first") if ".safetensors" in name]
    assert (INDEX if shards == "shards" else WEIGHTS) in names
    assert "model.safetensors" not in names
    assert same(model, AutoModelForCausalLM.from_pretrained("user/plain-first"))
    found = verify("user/plain-first")
    assert [row for row in found.rows if row.status == DIFFERS] == []
    card = hub.files("user/plain-first")["README.md"].decode()
    assert "so hf_sparse is needed to load the model" in card
    model.push_to_hub("user/plain-first")
    assert [name for name in hub.files("user/plain-first") if ".safetensors" in name] == ["model.safetensors"]
    assert "hf_sparse is not needed" in hub.files("user/plain-first")["README.md"].decode()


def test_pushed_while_saved(hub: Hub, tmp_path: Path) -> None:
    model = pruned()
    model.save_pretrained(
        tmp_path / "here", push_to_hub=True, repo_id="user/saved", sparse_format="bitmask", max_shard_size="6KB"
    )
    assert INDEX in weights_in(tmp_path / "here")
    assert INDEX in hub.files("user/saved")
    assert same(model, AutoModelForCausalLM.from_pretrained("user/saved"))
    assert same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "here"))


def test_configs_are_read_without_weights(tmp_path: Path) -> None:
    pruned().save_pretrained(tmp_path, sparse_format="bitmask")
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.quantization_config["quant_method"] == "hf_sparse"
    assert "transformers_weights" not in json.loads((tmp_path / "config.json").read_text())
