"""Prunes one block with two streams of activations: the pruned model's, and the dense model's beside it.

Both streams run once, stopped together before the products with each input of the sites. There the statistics of both are taken,
the dense stream makes its products with the dense weights, the sites are pruned, and the pruned stream goes on with the new ones.
"""

from collections.abc import Callable, Sequence
from contextlib import closing

import torch
from torch import nn

from hf_sparse import ranks
from hf_sparse.apply import BlockPlan, prune_block
from hf_sparse.blocks import Block
from hf_sparse.config import SparsityConfig
from hf_sparse.data import Batch
from hf_sparse.forwards import Call, main_tensor
from hf_sparse.lockstep import Arrival, Lockstep
from hf_sparse.observe import Operand, operand_of
from hf_sparse.plan import SitePlan
from hf_sparse.record import Recorder
from hf_sparse.registry import UPDATES
from hf_sparse.report import SiteReport
from hf_sparse.sites import Site, stored_rows
from hf_sparse.statistics import products
from hf_sparse.wiring import Wiring


class TwoStreams:
    """One block on its way through both streams; `prune` does it all and leaves the outputs in the calls."""

    def __init__(
        self, model: nn.Module, config: SparsityConfig, block: Block, sites: Sequence[Site], plans: Sequence[SitePlan],
        wiring: Wiring, recorder: Recorder, ahead: Recorder | None, changing: Callable[[], None],
    ) -> None:  # fmt: skip
        self._model, self._config, self._block, self._changing = model, config, block, changing
        self._sites = {site.name: site for site in sites}
        self._recorder, self._ahead = recorder, ahead
        # Without an update that sets targets by them, what the pruned stream lacks need not be measured.
        self._fitted = any(UPDATES[name].traits.get("sets_target") for name in config.update)
        self._enters = wiring.enters if self._fitted else {}
        targeted = {operand_of(plan.site) for plan in plans}
        self._stages = [group for group in wiring.inputs if targeted & set(group)]
        self._plans = {plan.site.name: plan for plan in plans}
        self._reports: dict[str, SiteReport] = {}
        self._lost: dict[int, torch.Tensor] = {}  # batch -> what the residual stream has lost so far, (tokens, hidden)
        self._batches: Sequence[Batch] = ()

    def prune(self, sparse: Sequence[Call], dense: Sequence[Call], batches: Sequence[Batch]) -> list[SiteReport]:
        """Prune the block; `sparse` and `dense` hold the same batches in the same order."""
        self._batches = batches
        partners = dict(zip((call.batch for call in sparse), dense, strict=True))
        numbers = {id(call): number for number, call in partners.items()} | {id(call): call.batch for call in sparse}
        for call in sparse:
            here, there = (
                main_tensor((call.args, call.kwargs)),
                main_tensor((partners[call.batch].args, partners[call.batch].kwargs)),
            )
            if self._enters and here is not None and there is not None and here.shape == there.shape:
                self._lost[call.batch] = (there - here).float().flatten(0, -2)
        stops = {group[0] for group in self._stages}
        staged = {operand for group in self._stages for operand in group}
        sites = list(self._sites.values())

        def made(sign: int, call: Call, operand: Operand, x: torch.Tensor, product: torch.Tensor) -> None:
            factor, number = self._enters.get(operand), numbers[id(call)]
            if factor is not None and number in self._lost:
                lost = self._lost[number].to(product.device)  # where the block computes, whatever its input came from
                change = sign * factor.to(product.device) * product.detach().float()
                self._lost[number] = lost + change.view(lost.shape)
            if sign < 0 and operand not in staged:
                self._recorder.passing([operand], x, batches[call.batch])

        ahead = Lockstep(self._model, sites, stops, lambda *given: made(1, *given), self._config.device)
        behind = Lockstep(self._model, sites, stops, lambda *given: made(-1, *given), self._config.device)
        with closing(ahead), closing(behind):
            ahead.start(dense)
            behind.start(sparse)
            self._recorder.settle()
            for stage in self._stages:
                # A product that is made again with pruned weights is none to stop at.
                stops.discard(stage[0])
                self._stage(stage, behind, ahead, numbers)
        self._rest(sparse)
        return [self._reports[name] for name in self._plans]

    def _stage(self, stage: list[Operand], behind: Lockstep, ahead: Lockstep, numbers: dict[int, int]) -> None:
        """All that read one input: measure, let the dense stream pass, prune, let the pruned stream pass."""
        here = [arrival for arrival in behind.waiting if arrival.operand in stage]
        there = {numbers[id(arrival.call)]: arrival for arrival in ahead.waiting if arrival.operand in stage}
        streams = self._measure(stage, here, there)
        ahead.go_on(set(stage))
        if any(ranks.gather(bool(here))):
            self._apply([plan for plan in self._plans.values() if operand_of(plan.site) in stage], streams)
        behind.go_on(set(stage))
        self._recorder.settle()

    def _measure(
        self, stage: list[Operand], here: list[Arrival], there: dict[int, Arrival]
    ) -> dict[str, dict[str, torch.Tensor]]:
        """The statistics of a stage's input; what the pruned stream lacks against the dense one, by site."""
        drift: torch.Tensor | None = None
        debts: dict[Operand, torch.Tensor] = {}
        for arrival in here:
            batch = arrival.call.batch
            self._recorder.arrived(stage, arrival.x, self._batches[batch])
            x = arrival.x.flatten(0, -2)
            partner = there.get(batch)
            if self._fitted and partner is not None and partner.x.shape == arrival.x.shape:
                found = products(partner.x.flatten(0, -2).float() - x.float(), x)
                drift = found if drift is None else drift + found
            lost = self._lost.get(batch)
            for operand in stage:
                if operand in self._enters and lost is not None and len(lost) == len(x):
                    owed = products(lost.to(x.device) / self._enters[operand].to(x.device), x)
                    debts[operand] = debts[operand] + owed if operand in debts else owed
        drift = self._share(stage, drift, debts)
        streams: dict[str, dict[str, torch.Tensor]] = {}
        for name, plan in self._plans.items():
            operand = operand_of(plan.site)
            if operand in stage and drift is not None:
                streams[name] = {"drift": drift}
                if operand in debts:
                    streams[name]["debt"] = debts[operand][stored_rows(plan.site).to(drift.device)]
        return streams

    def _share(
        self, stage: list[Operand], drift: torch.Tensor | None, debts: dict[Operand, torch.Tensor]
    ) -> torch.Tensor | None:
        """Make a stage's statistics those of all processes; returns the drift."""
        if ranks.count() == 1:
            return drift
        device = next(self._block.module.parameters()).device
        self._recorder.share(device, stage)
        shapes = ranks.gather(
            [list(found.shape) if found is not None else [] for found in (drift, *map(debts.get, stage))]
        )
        summed: list[torch.Tensor | None] = []
        for position, found in enumerate((drift, *map(debts.get, stage))):
            shape = max(part[position] for part in shapes)
            given = torch.zeros(shape, dtype=torch.float64, device=device) if found is None and shape else found
            summed.append(given)
        ranks.sum_(*(given for given in summed if given is not None))
        debts.update({operand: given for operand, given in zip(stage, summed[1:], strict=True) if given is not None})
        return summed[0]

    def _apply(self, plans: list[SitePlan], streams: dict[str, dict[str, torch.Tensor]]) -> None:
        self._changing()
        block_plan = BlockPlan(self._block, plans, self._sites, self._recorder, self._ahead, streams)
        for report in prune_block(self._model, self._config, block_plan):
            self._reports[report.name] = report

    def _rest(self, sparse: Sequence[Call]) -> None:
        """Sites that no stage held (experts, whose tokens differ between the streams) are pruned last, and the block runs again."""
        rest = [plan for name, plan in self._plans.items() if name not in self._reports]
        if not rest:
            return
        self._recorder.share(next(self._block.module.parameters()).device)
        self._apply(rest, {})
        for call in sparse:
            call.output = None
            call.output = call(self._config.device)
