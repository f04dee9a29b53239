"""Verifies a sparse model: what its card, report and config claim, against its files, its weights and its base model."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError

from hf_sparse.errors import CheckpointError, ConfigError
from hf_sparse.remote import Folder, Repository, forget, open_place, read_card, read_claim, read_report, weight_files
from hf_sparse.text import one_line
from hf_sparse.verify import base as base_check
from hf_sparse.verify import card, claims, files, measured, sites
from hf_sparse.verify.loading import DTYPES, load, model_config
from hf_sparse.verify.rows import AGREES, DIFFERS, NOT_CHECKED, Row, Verification
from hf_sparse.verify.sizes import TooLargeError, check_config, headers
from hf_sparse.verify.subject import Options, Subject

__all__ = ["AGREES", "DIFFERS", "NOT_CHECKED", "Row", "Verification", "verify"]

TOLERANCE = (
    1e-3  # relative; what other kernels, threads and versions of the libraries make of the same weights is far less
)
_MOST_EVALUATIONS = 10_000


def verify(
    model: str | Path,
    *,
    base: str | None = None,
    evaluate: bool = False,
    texts: Sequence[str] = (),
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    tolerance: float = TOLERANCE,
) -> Verification:
    """Check everything that a sparse model claims and that can be checked.

    Args:
        model: a folder, `embedded`, or a repository on the Hub, which is downloaded at what `revision` means now.
        base: the model that was pruned, in the same ways; without it the one that the report names, where that is in the package or
            on the Hub and its files tell of tensors like the model's. No folder is opened that was not given here.
        evaluate: measure the report's figures again.
        texts: files with texts that the report names, to measure on.
        dtype: number format to measure in; without it the one that the report states, or that of the weights.
        trust_remote_code: run the model's own code, and that of a `base` that was given.
        tolerance: how much a figure may be off, as a share of it.

    Nothing that the files say is executed otherwise. The model, and the base model with it, are held in memory.

    Raises: CheckpointError where there is nothing to verify or the claims cannot be read, HubError where the Hub does not show it,
        ConfigError for a dtype or tolerance that is none.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not known; give one of {', '.join(DTYPES)}, or leave it out.")
    if not 0 <= tolerance < 1:
        raise ConfigError(f"tolerance={tolerance} is not allowed; give a share from 0 to less than 1, such as 0.001.")
    options = Options(base, measured.texts_by_name(texts), token, cache_dir, dtype, trust_remote_code, tolerance)
    place = open_place(str(model), revision=revision, token=token, cache_dir=cache_dir)
    subject = _subject(place, options)
    try:
        return Verification(str(model), place.commit, list(_rows(subject, evaluate)))
    finally:
        for path in subject.damaged:
            forget(path)


def _subject(place: Folder | Repository, options: Options) -> Subject:
    """Read the claims first, so that nothing large is downloaded for a model that makes none."""
    weight_files(place)
    claim, report = read_claim(place), read_report(place)
    if claim is None and report is None:
        raise CheckpointError(
            f"{one_line(place.name)!r} claims nothing that could be verified: config.json has no key hf_sparse, and there is no report."
        )
    if report is not None and len(report.evaluations) > _MOST_EVALUATIONS:
        raise CheckpointError(
            f"the report of {one_line(place.name)!r} holds {len(report.evaluations)} evaluations; at most {_MOST_EVALUATIONS} are looked at."
        )
    text = read_card(place)
    folder = (
        place.path
        if isinstance(place, Folder)
        else place.download(files.wanted(place.files, options.trust_remote_code))
    )
    return Subject(place, folder, claim, report, text, options)


def _rows(subject: Subject, evaluate: bool) -> Iterator[Row]:
    yield from files.check(subject)
    yield from card.check(subject)
    failure = _load(subject)
    if failure is not None:
        yield failure
        return
    yield from claims.check(subject)
    yield from claims.check_finite(subject)
    yield from sites.check(subject)
    base = base_check.find_base(subject)
    yield from base_check.check(subject, base)
    if evaluate:
        yield from measured.check(subject, base)


def _load(subject: Subject) -> Row | None:
    """Load the weights; what keeps them from being loaded is a difference: a model that was saved can be read.

    Raises: CheckpointError for a model of a kind that cannot be verified, or of a size that its files do not have.
    """
    code = subject.options.trust_remote_code
    try:
        stored = headers(subject.folder)
    except CheckpointError as error:
        return _broken(error)
    check_config(subject.folder, stored)
    config = model_config(subject.folder, trust_remote_code=code)
    try:
        subject.loaded = load(subject.folder, config, trust_remote_code=code)
    except TooLargeError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        return _broken(error)
    return None


def _broken(error: Exception) -> Row:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = "the weights are not whole, or not of this config"
    return Row("weights", "load", DIFFERS, "a model that loads", one_line(lines[0], 200), reason)
