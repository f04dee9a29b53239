"""What will happen to each site, settled before anything is changed: metric, axis, share and the reasons for fall-backs."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from hf_sparse.config import SparsityConfig
from hf_sparse.errors import ConfigError
from hf_sparse.families import Inventory
from hf_sparse.groups import Feed
from hf_sparse.observe import Operand, operand_of
from hf_sparse.patterns import Pattern
from hf_sparse.registry import METRICS, UPDATES, Entry
from hf_sparse.sites import Site

_ROLES = {"mlp": {"gate", "up", "down"}, "attention": {"q", "k", "v", "o"}}
# Where the name table gives no role, the module path may still tell which part of the block it is.
_PATHS = {
    "mlp": re.compile(
        r"(^|[._])(mlp|ffn?|feed_?forward|experts?|intermediate|fc\d|dense_relu_dense)([._]|\d|$)", re.IGNORECASE
    ),
    "attention": re.compile(r"(attn|attention)", re.IGNORECASE),
}


@dataclass(frozen=True)
class SitePlan:
    """How one site will be pruned."""

    site: Site
    metric: Entry[Any]
    axis: str
    pattern: Pattern
    sparsity: float
    feed: Feed | None  # the consumer whose statistics score the rows, where the metric uses one
    note: str = ""

    @property
    def dense(self) -> bool:
        """Whether the allocation takes nothing from the site, so that it is left as it is."""
        return self.sparsity == 0


def _part_of(site: Site, part: str) -> bool:
    if site.role is not None:
        return site.role in _ROLES[part]
    other = "attention" if part == "mlp" else "mlp"
    return bool(_PATHS[part].search(site.name)) and not (part == "mlp" and _PATHS[other].search(site.name))


def _matches(site: Site, targets: tuple[str, ...]) -> bool:
    return any(
        target == "all" or (_part_of(site, target) if target in _ROLES else fnmatchcase(site.name, target))
        for target in targets
    )


def select(inventory: Inventory, config: SparsityConfig) -> tuple[dict[int, list[Site]], dict[str, str]]:
    """The targeted sites of each block, and the others with the reason.

    Raises: ConfigError where nothing is left to prune, or an `exclude` glob matches no site.
    """
    chosen: dict[int, list[Site]] = {}
    left: dict[str, str] = {}
    targets = (config.targets,) if isinstance(config.targets, str) else config.targets
    for index, sites in inventory.sites.items():
        for site in sites:
            if not _matches(site, targets):
                left[site.name] = "not among the targets"
            elif _matches(site, config.exclude):
                left[site.name] = "excluded"
            else:
                chosen.setdefault(index, []).append(site)
    names = [site.name for site in inventory.all()]
    for field, globs in {"targets": targets, "exclude": config.exclude}.items():
        for glob in globs:
            if glob not in ("all", *_ROLES) and not any(fnmatchcase(name, glob) for name in names):
                raise ConfigError(f"{field}: {glob!r} matches no site; the sites are named like {names[:3]}.")
    if not chosen:
        raise ConfigError(
            f"targets={targets!r} with exclude={config.exclude!r} leaves no site to prune; the sites are named like {names[:3]}."
        )
    return chosen, left


def _axis(entry: Entry[Any], config: SparsityConfig) -> str:
    if config.axis != "auto":
        return config.axis
    key = "axis" if Pattern.parse(config.pattern).group is not None else "unstructured_axis"
    return str(entry.traits.get(key, "input"))


def plan_site(
    site: Site, config: SparsityConfig, feeds: list[Feed], sparsity: float, unresolved: Mapping[str, str]
) -> SitePlan:
    """Settle metric, axis and pattern of one site; a metric that needs a consumer says what takes its place where there is none."""
    entry, pattern = METRICS[config.metric], Pattern.parse(config.pattern).dropping(sparsity)
    if not entry.consumer_needs:
        return SitePlan(site, entry, _axis(entry, config), pattern, sparsity, None)
    roles = entry.traits.get("roles", ())
    feed = next((feed for feed in feeds if feed.producer == site.name), None)
    gated = feed is not None and len({other.producer for other in feeds if other.consumer == feed.consumer}) > 1
    if site.role in roles and feed is not None and gated:  # type: ignore[operator]
        axis = _axis(entry, config)
        note = ""
        if axis == "input" and config.pattern != "unstructured":
            note = f"groups along the input axis: {entry.name} ranks them as magnitude does"
        return SitePlan(site, entry, axis, pattern, sparsity, feed, note)
    other = METRICS[str(entry.traits["otherwise"])]
    if site.role not in roles:  # type: ignore[operator]
        why = f"no {' or '.join(roles)} of a gated MLP"  # type: ignore[arg-type]
    else:
        why = unresolved.get(
            site.name, "its MLP has no gate" if feed is not None else "what it feeds could not be resolved"
        )
    return SitePlan(
        site, other, _axis(other, config), pattern, sparsity, None, f"{other.name} instead of {entry.name}: {why}"
    )


def needs(plans: list[SitePlan], sites: Mapping[str, Site], updates: Sequence[str]) -> dict[Operand, set[str]]:
    """Which statistics of which operand's input the plans and the updates ask for."""
    wanted: dict[Operand, set[str]] = {}
    for plan in plans:
        own = wanted.setdefault(operand_of(plan.site), set())
        if plan.dense:
            continue
        own.update(plan.metric.needs, *(UPDATES[name].needs for name in updates))
        if plan.feed is not None:
            wanted.setdefault(operand_of(sites[plan.feed.consumer]), set()).update(plan.metric.consumer_needs)
    return wanted
