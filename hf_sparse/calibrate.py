"""Measures what the chosen steps need, block by block, on calibration data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_sparse import groups
from hf_sparse.blocks import Block
from hf_sparse.config import SparsityConfig
from hf_sparse.data import Batch, Limits, Sample, Samples, batches, read_samples, tokens_of
from hf_sparse.errors import CalibrationError
from hf_sparse.families import Inventory
from hf_sparse.forwards import watched
from hf_sparse.observe import eager_experts
from hf_sparse.sites import Site

TOKEN_BUDGET = 4096  # tokens in a batch of size "auto"
_SURVEY_TOKENS = 64  # a survey only asks which parts run and what feeds what, so a short piece is enough


# ---------------------------------------------------------------------------------------------------- samples


def limits_of(model: nn.Module) -> Limits:
    """Longest sequence and number of token ids of a model, as far as its configuration and embeddings tell."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    length = getattr(text, "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa counts positions from behind the padding index, so two of its positions are never used.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            length = module.num_embeddings - module.padding_idx - 1
    try:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        embeddings = None
    return Limits(
        length if isinstance(length, int) and length > 0 else None, getattr(embeddings, "num_embeddings", None)
    )


def tokenizer_of(
    model: nn.Module, tokenizer: Any = None, options: Mapping[str, Any] | None = None
) -> Callable[[], Any]:
    """A function that gives the tokenizer: the given one, or else the one at the model's own path."""

    def load() -> Any:
        if tokenizer is not None:
            return tokenizer
        from transformers import AutoTokenizer  # only text needs it

        name = getattr(getattr(model, "config", None), "name_or_path", "") or getattr(model, "name_or_path", "")
        try:
            return AutoTokenizer.from_pretrained(name, **(options or {}))
        except Exception as error:  # missing files, unknown classes, no network: the remedy is the same
            raise CalibrationError(
                f"text needs a tokenizer, and none could be loaded from the model's own path {name!r} "
                f"({type(error).__name__}); pass tokenizer=..., or give token ids."
            ) from error

    return load


def read_calibration(
    model: nn.Module, config: SparsityConfig, tokenizer: Any = None, tokenizer_options: Mapping[str, Any] | None = None
) -> Samples:
    """The calibration samples of a config, checked against the model."""
    samples = read_samples(
        config.calibration,
        tokenizer=tokenizer_of(model, tokenizer, tokenizer_options),
        num_samples=config.num_samples,
        sequence_length=config.sequence_length,
        seed=config.seed,
        limits=limits_of(model),
    )
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return samples
    # Text alone says nothing about the decoder's side, so the decoder reads the same text.
    rows = [_with_decoder_input(row) for row in samples.rows]
    return Samples(rows, samples.source, samples.fingerprint, samples.tokens)


def _with_decoder_input(row: Sample) -> Sample:
    if "input_ids" in row and not {"decoder_input_ids", "labels", "decoder_inputs_embeds"} & set(row):
        return {**row, "decoder_input_ids": row["input_ids"]}
    return row


def make_batches(rows: Sequence[Sample], size: int | str) -> tuple[list[Batch], int]:
    """Batches and the batch size used; "auto" fills a fixed budget of tokens with the longest sample."""
    number = int(size) if size != "auto" else max(1, TOKEN_BUDGET // max(tokens_of(row) for row in rows))
    return batches(rows, number), number


# ---------------------------------------------------------------------------------------------------- the model's state


@contextmanager
def ready(model: nn.Module) -> Iterator[None]:
    """The model in inference mode without caches and compiled code; everything is put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    compiled = [
        (module, module._compiled_call_impl) for module in model.modules() if module._compiled_call_impl is not None
    ]
    configs = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None
    }
    caches = [(config, config.use_cache) for config in configs.values() if getattr(config, "use_cache", None)]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        model.eval()
        for module, _ in compiled:
            module._compiled_call_impl = None
        for config, _ in caches:
            config.use_cache = False
        with torch.random.fork_rng(devices), torch.no_grad(), eager_experts(model):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, call in compiled:
            module._compiled_call_impl = call
        for config, use in caches:
            config.use_cache = use


def forward(model: nn.Module, values: Sample) -> Callable[[], object]:
    """A pass of the model over one batch, on the device that its embeddings expect."""
    device = getattr(model, "device", torch.device("cpu"))
    device = torch.device("cpu") if device.type == "meta" else device

    def run() -> object:
        dtype = getattr(model, "dtype", None)
        placed = {key: value.to(device, dtype if value.is_floating_point() else None) for key, value in values.items()}
        return model(**placed)

    return run


# ---------------------------------------------------------------------------------------------------- survey


@dataclass
class Survey:
    """What one short dense pass shows: which blocks run, how often, and which feeds the numeric probe confirmed."""

    calls: dict[int, int] = field(default_factory=dict)  # block index -> calls a pass
    feeds: dict[int, list[groups.Feed]] = field(default_factory=dict)
    unresolved: dict[str, str] = field(default_factory=dict)  # site name -> why nothing is known about what it feeds


def _short(row: Sample) -> Sample:
    """A sample of token ids alone is cut; anything else (images, audio) stays whole."""
    shapes = {tuple(value.shape) for value in row.values()}
    if len(shapes) == 1 and "input_ids" in row and row["input_ids"].ndim == 2:
        return {key: value[:, :_SURVEY_TOKENS] for key, value in row.items()}
    return row


def survey(
    model: nn.Module, inventory: Inventory, rows: Sequence[Sample], want_feeds: bool, device: str | None = None
) -> Survey:
    """Run one short sample of each kind (by its tensors' names) through the dense model.

    A feed is proven once for each make of block (class and sites alike); equal blocks share the proof.
    """
    kinds = {tuple(sorted(row)): row for row in reversed(rows)}
    found = Survey()
    for row in kinds.values():
        calls: dict[int, int] = {}

        def call(
            block: Block,
            run: Callable[..., Any],
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            calls: dict[int, int] = calls,
        ) -> Any:
            calls[block.index] = calls.get(block.index, 0) + 1
            if want_feeds and block.index not in found.feeds and inventory.sites.get(block.index):
                with block.loaded():
                    _find_feeds(model, block, inventory.sites[block.index], lambda: run(*args, **kwargs), found)
            return run(*args, **kwargs)

        with watched(inventory.blocks, call):
            forward(model, _short(row))()
        for index, number in calls.items():
            found.calls[index] = max(number, found.calls.get(index, 0))
    return found


def _find_feeds(model: nn.Module, block: Block, sites: list[Site], run: Callable[[], object], found: Survey) -> None:
    proposed, unresolved = groups.propose(model, block, sites)
    proven, refuted = groups.prove(proposed, sites, run, model)
    found.feeds[block.index] = proven
    found.unresolved |= {**unresolved, **refuted}
