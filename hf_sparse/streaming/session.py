"""One attempt at a pruning from disk to disk: writes down what is done, and takes over what earlier attempts have done."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hf_sparse.allot import shares
from hf_sparse.blockwise import Run
from hf_sparse.config import SparsityConfig
from hf_sparse.data import Batch, Sample, Samples
from hf_sparse.hashes import sha256_of
from hf_sparse.permute import Permutations
from hf_sparse.report import FILE_NAME as REPORT_FILE
from hf_sparse.report import BlockReport, block_report
from hf_sparse.shared import Shared
from hf_sparse.streaming.weights import OUTSIDE, Weights
from hf_sparse.streaming.work import Work, check_same


class Session(Shared):
    """What `prune_sharing_` shares here is between attempts: all that costs a pass over the model is in the journal."""

    def __init__(self, weights: Weights, work: Work, tokenizer: Any, options: Mapping[str, Any]) -> None:
        super().__init__(tokenizer, options)
        self.diary = self
        self._weights, self._work, self._journal = weights, work, work.journal
        self._start = time.monotonic()
        self.earlier = max((float(entry.get("seconds", 0.0)) for entry in self._journal.entries), default=0.0)
        self._begun = self._journal.last("begin")  # by an earlier attempt, until this one has taken it over
        self.batch_size: int | None = self._begun["batch_size"] if self._begun else None
        self._noted = 0
        self._scores = {entry["shares"]: float(entry["score"]) for entry in self._of_kind("score")}

    def _of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [entry for entry in self._journal.entries if entry["kind"] == kind]

    def _add(self, kind: str, values: Mapping[str, Any]) -> None:
        self._journal.add(kind, {**values, "seconds": self.earlier + time.monotonic() - self._start})

    # ------------------------------------------------------------------------------------------------ what comes before

    def samples(self, model: nn.Module, config: SparsityConfig) -> Samples:
        """The samples, which must be those of the attempt before."""
        found = super().samples(model, config)
        now = {"calibration": found.fingerprint, "samples": len(found.rows), "tokens": found.tokens}
        known = self._journal.last("calibration")
        if known is None:
            self._journal.add("calibration", now)
        else:
            check_same(known, now, self._work.destination)
        return found

    def allot_(self, run: Run, samples: Samples, batches: Sequence[Batch]) -> None:
        """Settle the shares; what was measured before is not measured again."""
        known = self._journal.last("measured")
        if run.measured:
            return
        if known is not None:
            run.measured = {int(index): float(value) for index, value in known["values"].items()}
            if not run.chosen.keys() <= run.measured.keys():
                raise self._journal.damaged("not all blocks were measured")
            run.shares = shares(run.inventory, run.chosen, run.config, run.measured)
            run.notes += known["notes"]
            return
        before = len(run.notes)
        super().allot_(run, samples, batches)
        if run.measured:
            self._add("measured", {"values": run.measured, "notes": run.notes[before:]})

    def permute_(self, run: Run, rows: Sequence[Sample], batches: Sequence[Batch], permutations: Permutations) -> None:
        """Reorder channels; the dense weights in their new order stand in files of their own until the run is done."""
        if self._begun is not None:
            permutations.orders, permutations.places = self._begun["orders"], self._begun["places"]
            if self._begun["aside"]:
                permutations.resumed = True
                files = {name: self._work.aside / file for name, file in self._begun["aside"].items()}
                if lost := next((file for file in files.values() if not file.is_file()), None):
                    raise self._journal.damaged(f"{lost.name!r}, which it names, is not there")
                self._weights.take_aside(files)
            return
        if run.config.permute:
            self._work.aside.mkdir(exist_ok=True)
            self._weights.keep_in = self._work.aside
        super().permute_(run, rows, batches, permutations)
        if permutations.done and OUTSIDE not in self._weights.aside:
            self._weights.keep_outside(self._work.aside)

    # ------------------------------------------------------------------------------------------------ the diary

    def begin(self, run: Run, orders: Mapping[str, list[int]], places: Mapping[str, list[str]]) -> None:
        """From here on blocks that are written back are pruned ones."""
        self._weights.keep_in = None
        if self._begun is not None:
            run.notes[:] = self._begun["notes"]
            self._take_over(run)
            self._begun = None
        else:
            aside = {name: file.name for name, file in self._weights.aside.items()}
            self._add(
                "begin",
                {"notes": run.notes, "batch_size": run.batch_size, "orders": orders, "places": places, "aside": aside},
            )
        self._noted = len(run.notes)

    def _take_over(self, run: Run) -> None:
        """The blocks that are done are read from the output from now on."""
        last = max(number for number, entry in enumerate(self._journal.entries) if entry["kind"] == "begin")
        for entry in self._journal.entries[last:]:
            if entry["kind"] != "block":
                continue
            report = block_report(entry["report"])
            if report.name not in {block.name for block in run.inventory.blocks if block.index == report.index}:
                raise self._journal.damaged(f"the model has no block {report.index} of the name {report.name!r:.200}")
            run.done[report.index] = report
            run.changed.append(report.index)
            run.notes += entry["notes"]
            self._weights.written.add(report.name)

    def finished(self, run: Run, report: BlockReport) -> None:
        """The block's weights are on the disk before the journal says so."""
        self._weights.outputs.sync()
        self._add("block", {"report": dataclasses.asdict(report), "notes": run.notes[self._noted :]})
        self._noted = len(run.notes)

    def score(self, shares: Mapping[str, float]) -> float | None:
        return self._scores.get(_digest(shares))

    def scored(self, shares: Mapping[str, float], score: float) -> None:
        self._scores[_digest(shares)] = score
        self._add("score", {"shares": _digest(shares), "score": score})

    def complete(self, folder: Path) -> None:
        """All files of the model are written, in `folder`; its report tells the result from any other."""
        self._add("complete", {"report": sha256_of(folder / REPORT_FILE)})


def _digest(shares: Mapping[str, float]) -> str:
    return hashlib.sha256(json.dumps(shares, sort_keys=True).encode()).hexdigest()


def files_told(paths: Sequence[Path], weights: Weights) -> dict[str, Any]:
    """What tells whether files of the source have changed: SHA-256, of weights that of their header with size and time of the last change."""
    told: dict[str, Any] = {}
    for path in paths:
        header = weights.inputs.headers.get(path.name)
        if header is None:
            told[path.name] = sha256_of(path)
            continue
        status = path.stat()
        told[path.name] = [status.st_size, status.st_mtime_ns, hashlib.sha256(header.content).hexdigest()]
    return told
