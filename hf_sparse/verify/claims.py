"""Compares the claim in config.json and the report's totals with what is counted in the weights."""

import math
from collections.abc import Iterator
from typing import Any

import torch

from hf_sparse.errors import HfSparseError
from hf_sparse.plan import select
from hf_sparse.sites import Site, count_zeros, read
from hf_sparse.stored import stored_parameters
from hf_sparse.verify.rows import AGREES, DIFFERS, Row, compared, skipped
from hf_sparse.verify.subject import Subject

_ROUNDED = 1e-9  # two shares that were worked out from the same counts


def check(subject: Subject) -> Iterator[Row]:
    """The claim's totals, whether claim and report are of one pruning, and the report's totals."""
    if subject.claim is None:
        yield skipped("claim", "config.json", "it claims nothing about sparsity")
    else:
        yield from _claim(subject)
    if subject.report is None:
        yield skipped("report", "report", "there is none")
    else:
        yield from _report(subject)


def _claim(subject: Subject) -> Iterator[Row]:
    claim, known = subject.claim, subject.report
    if claim is None:
        return
    if known is not None:
        yield compared("claim", "config is that of the report", claim.config, known.config)
    sites = _claimed_sites(subject)
    if claim.totals is None or sites is None:
        reason = "config.json states none" if claim.totals is None else "its config does not tell which sites it means"
        yield skipped("claim", "totals", reason)
        return
    zeros, size = sum(count_zeros(read(subject.model, site)) for site in sites), sum(site.size for site in sites)
    yield from (
        compared("claim", name, claim.totals[name], {"zeros": zeros, "sites": len(sites)}[name])
        for name in ("zeros", "sites")
    )
    yield _share("sparsity", claim.totals["sparsity"], zeros, size)
    yield _share("block_sparsity", claim.totals["block_sparsity"], zeros, sum(all_matrices(subject).values()))


def _claimed_sites(subject: Subject) -> list[Site] | None:
    """The sites whose zeros the claim counts, as a save counts them: those of the report, else those that the config targets."""
    if subject.report is not None:
        names = {site.name for site in subject.report.sites}
        return [site for name, site in subject.sites.items() if name in names]
    try:
        chosen = select(subject.inventory, subject.claim.sparsity_config())[0] if subject.claim else {}
    except HfSparseError:
        return None
    return [site for sites in chosen.values() for site in sites]


def all_matrices(subject: Subject) -> dict[int, int]:
    """Weights in all matrices of each block; what blocks share counts once."""
    seen: set[int] = set()
    found = {}
    for block in subject.inventory.blocks:
        own = {id(p): p.numel() for p in block.module.parameters() if p.ndim >= 2 and id(p) not in seen}
        seen |= own.keys()
        found[block.index] = sum(own.values())
    return found


def _share(name: str, claimed: Any, zeros: int, size: int) -> Row:
    share = zeros / max(1, size)
    same = math.isclose(claimed, share, rel_tol=_ROUNDED, abs_tol=_ROUNDED)
    return Row("claim", name, AGREES if same else DIFFERS, claimed, share)


# ---------------------------------------------------------------------------------------------------- the report


def _report(subject: Subject) -> Iterator[Row]:
    """Whether the report is of this model, and whether its sums are those of its sites."""
    known = subject.report
    if known is None:
        return
    yield compared("report", "class of the model", known.model_class, type(subject.model).__name__)
    if not subject.trained:  # an adapter that was there at the pruning may be merged since
        parameters = sum(parameter.numel() for parameter in subject.model.parameters())
        yield compared("report", "parameters", known.parameters, parameters)
    matrices = all_matrices(subject)
    for block in known.blocks:
        name = block.name
        yield compared("report", f"{name}: sum of zeros", block.zeros, sum(site.zeros for site in block.sites))
        yield compared(
            "report",
            f"{name}: weights in the sites",
            block.size,
            sum(site.shape[0] * site.shape[1] for site in block.sites),
        )
        yield compared("report", f"{name}: weights in all matrices", block.all_matrices, matrices.get(block.index))
    last = known.recoveries[-1] if known.recoveries else None
    if last is not None:
        zeros = _zeros_of_parameters(subject)
        enough = zeros >= last.zeros_after  # what came later, such as merging an adapter, may have made more
        yield Row("report", "zeros after the last training", AGREES if enough else DIFFERS, last.zeros_after, zeros)


def _zeros_of_parameters(subject: Subject) -> int:
    """Zeros of the whole parameters that hold pruned sites, as a training counts them."""
    names = {site.name for site in subject.report.sites} if subject.report else set()
    stored = [one for one in stored_parameters(subject.model) if any(site.name in names for site in one.sites)]
    return sum(count_zeros(one.local()) for one in stored)


def check_finite(subject: Subject) -> Iterator[Row]:
    """A row for each tensor that holds NaN or infinity, or one for all, and one for what the files do not hold."""
    loaded = subject.loaded
    if loaded is None:
        return
    tensors = loaded.model.state_dict()
    broken = [
        name for name, tensor in tensors.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
    yield from (Row("weights", name, DIFFERS, "finite", "NaN or infinite") for name in broken)
    if not broken:
        yield Row("weights", f"{len(tensors)} tensors", AGREES, "finite", "finite")
    for name in sorted(loaded.missing):
        yield Row(
            "weights",
            name,
            DIFFERS,
            "in the files",
            "absent or of another shape",
            "the model cannot be had from the files alone",
        )
    for name in sorted(loaded.unexpected):
        yield Row("weights", name, DIFFERS, "of the model", "a tensor that it does not have")
