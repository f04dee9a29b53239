"""Gets a model and its calibration data ready, and looks at what runs and what feeds what."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from typing import Any

import torch
from torch import nn

from hf_sparse import groups, ranks
from hf_sparse.blocks import Block
from hf_sparse.config import SparsityConfig
from hf_sparse.data import Batch, Limits, Sample, Samples, batches, read_samples, tokens_of
from hf_sparse.data.text import is_made_up
from hf_sparse.errors import CalibrationError
from hf_sparse.families import Inventory
from hf_sparse.forwards import Call, Modes, watched
from hf_sparse.observe import eager_experts
from hf_sparse.sites import Site
from hf_sparse.wiring import Wiring, find_wiring

TOKEN_BUDGET = 4096  # tokens in a batch of size "auto"
Kind = tuple[str, ...]  # the names of a sample's tensors
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
        length if isinstance(length, int) and length > 0 else None,
        getattr(embeddings, "num_embeddings", None),
        bool(getattr(config, "is_encoder_decoder", False)),
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
            found = AutoTokenizer.from_pretrained(name, **(options or {}))
            if is_made_up(found):
                raise FileNotFoundError("no tokenizer")
            return found
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
    # A DataLoader draws from the global generator: seeded here, put back behind.
    with torch.random.fork_rng([]):
        torch.manual_seed(config.seed)
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
    return replace(samples, rows=rows)


def _with_decoder_input(row: Sample) -> Sample:
    if "input_ids" in row and not {"decoder_input_ids", "labels", "decoder_inputs_embeds"} & set(row):
        return {**row, "decoder_input_ids": row["input_ids"]}
    return row


def make_batches(rows: Sequence[Sample], size: int | str, budget: int = TOKEN_BUDGET) -> tuple[list[Batch], int]:
    """Batches and the batch size used; "auto" fills a fixed budget of tokens with the longest sample.

    Of many processes each gets a batch if there are samples enough.
    """
    number = int(size) if size != "auto" else max(1, budget // max(tokens_of(row) for row in rows))
    if size == "auto" and ranks.count() > 1:
        number = min(number, -(-len(rows) // ranks.count()))
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
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    cached = torch.is_autocast_cache_enabled()
    try:
        # Under the caller's autocast a weight that was cast once would stay in the cache after it was pruned.
        torch.set_autocast_cache_enabled(False)
        model.eval()
        for module, _ in compiled:
            module._compiled_call_impl = None
        for config, _ in caches:
            config.use_cache = False
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.no_grad(), eager_experts(model):
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
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
    """What short dense passes show: which blocks run in which order, how often, and which feeds the probe confirmed."""

    calls: dict[Kind, list[int]] = field(default_factory=dict)  # kind of sample -> blocks in the order of their calls
    feeds: dict[int, list[groups.Feed]] = field(default_factory=dict)
    unresolved: dict[str, str] = field(default_factory=dict)  # site name -> why nothing is known about what it feeds
    wirings: dict[int, Wiring] = field(default_factory=dict)

    @property
    def reached(self) -> set[int]:
        return {index for calls in self.calls.values() for index in calls}

    def expected(self, index: int, batches: Sequence[Batch]) -> int:
        """How often the batches will call a block."""
        return sum(self.calls.get(kind_of(batch.values), []).count(index) for batch in batches)

    def order(self) -> list[int]:
        """One order of the blocks that agrees with every kind's; as first met where the kinds contradict each other."""
        before: dict[int, set[int]] = {}
        for calls in self.calls.values():
            met = list(dict.fromkeys(calls))
            for position, index in enumerate(met):
                before.setdefault(index, set()).update(met[position - 1 : position])
        try:
            return list(TopologicalSorter(before).static_order())
        except CycleError:
            return list(before)


def kind_of(values: Sample) -> Kind:
    """Samples with the same tensors take the same way through a model."""
    return tuple(sorted(values))


def short(row: Sample) -> Sample:
    """A sample of token ids alone is cut; anything else (images, audio) stays whole."""
    shapes = {tuple(value.shape) for value in row.values()}
    if len(shapes) == 1 and "input_ids" in row and row["input_ids"].ndim == 2:
        return {key: value[:, :_SURVEY_TOKENS] for key, value in row.items()}
    return row


def survey(
    model: nn.Module,
    inventory: Inventory,
    rows: Sequence[Sample],
    want_feeds: bool,
    device: str | None = None,
    want_wirings: bool = False,
) -> Survey:
    """Run one short sample of each kind through the dense model; on request the probes for feeds and wirings run in every block."""
    found = Survey()
    thread = threading.get_ident()
    for kind, row in {kind_of(row): row for row in reversed(rows)}.items():
        calls = found.calls.setdefault(kind, [])

        def visit(
            block: Block,
            run: Callable[..., Any],
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            calls: list[int] = calls,
        ) -> Any:
            if threading.get_ident() != thread:  # somebody else uses the model meanwhile
                return run(*args, **kwargs)
            calls.append(block.index)
            call = Call(0, block, args, kwargs, run, Modes.present())
            with block.loaded(device):
                if want_feeds and block.index not in found.feeds and inventory.sites.get(block.index):
                    _find_feeds(model, block, inventory.sites[block.index], lambda: call(device), found)
                if want_wirings and block.index not in found.wirings and inventory.sites.get(block.index):
                    found.wirings[block.index] = find_wiring(model, inventory.sites[block.index], call, device)
                return call(device)

        with watched(inventory.blocks, visit):
            forward(model, short(row))()
    return found


def _find_feeds(model: nn.Module, block: Block, sites: list[Site], run: Callable[[], object], found: Survey) -> None:
    proposed, unresolved = groups.propose(model, block, sites)
    proven, refuted = groups.prove(proposed, sites, run, model)
    found.feeds[block.index] = proven
    found.unresolved |= {**unresolved, **refuted}
