"""The report: what was pruned, what it cost, and what fell back to something simpler."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, get_type_hints

from hf_sparse import hashes
from hf_sparse.config import recorded
from hf_sparse.errors import CheckpointError, ConfigError
from hf_sparse.patterns import Pattern
from hf_sparse.recovery import Recovery, fits, set_aside, writable
from hf_sparse.report_text import lines
from hf_sparse.schema import check_plain, read_json
from hf_sparse.text import one_line, shown

FILE_NAME = "hf_sparse_report.json"
PICTURE_FILE = "hf_sparse_report.png"
FORMAT = 1
_LARGEST_FILE = 256 * 2**20
# Orders of channels are most of it: 3 million numbers for 70 billion dense weights, ten times as many for hundreds of experts.
_MOST = {"depth": 24, "items": 2**25, "text": 2**20}
# In these, two figures are of the same measurement.
SAME = ("metric", "window", "stride", "text", "fingerprint", "tokens", "task", "filter", "few_shot", "limit")
_CALIBRATION = ("source", "samples", "tokens", "batch_size", "fingerprint")


@dataclass
class SiteReport:
    """One site after pruning. Errors are relative: ||y_sparse - y_dense|| / ||y_dense||; None means not measured."""

    name: str
    block: int
    role: str | None
    shape: tuple[int, int]
    pattern: str  # "dense" for a site that the allocation takes nothing from
    axis: str
    metric: str  # the metric that was used, which may be the fall-back; "none" for a dense site
    zeros: int  # counted after pruning
    sparsity: float
    output_error: float | None = None  # on a sample of at most 256 tokens of the dense block's inputs
    tokens: int | None = None  # calibration tokens that reached the site
    note: str = ""  # why something else than the chosen metric or axis was used

    @property
    def fits_tensor_cores(self) -> bool:
        """Whether 2:4 sparse tensor cores accept the pattern along this axis."""
        try:
            return Pattern.parse(self.pattern).fits_tensor_cores(self.axis)
        except ConfigError:
            return False


@dataclass
class BlockReport:
    """One block: its sites and the error of its output over all calibration tokens.

    The error is that of the pruned block against the dense one on the same inputs; with an update that follows the dense stream, that
    of the pruned model's hidden states against the dense model's, with all that the blocks before have lost.
    """

    index: int
    name: str
    stack: str
    zeros: int
    size: int  # weights in the targeted sites
    all_matrices: int  # weights in all matrices of the block, targeted or not
    output_error: float | None
    seconds: float
    sites: list[SiteReport] = field(default_factory=list)
    measured: float | None = None  # what the allocation saw in the dense block, where it looks at it

    @property
    def sparsity(self) -> float:
        return self.zeros / self.size if self.size else 0.0


@dataclass
class Report:
    """Everything that `prune_` did. `str(report)` is a table, `to_dict()` JSON, `plot(path)` a picture."""

    config: dict[str, Any]
    model: str
    model_class: str
    parameters: int
    blocks: list[BlockReport]
    left_out: dict[str, str]  # matrices in the blocks that are no sites, or were not targeted, with the reason
    notes: list[str]
    calibration: dict[str, Any] | None  # source, fingerprint, samples, tokens, batch_size
    versions: dict[str, str]
    seconds: float
    peak_memory_bytes: int | None  # of the process, as the system counts it
    processes: int = 1  # that shared the work; times and memory are those of one of them
    evaluations: list[dict[str, Any]] = field(default_factory=list)  # fields of model_cards.Evaluation, measured later
    # name of channels -> old indices in the new order: new[..., i] = dense[..., order[i]] at each of the places below
    permutations: dict[str, list[int]] = field(default_factory=dict)
    permuted: dict[str, list[str]] = field(
        default_factory=dict
    )  # the same names -> "tensor[:, 0:64]", as numpy writes it
    recoveries: list[Recovery] = field(default_factory=list)  # trainings since the pruning, in order
    speeds: list[dict[str, Any]] = field(default_factory=list)  # fields of speed.Speed, measured by `hf-sparse bench`
    files: dict[str, str] = field(default_factory=dict)  # name -> SHA-256 of the files of the last save
    format: int = FORMAT

    @property
    def sites(self) -> list[SiteReport]:
        return [site for block in self.blocks for site in block.sites]

    @property
    def pruned_blocks(self) -> list[BlockReport]:
        """The blocks with targeted sites; the others only count in `block_sparsity`."""
        return [block for block in self.blocks if block.size]

    @property
    def zeros(self) -> int:
        return sum(block.zeros for block in self.blocks)

    @property
    def sparsity(self) -> float:
        """Share of zeros over the pruned sites."""
        size = sum(block.size for block in self.blocks)
        return self.zeros / size if size else 0.0

    @property
    def block_sparsity(self) -> float:
        """Share of zeros over all matrices of all blocks, pruned or not."""
        size = sum(block.all_matrices for block in self.blocks)
        return self.zeros / size if size else 0.0

    def totals(self) -> dict[str, Any]:
        return {
            "zeros": self.zeros,
            "sites": len(self.sites),
            "sparsity": self.sparsity,
            "block_sparsity": self.block_sparsity,
        }

    def add_recovery(self, recovery: Recovery) -> None:
        """Tell of a training; where it made steps, the figures evaluated so far are those of the model before it, set aside as such."""
        self.recoveries.append(recovery)
        if recovery.steps:
            self.evaluations = [set_aside(values) for values in self.evaluations]

    def add_evaluation(self, values: Mapping[str, Any]) -> None:
        """Tell of a figure (fields of model_cards.Evaluation); it completes the one set aside that was measured in the same way."""
        for earlier in self.evaluations:
            if earlier.get("sparse") is None and all(earlier.get(name) == values.get(name) for name in SAME):
                earlier.update({name: value for name, value in values.items() if value is not None})
                return
        self.evaluations.append(dict(values))

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` takes back and JSON can hold: no secrets, and None for a figure that is not finite."""
        rest = dataclasses.asdict(dataclasses.replace(self, recoveries=[]))
        recoveries = [recovery.to_dict() for recovery in self.recoveries]
        plain: dict[str, Any] = writable({**rest, "recoveries": recoveries, "totals": self.totals()})
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read back what `to_dict` gave, up to 2**25 values, 24 deep, in words of up to 2**20 letters.

        Raises: CheckpointError for anything else, as the data may come from anyone.
        """
        what = "this is no report of hf_sparse"
        check_plain(values, what, **_MOST)
        try:
            known = {item.name for item in dataclasses.fields(cls)}
            plain = {key: value for key, value in values.items() if key in known}
            if plain.get("format", FORMAT) != FORMAT:
                raise CheckpointError(
                    f"the report has format {shown(plain['format'])}, this hf_sparse reads {FORMAT}; upgrade hf_sparse."
                )
            recoveries = _recoveries(plain.get("recoveries", []))
            blocks = [block_report(block) for block in plain["blocks"]]
            report = cls(**{**plain, "blocks": blocks, "recoveries": recoveries})
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{what} ({type(error).__name__}: {one_line(error)}).") from error
        for wrong in misfits(report):
            raise CheckpointError(f"{what}: {one_line(wrong)}.")
        return report

    def save(self, folder: str | Path) -> Path:
        """Write `hf_sparse_report.json` into a folder, made if absent."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder) / FILE_NAME
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a report from its file or the folder that holds it; raises CheckpointError where that fails."""
        file = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
        values = read_json(file, _LARGEST_FILE, "the report")
        if not isinstance(values, dict):
            raise CheckpointError(f"{str(file)!r} holds no report.")
        return cls.from_dict(values)

    def __str__(self) -> str:
        return "\n".join(lines(self))

    def plot(self, path: str | Path) -> Path:
        """Draw sparsity and output error over depth into a picture file (needs matplotlib)."""
        from hf_sparse.plot import plot_report  # matplotlib is an extra and slow to import

        return plot_report(self, Path(path))


def _recoveries(values: object) -> list[Recovery]:
    if not isinstance(values, list):
        raise CheckpointError(f"this is no report of hf_sparse: recoveries is {shown(values)}.")
    return [Recovery.from_dict(item) for item in values]


def block_report(values: Mapping[str, Any]) -> BlockReport:
    """A block out of plain data; raises KeyError and TypeError for what is none."""
    sites = [SiteReport(**{**site, "shape": tuple(site["shape"])}) for site in values["sites"]]
    return BlockReport(**{**values, "sites": sites})


_HINTS = {kind.__name__: get_type_hints(kind) for kind in (SiteReport, BlockReport, Report)}


def misfits(part: "Report | BlockReport | SiteReport") -> Iterable[str]:
    """What in a report that was read is not of the type it must have, as it may come from anyone."""
    for name, hint in _HINTS[type(part).__name__].items():
        value = getattr(part, name)
        if not fits(value, hint):
            yield f"{name} is {shown(value)}"
        elif hint is int and value < 0:
            yield f"{name} is {value}, which is less than 0"
        for inner in value if name in ("blocks", "sites") and isinstance(value, list) else ():
            yield from misfits(inner)
    if isinstance(part, Report):
        needed = {"config": ("pattern", "metric"), "calibration": _CALIBRATION if part.calibration is not None else ()}
        yield from (
            f"{name} has no {key}" for name, keys in needed.items() for key in keys if key not in getattr(part, name)
        )
        yield from (f"in config, {wrong}" for wrong in recorded.misfits(part.config))
        if fits(part.files, dict[str, str]):
            yield from (f"in files, {wrong}" for item in part.files.items() if (wrong := hashes.misfit(*item)))
