"""What a sparse model knows about itself: read from its weights, kept in its config, written beside its weights."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_sparse.errors import CheckpointError, ModelError
from hf_sparse.families import find_sites
from hf_sparse.report import Report
from hf_sparse.sites import Site, read

CONFIG_KEY = "hf_sparse"
FORMAT = 1
_REPORT = "_hf_sparse_report"


# ---------------------------------------------------------------------------------------------------- models and wrappers


def unwrap(model: nn.Module) -> nn.Module:
    """The Transformers model inside torch.compile, DataParallel and PEFT wrappers; pruning it prunes what they run.

    Raises: ModelError for FSDP and DeepSpeed, whose weights lie flattened or sharded over processes.
    """
    while True:
        kind = type(model).__name__
        if kind in ("FullyShardedDataParallel", "DeepSpeedEngine") or kind.startswith("FSDP"):
            raise ModelError(f"a model wrapped as {kind} has its weights in shards; prune it before you wrap it.")
        inner = getattr(model, "_orig_mod", None)
        if inner is None and kind in ("DataParallel", "DistributedDataParallel"):
            inner = model.module
        if inner is None and hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            inner = model.get_base_model()  # type: ignore[operator]
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner


def check_prunable(model: nn.Module) -> None:
    """Refuse quantized, sharded and weightless models, with the way out."""
    config = getattr(model, "config", None)
    method = getattr(getattr(config, "quantization_config", None), "quant_method", None)
    if getattr(model, "is_quantized", False) or getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"the model is quantized ({method or 'unknown method'}); load it without quantization, prune, then quantize."
        )
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
            raise ModelError(f"{name} is sharded over processes (DTensor); prune the model before it is sharded.")
    merged = next((name for name, module in model.named_modules() if getattr(module, "merged", None) is True), None)
    if merged is not None:
        raise ModelError(
            f"the adapter at {merged} is merged into its weights; unmerge it, or merge_and_unload() and prune the result."
        )
    offloaded = {
        id(parameter) for module in model.modules() if hasattr(module, "_hf_hook") for parameter in module.parameters()
    }
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta" and id(parameter) not in offloaded:
            raise ModelError(
                f"{name} is on the meta device and has no weights; load the model with from_pretrained first."
            )


# ---------------------------------------------------------------------------------------------------- counting


def _targeted(model: nn.Module) -> Iterator[tuple[Any, list[Site]]]:
    """Each block with those of its sites that were pruned, or with all of them where nothing is known."""
    known = report(model)
    names = {site.name for site in known.sites} if known else set(_claim(model).get("sites", ()))
    inventory = find_sites(unwrap(model))
    for block in inventory.blocks:
        sites = [site for site in inventory.sites.get(block.index, []) if not names or site.name in names]
        if sites:
            yield block, sites


def _claim(model: nn.Module) -> dict[str, Any]:
    claim = getattr(getattr(unwrap(model), "config", None), CONFIG_KEY, None)
    return claim if isinstance(claim, dict) else {}


def masks(model: nn.Module) -> dict[str, torch.Tensor]:
    """The mask (out, in) of every pruned site by its name, True keeps: the mask is `weight != 0`.

    For a model that carries no report all sites are given. The masks lie on the CPU.
    """
    found = {}
    for block, sites in _targeted(model):
        with block.loaded():
            for site in sites:
                found[site.name] = (read(unwrap(model), site) != 0).cpu()
    return found


def count(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Zeros and size of every pruned site (of all sites, where nothing is known), counted now."""
    found = {}
    for block, sites in _targeted(model):
        with block.loaded():
            for site in sites:
                weight = read(unwrap(model), site)
                found[site.name] = (weight.numel() - int(torch.count_nonzero(weight)), weight.numel())
    return found


def is_sparse(model: nn.Module) -> bool:
    """Whether the model was pruned by hf_sparse, or has at least a tenth of zeros in its sites."""
    if _claim(model) or report(model) is not None:
        return True
    counted = count(model).values()
    return sum(zeros for zeros, _ in counted) >= 0.1 * max(1, sum(size for _, size in counted))


def matrix_weights(module: nn.Module) -> int:
    """Number of weights in all matrices of a block, whether they are sites or not."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim >= 2)


# ---------------------------------------------------------------------------------------------------- what a model carries


def report(model: nn.Module) -> Report | None:
    """The report of the pruning that made the model, or None; it came with `prune_` or with the checkpoint."""
    found = getattr(model, _REPORT, None) or getattr(unwrap(model), _REPORT, None)
    return found if isinstance(found, Report) else None


def attach_report(model: nn.Module, report: Report) -> None:
    object.__setattr__(model, _REPORT, report)


def attach(model: nn.Module, report: Report) -> None:
    """Let a model know its report, and its config what was done."""
    attach_report(model, report)
    if hasattr(model, "config"):
        setattr(model.config, CONFIG_KEY, claim(report))


def claim(report: Report) -> dict[str, Any]:
    """What config.json says under `hf_sparse`: the resolved config with every field, totals, data fingerprint."""
    return {
        "format": FORMAT,
        "config": report.config,
        "totals": report.totals(),
        "calibration": report.calibration,
        "version": report.versions.get("hf_sparse", ""),
    }


def recounted(model: nn.Module) -> dict[str, Any]:
    """The claim with totals counted now, so that it stays true after training."""
    counted = count(model)
    zeros, size = sum(zeros for zeros, _ in counted.values()), sum(size for _, size in counted.values())
    all_matrices = sum(matrix_weights(block.module) for block in find_sites(unwrap(model)).blocks)
    known = report(model)
    totals = {
        "zeros": zeros, "sites": len(counted), "sparsity": zeros / max(1, size), "block_sparsity": zeros / max(1, _all(known, all_matrices)),
    }  # fmt: skip
    return {**_claim(model), "totals": totals}


def _all(known: Report | None, counted: int) -> int:
    return sum(block.all_matrices for block in known.blocks) if known else counted


def write_side_files(model: nn.Module, folder: Path) -> None:
    """Write the report beside the weights."""
    known = report(model)
    if known is not None:
        known.save(folder)


def read_side_files(model: nn.Module, file: Path | None) -> None:
    """Attach the report found beside the weights; a claim of a newer format is refused.

    Raises: CheckpointError for a format that this version does not know or a report that is not one.
    """
    claim: Mapping[str, Any] = _claim(model)
    version = claim.get("format")
    if version != FORMAT:
        raise CheckpointError(
            f"config.json carries hf_sparse format {version!r}; this version reads {FORMAT}. Upgrade hf_sparse."
        )
    if file is not None:
        attach_report(model, Report.load(file))
