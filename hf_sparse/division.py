"""Divides the sites of a block over the processes: each solves some, and all get the weights and the reports of all."""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hf_sparse import ranks
from hf_sparse.plan import SitePlan
from hf_sparse.report import SiteReport
from hf_sparse.sites import read, write_


def owners(groups: Sequence[Sequence[SitePlan]], updated: bool) -> list[int]:
    """The process that solves each group of sites with one input; `updated`: weights are worked out, not only scores."""
    return ranks.owners([_cost(group, updated) for group in groups])


def _cost(group: Sequence[SitePlan], updated: bool) -> float:
    """What a group takes about: its matrix of inputs is factorised once, and then each row is gone through with it."""
    inputs, rows = group[0].site.shape[1], sum(plan.site.shape[0] for plan in group)
    return float(inputs**3 + rows * inputs**2 if updated else rows * inputs)


def hand_out_(
    model: nn.Module, groups: Sequence[Sequence[SitePlan]], owner: Sequence[int], reports: dict[str, SiteReport]
) -> None:
    """Write the weights of all groups as their owners have them, and complete the reports."""
    if ranks.count() == 1:
        return
    told: list[dict[str, Any]] = [
        dataclasses.asdict(reports[plan.site.name])
        for group, number in zip(groups, owner, strict=True)
        for plan in group
        if number == ranks.rank()
    ]
    for values in (values for part in ranks.gather(told) for values in part):
        report = SiteReport(**{**values, "shape": tuple(values["shape"])})
        reports.setdefault(report.name, report)
    for group, number in zip(groups, owner, strict=True):
        weights = ranks.hand_out([read(model, plan.site) for plan in group], [number] * len(group))
        if number != ranks.rank():
            for plan, weight in zip(group, weights, strict=True):
                write_(model, plan.site, weight)


def check_alike(name: str, module: nn.Module) -> None:
    """Raises ModelError where a loaded module's parameters are not the same bits on all processes."""
    if ranks.count() > 1:
        ranks.agree(f"weights of {name}", checksum(module))


def checksum(module: nn.Module) -> int:
    """A checksum of a module's parameters; those on the meta device count by their shape."""
    found = 0
    for parameter in module.parameters():
        stored = parameter.detach()
        if stored.device.type == "meta":
            found = zlib.crc32(repr(tuple(stored.shape)).encode(), found)
            continue
        found = zlib.crc32(stored.cpu().contiguous().view(-1).view(torch.uint8).numpy().data, found)
    return found
