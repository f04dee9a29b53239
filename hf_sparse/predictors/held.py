"""Choices that hold for several tokens: the scores of the last token at which one was made."""

from collections.abc import Hashable

import torch


class Held:
    """The scores that are chosen by, where choices are made at the places that are multiples of `every`.

    Those of the last pass are remembered, all of them: when a guess is taken back (assisted decoding), the next pass begins in the
    midst of this one.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._scores: dict[
            Hashable, dict[int, torch.Tensor]
        ] = {}  # place -> (..., 1, units), one row for each sequence

    def clear(self) -> None:
        """Another sequence begins."""
        self._scores.clear()

    def __call__(self, key: Hashable, scores: torch.Tensor, start: int) -> torch.Tensor:
        """Scores (..., tokens, units) of a pass that begins at a place -> those that hold at each of its tokens."""
        every, length = self._every, scores.shape[-2]
        first = start // every * every
        before = self._scores.get(key, {}).get(first)
        fits = before is not None and before.shape[:-2] == scores.shape[:-2]
        # Where there is nothing to go by, the first token that is seen is chosen for.
        known = {first: before if fits else scores[..., :1, :]}
        for place in range(-(-start // every) * every, start + length, every):
            known[place] = scores[..., place - start : place - start + 1, :]
        self._scores[key] = known  # type: ignore[assignment]
        places = torch.arange(start, start + length, device=scores.device)
        return torch.cat(list(known.values()), -2).index_select(-2, places // every - first // every)  # type: ignore[arg-type]

    def reorder(self, rows: torch.Tensor) -> None:
        """Row i becomes what row `rows[i]` was."""
        for held in self._scores.values():
            held.update({place: scores.index_select(0, rows.to(scores.device)) for place, scores in held.items()})
