"""Moves the masks of a model in training towards their target; the values of what is dropped wait until the masks are frozen."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hf_sparse import checkpoint
from hf_sparse.allot import shares
from hf_sparse.config import SparsityConfig
from hf_sparse.errors import CheckpointError, ConfigError, ModelError
from hf_sparse.families import find_sites
from hf_sparse.forwards import full_precision
from hf_sparse.gradual.feeding import Feeding
from hf_sparse.gradual.fitting import fitting
from hf_sparse.gradual.held import Held, hold
from hf_sparse.gradual.inputs import Measured, TrainingInputs
from hf_sparse.gradual.masks import due, partial_mask
from hf_sparse.gradual.scores import scores_of
from hf_sparse.observe import operand_of
from hf_sparse.plan import SitePlan, plan_site, select
from hf_sparse.registry import METRICS
from hf_sparse.sites import count_zeros, view
from hf_sparse.stored import over_processes, stored_parameters

_SPARSE = 0.01  # share of zeros from which a site is taken for sparse
_NAMED = 3


class Gradual:
    """The masks of a model in training, between those that it began with and those of a configuration.

    Made once the model is wrapped, sharded and on its device. `saved` is what `progress` gave when the weights were saved, where the
    training was resumed. Until `freeze_` it takes, for each parameter with targeted sites, one byte for each weight and a copy of the
    dropped ones; an update needs room for one more parameter in single precision, its mask and the order of its scores. All processes
    of a training make the same masks; those with shards gather one parameter at a time.

    Raises: ConfigError where the configuration cannot be met step by step, or a site is sparser than its target; ModelError for models
    that are quantized, whose targeted weights do not train, or are where they cannot be changed; CheckpointError where the weights
    have lost zeros since they were saved.
    """

    def __init__(self, model: nn.Module, config: SparsityConfig, saved: Mapping[str, Any] | None = None) -> None:
        self.model = checkpoint.unwrap(model)
        self.config = fitting(config)
        self._stored = stored_parameters(self.model)
        self.inventory = find_sites(self.model)
        self.chosen, self.left = select(self.inventory, self.config)
        self.shares = shares(self.inventory, self.chosen, self.config)
        self.sites = {site.name: site for site in self.inventory.all()}
        self.earlier = checkpoint.report(model)
        self.frozen = False
        self.seconds = 0.0  # spent in updates
        saved = saved or {}
        self.tokens: dict[str, int] = dict(saved.get("tokens") or {})  # that had reached a site at the last update
        self.fell_back = set(
            saved.get("fell_back", ())
        )  # sites that it scored by magnitude, as no token had reached them
        self._changed = int(saved.get("changed", 0))  # weights that were dropped or came back, before this was made
        self._feeding = Feeding(self.model, self.inventory) if self._entry.consumer_needs else None
        self._unresolved: dict[str, str] | None = saved.get("unresolved")  # why nothing is known of what a site feeds
        self.plans = self._planned()
        self.dropped = self.count()  # by the mask of each site
        self.held = self._hold()
        self.began: dict[str, int] = dict(
            saved.get("began", self.dropped)
        )  # zeros of each site when the training began
        self._check(saved.get("dropped", {}))

    @property
    def _entry(self) -> Any:
        return METRICS[self.config.metric]

    @property
    def needs_inputs(self) -> bool:
        """Whether updates need what was measured while the model trains."""
        return bool(self._entry.needs or self._entry.consumer_needs)

    def progress(self) -> dict[str, Any]:
        """What cannot be told from the weights, as JSON holds it."""
        names = [site.name for held in self.held for site in held.moving]
        changed = sum(held.changed for held in self.held if not held.stored.sharded)
        return {
            "began": {name: zeros for name, zeros in self.began.items() if name in self.plans},
            "dropped": {name: self.dropped[name] for name in names}, "tokens": self.tokens, "fell_back": sorted(self.fell_back),
            "changed": self._changed + changed, "unresolved": self._unresolved,
        }  # fmt: skip

    # ------------------------------------------------------------------------------------------------ at the start

    def _planned(self) -> dict[str, SitePlan]:
        known = self._unresolved if self._unresolved is not None else {}
        feeds = self._feeding.feeds(known) if self._feeding and self._unresolved is not None else {}
        return {
            site.name: plan_site(site, self.config, feeds.get(index, []), self.shares[site.name], known)
            for index, sites in self.chosen.items()
            for site in sites
        }

    @torch.no_grad()
    def _hold(self) -> list[Held]:
        """The parameters with targeted sites, or with sites that were sparse before, with the zeros that there are."""
        known = {site.name for site in self.earlier.sites} if self.earlier else set()
        dense = {name: plan.dense for name, plan in self.plans.items()}
        found = []
        for stored in self._stored:
            held = hold(stored, dense, {name for name in self.dropped if name in known or self._is_sparse(name)})
            if held.targeted and not stored.parameter.requires_grad:
                raise ModelError(
                    f"{held.targeted[0].name} does not train (under an adapter, or because its gradient was turned off), so it cannot be pruned step by "
                    "step: prune first, with hf_sparse.prune_(model, config), and train then; or let the whole model train; or leave it out "
                    "with exclude."
                )
            if any(self.dropped[site.name] for site in (*held.moving, *held.fixed)):
                held.take_up_()
            if held.targeted or held.fixed:
                found.append(held)
        return found

    def _is_sparse(self, name: str) -> bool:
        """Whether a site has enough zeros not to have them by chance, and is not one of fresh weights that are all zero."""
        return _SPARSE * self.sites[name].size <= self.dropped[name] < self.sites[name].size

    def _check(self, saved: Mapping[str, int]) -> None:
        """Refuse weights that have lost zeros since they were saved, and sites that began with more than they shall have."""
        lost = [
            f"{name} ({self.dropped[name]} of {zeros})"
            for name, zeros in saved.items()
            if self.dropped.get(name, 0) < zeros
        ]
        if lost:
            raise CheckpointError(
                f"the resumed weights hold fewer zeros than their masks had dropped when they were saved, in {_some(lost)}. Perhaps the Trainer "
                "did not load them (for mixtures of experts some versions of Transformers do not; then make the model with "
                "from_pretrained from the checkpoint), or they were trained without their masks since."
            )
        above = []
        for name, plan in self.plans.items():
            zeros = self.began.get(name, 0)
            if zeros >= _SPARSE * plan.site.size and zeros > (target := _target(plan, self.rounding)):
                above.append(f"{name} ({zeros} of {plan.site.size}, target {target})")
        if above:
            raise ConfigError(
                f"the target is less sparse than the model was when training began, in {_some(above)}; give a higher sparsity, leave these "
                "sites out with exclude, or start from the dense model."
            )

    @property
    def rounding(self) -> str:
        return str(self.config.options_of("unstructured")["rounding"])

    # ------------------------------------------------------------------------------------------------ step by step

    def inputs(self) -> TrainingInputs:
        """Measures what an update needs."""
        wanted = {
            index: self.inventory.sites[index] if self._feeding else [site for site in sites if not self.plans[site.name].dense]
            for index, sites in self.chosen.items()
        }  # fmt: skip
        return TrainingInputs(self.model, self.inventory, wanted, self._feeding if self._unresolved is None else None)

    @torch.no_grad()
    def update_(self, remaining: float, measured: Measured | None = None) -> None:
        """Make all masks anew; `remaining` is the share of the way to the target that is still to go, 1 to 0.

        A site that nothing was measured for is scored by magnitude, and stands in `fell_back`.
        Raises: ModelError for weights that are not finite.
        """
        start = time.monotonic()
        if self._feeding is not None and self._unresolved is None:
            self._unresolved = self._feeding.unresolved()
            self.plans = self._planned()
        self.fell_back.clear()
        if measured is not None:
            moving = [site for held in self.held for site in held.moving]
            self.tokens = {site.name: measured.tokens[operand_of(site)] for site in moving}
        with full_precision():
            for held in self.held:
                if held.moving:
                    held.wake_()
                    held.set_(self._mask(held, held.stored.whole(), remaining, measured))
        self.seconds += time.monotonic() - start

    def _mask(self, held: Held, whole: torch.Tensor, remaining: float, measured: Measured | None) -> torch.Tensor:
        """The mask of a whole parameter, from its weights with the dormant ones back in their places."""
        keep = torch.ones_like(whole, dtype=torch.bool)
        for site in held.fixed:
            view(keep, site).copy_(view(whole, site) != 0)
        for site in held.moving:
            plan = self.plans[site.name]
            weight = view(whole, site).reshape(site.shape)
            scores, fell_back = scores_of(plan, weight, self.config, measured, self.sites)
            if fell_back:
                self.fell_back.add(site.name)
            final = plan.pattern.mask(scores, plan.sparsity, plan.axis, self.rounding)
            target = final.numel() - int(final.sum())
            begin = min(self.began.get(site.name, 0), target)
            self.dropped[site.name] = due(begin, target, remaining)
            mask = partial_mask(scores, final, self.dropped[site.name])
            view(keep, site).copy_(mask.reshape(view(keep, site).shape))
        return keep

    @torch.no_grad()
    def apply_(self) -> None:
        """Write the zeros of all masks as they are; behind each step of the optimizer."""
        for held in self.held:
            held.apply_()

    @torch.no_grad()
    def freeze_(self) -> None:
        """The masks stay as they are from now on; kept weights that are zero count as dropped. The values put aside are let go."""
        for held in self.held:
            held.take_up_()
        self.frozen = True

    # ------------------------------------------------------------------------------------------------ counting

    @torch.no_grad()
    def count(self) -> dict[str, int]:
        """Zeros of every site of the model at this moment; all processes have to call it."""
        found: dict[str, int] = {}
        for stored in self._stored:
            whole = stored.whole()
            found |= {site.name: count_zeros(view(whole, site)) for site in stored.sites}
        return found

    @torch.no_grad()
    def unmet(self) -> list[str]:
        """The targeted sites whose zeros do not make the mask of the target at this moment."""
        found = []
        for held in self.held:
            whole = held.stored.whole()
            for site in held.moving:
                weight = view(whole, site).reshape(site.shape)
                plan = self.plans[site.name]
                mask = plan.pattern.mask(weight.abs(), plan.sparsity, plan.axis, self.rounding)
                if bool(weight[~mask].any()):
                    found.append(site.name)
        return found

    @torch.no_grad()
    def sparsity(self) -> float:
        """Share of zeros in the targeted sites, counted at this moment over all processes."""
        size = sum(plan.site.size for plan in self.plans.values())
        return self._over_processes([held.zeros() for held in self.held]) / size

    def changed_(self) -> int:
        """Weights that were dropped or came back since the last call, over all processes."""
        found = self._changed + self._over_processes([held.changed for held in self.held])
        self._changed = 0
        for held in self.held:
            held.changed = 0
        return found

    @torch.no_grad()
    def lost(self) -> int:
        """Zeros of the masks that are none at this moment, over all processes."""
        return self._over_processes([held.lost() for held in self.held])

    def _over_processes(self, counts: list[int]) -> int:
        """The sum of what was counted in each parameter; what several processes hold counts once."""
        found = torch.tensor(
            [[count, held.stored.local().numel()] for count, held in zip(counts, self.held, strict=True)]
        )
        if any(held.stored.sharded for held in self.held):
            found = over_processes(found)
        each = zip(self.held, found.tolist(), strict=True)
        return sum(count * held.stored.shape.numel() // size for held, (count, size) in each)


def _target(plan: SitePlan, rounding: str) -> int:
    """How many weights the pattern drops, whatever the scores."""
    if plan.dense:
        return 0
    mask = plan.pattern.mask(torch.zeros(plan.site.shape), plan.sparsity, plan.axis, rounding)
    return mask.numel() - int(mask.sum())


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more sites" if more > 0 else "")
