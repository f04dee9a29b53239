"""Lets all processes walk the blocks in one order, though each has passes of its own, or none at all."""

from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

from hf_sparse import ranks
from hf_sparse.blocks import Block
from hf_sparse.data import Batch, tokens_of
from hf_sparse.forwards import Call


class Turn(NamedTuple):
    """The calls of this process that wait at a block, none where its passes are elsewhere; `everywhere`: over all processes."""

    block: Block
    calls: list[Call]
    everywhere: int


def own_batches(batches: Sequence[Batch]) -> list[int]:
    """The positions of the batches that this process runs, by tokens as many as the others; they are formed as in one process."""
    return ranks.own([tokens_of(batch.values) for batch in batches])


def in_step(turns: Iterator[list[Call]], blocks: Sequence[Block], order: Sequence[int]) -> Generator[Turn, None, None]:
    """The turns of `forwards.walk`, the same blocks on all processes; `order` is the one that the walk was given."""
    place = {index: position for position, index in enumerate(order)}
    by_index = {block.index: block for block in blocks}
    waiting = [next(turns, [])]  # at most one list of calls, handed on so that nothing keeps them alive here
    while True:
        here = waiting[0][0].block.index if waiting[0] else None
        everywhere = ranks.gather([here, len(waiting[0])])
        fronts = {index for index, _ in everywhere if index is not None}
        if not fronts:
            return
        front = min(fronts, key=lambda index: (place.get(index, len(place)), index))
        number = sum(calls or 0 for index, calls in everywhere if index == front)
        yield Turn(by_index[front], waiting.pop() if here == front else [], number)
        if not waiting:
            waiting.append(next(turns, []))
