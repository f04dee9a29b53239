"""Compares the kept weights, and every tensor that was not pruned, with the base model's, bit for bit."""

import shlex
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from hf_sparse import embedded
from hf_sparse.errors import CheckpointError, HfSparseError, HubError
from hf_sparse.permute import permuted_state_dict
from hf_sparse.remote import CONFIG, Folder, Place, Repository, is_repository, open_place, weight_files
from hf_sparse.report import Report
from hf_sparse.sites import Site, plain_name, view
from hf_sparse.text import one_line
from hf_sparse.verify.files import wanted
from hf_sparse.verify.loading import Loaded, load_as, tensors_of
from hf_sparse.verify.rows import DIFFERS, Row, compared, skipped
from hf_sparse.verify.sizes import files_of_base, headers, unlike
from hf_sparse.verify.subject import Subject, is_embedded

CHECK = "base"
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Base:
    """The base model, or why there is none."""

    name: str
    loaded: Loaded | None
    reason: str = ""


# ---------------------------------------------------------------------------------------------------- finding it


def find_base(subject: Subject) -> Base:
    """Load the base model that was given, else the one that the report names; never with code of its own unless it was given.

    Raises: CheckpointError or HubError where a base that was given cannot be used.
    """
    given, told = subject.options.base, subject.report.model if subject.report else ""
    if given is not None:
        return Base(given, _load(subject, given, with_code=subject.options.trust_remote_code))
    name, reason = _named(told)
    if reason:
        return Base(told, None, reason)
    try:
        if name != embedded.NAME:
            return _from_hub(subject, name)
        return Base(name, _load(subject, name, with_code=False))
    except HubError as error:
        return Base(name, None, f"the base model cannot be had ({error}); give --base")
    except (HfSparseError, OSError, ValueError, ImportError, RuntimeError) as error:
        shown = f"{one_line(name)!r} cannot be loaded ({one_line(error, 200)})"
        return Base(name, None, f"the base model {shown}; give --base")


def _named(told: str) -> tuple[str, str]:
    """The name of the base in a report, or why it is not opened: a folder of that name may be here by chance, or by intent."""
    if is_embedded(told):
        return embedded.NAME, ""
    if not told:
        return "", "the report names no base model (it was made in memory); give --base with the model that was pruned"
    if is_repository(told) and not Path(told).exists():
        return told, ""
    shown = one_line(told)
    return (
        "",
        f"the report names {shown!r}, and no path that a report names is opened; give --base {shlex.quote(shown)} if you trust it",
    )


def _from_hub(subject: Subject, name: str) -> Base:
    """The base that a report names, downloaded only where the first bytes of its files tell of tensors like the model's."""
    place = Repository(name, token=subject.options.token, cache_dir=subject.options.cache_dir)
    _check_files(place)
    why = unlike(place, headers(subject.folder), getattr(subject.model, "base_model_prefix", ""))
    if why is not None:
        return Base(
            name,
            None,
            f"{one_line(name)!r}, which the report names, is another model ({why}); give --base with the one that was pruned",
        )
    folder = place.download(files_of_base(place))
    return Base(name, load_as(type(subject.model), folder, dtype=subject.model.dtype))


def _check_files(place: Place) -> None:
    weight_files(place)
    if CONFIG not in place.files:
        raise CheckpointError(f"{one_line(place.name)!r} has no {CONFIG}, so it is no base model.")


def _load(subject: Subject, name: str, with_code: bool) -> Loaded:
    options = subject.options
    place = open_place(name, token=options.token, cache_dir=options.cache_dir)
    _check_files(place)
    folder = place.download(wanted(place.files, with_code)) if isinstance(place, Repository) else place.path
    if isinstance(place, Folder) and "adapter_config.json" in place.files:
        raise CheckpointError(f"{one_line(name)!r} holds an adapter; give the model that was pruned.")
    # The class of the saved model, whose code runs already: nothing that the base's config names is imported.
    return load_as(type(subject.model), folder, dtype=subject.model.dtype)


# ---------------------------------------------------------------------------------------------------- comparing


def check(subject: Subject, base: Base) -> Iterator[Row]:
    """A row for each pruned site and for each other tensor, or the reason why they were not compared."""
    known = subject.report
    if known is None or subject.trained or base.loaded is None:
        reason = "there is no report" if known is None else base.reason
        reason = "a training has changed the weights since the pruning" if subject.trained else reason
        yield skipped(CHECK, "kept weights and other tensors", reason)
        return
    try:
        dense = permuted_state_dict(known, tensors_of(base.loaded.model))
    except CheckpointError as error:
        yield Row(CHECK, "permutations", DIFFERS, "fit the base model", None, one_line(error))
        return
    holding = _pruned(subject, known)
    updates = _updates(known)
    for name, tensor in tensors_of(subject.model).items():
        if updates and _in_pruned_block(subject, known, name):
            yield skipped(CHECK, name, f"the update {', '.join(updates)} has changed the weights of the pruned blocks")
        elif name not in dense or name in base.loaded.missing:
            yield skipped(CHECK, name, f"the base model {one_line(base.name)!r} has no such tensor")
        else:
            yield from _tensor(name, tensor, dense[name], holding.get(name, ()))


def _updates(report: Report) -> list[str]:
    given = report.config.get("update", "none")
    names = [given] if isinstance(given, str) else list(given or ())
    return [one_line(name, 40) for name in names if name != "none"]


def _pruned(subject: Subject, report: Report) -> Mapping[str, Collection[Site]]:
    """Name of a tensor -> the pruned sites in it. A parameter that has several names has its sites under each of them."""
    names = {site.name for site in report.sites}
    same: dict[int, list[str]] = defaultdict(list)
    for name, parameter in subject.model.named_parameters(remove_duplicate=False):
        same[id(parameter)].append(name)
    found: dict[str, list[Site]] = defaultdict(list)
    for site in subject.sites.values():
        if site.name in names:
            parameter = getattr(subject.model.get_submodule(site.module), site.parameter)
            for name in same[id(parameter)]:
                found[name].append(site)
    return found


def _in_pruned_block(subject: Subject, report: Report, name: str) -> bool:
    pruned = {block.name for block in report.pruned_blocks}
    return any(plain_name(name).startswith(f"{plain_name(block)}.") for block in pruned)


def _tensor(name: str, tensor: torch.Tensor, dense: torch.Tensor, sites: Iterable[Site]) -> Iterator[Row]:
    if tensor.shape != dense.shape:
        yield compared(CHECK, f"{name}: shape", list(dense.shape), list(tensor.shape))
        return
    differs = bits_differ(tensor, dense)
    rest = differs.clone()
    for site in sites:
        changed = view(differs, site) & (view(tensor, site) != 0)
        yield _row(site.name, "kept weights", int(changed.sum()))
        view(rest, site).fill_(False)
    if not sites or bool(rest.any()):
        yield _row(name, "weights outside of the pruned sites" if sites else "values", int(rest.sum()))


def _row(item: str, what: str, changed: int) -> Row:
    found = "as in the base model" if not changed else f"{changed} {what} that are not the base model's"
    return compared(CHECK, item, "as in the base model", found)


def bits_differ(tensor: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Where two tensors of one shape differ in any bit, the second one taken in the number format of the first."""
    if not tensor.is_floating_point():
        return tensor != dense.to(tensor.dtype)
    kind = _INTEGERS[tensor.element_size()]
    return tensor.contiguous().view(kind) != dense.to(tensor.dtype).contiguous().view(kind)
