"""Where channels lie in stored tensors, and how they change places there."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from hf_sparse.errors import CheckpointError
from hf_sparse.report import Report
from hf_sparse.sites import Site, plain_name, stored_rows


class Place(NamedTuple):
    """Evenly spaced positions along one dimension of a tensor, or of one expert's slice of it."""

    tensor: str  # as `named_parameters` has it
    at: tuple[int | slice, ...]  # the last one holds the channels

    def __str__(self) -> str:
        """As numpy would write it: `model.layers.0.mlp.experts.gate_up_proj[3, :, 0:96:2]`."""
        return f"{plain_name(self.tensor)}[{', '.join(_written(one) for one in self.at)}]"

    @classmethod
    def parse(cls, text: str) -> "Place":
        match = re.fullmatch(r"([^\[\]]+)\[((?:\d{1,12}, )?(?::, )*)(\d{1,12}:\d{1,12}(?::\d{1,12})?)\]", text)
        if not match:
            raise CheckpointError(f"{text!r:.80} is no place of channels in a tensor.")
        before = [slice(None) if part == ":" else int(part) for part in match[2].split(", ")[:-1]]
        return cls(match[1], (*before, slice(*map(int, match[3].split(":")))))

    def take_(self, tensor: torch.Tensor, order: torch.Tensor) -> None:
        """Put channel `order[i]` where channel i was."""
        part = tensor.detach()[self.at]
        dimension = sum(isinstance(one, slice) for one in self.at) - 1
        if part.shape[dimension] != len(order):
            raise IndexError(f"{part.shape[dimension]} channels cannot be put in an order of {len(order)}")
        part.copy_(part.index_select(dimension, order.to(part.device)))


def _written(one: int | slice) -> str:
    if isinstance(one, int):
        return str(one)
    if one.start is None:
        return ":"
    return f"{one.start}:{one.stop}" + (f":{one.step}" if one.step not in (None, 1) else "")


def spaced(positions: Sequence[int]) -> slice | None:
    """The slice that takes exactly these positions in this order, if there is one."""
    step = positions[1] - positions[0] if len(positions) > 1 else 1
    if step < 1 or list(positions) != list(range(positions[0], positions[0] + step * len(positions), step)):
        return None
    return slice(positions[0], positions[-1] + 1, step)


@dataclass(frozen=True)
class Channels:
    """Channels that may change places with each other, everywhere at once."""

    name: str
    size: int
    places: tuple[Place, ...]

    def take_(self, model: nn.Module, order: torch.Tensor) -> None:
        """Reorder the channels in a model; a tensor that has several names is reordered once."""
        seen: dict[tuple[int, str], str] = {}
        for place in self.places:
            path, _, name = place.tensor.rpartition(".")
            tensor = getattr(model.get_submodule(path), name)
            where = str(place).removeprefix(plain_name(place.tensor))
            if seen.setdefault((id(tensor), where), place.tensor) == place.tensor:
                place.take_(tensor, order)


def columns_of(site: Site, columns: Sequence[int]) -> list[Place] | None:
    """Where input columns of a site lie; None where they are not evenly spaced."""
    full = f"{site.module}.{site.parameter}"
    if site.stacked is not None and site.expert is not None and site.transposed:  # (expert, in) in one dimension
        columns = [site.expert * site.shape[1] + column for column in columns]
    found = spaced(columns)
    return None if found is None else [Place(full, (*_leading(site, site.transposed), found))]


def rows_of(site: Site, rows: Sequence[int], bias: tuple[str, int] | None) -> list[Place] | None:
    """Where output rows of a site and of its bias (name, dimensions) lie; None where they are not evenly spaced."""
    stored = stored_rows(site)[list(rows)].tolist()
    if site.stacked is not None and site.expert is not None and not site.transposed:
        stored = [site.expert * site.shape[0] + row for row in stored]
    found = spaced(stored)
    if found is None:
        return None
    places = [Place(f"{site.module}.{site.parameter}", (*_leading(site, not site.transposed), found))]
    if bias is not None:
        name, dimensions = bias
        if dimensions == 1 and site.expert is not None:
            return None  # all experts share it
        expert = () if dimensions == 1 or site.expert is None else (site.expert,)
        places.append(Place(f"{site.module}.{name}", (*expert, found)))
    return places


def _leading(site: Site, first: bool) -> tuple[int | slice, ...]:
    """What stands before the channels' own index: the expert, and the other dimension where that comes first."""
    expert = (site.expert,) if site.expert is not None and site.stacked is None else ()
    return (*expert, *(() if first else (slice(None),)))


def bias_of(model: nn.Module, site: Site) -> tuple[str, int] | None:
    """Name and number of dimensions of the bias that belongs to the site's parameter."""
    module = model.get_submodule(site.module)
    for name in (re.sub(r"weight$", "bias", site.parameter), f"{site.parameter}_bias"):
        bias = getattr(module, name, None)
        if name != site.parameter and isinstance(bias, torch.Tensor):
            return name, bias.ndim
    return None


def aliases(model: nn.Module) -> dict[str, list[str]]:
    """All names of every parameter that has several, as tied embeddings and shared layers have."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: shared for shared in names.values() if len(shared) > 1 for name in shared}


def permuted_state_dict(report: Report, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The dense model's weights in the order of the pruned one's, so that each kept weight can be traced to where it came from.

    `state_dict` is the dense model's, `model.state_dict()`; it is not changed. For every name in `report.permutations`, at each
    of its places: `new[..., i] = old[..., order[i]]`.

    Raises: CheckpointError where report and weights do not belong together.
    """
    new = dict(state_dict)
    copied: set[str] = set()
    for name, order in report.permutations.items():
        places = [Place.parse(text) for text in report.permuted.get(name, ())]
        present = [place for place in places if place.tensor in new]
        if not present:
            raise CheckpointError(
                f"none of the tensors that {name!r} reorders is among the weights; give model.state_dict()."
            )
        _take_all(new, copied, name, present, order)
    return new


def _take_all(
    new: dict[str, torch.Tensor], copied: set[str], name: str, places: Iterable[Place], order: list[int]
) -> None:
    if sorted(order) != list(range(len(order))):
        raise CheckpointError(f"the permutation {name!r} in the report does not hold each index once.")
    for place in places:
        if place.tensor not in copied:
            new[place.tensor] = new[place.tensor].clone()
            copied.add(place.tensor)
        try:
            place.take_(new[place.tensor], torch.tensor(order))
        except (IndexError, RuntimeError) as error:
            raise CheckpointError(f"{place} does not fit the weights; are they the model's that was pruned?") from error
