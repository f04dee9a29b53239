"""Finds an order of channels in which N:M groups lose little: strong and weak ones dealt out, then assigned anew."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from hf_sparse.patterns.n_m import n_m_mask

ROWS = 512  # rows of all parts together that the search looks at; the result is judged on all of them
_CHUNK = (
    128  # groups among which channels are assigned at once, so that the cost grows with the channels, not their cube
)
_SWEEPS = 6
_ENOUGH = 1e-4  # a sweep that wins a smaller share of the kept importance is the last


class Part(NamedTuple):
    """What one site puts into the scale: its importance scores with the channels as columns."""

    scores: torch.Tensor  # (rows, channels)
    keep: int  # of every group of consecutive channels


def kept_importance(parts: Sequence[Part], order: torch.Tensor | None, group: int) -> float:
    """The sum of the scores that N:M leaves in, with the channels in that order."""
    total = 0.0
    for scores, keep in parts:
        ordered = scores if order is None else scores[:, order]
        total += float(torch.where(n_m_mask(ordered, keep, group), ordered, 0).sum(dtype=torch.float64))
    return total


def best_order(parts: Sequence[Part], group: int, seed: int = 0, rows: int = ROWS) -> torch.Tensor:
    """Old indices in the new order, so that `new[:, i] = old[:, order[i]]`; the present order where none keeps more.

    The start is that of Plug-and-Play's channel permutation (ICLR 2024, section 3.2): channels sorted by their sum are dealt
    snake-wise into the groups, then linear assignment refines them. Where that goes slot by slot, here a random channel of
    each of at most 128 random groups takes part in a round. A ragged tail stays where it is.
    """
    channels = parts[0].scores.shape[1]
    present = torch.arange(channels)
    whole = channels // group * group
    if whole <= group:
        return present
    sampled = sample_rows(parts, rows, whole)
    groups = _refined(sampled, _dealt(sampled, group), torch.Generator().manual_seed(seed))
    found = torch.cat([_tidy(groups), present[whole:]])
    return found if kept_importance(parts, found, group) > kept_importance(parts, None, group) else present


def sample_rows(parts: Sequence[Part], rows: int, channels: int) -> list[Part]:
    """Evenly spaced rows of every part, scaled up to stand for all; parts of which equally many are kept become one."""
    share = min(1.0, rows / max(1, sum(len(part.scores) for part in parts)))
    by_keep: dict[int, list[torch.Tensor]] = {}
    for scores, keep in parts:
        number = max(1, round(share * len(scores)))
        chosen = torch.linspace(0, len(scores) - 1, number).round().long().to(scores.device)
        taken = scores[chosen, :channels].float() if number < len(scores) else scores[:, :channels].float()
        by_keep.setdefault(keep, []).append(taken * (len(scores) / number))
    return [Part(torch.cat(found).cpu(), keep) for keep, found in by_keep.items()]


def _dealt(parts: Sequence[Part], group: int) -> torch.Tensor:
    """(groups, channels of each): the strongest go one to each group, the next the other way round, and so on."""
    total = torch.stack([part.scores.sum(0) for part in parts]).sum(0)
    rounds = total.argsort(descending=True, stable=True).view(group, -1)
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.contiguous()


def _tidy(groups: torch.Tensor) -> torch.Tensor:
    """The same groups with channels in ascending order, as far as that goes."""
    inside = groups.sort(1).values
    return inside[inside[:, 0].argsort()].flatten()


def _refined(parts: Sequence[Part], groups: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    number, size = groups.shape
    total = sum(kept_importance([part], groups.flatten(), size) for part in parts)
    for _ in range(_SWEEPS):
        won = 0.0
        for _ in range(size):
            slots = torch.randint(size, (number,), generator=generator)
            shuffled = torch.randperm(number, generator=generator)
            won += sum(_reassign_(parts, groups, slots, chunk) for chunk in shuffled.split(_CHUNK))
        if won <= _ENOUGH * total:
            break
    return groups


def _reassign_(parts: Sequence[Part], groups: torch.Tensor, slots: torch.Tensor, chosen: torch.Tensor) -> float:
    """Gives one channel of each chosen group to the group where it is worth most; returns the importance won."""
    slot = slots[chosen]
    moving = groups[chosen, slot]
    gain = torch.zeros(len(chosen), len(chosen))
    others = groups[chosen].masked_select(torch.arange(groups.shape[1]) != slot[:, None]).view(len(chosen), -1)
    for scores, keep in parts:
        if not 0 < keep < groups.shape[1]:
            continue
        # A channel in a group keeps its score where that beats the last of the others that would be kept without it.
        rival = scores[:, others].topk(keep, dim=-1).values[..., -1].T.contiguous()  # (groups, rows)
        comer = scores[:, moving].T.contiguous()  # (channels, rows)
        # The sum of the larger ones, for all pairs: max(a, b) = (a + b + |a - b|) / 2.
        gain += (comer.sum(1)[:, None] + rival.sum(1) + torch.cdist(comer, rival, p=1)) / 2
    placed, won = _assigned(gain)
    groups[chosen, slot] = moving[placed]
    return won


def _assigned(gain: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Which of the channels (rows) each group (column) gets for the largest sum of gains, and what that wins.

    Shortest augmenting paths with potentials (Kuhn 1955; Jonker and Volgenant 1987); scipy has it too, but is no dependency.
    """
    cost = -gain.double().numpy()
    number = len(cost)
    rows, columns = np.zeros(number + 1), np.zeros(number + 1)  # potentials; index 0 stands for a column outside
    owner, way = np.zeros(number + 1, dtype=np.int64), np.zeros(number + 1, dtype=np.int64)
    for row in range(1, number + 1):
        owner[0], column = row, 0
        least, used = np.full(number + 1, np.inf), np.zeros(number + 1, dtype=bool)
        while True:
            used[column] = True
            reduced = cost[owner[column] - 1] - rows[owner[column]] - columns[1:]
            better = np.flatnonzero(~used[1:] & (reduced < least[1:])) + 1
            least[better], way[better] = reduced[better - 1], column
            following = int(np.where(used, np.inf, least).argmin())
            step = least[following]
            rows[owner[used]] += step
            columns[used] -= step
            least[~used] -= step
            column = following
            if not owner[column]:
                break
        while column:
            owner[column], column = owner[way[column]], way[column]
    placed = torch.from_numpy(owner[1:] - 1)
    won = float((gain[placed, torch.arange(number)] - gain.diagonal()).sum(dtype=torch.float64))
    return placed, won
