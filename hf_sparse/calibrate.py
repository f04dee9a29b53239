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
from hf_sparse.observe import Observer, Operand, eager_experts, operand_of
from hf_sparse.registry import STATISTICS
from hf_sparse.sites import Site
from hf_sparse.statistics import Statistic

TOKEN_BUDGET = 4096  # tokens in a batch of size "auto"
ERROR_SAMPLE = 512  # tokens at most on which the output error of a site is measured
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
    return Limits(length if isinstance(length, int) and length > 0 else None, getattr(embeddings, "num_embeddings", None))


def tokenizer_of(model: nn.Module, tokenizer: Any = None, options: Mapping[str, Any] | None = None) -> Callable[[], Any]:
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
    compiled = [(module, module._compiled_call_impl) for module in model.modules() if module._compiled_call_impl is not None]
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None}
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


def survey(model: nn.Module, inventory: Inventory, rows: Sequence[Sample], want_feeds: bool, device: str | None = None) -> Survey:
    """Run one short sample of each kind (by its tensors' names) through the dense model.

    A feed is proven once for each make of block (class and sites alike); equal blocks share the proof.
    """
    kinds = {tuple(sorted(row)): row for row in reversed(rows)}
    found = Survey()
    for row in kinds.values():
        calls: dict[int, int] = {}

        def call(block: Block, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], calls: dict[int, int] = calls) -> Any:
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


# ---------------------------------------------------------------------------------------------------- recording


class Recorder:
    """Adds up the statistics of a block's inputs over its calls.

    Statistics belong to inputs: products that read the very same tensor in one call share one (q, k and v; gate and up).
    """

    def __init__(self, sites: Sequence[Site], needs: dict[Operand, set[str]], sample_each: int) -> None:
        self._needs = needs
        self._sample_each = sample_each
        self.input_of: dict[Operand, Operand] = {}  # operand -> the first operand that read the same input
        self.statistics: dict[tuple[Operand, str], Statistic] = {}
        self.samples: dict[Operand, list[torch.Tensor]] = {}
        self._wanted = {operand_of(site) for site in sites}
        self._present: dict[tuple[int, tuple[int, ...], int], tuple[Operand, torch.Tensor]] = {}

    def seen(self, operand: Operand, x: torch.Tensor, product: torch.Tensor) -> None:
        """The observer's callback."""
        if operand not in self._wanted:
            return
        identity = (x.data_ptr(), (x.numel(), x.shape[-1]), x._version)
        if identity in self._present:
            first = self._present[identity][0]
            shared = self.input_of.setdefault(operand, first)
            if shared == first:
                self._add_missing(first, operand, x)
                return
        key = self.input_of.setdefault(operand, operand)
        self._present[identity] = (key, x)  # kept until the call ends, so that no other tensor takes its address
        flat = x.detach().reshape(-1, x.shape[-1])
        for name in sorted(self._needs.get(operand, ())):
            self._statistic(key, name, flat).add(flat)
        kept = self.samples.setdefault(key, [])
        if flat.shape[0] and sum(map(len, kept)) < ERROR_SAMPLE:
            step = max(1, flat.shape[0] // self._sample_each)
            kept.append(flat[::step][: self._sample_each].clone())

    def _statistic(self, key: Operand, name: str, flat: torch.Tensor) -> Statistic:
        if (key, name) not in self.statistics:
            self.statistics[key, name] = STATISTICS[name].function(flat.shape[-1], flat.device)  # type: ignore[assignment]
        return self.statistics[key, name]

    def _add_missing(self, first: Operand, operand: Operand, x: torch.Tensor) -> None:
        """A later reader of the same input may need a statistic that the first one did not."""
        for name in sorted(self._needs.get(operand, set()) - self._needs.get(first, set())):
            flat = x.detach().reshape(-1, x.shape[-1])
            self._statistic(first, name, flat).add(flat)

    def end_call(self, batch: Batch, names: dict[Operand, str]) -> None:
        """Forget the tensors of one call; refuse inputs that were not finite.

        Raises: CalibrationError that names the site and, where the input still shows it, the sample.
        """
        for key, x in self._present.values():
            statistics = [statistic for (owner, _), statistic in self.statistics.items() if owner == key]
            finite = all(bool(torch.isfinite(statistic.value).all()) for statistic in statistics)
            if not finite or (not statistics and not bool(torch.isfinite(x.sum()))):
                raise CalibrationError(self._not_finite(key, x, batch, names))
        self._present.clear()

    def _not_finite(self, key: Operand, x: torch.Tensor, batch: Batch, names: dict[Operand, str]) -> str:
        numbers = list(batch.numbers)
        if len(x) == len(numbers):
            bad = [number for number, row in zip(numbers, x, strict=True) if not bool(torch.isfinite(row).all())]
            numbers = bad or numbers
        where = f"sample {numbers[0]}" if len(numbers) == 1 else f"one of samples {numbers[0]} to {numbers[-1]}"
        return (
            f"the input of {names.get(key, key.module)} is NaN or infinite for {where}; "
            "drop that sample, or load the model in a wider dtype (float16 overflows easily)."
        )

    def tokens(self, site: Site) -> int:
        """How many tokens reached the site; 0 for an expert that none was sent to."""
        key = self.input_of.get(operand_of(site))
        return 0 if key is None else max((s.tokens for (owner, _), s in self.statistics.items() if owner == key), default=1)

    def own(self, site: Site) -> dict[str, torch.Tensor]:
        """The values measured for the site's input."""
        key = self.input_of.get(operand_of(site))
        return {name: statistic.value for (owner, name), statistic in self.statistics.items() if owner == key}

    def sample(self, site: Site) -> torch.Tensor | None:
        """Some tokens of the site's input (at most 512), or None where none came."""
        key = self.input_of.get(operand_of(site))
        kept = self.samples.get(key, []) if key is not None else []
        return torch.cat(kept)[:ERROR_SAMPLE] if kept else None

    def observe(self, model: nn.Module, sites: Sequence[Site]) -> Observer:
        """The context manager that feeds this recorder while a block runs."""
        return Observer(model, sites, self.seen)
