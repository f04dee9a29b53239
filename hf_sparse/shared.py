"""Keeps what prunings of one dense model have in common, so that each piece of it is worked out once."""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

from torch import nn

from hf_sparse.allot import measured_by, shares
from hf_sparse.blockwise import Diary, Run
from hf_sparse.calibrate import Survey, read_calibration, survey
from hf_sparse.config import SparsityConfig
from hf_sparse.data import Batch, Sample, Samples, fingerprint
from hf_sparse.measure import allot_
from hf_sparse.permute import Permutations, permute_

T = TypeVar("T")


class Spent(NamedTuple):
    """Seconds of work: of all threads of the process together, and of the clock on the wall."""

    cpu: float = 0.0
    wall: float = 0.0

    @classmethod
    def now(cls) -> Self:
        return cls(time.process_time(), time.monotonic())

    def plus(self, other: "Spent") -> "Spent":
        return Spent(self.cpu + other.cpu, self.wall + other.wall)

    def since(self, start: "Spent") -> "Spent":
        return Spent(self.cpu - start.cpu, self.wall - start.wall)


class Shared:
    """Calibration samples, surveys and what allocations measured, all of one dense model, which must be dense at each use.

    A piece is only handed out where working it out anew would give the same bits.
    """

    diary: Diary | None = None  # who writes down what a run does

    def __init__(self, tokenizer: Any = None, tokenizer_options: Mapping[str, Any] | None = None) -> None:
        self._tokenizer, self._options = tokenizer, tokenizer_options
        self._kept: dict[Hashable, tuple[Any, Spent]] = {}  # what was found, and what that took
        self._sources: list[Any] = []  # data in memory are known by their id, so they must live on
        self.saved = Spent()  # what pieces that were handed out again would have taken

    def _once(self, key: Hashable, find: Callable[[], T]) -> T:
        if key in self._kept:
            found, spent = self._kept[key]
            self.saved = self.saved.plus(spent)
            return found  # type: ignore[no-any-return]
        start = Spent.now()
        made = find()
        self._kept[key] = (made, Spent.now().since(start))
        return made

    def samples(self, model: nn.Module, config: SparsityConfig) -> Samples:
        """The calibration samples of a config, read once for each source, number, length and seed."""
        source = config.calibration
        if not isinstance(source, str | Path):
            self._sources.append(source)
        name = str(source) if isinstance(source, str | Path) else id(source)
        key = ("samples", name, config.num_samples, config.sequence_length, config.seed)
        return self._once(key, lambda: read_calibration(model, config, self._tokenizer, self._options))

    def survey(self, run: Run, samples: Samples, want_feeds: bool) -> Survey:
        """The survey of a run; one with other probes is another one, so that each run answers for its own."""
        device = run.config.device
        return self._once(
            ("survey", id(samples), want_feeds, run.two_streams, device),
            lambda: survey(run.model, run.inventory, samples.rows, want_feeds, device, run.two_streams),
        )

    def allot_(self, run: Run, samples: Samples, batches: Sequence[Batch]) -> None:
        """Settle the shares of a run; the pass over the dense blocks is made once for runs that measure the same alike."""
        entry = measured_by(run.config)
        if entry is None or run.measured:
            return

        def find() -> tuple[dict[int, float], list[str]]:
            before = len(run.notes)
            allot_(run, batches)
            return run.measured, run.notes[before:]

        sites = tuple(site.name for sites in run.chosen.values() for site in sites)
        data = fingerprint(batch.values for batch in batches)  # sums over other batches differ in their last bits
        options = tuple(sorted(run.config.options_of(entry.name).items()))
        measured, notes = self._once(
            ("measured", id(samples), entry.name, options, sites, data, run.config.device), find
        )
        if not run.measured:
            run.measured, run.shares = dict(measured), shares(run.inventory, run.chosen, run.config, measured)
            run.notes += notes

    def permute_(self, run: Run, rows: Sequence[Sample], batches: Sequence[Batch], permutations: Permutations) -> None:
        """Reorder the channels of a run's model where its configuration asks for it; `permutations` gets the orders."""
        permute_(run, rows, batches, permutations)
