"""Keeps the zeros of a model that is trained: the masks of its sites, bound to the live parameters."""

import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hf_sparse import checkpoint
from hf_sparse.errors import CheckpointError, ModelError
from hf_sparse.sites import Site, count_zeros, view
from hf_sparse.stored import (
    Stored,
    bits,
    member_mask,
    over_processes,
    stored_parameters,
    zero_,
    zero_master_,
    zeros_and_size,
)

_SPARSE = 0.01  # share of zeros from which a site counts as sparse where nothing is known of the model
_NAMED = 3

Counts = dict[str, tuple[int, int]]  # site name -> zeros, size


class _Kept(NamedTuple):
    stored: Stored
    mask: torch.Tensor  # of this process's part of the parameter, int8, all bits set where a weight is kept


class KeptMasks:
    """The zeros of a model's sites as they stand when this is made; `apply_()` makes them zero again.

    For training loops of your own, two lines: `kept = KeptMasks(model)` once the model is wrapped, sharded and on its device
    (behind `accelerator.prepare`), and `kept.apply_()` behind each `optimizer.step()`. Norms, biases, embeddings, heads and
    adapters are never touched. It takes one byte for each weight of the parameters that hold zeros.

    A model that has fewer zeros than its report says is warned about, and what is zero now is kept. Where `resumed` says what the
    weights were read from, such as "the checkpoint of step 4", it is refused instead, unless each site has the `zeros` (by its name)
    that whoever wrote them kept.

    Raises: ModelError where there is nothing to keep, or the weights are where they cannot be kept; CheckpointError for a resumed
    checkpoint that has lost zeros.
    """

    def __init__(self, model: nn.Module, *, resumed: str | None = None, zeros: Mapping[str, int] | None = None) -> None:
        model = checkpoint.unwrap(model)
        self.counts: Counts = {}  # at the start, of every site
        self.notes: list[str] = []
        self._kept: list[_Kept] = []
        known = checkpoint.report(model)
        pruned = {site.name for site in known.sites} if known else set()
        stored = stored_parameters(model)
        free = [site.name for one in stored for site in self._add(one, pruned)]
        if free:
            self.notes.append(f"{_some(free)}: all weights are zero, so they are left free to train")
        self._compare(model, resumed, zeros, any(one.parameter.requires_grad for one in stored))
        found = [self.counts[name] for name in self.counts.keys() - set(free)]
        if not any(count >= (1 if known else _SPARSE * size) for count, size in found):
            raise ModelError(
                f"there is nothing to keep: {self.zeros} of {self.size} weights in the sites of {type(model).__name__} are zero. "
                "Prune it first, with from_pretrained(..., sparsity_config=...) or hf_sparse.prune_(model, config), or while it "
                "trains, with trainer_callbacks.Sparsify or GradualPruning, which keep their masks themselves."
            )
        for note in self.notes:
            warnings.warn(note, stacklevel=2)

    def _add(self, stored: Stored, pruned: set[str]) -> list[Site]:
        """Count a parameter's sites and keep its zeros, but for the sites given back: fresh weights that begin at zero."""
        whole = stored.whole()
        for site in stored.sites:
            self.counts[site.name] = (count_zeros(view(whole, site)), site.size)
        free = [site for site in stored.sites if self.counts[site.name][0] == site.size and site.name not in pruned]
        dropped = whole == 0
        member = member_mask(stored)
        if member is not None:
            dropped &= member
        for site in free:
            view(dropped, site).fill_(False)
        if bool(dropped.any()):
            self._kept.append(_Kept(stored, bits(~stored.piece(dropped))))
        return free

    def _compare(self, model: nn.Module, resumed: str | None, zeros: Mapping[str, int] | None, trains: bool) -> None:
        """Look for zeros that are promised and not there."""
        missing = missing_zeros(model, self.counts)
        lost = missing if zeros is None else _fewer(self.counts, zeros)
        if resumed and lost:
            why = (
                "it was written by a training that did not keep the masks; resume from an older one, or prune again"
                if trains
                else "it holds adapters, and the model under them is not the sparse one that they were trained on; load that"
            )
            raise CheckpointError(f"{resumed} has lost zeros: {lost}. Perhaps {why}.")
        if missing:
            self.notes.append(f"the model has fewer zeros than its report says: {missing}; what is zero now is kept")

    @property
    def zeros(self) -> int:
        """Zeros in all sites at the start."""
        return sum(zeros for zeros, _ in self.counts.values())

    @property
    def size(self) -> int:
        """Weights in all sites."""
        return sum(size for _, size in self.counts.values())

    @torch.no_grad()
    def apply_(self) -> None:
        """Write the zeros into all parameters that train.

        Raises: ModelError where a parameter was replaced by another one.
        """
        for number in range(len(self._kept)):
            stored, mask = self._here(number)
            if stored.parameter.requires_grad:  # it does not where it is frozen under an adapter
                zero_(stored.local(), mask)
                zero_master_(stored.parameter, mask)

    @torch.no_grad()
    def apply_to_gradients_(self) -> None:
        """Write zeros into the gradients of the weights that are kept at zero.

        Only optimizers that hold other weights than the model has (such as schedule-free ones, which swap them in for evaluation)
        need it, before each step.
        """
        for number in range(len(self._kept)):
            stored, mask = self._here(number)
            gradient = stored.parameter.grad
            if gradient is not None:
                zero_(gradient.to_local() if isinstance(gradient, DTensor) else gradient, mask)

    def _here(self, number: int) -> _Kept:
        """A parameter with its mask on its device, whose live values are still those of the start."""
        kept = self._kept[number]
        device = kept.stored.local().device
        if kept.mask.device != device:
            kept = self._kept[number] = kept._replace(mask=kept.mask.to(device))
        return kept

    @torch.no_grad()
    def lost(self) -> int:
        """How many of the zeros are none at this moment, over all processes."""
        kept = [self._here(number) for number in range(len(self._kept))]
        lost = sum(int(torch.count_nonzero(stored.local()[mask == 0])) for stored, mask in kept)
        return int(over_processes(torch.tensor(lost))) if any(stored.sharded for stored, _ in kept) else lost

    @torch.no_grad()
    def sparsity(self) -> float:
        """The share of zeros in the parameters with kept zeros, counted at this moment."""
        zeros, size = zeros_and_size(stored for stored, _ in self._kept)
        return zeros / max(1, size)


def missing_zeros(model: nn.Module, counts: Mapping[str, tuple[int, int]]) -> str | None:
    """What a model's sites lack of the zeros that its report or its config promises, in words; None where nothing is missing."""
    known = checkpoint.report(model)
    if known is not None:
        return _fewer(counts, {site.name: site.zeros for site in known.sites if site.name in counts})
    promised = checkpoint.promised_zeros(model)
    found = sum(zeros for zeros, _ in counts.values())
    if promised is None or found >= promised:
        return None
    least = sorted(counts, key=lambda name: counts[name][0] / counts[name][1])
    return f"{found} of {promised} zeros are there; the least have {_some([f'{name} ({counts[name][0]})' for name in least])}"


def _fewer(counts: Mapping[str, tuple[int, int]], wanted: Mapping[str, int]) -> str | None:
    """The sites with fewer zeros than wanted, in words; None where there are none. A site that is not there has no zeros."""
    found = {name: counts[name][0] if name in counts else 0 for name in wanted}
    fewer = [f"{name} ({found[name]} of {zeros})" for name, zeros in wanted.items() if found[name] < zeros]
    return _some(fewer) if fewer else None


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
