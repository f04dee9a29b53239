"""What config.json says under `hf_sparse`: read as plain data of a fixed form, as it may come from anyone."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from hf_sparse.config import SparsityConfig
from hf_sparse.errors import CheckpointError, HfSparseError, unknown
from hf_sparse.schema import check_plain
from hf_sparse.text import one_line, shown

FORMAT = 1
_NEEDED = ("format", "config", "calibration", "version")
_LONGEST_VERSION = 100
_LARGEST_COUNT = 2**63
_WAY_OUT = "Delete the key from config.json, or call hf_sparse.uninstall() before loading; the weights do not need it."


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a model claims about its sparsity. Nothing of it is proved: `hf_sparse.masks` and `hf-sparse verify` count."""

    format: int
    # as it stands in the file: one that this version cannot take must not keep the weights from loading
    config: Mapping[str, Any]
    totals: Mapping[str, int | float] | None  # zeros, sites, sparsity, block_sparsity; None where they were not counted
    calibration: Mapping[str, str | int | float | bool | None] | None
    version: str  # of the hf_sparse that pruned

    @classmethod
    def parse(cls, values: object) -> Self:
        """Check the value of the key `hf_sparse` of config.json; the config inside is left to `sparsity_config`.

        The same format has exactly these keys; only `totals` may be missing, as they cannot always be counted. At most
        100,000 values, 16 deep, in words of at most 65,536 letters.

        Raises: CheckpointError that says what is wrong and the way out.
        """
        what = "the claim under `hf_sparse` in config.json"
        try:
            check_plain(values, what)
            if not isinstance(values, Mapping):
                raise CheckpointError(f"{what} is {shown(values)}, where a mapping should stand.")
            _check_keys(values, what)
            if wrong := next(_misfits(values), None):
                raise CheckpointError(f"{what}: {wrong}.")
        except CheckpointError as error:
            raise CheckpointError(f"{error} {_WAY_OUT}") from error
        return cls(**{"totals": None, **values})

    def to_dict(self) -> dict[str, Any]:
        """What `parse` takes back; totals are left out where there are none."""
        told: dict[str, Any] = {"format": self.format, "config": dict(self.config)}
        if self.totals is not None:
            told["totals"] = dict(self.totals)
        return {
            **told,
            "calibration": None if self.calibration is None else dict(self.calibration),
            "version": self.version,
        }

    @property
    def zeros(self) -> int | None:
        """Zeros in the pruned sites as of the last count; None where they were not counted."""
        return None if self.totals is None else int(self.totals["zeros"])

    def sparsity_config(self) -> SparsityConfig:
        """The configuration that the model was pruned with.

        Raises: CheckpointError where this version of hf_sparse does not accept it.
        """
        try:
            return SparsityConfig.from_dict(self.config)
        except (HfSparseError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise CheckpointError(
                f"this hf_sparse cannot use the configuration that the model was pruned with, only its weights: {one_line(error)}"
            ) from error


def _check_keys(values: Mapping[str, Any], what: str) -> None:
    version = values.get("format")
    if version != FORMAT or isinstance(version, bool):
        raise CheckpointError(
            f"config.json carries hf_sparse format {shown(version)}; this version reads {FORMAT}. Upgrade hf_sparse."
        )
    for key in values:
        if key not in (*_NEEDED, "totals"):
            raise CheckpointError(f"{what}: {one_line(unknown('key', key, (*_NEEDED, 'totals')))}")
    if missing := [key for key in _NEEDED if key not in values]:
        raise CheckpointError(f"{what} has no {', '.join(missing)}.")


def _misfits(values: Mapping[str, Any]) -> Iterator[str]:
    """What is not of the type or in the range that it must have."""
    if not isinstance(values["config"], Mapping):
        yield f"config is {shown(values['config'])}, where a mapping should stand"
    version = values["version"]
    if not isinstance(version, str) or len(version) > _LONGEST_VERSION:
        yield f"version is {shown(version)}, where a short text should stand"
    calibration = values["calibration"]
    if not (calibration is None or isinstance(calibration, Mapping)):
        yield f"calibration is {shown(calibration)}, where a mapping or null should stand"
    for key, value in (calibration or {}).items():
        if isinstance(value, list | tuple | Mapping):
            yield f"calibration.{one_line(key)} is {shown(value)}, where a single value should stand"
    if values.get("totals") is not None:
        yield from _wrong_totals(values["totals"])


def _wrong_totals(totals: object) -> Iterator[str]:
    counts, shares = ("zeros", "sites"), ("sparsity", "block_sparsity")
    if not isinstance(totals, Mapping) or set(totals) != {*counts, *shares}:
        yield f"totals is {shown(totals)}, where a mapping of {', '.join((*counts, *shares))} should stand"
        return
    for name in counts:
        if not (type(totals[name]) is int and 0 <= totals[name] < _LARGEST_COUNT):
            yield f"totals.{name} is {shown(totals[name])}, where a count should stand"
    for name in shares:
        if not (type(totals[name]) in (int, float) and 0 <= totals[name] <= 1):
            yield f"totals.{name} is {shown(totals[name])}, where a share from 0 to 1 should stand"
