"""The live parameters that hold a model's sites, whole or in shards over processes, and the zeros written into them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from hf_sparse.errors import ModelError
from hf_sparse.families import find_sites
from hf_sparse.runtime import refuse_sparse
from hf_sparse.sites import Site, count_zeros, plain_name, view

_CHUNK = 2**18  # weights at a time, so that a widened piece of the mask stays in the cache
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(eq=False)
class Stored:
    """One parameter of a model in training, with the sites that it holds.

    Training code may hold on to the parameter object (an optimizer does), so an exchange of it is an error, not followed.
    """

    module: nn.Module
    attribute: str
    parameter: nn.Parameter
    sites: list[Site]
    group: FSDPModule | None = None  # that shards it, with the parameters beside it
    shape: torch.Size = field(init=False)  # as it was when this was made

    def __post_init__(self) -> None:
        self.shape = self.parameter.shape

    @property
    def name(self) -> str:
        return plain_name(f"{self.sites[0].module}.{self.attribute}")

    def local(self) -> torch.Tensor:
        """What this process holds of the live parameter, detached, sharing its memory.

        Raises: ModelError where the module has another parameter now, or the parameter another shape.
        """
        now = self.module._parameters.get(self.attribute)
        if now is not self.parameter and self.group is not None:
            self.group.reshard()  # a forward pass without a backward pass may leave the gathered copy in its place
            now = self.module._parameters.get(self.attribute)
        if now is not self.parameter or now.shape != self.shape:
            found = "none" if now is None else f"another, of shape {tuple(now.shape)}"
            raise ModelError(
                f"{self.name} was a parameter of shape {tuple(self.shape)} when training began and is {found} now, so its mask no longer "
                "belongs to it; change the model (resize, convert, wrap) before training begins, or make the masks anew behind the change."
            )
        data = self.parameter.detach()
        return data.to_local() if isinstance(data, DTensor) else data

    def whole(self) -> torch.Tensor:
        """The whole parameter, detached: gathered from all processes if it is in shards, else without a copy."""
        self.local()
        data = self.parameter.detach()
        return data.full_tensor() if isinstance(data, DTensor) else data

    def piece(self, whole: torch.Tensor) -> torch.Tensor:
        """The part of a tensor of the whole parameter's shape that lies where `local` does; no communication."""
        data = self.parameter
        if not isinstance(data, DTensor):
            return whole
        everywhere = [Replicate()] * data.device_mesh.ndim
        spread = DTensor.from_local(whole, data.device_mesh, everywhere, run_check=False)
        return spread.redistribute(placements=data.placements).to_local()

    @property
    def sharded(self) -> bool:
        return isinstance(self.parameter, DTensor)


def stored_parameters(model: nn.Module) -> list[Stored]:
    """The parameters that hold the sites of a model, as they are now: call it when the model is wrapped and sharded.

    Raises: ModelError for models whose parameters have no shape of their own (FSDP's first version, DeepSpeed ZeRO stage 3), no
    values (offloaded, on the meta device), or no plain numbers (quantized).
    """
    _check(model)
    groups = {name: module for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    for sharded in groups.values():
        sharded.reshard()  # what a forward pass without a backward pass gathered is no parameter of the training
    found: dict[int, Stored] = {}
    for site in find_sites(model).all():
        module = model.get_submodule(site.module)
        parameter = module._parameters[site.parameter]
        if parameter is None or parameter.device.type == "meta":
            raise ModelError(
                f"{site.name} is offloaded or on the meta device, where nothing can be trained; load the model without device_map or with "
                "one that keeps all of it in memory."
            )
        group = _group(groups, site.module)
        found.setdefault(id(parameter), Stored(module, site.parameter, parameter, [], group)).sites.append(site)
    return list(found.values())


def _group(groups: Mapping[str, FSDPModule], name: str) -> FSDPModule | None:
    """The innermost of the modules that FSDP version 2 has sharded around a module."""
    while name and name not in groups:
        name = name.rpartition(".")[0]
    return groups.get(name)


def _check(model: nn.Module) -> None:
    refuse_sparse(model, "be trained")
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    if settings is not None or getattr(model, "is_quantized", False):
        method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
        raise ModelError(
            f"{type(model).__name__} is quantized ({getattr(method, 'value', method) or 'unknown method'}), and zeros are kept in plain "
            "weights only; load it without quantization, train it with its zeros kept, then quantize."
        )
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ModelError(
                f"{name or type(model).__name__} is wrapped by the first version of FSDP, which flattens weights so that their sites "
                "cannot be told apart; use its second version (fsdp_version: 2)."
            )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id") and parameter.numel() == 0:
            raise ModelError(
                f"{name} is partitioned by DeepSpeed ZeRO stage 3, whose parameters are empty outside their own layer; use stage 1 or "
                "2, or FSDP version 2."
            )


def member_mask(stored: Stored) -> torch.Tensor | None:
    """Which weights of the whole parameter belong to its sites, bool; None where all do."""
    if sum(site.size for site in stored.sites) == stored.parameter.numel():
        return None
    member = torch.zeros(stored.parameter.shape, dtype=torch.bool, device=stored.parameter.device)
    for site in stored.sites:
        view(member, site).fill_(True)
    return member


# ---------------------------------------------------------------------------------------------------- zeros


def bits(kept: torch.Tensor) -> torch.Tensor:
    """A bool mask as `zero_` takes it: int8, all bits set where a weight is kept."""
    return kept.to(torch.int8).neg_()


def zero_(weights: torch.Tensor, kept: torch.Tensor) -> None:
    """Make +0.0 of every weight that is not kept, whatever it was (NaN included); `kept` comes from `bits`.

    An `and` with the weights' bits: exact in every number format, and on a CPU ten times as fast as `masked_fill_`.
    """
    integers = weights.view(_INTEGERS[weights.element_size()])
    if weights.device.type != "cpu" or not weights.is_contiguous() or not kept.is_contiguous():
        integers.bitwise_and_(kept)
        return
    wide = torch.empty(min(_CHUNK, weights.numel()), dtype=integers.dtype)
    for part, mask in zip(integers.view(-1).split(_CHUNK), kept.view(-1).split(_CHUNK), strict=True):
        part.bitwise_and_(wide[: part.numel()].copy_(mask))


def zero_master_(parameter: nn.Parameter, kept: torch.Tensor) -> None:
    """The same for what DeepSpeed (ZeRO stage 1 and 2) makes its steps on: this process's part of a copy in single precision.

    The weights are made of it in each step, so it need not be zero for them, but `zero_to_fp32.py` reads it from checkpoints.
    """
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is not None:
        part, copy = mapping.lp_fragment_address, mapping.hp_fragment.detach()
        zero_(copy, kept.view(-1)[part.start : part.start + part.numel].to(copy.device))


def over_processes(values: torch.Tensor) -> torch.Tensor:
    """Sums over all processes; the values themselves where there is only one. All processes have to call it."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return values
    backend = distributed.get_backend()
    on_host = backend in ("gloo", "mpi") or "cpu:" in str(distributed.get_backend_config())
    device = values.device if on_host else torch.accelerator.current_accelerator()
    summed = values.to(device, copy=True)
    distributed.all_reduce(summed)
    return summed.to(values.device)


def zeros_and_size(parameters: Iterable[Stored]) -> tuple[int, int]:
    """Zeros and weights in whole parameters, counted now, each process what it holds. All processes have to call it."""
    parameters = list(parameters)
    found = torch.tensor([[count_zeros(one.local()), one.local().numel()] for one in parameters]).view(-1, 2)
    if any(one.sharded for one in parameters):
        found = over_processes(found)
    # What several processes hold was counted as often as that.
    zeros = [count * one.shape.numel() // size for one, (count, size) in zip(parameters, found.tolist(), strict=True)]
    return sum(zeros), sum(one.shape.numel() for one in parameters)
