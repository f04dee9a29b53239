"""What feeds what inside a block: which rows of one site end up in which input columns of another."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from hf_sparse.blocks import Block
from hf_sparse.families.fused import number
from hf_sparse.observe import Observer, Operand, eager_experts, operand_of
from hf_sparse.sites import Site, stored_rows

PROBES = 3  # extra runs: for the first producer of every consumer, for the second, and for all together in other rows
_ROUNDING = 1e-5  # smaller changes than this share of the largest come from sums in another order
_PRODUCERS = {"down": ("gate", "up"), "o": ("v",)}
_HEAD_SIZES = ("v_head_dim", "head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "d_kv")
_HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head")


@dataclass(frozen=True)
class Feed:
    """The rows of one site become the input columns of another, element-wise or mixed over positions, never over channels."""

    producer: str  # site name whose rows ...
    consumer: str  # ... become the input columns of this site
    rows: tuple[int, ...]  # for every input column the producer's row, or -1; grouped heads repeat rows


# ---------------------------------------------------------------------------------------------------------------- by name


def propose(model: nn.Module, block: Block, sites: list[Site]) -> tuple[list[Feed], dict[str, str]]:
    """Pairs sites of a block by their roles: gate and up with down, v with o; and says which site finds no consumer."""
    feeds: list[Feed] = []
    unresolved: dict[str, str] = {}
    by_role: dict[tuple[str | None, int | None], list[Site]] = defaultdict(list)
    for site in sites:
        by_role[site.role, site.expert].append(site)
    for consumer in sites:
        for role in _PRODUCERS.get(consumer.role or "", ()):
            candidates = [site for expert in {None, consumer.expert} for site in by_role[role, expert]]
            for producer in _nearest(consumer, candidates):
                if rows := _rows(model, producer, consumer):
                    feeds.append(Feed(producer.name, consumer.name, rows))
                else:
                    unresolved[producer.name] = f"Its number of rows does not fit the columns of {consumer.name}."
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
    """The one producer that stands nearest to a consumer, if there is one."""
    depths = [_common(site, consumer) for site in candidates]
    near = [site for site, depth in zip(candidates, depths, strict=True) if depth == max(depths)]
    return near if len(near) == 1 else []  # two that stand equally near: nothing is certain


def _rows(model: nn.Module, producer: Site, consumer: Site) -> tuple[int, ...] | None:
    rows, columns = producer.shape[0], consumer.shape[1]
    if rows == columns:
        return tuple(range(rows))
    size = head_size(model, producer, consumer)
    if producer.role != "v" or size is None or rows % size or columns % rows:
        return None
    repeats = columns // rows  # query heads that share one head of keys and values
    return tuple(column // size // repeats * size + column % size for column in range(columns))


def head_size(model: nn.Module, producer: Site, consumer: Site) -> int | None:
    """How many values a head has, as the modules around v and o or their configuration tell."""
    path = producer.module.split(".")[: _common(producer, consumer)]
    for length in range(len(path), 0, -1):
        owner = model.get_submodule(".".join(path[:length]))
        if size := number(owner, _HEAD_SIZES):
            return size
        if heads := number(owner, _HEAD_COUNTS):
            return consumer.shape[1] // heads
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
    `PROBES` times with noise added to one output channel of producers. The products of all consumers are replaced
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
    alone = probe < PROBES - 1
    for consumer, group in by_consumer.items():
        inputs = [x.float().abs().flatten(0, -2) for x in sample.inputs[operand_of(by_name[consumer])]]
        busiest = torch.cat(inputs).mean(0).argsort(descending=True).tolist()
        for position, feed in enumerate(group):
            if alone and position != probe:
                continue
            rows = list(dict.fromkeys(feed.rows[column] for column in busiest if feed.rows[column] >= 0))
            chosen[feed] = disturbed.setdefault(feed.producer, rows[(probe + position) % len(rows)])
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
    changes: dict[Operand, list[torch.Tensor]] = defaultdict(list)
    generator = torch.Generator().manual_seed(seed)

    def look(operand: Operand, x: torch.Tensor, product: torch.Tensor) -> torch.Tensor | None:
        if operand in sample.inputs:
            calls[operand] += 1
            if calls[operand] > len(sample.inputs[operand]):
                return None
            changes[operand].append(_change(sample.inputs[operand][calls[operand] - 1], x))
            return sample.products[operand][calls[operand] - 1].clone()  # the model may go on in place
        if operand not in channels:
            return None
        return _with_noise(product, sorted(channels[operand]), sample.scales[operand], generator)

    with Observer(model, sites, look):
        run()
    return {feed.consumer: _changed(changes[operand_of(by_name[feed.consumer])]) for feed in chosen}


def _change(before: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """By how much each column changed at most."""
    if before.shape != x.shape:  # not the same run: nothing can be told apart
        return torch.ones(x.shape[-1], device=x.device)
    if not x.numel():
        return torch.zeros(x.shape[-1], device=x.device)
    return (x.float() - before.float()).abs().flatten(0, -2).amax(0)


def _changed(changes: list[torch.Tensor]) -> set[int]:
    most = torch.stack(changes).amax(0) if changes else torch.zeros(0)
    return set((most > _ROUNDING * most.max()).nonzero().flatten().tolist()) if most.any() else set()


def _with_noise(
    product: torch.Tensor, channels: list[int], scales: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Noise of each channel's own size, other at every position: a constant could vanish in a softmax or a norm."""
    noise = torch.randn(*product.shape[:-1], len(channels), generator=generator).to(product.device)
    size = torch.where(scales > 0, scales, scales.max().clamp_min(1e-3))[channels]
    disturbed = product.clone()
    disturbed[..., channels] += (noise * size).to(product.dtype)
    return disturbed


def _contradictions(chosen: dict[Feed, int], seen: dict[str, set[int]]) -> dict[Feed, str]:
    """A feed is wrong if its columns did not change, or if columns changed that no feed of the consumer accounts for."""
    expected = {feed: {c for c, source in enumerate(feed.rows) if source == row} for feed, row in chosen.items()}
    missing = {feed.consumer for feed, columns in expected.items() if not columns <= seen[feed.consumer]}
    extra = {consumer: set(columns) for consumer, columns in seen.items()}
    for feed, columns in expected.items():
        extra[feed.consumer] -= columns
    wrong = {}
    for feed, columns in expected.items():
        noise, more = f"Noise in row {chosen[feed]}", len(extra[feed.consumer])
        if not columns <= seen[feed.consumer]:
            wrong[feed] = f"{noise} did not reach the columns of {feed.consumer} that it should feed."
        elif more and feed.consumer not in missing:
            wrong[feed] = f"{noise} reached {more} more columns of {feed.consumer} than it should feed."
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
