"""What is pushed comes back bit for bit: every family, in one file or in shards, with hf_sparse or without it."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hub.client import Hub
from models import bert, gpt2, llama, mixtral, phi3, t5

import hf_sparse
from hf_sparse import SparsityConfig, prune_

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": llama, "mixtral": mixtral, "phi3": phi3, "gpt2": gpt2, "bert": bert, "t5": t5,
}  # fmt: skip
SHARDS = {"plain": "50GB", "sharded": "4KB"}
CASES = [(family, shards) for family in FAMILIES for shards in SHARDS]


def pushed(family: str, shards: str, dtype: torch.dtype = torch.float32) -> Any:
    model = FAMILIES[family]().to(dtype)
    prune_(model, SparsityConfig(pattern="2:4", metric="magnitude"))
    model.push_to_hub(f"user/{family}-{shards}", max_shard_size=SHARDS[shards])
    return model


def digests(model: Any) -> dict[str, str]:
    """SHA-256 of every tensor's bytes."""
    return {
        name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize(("family", "shards"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_hf_sparse(family: str, shards: str, dtype: torch.dtype, hub: Hub) -> None:
    model = pushed(family, shards, dtype)
    weights = [name for name in hub.files(f"user/{family}-{shards}") if name.endswith(".safetensors")]
    assert (len(weights) > 1) == (shards == "sharded")
    loaded, info = type(model).from_pretrained(f"user/{family}-{shards}", output_loading_info=True)
    assert not info["missing_keys"]
    assert digests(loaded) == digests(model)
    assert hf_sparse.report(loaded).to_dict() == hf_sparse.report(model).to_dict()
    assert hf_sparse.masks(loaded).keys() == hf_sparse.masks(model).keys()


def test_without_hf_sparse(hub: Hub) -> None:
    models = {f"user/{family}-{shards}": pushed(family, shards) for family, shards in CASES}
    classes = {name: type(model).__name__ for name, model in models.items()}
    code = f"""
import hashlib, json, sys, torch, transformers
found = {{}}
for name, kind in {classes!r}.items():
    model = getattr(transformers, kind).from_pretrained(name)
    found[name] = {{
        key: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest() for key, tensor in model.state_dict().items()
    }}
assert "hf_sparse" not in sys.modules
print(json.dumps(found))
"""
    found = json.loads(hub.run(code).stdout.splitlines()[-1])
    assert found == {name: digests(model) for name, model in models.items()}


@pytest.mark.parametrize("with_plugin", [True, False])
def test_a_snapshot_is_a_model_folder(with_plugin: bool, hub: Hub, tmp_path: Any) -> None:
    from huggingface_hub import snapshot_download

    model = pushed("llama", "sharded")
    for folder in (
        snapshot_download("user/llama-sharded"),
        snapshot_download("user/llama-sharded", local_dir=tmp_path),
    ):
        if not with_plugin:
            hf_sparse.uninstall()
        try:
            loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
        finally:
            hf_sparse.install()
        assert digests(loaded) == digests(model)


def test_each_revision_has_its_own_model_and_report(hub: Hub) -> None:
    first = pushed("llama", "plain")
    head = hub.head("user/llama-plain")
    second = llama()
    prune_(second, SparsityConfig(pattern="1:4", metric="magnitude"))
    second.push_to_hub("user/llama-plain")
    for revision, model in ((head, first), ("main", second)):
        loaded = transformers.AutoModelForCausalLM.from_pretrained("user/llama-plain", revision=revision)
        assert digests(loaded) == digests(model)
        assert hf_sparse.report(loaded).config["pattern"] == hf_sparse.report(model).config["pattern"]
