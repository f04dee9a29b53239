"""Reorders channels inside blocks while a short sample runs through them."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_sparse.blocks import Block
from hf_sparse.blockwise import Run
from hf_sparse.calibrate import forward
from hf_sparse.data import Sample
from hf_sparse.forwards import Call, Modes, watched
from hf_sparse.patterns import Pattern
from hf_sparse.permute.importance import Norms, importance
from hf_sparse.permute.inside import Reordering, find_reorderings
from hf_sparse.permute.order import Part, best_order, kept_importance
from hf_sparse.permute.places import Channels
from hf_sparse.permute.proof import block_answers, same, tolerance
from hf_sparse.plan import SitePlan
from hf_sparse.sites import Site, count_zeros, read

Add = Callable[[int, Channels, torch.Tensor], None]


@dataclass
class Tally:
    """How much importance the pattern keeps before and after, over everything of one sort."""

    name: str
    before: float = 0.0
    after: float = 0.0
    total: float = 0.0
    count: int = 0

    def add(self, before: float, after: float, total: float) -> None:
        self.before, self.after, self.total, self.count = (
            self.before + before,
            self.after + after,
            self.total + total,
            self.count + 1,
        )

    def notes(self) -> list[str]:
        if not self.count:
            return []
        before, after = (100 * kept / self.total for kept in (self.before, self.after))
        return [
            f"permute: {self.name} reordered ({self.count}), importance kept by the pattern {before:.2f} % -> {after:.2f} %"
        ]


class _Blocks:
    """What is needed at every block, and what came of it."""

    def __init__(self, run: Run, norms: Norms, add: Add) -> None:
        self.run, self.norms, self.add = run, norms, add
        self.tallies = {False: Tally("MLP channels"), True: Tally("values within heads")}
        self.reasons: dict[str, int] = {}
        self.done: set[int] = set()

    def notes(self) -> list[str]:
        left = [f"permute: channels stay in order ({count} times): {why}" for why, count in self.reasons.items()]
        return [*(note for tally in self.tallies.values() for note in tally.notes()), *left]

    def leave(self, why: str) -> None:
        self.reasons[why] = self.reasons.get(why, 0) + 1

    def turn(self, call: Call) -> Any:
        """Reorder a block at its first call; returns what the dense one returned."""
        device = self.run.config.device
        index = call.block.index
        with call.block.loaded(device):
            if index in self.done or index not in self.run.chosen:
                return call(device)
            self.done.add(index)
            if self._reorder(call):
                call.block.commit()
            return call(device)

    def _reorder(self, call: Call) -> bool:
        run, index = self.run, call.block.index
        plans = {plan.site.name: plan for plan in run.plans(call.block) if not plan.dense}
        sites = {site.name: site for site in run.inventory.sites[index]}
        found, reasons = find_reorderings(run.model, run.survey.feeds.get(index, []), sites)
        for reason in reasons:
            self.leave(reason.partition(": ")[2])
        wanted: dict[str, list[tuple[Reordering, torch.Tensor, tuple[float, float, float]]]] = {}
        scores = _Scores(run, plans, self.norms)
        for one in found:
            if (chosen := self._order(one, plans, scores)) is not None:
                wanted.setdefault(one.kind, []).append((one, *chosen))
        return sum(self._prove(call, kind) for kind in wanted.values()) > 0

    def _order(
        self, one: Reordering, plans: dict[str, SitePlan], scores: "_Scores"
    ) -> tuple[torch.Tensor, tuple[float, float, float]] | None:
        group = Pattern.parse(self.run.config.pattern).group or 1
        if _bystander(self.run, one, plans):
            self.leave("a site that is not pruned now is sparse already")
            return None
        if any(
            columns[0] % group or (len(columns) % group and len(columns) < site.shape[1])
            for site, columns in one.consumers
        ):
            self.leave(f"heads of {one.channels.size} values are no multiple of {group}")
            return None
        parts = scores.parts(one)
        if not parts:
            return None  # no site competes along these channels
        order = best_order(parts, group, self.run.config.seed)
        if torch.equal(order, torch.arange(len(order))):
            return None
        total = sum(float(part.scores.sum(dtype=torch.float64)) for part in parts)
        return order, (kept_importance(parts, None, group), kept_importance(parts, order, group), total)

    def _prove(self, call: Call, wanted: list[tuple[Reordering, torch.Tensor, tuple[float, float, float]]]) -> bool:
        """Reorder, and put back if the block then computes something else."""
        run = self.run
        consumers = [site for one, _, _ in wanted for site, _ in one.consumers]
        before = block_answers(run.model, call, run.config.device, consumers)
        for one, order, _ in wanted:
            one.channels.take_(run.model, order)
        after = block_answers(run.model, call, run.config.device, consumers)
        if not same(before, after, tolerance(run.model)):
            for one, order, _ in wanted:
                one.channels.take_(run.model, order.argsort())
            self.leave(f"the output of {call.block.name} would change with those of {wanted[0][0].kind}")
            return False
        for one, order, figures in wanted:
            self.add(call.block.index, one.channels, order)
            self.tallies[any(site.role == "v" for site, _ in one.producers)].add(*figures)
        return True


class _Scores:
    """The importance of sites along channels; only the last few matrices are held, as experts are many."""

    def __init__(self, run: Run, plans: dict[str, SitePlan], norms: Norms) -> None:
        self._run, self._plans, self._norms = run, plans, norms
        self._held: dict[str, torch.Tensor] = {}

    def parts(self, one: Reordering) -> list[Part]:
        """What competes along the channels: columns of consumers, and rows of producers with groups along the output."""
        found = [(site, columns, False) for site, columns in one.consumers if self._axis(site) == "input"]
        found += [(site, rows, True) for site, rows in one.producers if self._axis(site) == "output"]
        parts = []
        for site, channels, turned in found:
            scores = self._of(site)
            keep = self._plans[site.name].pattern.keep
            parts.append(Part((scores.T if turned else scores)[:, list(channels)], keep or 0))
        return parts

    def _axis(self, site: Site) -> str | None:
        plan = self._plans.get(site.name)
        return plan.axis if plan is not None else None

    def _of(self, site: Site) -> torch.Tensor:
        if site.name not in self._held:
            while len(self._held) > 2:
                self._held.pop(next(iter(self._held)))
            scores = importance(self._run, self._plans[site.name], self._norms)
            # Metrics have units of their own, such as dass for gate and up beside wanda for down.
            self._held[site.name] = scores / scores.sum().clamp_min(torch.finfo(scores.dtype).tiny)
        return self._held[site.name]


def _bystander(run: Run, one: Reordering, plans: dict[str, SitePlan]) -> bool:
    others = [site for site, _ in (*one.consumers, *one.producers) if site.name not in plans]
    return any(is_sparse(run, site) for site in others)


def is_sparse(run: Run, site: Site) -> bool:
    """Whether a site holds zeros whose pattern another order would break."""
    return count_zeros(read(run.model, site)) > 0.01 * site.size


def permute_blocks_(run: Run, samples: Sequence[Sample], norms: Norms, add: Add) -> list[str]:
    """Reorder channels in all blocks that the samples reach; returns notes on what was won and what stayed."""
    state = _Blocks(run, norms, add)
    thread = threading.get_ident()

    def visit(block: Block, forward_: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != thread:  # somebody else uses the model meanwhile
            return forward_(*args, **kwargs)
        return state.turn(Call(0, block, args, kwargs, forward_, Modes.present()))

    with watched(run.inventory.blocks, visit):
        for row in samples:
            forward(run.model, row)()
    return state.notes()
