"""What feeds what inside a block: which rows of one site end up in which input columns of another."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from hf_sparse.blocks import Block
from hf_sparse.observe import Observer, Operand, eager_experts, operand_of
from hf_sparse.sites import Site, stored_rows

PROBES = 2  # extra runs of a block; every run disturbs other channels
_PRODUCERS = {"down": ("gate", "up"), "o": ("v",)}
_HEAD_SIZES = ("v_head_dim", "value_head_dim", "head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "d_kv")
_HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head")


@dataclass(frozen=True)
class Feed:
    """The rows of one site become the input columns of another, element-wise or mixed over positions, never over channels."""

    producer: str  # site name whose rows ...
    consumer: str  # ... become the input columns of this site
    rows: tuple[int, ...]  # per input column of the consumer: the producer's row that feeds it; grouped heads repeat rows


# ---------------------------------------------------------------------------------------------------------------- by name


def propose(model: nn.Module, block: Block, sites: list[Site]) -> tuple[list[Feed], dict[str, str]]:
    """Pairs sites of a block by their roles: gate and up with down, v with o; and says which site finds no consumer."""
    feeds: list[Feed] = []
    unresolved: dict[str, str] = {}
    for consumer in sites:
        for role in _PRODUCERS.get(consumer.role or "", ()):
            for producer in _nearest(consumer, [site for site in sites if site.role == role]):
                rows = _rows(model, producer, consumer)
                if rows is None:
                    unresolved[producer.name] = f"Its {producer.shape[0]} rows do not fit {consumer.name}'s {consumer.shape[1]} columns."
                else:
                    feeds.append(Feed(producer.name, consumer.name, rows))
    fed = {feed.producer for feed in feeds}
    for site in sites:
        if site.role is None:
            unresolved[site.name] = "The name table knows no role for it."
        elif site.role in ("gate", "up", "v") and site.name not in fed:
            unresolved.setdefault(site.name, f"No site of block {block.name} that it could feed was found.")
    return [feed for feed in feeds if feed.producer not in unresolved], unresolved


def _common(one: Site, other: Site) -> int:
    """How many leading path components two sites share."""
    left, right = one.module.split("."), other.module.split(".")
    return next((index for index, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), len(left))


def _nearest(consumer: Site, candidates: list[Site]) -> list[Site]:
    """The producers that stand nearest to a consumer; those of the same expert, or shared by all experts."""
    same = [site for site in candidates if site.expert in (consumer.expert, None)]
    deepest = max((_common(site, consumer) for site in same), default=0)
    near = [site for site in same if _common(site, consumer) == deepest]
    return near if len(near) == 1 else []  # two that stand equally near: nothing is certain


def _rows(model: nn.Module, producer: Site, consumer: Site) -> tuple[int, ...] | None:
    rows, columns = producer.shape[0], consumer.shape[1]
    if rows == columns:
        return tuple(range(rows))
    size = _head_size(model, producer, consumer)
    if producer.role != "v" or size is None or rows % size or columns % rows:
        return None
    repeats = columns // rows  # query heads that share one head of keys and values
    return tuple(column // size // repeats * size + column % size for column in range(columns))


def _head_size(model: nn.Module, producer: Site, consumer: Site) -> int | None:
    path = producer.module.split(".")[: _common(producer, consumer)]
    while path:
        owner = model.get_submodule(".".join(path))
        for holder in (owner, getattr(owner, "config", None)):
            for name in _HEAD_SIZES:
                if isinstance(size := getattr(holder, name, None), int):
                    return size
            for name in _HEAD_COUNTS:
                if isinstance(heads := getattr(holder, name, None), int) and heads > 0 and consumer.shape[1] % heads == 0:
                    return consumer.shape[1] // heads
        path = path[:-1]
    return None


# ------------------------------------------------------------------------------------------------------------- by numbers


@dataclass
class _Sample:
    """What one undisturbed run showed."""

    inputs: dict[Operand, list[torch.Tensor]]  # of consumers
    products: dict[Operand, list[torch.Tensor]]  # of consumers
    scales: dict[Operand, torch.Tensor]  # of producers: root mean square of every output channel


def prove(
    feeds: list[Feed], sites: list[Site], run: Callable[[], object], model: nn.Module
) -> tuple[list[Feed], dict[str, str]]:
    """Keeps the feeds that numbers confirm: noise in a producer's row must reach exactly the proposed columns.

    `run` calls the block (or the whole model) on the same small sample each time. It is called once undisturbed and then
    `PROBES` times with noise added to one output channel of every producer. The products of all consumers are replaced
    by the undisturbed ones, so that no disturbance goes on into later modules and all sites are probed together.
    """
    by_name = {site.name: site for site in sites}
    involved = [by_name[name] for feed in feeds for name in (feed.producer, feed.consumer)]
    consumers = {operand_of(by_name[feed.consumer]) for feed in feeds}
    wrong: dict[Feed, str] = {}
    with torch.no_grad(), eager_experts(model):
        sample = _record(model, involved, consumers, run)
        reached = [feed for feed in feeds if _was_reached(feed, by_name, sample)]
        for probe in range(PROBES):
            chosen = _choose(reached, by_name, sample, probe)
            seen = _disturb(model, involved, chosen, by_name, sample, run, probe)
            wrong.update(_contradictions(chosen, seen))
    proven = [feed for feed in reached if feed not in wrong]
    return _with_unreached(feeds, proven, wrong, by_name)


def _record(model: nn.Module, sites: Iterable[Site], consumers: set[Operand], run: Callable[[], object]) -> _Sample:
    sample = _Sample(defaultdict(list), defaultdict(list), {})
    squares: dict[Operand, list[torch.Tensor]] = defaultdict(list)

    def look(operand: Operand, x: torch.Tensor, product: torch.Tensor) -> None:
        if operand in consumers:
            sample.inputs[operand].append(x.detach().clone())
            sample.products[operand].append(product.detach().clone())
        elif product.numel():
            squares[operand].append(product.detach().float().square().flatten(0, -2).mean(0))

    with Observer(model, sites, look):
        run()
    sample.scales = {operand: torch.stack(found).mean(0).sqrt() for operand, found in squares.items()}
    return sample


def _was_reached(feed: Feed, by_name: dict[str, Site], sample: _Sample) -> bool:
    inputs = sample.inputs.get(operand_of(by_name[feed.consumer]), [])
    return any(bool(x.count_nonzero()) for x in inputs) and operand_of(by_name[feed.producer]) in sample.scales


def _choose(feeds: list[Feed], by_name: dict[str, Site], sample: _Sample, probe: int) -> dict[Feed, int]:
    """The row to disturb for every feed: one that reaches a busy column, and another for each feed of the same consumer.

    A producer with many consumers (v under experts of o) is disturbed in one row only, which all of them must see.
    """
    by_consumer: dict[str, list[Feed]] = defaultdict(list)
    for feed in feeds:
        by_consumer[feed.consumer].append(feed)
    chosen: dict[Feed, int] = {}
    disturbed: dict[str, int] = {}
    for consumer, group in by_consumer.items():
        inputs = [x.float().abs().flatten(0, -2) for x in sample.inputs[operand_of(by_name[consumer])]]
        busiest = torch.cat(inputs).mean(0).argsort(descending=True).tolist()
        for position, feed in enumerate(group):
            rows = list(dict.fromkeys(feed.rows[column] for column in busiest if feed.rows[column] >= 0))
            chosen[feed] = disturbed.setdefault(feed.producer, rows[(probe * len(group) + position) % len(rows)])
    return chosen


def _disturb(
    model: nn.Module,
    sites: Iterable[Site],
    chosen: dict[Feed, int],
    by_name: dict[str, Site],
    sample: _Sample,
    run: Callable[[], object],
    seed: int,
) -> dict[str, set[int]]:
    """Runs with noise in the chosen rows; the columns of every consumer's input that changed."""
    channels: dict[Operand, set[int]] = defaultdict(set)
    for feed, row in chosen.items():
        site = by_name[feed.producer]
        channels[operand_of(site)].add(int(stored_rows(site)[row]))
    calls: dict[Operand, int] = defaultdict(int)
    changes: dict[Operand, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(seed)

    def look(operand: Operand, x: torch.Tensor, product: torch.Tensor) -> torch.Tensor | None:
        if operand in sample.inputs:
            call = calls[operand]
            calls[operand] += 1
            if call >= len(sample.inputs[operand]) or sample.inputs[operand][call].shape != x.shape:
                changes[operand] = torch.ones(x.shape[-1], device=x.device)  # not the same run: nothing can be told apart
                return None
            if x.numel():
                change = (x.float() - sample.inputs[operand][call].float()).abs().flatten(0, -2).amax(0)
                changes[operand] = torch.maximum(changes[operand], change) if operand in changes else change
            return sample.products[operand][call]
        return _with_noise(product, sorted(channels[operand]), sample.scales[operand], generator) if operand in channels else None

    with Observer(model, sites, look):
        run()
    columns = {operand: (change > 1e-5 * change.max()).nonzero().flatten().tolist() for operand, change in changes.items()}
    return {feed.consumer: set(columns.get(operand_of(by_name[feed.consumer]), ())) for feed in chosen}


def _with_noise(product: torch.Tensor, channels: list[int], scales: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise of each channel's own size, other at every position: a constant could vanish in a softmax or a norm."""
    noise = torch.randn(*product.shape[:-1], len(channels), generator=generator).to(product.device)
    size = torch.where(scales > 0, scales, scales.max().clamp_min(1e-3))[channels]
    disturbed = product.clone()
    disturbed[..., channels] += (noise * size).to(product.dtype)
    return disturbed


def _contradictions(chosen: dict[Feed, int], seen: dict[str, set[int]]) -> dict[Feed, str]:
    """A feed is wrong if its columns did not change, or if columns changed that no feed of the consumer accounts for."""
    expected = {feed: {column for column, source in enumerate(feed.rows) if source == row} for feed, row in chosen.items()}
    missing = {feed for feed, columns in expected.items() if not columns <= seen[feed.consumer]}
    wrong = {}
    for feed in chosen:
        group = [other for other in chosen if other.consumer == feed.consumer]
        extra = seen[feed.consumer] - set().union(*(expected[other] for other in group))
        if feed in missing:
            wrong[feed] = f"Noise in row {chosen[feed]} did not reach the columns of {feed.consumer} that it should feed."
        elif extra and not missing.intersection(group):
            wrong[feed] = f"Noise in row {chosen[feed]} reached {len(extra)} more columns of {feed.consumer} than it should feed."
    return wrong


def _with_unreached(
    feeds: list[Feed], proven: list[Feed], wrong: dict[Feed, str], by_name: dict[str, Site]
) -> tuple[list[Feed], dict[str, str]]:
    """Adds feeds of experts that no token of the sample reached, where another expert of the same parameter was proven."""
    sure = {_pair(feed, by_name) for feed in proven} - {_pair(feed, by_name) for feed in wrong}
    kept: list[Feed] = []
    reasons: dict[str, str] = {}
    confirmed = set(proven)
    for feed in feeds:
        if feed in wrong:
            reasons[feed.producer] = wrong[feed]
        elif feed in confirmed or _pair(feed, by_name) in sure:
            kept.append(feed)
        else:
            reasons[feed.producer] = f"The sample did not run it together with {feed.consumer}."
    return kept, reasons


def _pair(feed: Feed, by_name: dict[str, Site]) -> tuple[str, ...]:
    """What the feeds of all experts of a block have in common, be they slices of a parameter or modules in a list."""
    producer, consumer = by_name[feed.producer], by_name[feed.consumer]
    modules = [re.sub(r"experts\.\w*?\d+", "experts", site.module) for site in (producer, consumer)]
    return (*modules, producer.parameter, str(producer.role), consumer.parameter)
