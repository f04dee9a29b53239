"""Puts together the report of a pruning, whatever did it: one run over the blocks, or a training."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from hf_sparse import environment
from hf_sparse.config import SparsityConfig
from hf_sparse.families import Inventory
from hf_sparse.report import BlockReport, Report
from hf_sparse.sites import Site


def make_report(
    model: nn.Module, config: SparsityConfig, blocks: list[BlockReport], left_out: Mapping[str, str], notes: list[str],
    calibration: dict[str, Any] | None, seconds: float,
) -> Report:  # fmt: skip
    """The report of a pruned model; what several sites fell back to stands among the notes, with their number."""
    reasons: dict[str, int] = {}
    for site in (site for block in blocks for site in block.sites if site.note):
        reasons[site.note] = reasons.get(site.note, 0) + 1
    model_config = getattr(model, "config", None)
    return Report(
        config=config.resolved().to_dict(), model=_base_name(model_config), model_class=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()), blocks=blocks, left_out=dict(left_out),
        notes=[*notes, *(f"{count} sites: {note}" for note, count in reasons.items())], calibration=calibration,
        versions=environment.versions(), seconds=seconds, peak_memory_bytes=environment.peak_memory(),
    )  # fmt: skip


def _base_name(model_config: Any) -> str:
    """The name of the model, of a folder with its whole path: seen from elsewhere, `user/name` would be a repository."""
    name = getattr(model_config, "name_or_path", "") or ""
    return str(Path(name).absolute()) if name and Path(name).is_dir() else name


def block_reports(
    inventory: Inventory, done: Mapping[int, BlockReport], measured: Mapping[int, float] | None = None
) -> list[BlockReport]:
    """What was done to each block; one without targeted sites counts with its size, so that shares of the whole are true."""
    reports = []
    seen: set[int] = set()  # parameters that blocks share count once
    for block in inventory.blocks:
        own = {id(p): p.numel() for p in block.module.parameters() if p.ndim >= 2 and id(p) not in seen}
        seen |= own.keys()
        empty = BlockReport(
            block.index, block.name, block.stack, zeros=0, size=0, all_matrices=0, output_error=None, seconds=0.0
        )
        report = done.get(block.index, empty)
        reports.append(replace(report, all_matrices=sum(own.values()), measured=(measured or {}).get(block.index)))
    return reports


def add_earlier_(
    blocks: list[BlockReport], inventory: Inventory, earlier: Report | None, now: set[str], zeros_of: Callable[[Site], int]
) -> int:  # fmt: skip
    """Put in the sites that an earlier pruning made sparse and this one left alone, counted again; how many they are."""
    kept = {site.name: site for site in earlier.sites if site.name not in now} if earlier else {}
    if not kept:
        return 0
    for block, report in zip(inventory.blocks, blocks, strict=True):
        with block.loaded():
            for site in inventory.sites[block.index]:
                if site.name in kept:
                    zeros = zeros_of(site)
                    report.sites.append(replace(kept[site.name], zeros=zeros, sparsity=zeros / site.size))
                    report.zeros, report.size = report.zeros + zeros, report.size + site.size
    return len(kept)
