"""What a sparse model knows about itself: read from its weights, kept in its config, written beside its weights."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_sparse.blocks import Block, has_source
from hf_sparse.claim import FORMAT, Claim
from hf_sparse.errors import CheckpointError, HfSparseError, ModelError
from hf_sparse.families import Inventory, find_sites
from hf_sparse.plan import select
from hf_sparse.recovery import writable
from hf_sparse.report import Report
from hf_sparse.runtime import refuse_sparse
from hf_sparse.sites import Site, count_zeros, plain_name, read, view
from hf_sparse.storage.names import forget_format

CONFIG_KEY = "hf_sparse"
_REPORT = "_hf_sparse_report"


# ---------------------------------------------------------------------------------------------------- models and wrappers


def unwrap(model: nn.Module) -> nn.Module:
    """The Transformers model inside torch.compile, DataParallel and PEFT wrappers; pruning it prunes what they run."""
    while True:
        kind = type(model).__name__
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
    if not isinstance(model, nn.Module):
        raise ModelError(f"a {type(model).__name__} cannot be pruned; give a model, such as from_pretrained returns.")
    refuse_sparse(model, "be pruned")
    kind = type(model).__name__
    if kind in ("FullyShardedDataParallel", "DeepSpeedEngine") or kind.startswith("FSDP"):
        raise ModelError(f"a model wrapped as {kind} has its weights in shards; prune it before you wrap it.")
    config = getattr(model, "config", None)
    forget_format(config)
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
        if parameter.device.type == "meta" and id(parameter) not in offloaded and not has_source(model):
            raise ModelError(
                f"{name} is on the meta device and has no weights; load the model with from_pretrained first."
            )


# ---------------------------------------------------------------------------------------------------- counting


def _targeted(model: nn.Module) -> Iterator[tuple[Block, list[Site]]]:
    """Each block with those of its sites that were pruned, or with all of them where nothing is known."""
    known = report(model)
    inventory = find_sites(unwrap(model))
    names = {site.name for site in known.sites} if known else _claimed_names(model, inventory)
    for block in inventory.blocks:
        sites = [site for site in inventory.sites.get(block.index, []) if not names or site.name in names]
        if sites:
            yield block, sites


def _claimed_names(model: nn.Module, inventory: Inventory) -> set[str]:
    """The sites that the config in the claim targets; none where the claim cannot be used."""
    claimed = claim_of(model)
    try:
        chosen, _ = select(inventory, claimed.sparsity_config()) if claimed else ({}, {})
    except HfSparseError:
        return set()
    return {site.name for sites in chosen.values() for site in sites}


def claim_of(model: nn.Module) -> Claim | None:
    """What the config of a model claims; None where it claims nothing.

    Raises: CheckpointError for a claim that is none, as it may come from anyone.
    """
    values = getattr(getattr(unwrap(model), "config", None), CONFIG_KEY, None)
    return None if values is None else Claim.parse(values)


def promised_zeros(model: nn.Module) -> int | None:
    """How many zeros the config of a model claims, as of the last count; None where it claims none."""
    claimed = claim_of(model)
    return None if claimed is None else claimed.zeros


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
                found[site.name] = (count_zeros(weight), weight.numel())
    return found


def is_sparse(model: nn.Module) -> bool:
    """Whether the weights say so: zeros in the sites that hf_sparse pruned, or a tenth of zeros where nothing is known."""
    counted = count(model).values()
    zeros, size = sum(zeros for zeros, _ in counted), sum(size for _, size in counted)
    return zeros > 0 if claim_of(model) or report(model) is not None else zeros >= 0.1 * max(1, size)


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
    told: dict[str, Any] = writable(
        {
            "format": FORMAT,
            "config": report.config,
            "totals": report.totals(),
            "calibration": {key: value for key, value in (report.calibration or {}).items() if key != "items"} or None,
            "version": report.versions.get("hf_sparse", ""),
        }
    )
    return told


def detach(model: nn.Module) -> None:
    """Take back what a model claims about its sparsity."""
    if hasattr(model, _REPORT):
        object.__delattr__(model, _REPORT)
    if CONFIG_KEY in getattr(getattr(model, "config", None), "__dict__", {}):
        delattr(model.config, CONFIG_KEY)


def recounted(model: nn.Module, state_dict: Mapping[str, torch.Tensor] | None = None) -> dict[str, Any]:
    """The claim with totals counted now, in what is going to be saved, so that it stays true after training.

    Totals are left out where they cannot be counted: weights in shards, or a state dict without the sites' tensors.
    """
    claimed = claim_of(model)
    claim = {key: value for key, value in claimed.to_dict().items() if key != "totals"} if claimed else {}
    if any(type(parameter.data).__name__ == "DTensor" for parameter in model.parameters()) and state_dict is None:
        return claim
    try:
        counted = count(model) if state_dict is None else _counted_in(state_dict, model)
    except (KeyError, RuntimeError):
        return claim
    zeros, size = sum(zeros for zeros, _ in counted.values()), sum(size for _, size in counted.values())
    known = report(model)
    all_matrices = max(size, sum(block.all_matrices for block in known.blocks) if known else 0)
    totals = {
        "zeros": zeros, "sites": len(counted), "sparsity": zeros / max(1, size), "block_sparsity": zeros / max(1, all_matrices),
    }  # fmt: skip
    return {**claim, "totals": totals}


def _counted_in(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, tuple[int, int]]:
    found = {}
    for _, sites in _targeted(model):
        for site in sites:
            name = f"{site.module}.{site.parameter}"
            weight = view(state_dict[name if name in state_dict else plain_name(name)], site)
            found[site.name] = (count_zeros(weight), weight.numel())
    return found


def write_side_files(model: nn.Module, folder: Path) -> None:
    """Write the report beside the weights."""
    known = report(model)
    if known is not None:
        known.save(folder)


def read_side_files(model: nn.Module, file: Path | None) -> None:
    """Check what the config claims, and attach the report found beside the weights.

    Raises: CheckpointError for a claim or a report that is none, or of a format that this version does not know.
    """
    claim_of(model)
    if file is None:
        return
    try:
        attach_report(model, Report.load(file))
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} Delete the file, or call hf_sparse.uninstall() before loading; the weights do not need it."
        ) from error
