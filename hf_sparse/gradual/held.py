"""One parameter whose weights come and go: its mask, and the values of what is dropped."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from hf_sparse.sites import Site, count_zeros, view
from hf_sparse.stored import Stored, bits, zero_


@dataclass(eq=False)
class Held:
    """A live parameter, or this process's part of it, with its mask.

    `dormant` holds the last values of the dropped weights in their order, in the weights' dtype; None: they are zeros.
    """

    stored: Stored
    targeted: list[Site]
    moving: list[Site]  # those of them whose masks may change
    fixed: list[Site]  # sparse before and not targeted: their zeros stay as they are
    kept: torch.Tensor | None = None  # int8 as `bits` makes it, of this process's part; None: nothing is dropped
    dormant: torch.Tensor | None = None
    changed: int = 0  # weights here that were dropped or came back, since it was last set to zero

    def standing(self, whole: torch.Tensor) -> torch.Tensor:
        """The mask (True keeps) of the whole parameter that its zeros make; zeros of other sites have no say."""
        keep = torch.ones_like(whole, dtype=torch.bool)
        for site in (*self.moving, *self.fixed):
            view(keep, site).copy_(view(whole, site) != 0)
        return keep

    def dropped(self) -> torch.Tensor:
        """Where this process's part is dropped, bool."""
        local = self.stored.local()
        return torch.zeros_like(local, dtype=torch.bool) if self.kept is None else self.kept == 0

    def wake_(self) -> None:
        """Put the dormant values back into the live parameter; `set_` has to follow."""
        if self.dormant is not None:
            self.stored.local()[self.dropped()] = self.dormant

    def set_(self, keep: torch.Tensor) -> None:
        """Drop what a mask of the whole parameter does not keep, and put its values aside."""
        local, before = self.stored.local(), self.dropped()
        dropped = ~self.stored.piece(keep)
        self.dormant = local[dropped] if self.moving else None
        self.kept = bits(~dropped) if bool(dropped.any()) else None
        self.changed += int(torch.count_nonzero(before != dropped))
        self.apply_()

    def take_up_(self) -> None:
        """What is zero stays zero, and there is nothing to put aside."""
        dropped = ~self.stored.piece(self.standing(self.stored.whole()))
        self.kept = bits(~dropped) if bool(dropped.any()) else None
        self.dormant = None
        self.apply_()

    def apply_(self) -> None:
        """Write the zeros."""
        if self.kept is not None:
            zero_(self.stored.local(), self.kept)

    def lost(self) -> int:
        """How many of the zeros in this process's part are none at this moment."""
        return 0 if self.kept is None else int(torch.count_nonzero(self.stored.local()[self.dropped()]))

    def zeros(self) -> int:
        """Zeros of the targeted sites in this process's part."""
        local = self.stored.local()
        if sum(site.size for site in self.targeted) == self.stored.shape.numel():
            return count_zeros(local)
        member = torch.zeros(self.stored.shape, dtype=torch.bool, device=local.device)
        for site in self.targeted:
            view(member, site).fill_(True)
        return count_zeros(local[self.stored.piece(member)])


def hold(stored: Stored, targeted: Mapping[str, bool], sparse: Collection[str]) -> Held:
    """A parameter with its sites by what shall happen to them.

    `targeted` says of each targeted site whether it is left dense; `sparse` names the sites that are sparse now.
    """
    sites = [site for site in stored.sites if site.name in targeted]
    moving = [site for site in sites if not targeted[site.name]]
    fixed = [site for site in stored.sites if site.name not in targeted and site.name in sparse]
    return Held(stored, sites, moving, fixed)
