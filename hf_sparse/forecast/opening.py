"""Makes a model without weights from its config and the headers of its files: nothing of the weights is read."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, try_to_load_from_cache
from transformers import AutoConfig

from hf_sparse.config import SparsityConfig
from hf_sparse.errors import CheckpointError, ConfigError
from hf_sparse.families import find_sites
from hf_sparse.hub import is_weights
from hf_sparse.plan import select
from hf_sparse.remote import CONFIG, Folder, Place, Repository, open_place, read_config
from hf_sparse.shapes import ModelShape, shape_of
from hf_sparse.streaming.files import DTYPES
from hf_sparse.text import one_line
from hf_sparse.verify.loading import auto_class
from hf_sparse.verify.sizes import check_config, headers, loaded_weights, no_larger_than


@dataclass(frozen=True)
class Source:
    """A checkpoint as its config and headers tell of it."""

    shape: ModelShape
    dtype: torch.dtype  # in which the model will be loaded
    file_bytes: int  # of the weight files
    plain_bytes: int  # of the tensors, were none compressed
    converted: bool  # whether loading makes other numbers of them, so that no file is mapped
    download: int  # bytes that come from the Hub first
    cache: Path  # where they go
    longest: int | None  # tokens of a sample at most


def look(source: str, config: SparsityConfig, dtype: str | torch.dtype | None, options: Mapping[str, Any]) -> Source:
    """Look at a checkpoint.

    Raises: CheckpointError, HubError and ConfigError for what cannot be pruned, and ConfigError for targets that match nothing.
    """
    known = {name: value for name, value in options.items() if name in ("revision", "token", "cache_dir")}
    place = open_place(source, **known)
    values = read_config(place)
    if "adapter_config.json" in place.files:
        raise CheckpointError(f"{one_line(source)!r} holds an adapter; merge it, save the model, and prune that.")
    stored = headers(place)
    check_config(place.local(CONFIG).parent, stored)
    model_config = _config(str(place.path) if isinstance(place, Folder) else source, options)
    kind = auto_class(model_config)
    code = {"trust_remote_code": True} if options.get("trust_remote_code") else {}
    with no_larger_than(stored), torch.device("meta"):
        model = kind.from_config(model_config, **code)
    inventory = find_sites(model)
    chosen, _ = select(inventory, config)
    held = {name: DTYPES.get(tensor.dtype, torch.uint8) for name, tensor in stored.items()}
    sizes: dict[torch.dtype, int] = {}
    for name, tensor in stored.items():
        sizes[held[name]] = sizes.get(held[name], 0) + tensor.size
    own = max((one for one in sizes if one.is_floating_point), key=sizes.__getitem__, default=torch.float32)
    wanted = _dtype(dtype, values, own)
    compressed = any(tensor.kept is not None for tensor in stored.values())
    return Source(
        shape=replace(shape_of(model, inventory, chosen), itemsize=wanted.itemsize), dtype=wanted,
        file_bytes=sum(place.files[name].size for name in loaded_weights(place)),
        plain_bytes=sum(tensor.size * held[name].itemsize for name, tensor in stored.items()),
        converted=compressed or wanted != own, download=_download(place, options),
        cache=Path(options.get("cache_dir") or constants.HF_HUB_CACHE),
        longest=_longest(model_config),
    )  # fmt: skip


def _config(name: str, options: Mapping[str, Any]) -> Any:
    try:
        return AutoConfig.from_pretrained(name, **options)
    except ValueError as error:
        raise ConfigError(
            f"{one_line(name)!r} is not a model that Transformers can load: {one_line(str(error).splitlines()[0], 200)}"
        ) from error


def _dtype(given: str | torch.dtype | None, values: Mapping[str, Any], own: torch.dtype) -> torch.dtype:
    """As `from_pretrained(dtype="auto")` chooses: what the config says, else what the files hold."""
    if isinstance(given, torch.dtype):
        return given
    told = given if given not in (None, "auto") else values.get("dtype", values.get("torch_dtype"))
    found = getattr(torch, told, None) if isinstance(told, str) else None
    return found if isinstance(found, torch.dtype) else own


def _longest(config: Any) -> int | None:
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def _download(place: Place, options: Mapping[str, Any]) -> int:
    """Bytes of weights that are not in the cache of the Hub yet."""
    if not isinstance(place, Repository):
        return 0
    missing = [
        file for name, file in place.files.items()
        if is_weights(name) and name.endswith(".safetensors")
        and not isinstance(try_to_load_from_cache(place.name, name, cache_dir=options.get("cache_dir"), revision=place.commit), str)
    ]  # fmt: skip
    return sum(file.size for file in missing)
