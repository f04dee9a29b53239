"""Finds channels inside a block that may change places: the neurons of its MLPs, and the values within each head."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from posixpath import commonpath

from torch import nn

from hf_sparse.groups import Feed, head_size
from hf_sparse.permute.places import Channels, bias_of, columns_of, rows_of
from hf_sparse.sites import Site


@dataclass(frozen=True)
class Reordering:
    """Channels with the sites that hold them: columns of the consumers, rows of the producers, in the order of the channels."""

    channels: Channels
    kind: str  # all reorderings of a kind are proven together: those of one matrix, or of the experts in one tensor
    consumers: tuple[
        tuple[Site, tuple[int, ...]], ...
    ]  # (site, its columns); a site with grouped heads stands here repeatedly
    producers: tuple[tuple[Site, tuple[int, ...]], ...]  # (site, its rows)


def find_reorderings(
    model: nn.Module, feeds: Sequence[Feed], sites: dict[str, Site]
) -> tuple[list[Reordering], list[str]]:
    """What may be reordered in a block whose feeds are proven, and reasons for what may not."""
    found: list[Reordering] = []
    reasons: list[str] = []
    for together in _connected(feeds):
        name = together[0].consumer
        made = _reorderings(model, together, sites)
        if isinstance(made, str):
            reasons.append(f"{name}: {made}")
        else:
            found += made
    return found, reasons


def _connected(feeds: Sequence[Feed]) -> list[list[Feed]]:
    """Feeds that share a producer or a consumer, directly or over others."""
    lists: list[list[Feed]] = []
    for feed in feeds:
        near = [
            one
            for one in lists
            if any({feed.producer, feed.consumer} & {other.producer, other.consumer} for other in one)
        ]
        lists = [one for one in lists if one not in near] + [[*(other for one in near for other in one), feed]]
    return lists


def _reorderings(model: nn.Module, feeds: list[Feed], sites: dict[str, Site]) -> list[Reordering] | str:
    producers = [sites[name] for name in dict.fromkeys(feed.producer for feed in feeds)]
    consumers = [sites[name] for name in dict.fromkeys(feed.consumer for feed in feeds)]
    if any("base_layer" in site.module.split(".") for site in (*producers, *consumers)):
        return "an adapter around it expects its channels in order"
    if len({feed.rows for feed in feeds}) != 1:
        return "its producers do not agree on their rows"
    rows = feeds[0].rows
    if min(rows) < 0:
        return "some of its columns come from elsewhere"
    if any(site.role == "v" for site in producers):
        size = head_size(model, producers[0], consumers[0])
        heads = _heads(rows, size, len(set(rows))) if size else None
        if heads is None:
            return "how its heads lie is not known"
    else:
        if rows != tuple(range(len(rows))) or _between(model, consumers, producers, sites.values(), len(rows)):
            return "another tensor holds as many channels, or rows and columns are not in one order"
        heads = [[list(rows)]]
    made = [
        _reordering(model, consumers, producers, number, copies, rows, len(heads))
        for number, copies in enumerate(heads)
    ]
    whole = [one for one in made if one is not None]
    return whole if len(whole) == len(made) else "its channels are not evenly spaced in the stored tensor"


def _heads(rows: tuple[int, ...], size: int, values: int) -> list[list[list[int]]] | None:
    """For each head of values the columns of the query heads that read it, in the order of its rows."""
    if values % size or len(rows) % size:
        return None
    found: dict[int, list[list[int]]] = defaultdict(list)
    for start in range(0, len(rows), size):
        head = rows[start] // size
        if list(rows[start : start + size]) != list(range(head * size, (head + 1) * size)):
            return None
        found[head].append(list(range(start, start + size)))
    return [found[head] for head in sorted(found)]


def _between(
    model: nn.Module, consumers: Sequence[Site], producers: Sequence[Site], every: Iterable[Site], size: int
) -> bool:
    """Whether a vector with that many entries stands among the sites, such as a norm's weight, that would stay in its order.

    Half precision could hide what that does, so numbers alone are not trusted with it.
    """
    if any(site.shape[0] == size for site in consumers):
        return False  # it may as well hold channels of what the consumers write
    path = commonpath(["/" + site.module.replace(".", "/") for site in (*consumers, *producers)])[1:].replace("/", ".")
    known = {f"{site.module}.{bias[0]}" for site in every if (bias := bias_of(model, site))}
    inside = model.get_submodule(path).named_parameters(prefix=path)
    return any(value.ndim == 1 and len(value) == size and name not in known for name, value in inside)


def _reordering(
    model: nn.Module,
    consumers: Sequence[Site],
    producers: Sequence[Site],
    head: int,
    copies: list[list[int]],
    rows: tuple[int, ...],
    heads: int,
) -> Reordering | None:
    own_rows = tuple(rows[column] for column in copies[0])
    parts = [columns_of(site, columns) for site in consumers for columns in copies]
    parts += [rows_of(site, own_rows, bias_of(model, site)) for site in producers]
    places = [place for part in parts for place in part or ()]
    if None in parts:
        return None
    name = f"{consumers[0].name}:input" + (f":{head}" if heads > 1 else "")
    module = consumers[0].module.split(".")
    kind = ".".join("*" if part.isdigit() and "experts" in module[:at] else part for at, part in enumerate(module))
    return Reordering(
        Channels(name, len(own_rows), tuple(places)),
        kind,
        tuple((site, tuple(columns)) for site in consumers for columns in copies),
        tuple((site, own_rows) for site in producers),
    )
