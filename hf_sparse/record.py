"""Records what enters the sites of a block while it runs."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_sparse import ranks
from hf_sparse.data import Batch
from hf_sparse.errors import CalibrationError
from hf_sparse.observe import Observer, Operand, operand_of
from hf_sparse.registry import STATISTICS
from hf_sparse.sites import Site
from hf_sparse.statistics import Statistic

_HELD = 2  # inputs of a call that are still compared with those of later products
ERROR_SAMPLE = 256  # tokens at most on which the output error of a site is measured


Identity = tuple[int, tuple[int, ...], int, tuple[int, ...], int]


def identity(x: torch.Tensor) -> Identity:
    """What tells a tensor from others, as long as it is held: later readers of the same input have the same."""
    return x.data_ptr(), tuple(x.shape[-1:]), x.numel(), x.stride(), x._version


class _Present(NamedTuple):
    """A tensor that was read in the present call: whose input it is, and which statistics have it already."""

    key: Operand
    x: torch.Tensor
    added: set[str]


class Recorder:
    """Adds up the statistics of a block's inputs over its calls.

    Statistics belong to inputs: products that read the very same tensor in one call share one (q, k and v; gate and up).
    """

    def __init__(self, sites: Sequence[Site], needs: dict[Operand, set[str]], sample_each: int) -> None:
        self._needs = needs
        self._sample_each = sample_each
        self.input_of: dict[Operand, Operand] = {}  # operand -> the first operand that read the same input
        self.statistics: dict[tuple[Operand, str], Statistic] = {}
        self.samples: dict[Operand, list[torch.Tensor]] = {}
        self._numbers: dict[Operand, list[int]] = {}  # of the first sample of the batch that each sample came from
        self._shared: set[Operand] = set()  # operands whose records are those of all processes
        self._wanted = {operand_of(site) for site in sites}
        self._tokens: dict[Operand, int] = {}
        self._present: dict[Identity, _Present] = {}
        self._batch = Batch({}, ())
        self._names = {operand_of(site): site.name for site in sites}

    def seen(self, operand: Operand, x: torch.Tensor, product: torch.Tensor) -> None:
        """The observer's callback."""
        if operand not in self._wanted:
            return
        same = identity(x)
        present = self._present.get(same)
        key = self.input_of.setdefault(operand, present.key if present else operand)
        if present is not None and present.key != key:
            raise CalibrationError(
                f"{operand.module} shares its input with {present.key.module} in one run of the block and not in another; "
                f"leave one of them out with exclude=('{present.key.module}',)."
            )
        flat = x.detach().reshape(-1, x.shape[-1])
        if present is None:
            # Held, so that no other tensor takes its address; but only the last few, or all would outlive their use in
            # the block. Products that share an input stand close together.
            while len(self._present) >= _HELD:
                self._check(self._present.pop(next(iter(self._present))))
            present = self._present[same] = _Present(key, x, set())
            self._count(key, operand, flat)
        # A later reader of the same input may need a statistic that the first one did not.
        for name in sorted(self._needs.get(operand, set()) - present.added):
            self._statistic(key, name, flat).add(flat)
            present.added.add(name)

    def _count(self, key: Operand, operand: Operand, flat: torch.Tensor) -> None:
        """Tokens of an input; rows of zeros are how batched experts are given tokens that are not theirs."""
        tokens = flat.shape[0] if operand.expert is None else int(flat.any(dim=1).sum())
        self._tokens[key] = self._tokens.get(key, 0) + tokens
        kept = self.samples.setdefault(key, [])
        if self._sample_each and flat.shape[0] and sum(map(len, kept)) < ERROR_SAMPLE:
            step = max(1, flat.shape[0] // self._sample_each)
            kept.append(flat[::step][: self._sample_each].clone())
            self._numbers.setdefault(key, []).append(min(self._batch.numbers, default=0))

    def _statistic(self, key: Operand, name: str, flat: torch.Tensor) -> Statistic:
        if (key, name) not in self.statistics:
            self.statistics[key, name] = STATISTICS[name].function(flat.shape[-1], flat.device)  # type: ignore[assignment]
        return self.statistics[key, name]

    def arrived(self, operands: Sequence[Operand], x: torch.Tensor, batch: Batch) -> None:
        """Record an input that all of `operands` will read, before the products are made; raises as `listening` does."""
        self.passing(operands, x, batch)
        self.settle()

    def passing(self, operands: Sequence[Operand], x: torch.Tensor, batch: Batch) -> None:
        """Record an input whose other readers may be met later in the same call; `settle` ends the call."""
        self._batch = batch
        for operand in operands:
            self.seen(operand, x, x)

    def settle(self) -> None:
        """End a call: check what was seen, and hold no input any longer."""
        for present in self._present.values():
            self._check(present)
        self._present.clear()

    @contextmanager
    def listening(self, model: nn.Module, sites: Sequence[Site], batch: Batch) -> Iterator[None]:
        """Record one call of the block that runs inside.

        Raises: CalibrationError for inputs that are not finite; it names the site and, where it can be told, the sample.
        """
        self._batch = batch
        with Observer(model, sites, self.seen):
            yield
        self.settle()

    def _check(self, present: "_Present") -> None:
        key, x, _ = present
        statistics = [statistic for (owner, _), statistic in self.statistics.items() if owner == key]
        finite = all(statistic.finite for statistic in statistics)
        if not finite or (not statistics and not bool(torch.isfinite(x.sum()))):
            raise CalibrationError(self._not_finite(key, x, self._batch, self._names))

    def _not_finite(self, key: Operand, x: torch.Tensor, batch: Batch, names: dict[Operand, str]) -> str:
        numbers = list(batch.numbers)
        if len(x) == len(numbers):
            bad = [number for number, row in zip(numbers, x, strict=True) if not bool(torch.isfinite(row).all())]
            numbers = bad or numbers
        where = f"sample {numbers[0]}" if len(numbers) == 1 else f"one of samples {numbers[0]} to {numbers[-1]}"
        return (
            f"the input of {names.get(key, key.module)} is NaN or infinite for {where}; "
            "drop that sample, or load the model in a wider dtype (float16 overflows easily)."
        )

    def share(self, device: torch.device, operands: Collection[Operand] | None = None) -> None:
        """Make what all processes recorded of some operands' inputs (None: of all) the record of each; `device` is the block's.

        Raises: CalibrationError where operands share an input on one process and not on another.
        """
        if ranks.count() == 1:
            return
        due = self._wanted - self._shared if operands is None else set(operands) - self._shared
        self._shared |= due
        told = ranks.gather(self._told(due))
        for operand, key in ((Operand(*one), Operand(*other)) for part in told for one, other in part["inputs"]):
            if self.input_of.setdefault(operand, key) != key:
                raise CalibrationError(
                    f"{operand.module} shares its input with {key.module} on one process and not on another; leave one of them "
                    f"out with exclude=('{key.module}',)."
                )
        for key in sorted({Operand(*entry["key"]) for part in told for entry in part["keys"]}, key=str):
            mine = [next((e for e in part["keys"] if Operand(*e["key"]) == key), None) for part in told]
            self._tokens[key] = sum(entry["tokens"] for entry in mine if entry)
            self._share_statistics(key, [entry["statistics"] if entry else {} for entry in mine], device)
            self._share_samples(key, [entry["samples"] if entry else [] for entry in mine], device)

    def _told(self, due: Collection[Operand]) -> dict[str, Any]:
        """What there is to be added up of some operands: names and sizes, in plain data."""
        inputs = [(operand, key) for operand, key in self.input_of.items() if operand in due]
        keys = []
        for key in dict.fromkeys(key for _, key in inputs if key in due):
            names = {name: statistic for (owner, name), statistic in self.statistics.items() if owner == key}
            statistics = {name: [found.tokens, found.sums()[0].shape[-1]] for name, found in names.items()}
            pieces = zip(self._numbers.get(key, []), self.samples.get(key, []), strict=True)
            samples = [[number, *piece.shape, str(piece.dtype)] for number, piece in pieces]
            keys.append({"key": key, "tokens": self._tokens.get(key, 0), "statistics": statistics, "samples": samples})
        return {"inputs": inputs, "keys": keys}

    def _share_statistics(self, key: Operand, told: list[dict[str, list[int]]], device: torch.device) -> None:
        features = {name: width for part in told for name, (_, width) in part.items()}
        for name in sorted(features):
            statistic = self._statistic(key, name, torch.empty(0, features[name], device=device))
            ranks.sum_(*statistic.sums())
            statistic.tokens = sum(part[name][0] for part in told if name in part)

    def _share_samples(self, key: Operand, told: list[list[list[Any]]], device: torch.device) -> None:
        """The samples of all processes, in the order in which one process would have taken them."""
        pieces = sorted((piece[0], owner, index) for owner, part in enumerate(told) for index, piece in enumerate(part))
        if not pieces:
            return
        _, _, width, dtype = next(piece for part in told for piece in part)
        kind = getattr(torch, dtype.removeprefix("torch."))
        rows = sum(piece[1] for part in told for piece in part)
        every = torch.zeros(rows, width, dtype=torch.promote_types(kind, torch.float32), device=device)
        row = 0
        for _, owner, index in pieces:
            length = told[owner][index][1]
            if owner == ranks.rank():
                every[row : row + length] = self.samples[key][index].to(device)
            row += length
        ranks.sum_(every)
        self.samples[key] = [every[:ERROR_SAMPLE].to(kind)]

    def tokens(self, site: Site) -> int:
        """How many tokens reached the site; 0 for an expert that none was sent to."""
        return self._tokens.get(self.input_of.get(operand_of(site), operand_of(site)), 0)

    def own(self, site: Site, names: Collection[str] | None = None) -> dict[str, torch.Tensor]:
        """The values measured for the site's input, or some of them by name; each call works them out anew."""
        key = self.input_of.get(operand_of(site))
        return {
            name: statistic.value
            for (owner, name), statistic in self.statistics.items()
            if owner == key and (names is None or name in names)
        }

    def sample(self, site: Site) -> torch.Tensor | None:
        """Some tokens of the site's input (at most 256), or None where none came."""
        key = self.input_of.get(operand_of(site))
        kept = self.samples.get(key, []) if key is not None else []
        return torch.cat(kept)[:ERROR_SAMPLE] if kept else None
