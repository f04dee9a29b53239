"""Searches for an allocation on calibration samples that are held out.

Candidates are compared by trials, which prune on few samples; the best one is then pruned with on all. Uniform is too, and the better
of the two on the held-out samples is kept, unless the best one beats uniform's trial by more than twice what its own score differed
between trial and pruning. Then uniform is known from its trial alone, and the note in the report says so.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import logging as transformers_logging

from hf_sparse import ranks
from hf_sparse.allocations import BlockSize, Shares, spread, stacks
from hf_sparse.allocations.atp import bound, ramp
from hf_sparse.allot import block_sizes, settled
from hf_sparse.blockwise import Run
from hf_sparse.data import Sample
from hf_sparse.errors import CalibrationError
from hf_sparse.patterns import Pattern
from hf_sparse.trials import Trials, by_kind

_FIRST = (0.0, 0.25, 0.5)  # steps of the ramp, in units of the bound
_FURTHER = 0.25  # from the outermost on
_SPACINGS = (1 / 8, 1 / 16)  # around the best so far
_WORTH = 0.01  # a finer step is looked for while the last ones won this share of what was won in all
_NARROWEST = 8  # how often the width of a block search is halved at most, as a divisor: width / 8


Key = tuple[float, ...]


def held_back(run: Run, rows: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Samples to calibrate on, and the last ones of each kind, which are kept for scoring where the allocation is searched for.

    The only sample of its kind is calibrated on: without it the blocks that no other sample runs could not be pruned.
    """
    if not run.config.searches:
        return list(rows), []
    name = str(run.config.allocation)
    share, kept = run.config.options_of(name)["held_out"], set()
    for positions in by_kind(rows):
        number = min(max(1, round(len(positions) * share)), len(positions) - 1)
        kept |= set(positions[len(positions) - number :])
    if not kept:
        raise CalibrationError(
            f"{len(rows)} calibration samples, no two of one kind, cannot be shared between calibration and the search of "
            f"allocation {name!r}; give more, with num_samples."
        )
    calibrated = [row for position, row in enumerate(rows) if position not in kept]
    return calibrated, [row for position, row in enumerate(rows) if position in kept]


@dataclass
class _Found:
    """Candidates that were scored: by what they are made of (a step, or the blocks' shares), the score and the shares."""

    scores: dict[Key, float] = field(default_factory=dict)
    shares: dict[Key, Shares] = field(default_factory=dict)

    def best(self) -> Key:
        return min(self.scores, key=lambda key: self.scores[key])


def search_(run: Run, rows: Sequence[Sample], held_out: Sequence[Sample]) -> None:
    """Search for the shares of a run and prune with the best: `run` ends as after `with_data`."""
    name, start = str(run.config.allocation), time.process_time()
    options = run.config.options_of(name)
    trials = Trials(run, rows, held_out, str(options["selector"]))
    try:
        blocks = list(block_sizes(run.inventory, run.chosen).values())
        with transformers_logging.tqdm(desc="Searching", unit="trial", disable=not ranks.is_first()) as bar:
            found, step = _ramps(run, blocks, trials, bar)
            note, even = f"the best step of the ramp is {step:.4g}", found.scores[0.0,]
            if name == "search":
                found = _by_block(run, blocks, trials, found, options, bar)
                note = "moved block by block"
        _conclude(run, trials, found, even, note, start)
    except BaseException:
        trials.restore()
        raise


# ---------------------------------------------------------------------------------------------------- the candidates


def _score(trials: Trials, found: _Found, candidates: Mapping[Key, Shares], bar: Any) -> None:
    """Score the candidates that are new; ones that come out as the same shares count as one."""
    for key, shares in candidates.items():
        if key in found.scores:
            continue
        same = next((other for other, known in found.shares.items() if known == shares), None)
        if same is None:
            bar.update()
        found.scores[key] = trials.score(shares) if same is None else found.scores[same]
        found.shares[key] = shares


def _ramps(run: Run, blocks: list[BlockSize], trials: Trials, bar: Any) -> tuple[_Found, float]:
    """ATP's ramp: coarse steps upwards first; downwards if none of them helps; either way further out to the bound while the outermost
    is best; then finer around the best.
    """
    target = run.config.target
    limit = min(bound(target, len(stack)) for stack in stacks(blocks))
    found = _Found()

    def best_of(units: Sequence[float]) -> float:
        legal = [unit for unit in units if -1 <= unit <= 1]
        shares: dict[Key, Shares] = {}
        for unit in legal:
            shares[unit,] = settled(run.config, ramp(target, blocks, unit * limit), blocks)
        _score(trials, found, shares, bar)
        return found.best()[0]

    best = best_of(_FIRST)
    direction = 1 if best > 0 else -1
    outermost = _FIRST[-1] if best > 0 else 0.0
    while best == outermost and abs(outermost) < 1:
        outermost += direction * _FURTHER
        best = best_of((outermost,))
    for spacing in _SPACINGS:
        won = found.scores[0.0,] - found.scores[found.best()]
        before, best = best, best_of((best - spacing, best + spacing))
        now = found.scores[0.0,] - found.scores[found.best()]
        if best == before or now - won < _WORTH * now:
            break
    return found, best * limit


def _by_block(
    run: Run, blocks: list[BlockSize], trials: Trials, ramps: _Found, options: Mapping[str, Any], bar: Any
) -> _Found:
    """From the best ramp on: each block up and down, then all moves that helped together; the width shrinks when none does."""
    # A whole N of N:M is the smallest move that shows.
    width = max(float(options["width"]), 1 / (Pattern.parse(run.config.pattern).group or math.inf))
    narrowest = width / _NARROWEST
    start = ramps.shares[ramps.best()]
    present = tuple(sum(start[name] * size for name, size in block.sites.items()) / block.size for block in blocks)
    found = _Found({present: ramps.scores[ramps.best()]}, {present: start})
    for _ in range(int(options["rounds"])):
        moves = {
            (index, sign): _moved(present, {index: sign * width}) for index in range(len(blocks)) for sign in (-1, 1)
        }
        _score(trials, found, {key: _shares(run, blocks, key) for key in moves.values()}, bar)
        gains = {move: found.scores[present] - found.scores[key] for move, key in moves.items()}
        better = {move: gain for move, gain in gains.items() if gain > 0 and gain >= gains[move[0], -move[1]]}
        together = _moved(present, {index: sign * width for index, sign in better})
        _score(trials, found, {together: _shares(run, blocks, together)}, bar)
        if found.best() == present:
            width /= 2
            if width < narrowest:
                break
        present = found.best()
    return found


def _moved(shares: Key, by: Mapping[int, float]) -> Key:
    return tuple(min(max(share + by.get(index, 0.0), 0.0), 1.0) for index, share in enumerate(shares))


def _shares(run: Run, blocks: list[BlockSize], wanted: Key) -> Shares:
    by_name = dict(zip((block.name for block in blocks), wanted, strict=True))
    allotted: Shares = {}
    for stack in stacks(blocks):
        allotted |= spread(stack, [by_name[block.name] for block in stack], run.config.target)
    return settled(run.config, allotted, blocks)


# ---------------------------------------------------------------------------------------------------- the end


def _conclude(run: Run, trials: Trials, found: _Found, even: float, note: str, start: float) -> None:
    """Prune with the best candidate on all samples; uniformly as well, unless that is clearly worse, and keep what is better."""
    uniform, best = dict(run.shares), found.shares[found.best()]
    kept, score = trials.real(best)
    compared = f"about {even:.5g} in a trial"
    if best == uniform:
        compared = f"{score:.5g}"
    # How far trials are from the truth shows in the best one's; within twice that nothing is sure.
    elif score > even - 2 * abs(score - found.scores[found.best()]):
        trials.restore()
        other, even = trials.real(uniform)
        compared = f"{even:.5g}"
        if score < even:
            trials.restore()
            other, _ = trials.real(best)
        kept, score = other, min(score, even)
    run.shares, run.done, run.changed = kept.shares, kept.done, kept.changed
    chosen = note if kept.shares != uniform else "nothing was better than uniform"
    cost = (time.process_time() - start) / trials.pruning_seconds
    rows = sum(len(batch.numbers) for batch in trials.held_out)
    run.notes += kept.notes
    run.notes.append(
        f"allocation {run.config.allocation} searched with {trials.number} trials, {cost:.1f} times the cost of one pruning: {chosen}; "
        f"{trials.selector} on {rows} held-out samples {score:.5g}, uniform {compared}"
    )
