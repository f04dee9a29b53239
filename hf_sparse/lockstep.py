"""Runs many calls of one block at once and stops them at its products: all calls reach a product before any goes on behind it.

So a site can be pruned when the inputs of all batches are known and before the first product with it is made: what comes behind
sees the pruned weights, in one single pass. Each call runs in a greenlet, as the passes of `forwards.walk` do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from greenlet import greenlet
from torch import nn

from hf_sparse import warning_handler
from hf_sparse.forwards import Call, Modes
from hf_sparse.observe import Observer, Operand
from hf_sparse.sites import Site


@dataclass
class Arrival:
    """One call that waits before a product."""

    call: Call
    operand: Operand
    x: torch.Tensor  # the product's other factor, contraction dimension last


class _Worker(greenlet):
    """A greenlet that runs one call of a block."""

    def __init__(self, run: Callable[[], Any], call: Call) -> None:
        super().__init__(run)
        self.call = call


# What is done with a product that was made: (call, operand, x, product)
Made = Callable[[Call, Operand, torch.Tensor, torch.Tensor], None]


class Lockstep:
    """Calls of one block, each stopped before the next product with one of some operands."""

    def __init__(
        self, model: nn.Module, sites: Sequence[Site], stops: set[Operand], made: Made, device: str | None
    ) -> None:
        self._model, self._sites, self._stops, self._made, self._device = model, sites, stops, made, device
        self._waiting: dict[int, tuple[_Worker, Arrival]] = {}

    def start(self, calls: Sequence[Call]) -> None:
        """Run each call up to its first stop, or to its end, which fills its `output`."""
        for call in calls:
            self._advance(_Worker(partial(self._run, call), call))

    def _run(self, call: Call) -> None:
        def before(operand: Operand, x: torch.Tensor) -> None:
            if operand in self._stops:
                modes, handler = Modes.present(), warning_handler.present()
                parent = greenlet.getcurrent().parent
                try:
                    parent.switch(Arrival(call, operand, x))
                finally:
                    warning_handler.put_back(handler)
                modes.apply()

        def after(operand: Operand, x: torch.Tensor, product: torch.Tensor) -> None:
            self._made(call, operand, x, product)

        with Observer(self._model, self._sites, after, before):
            call.output = call(self._device)

    def _advance(self, worker: _Worker) -> None:
        worker.parent = greenlet.getcurrent()
        base, handler = Modes.present(), warning_handler.present()
        arrival = worker.switch()
        warning_handler.put_back(handler)
        base.apply()
        if isinstance(arrival, Arrival) and not worker.dead:
            self._waiting[id(worker.call)] = (worker, arrival)

    @property
    def waiting(self) -> list[Arrival]:
        return [arrival for _, arrival in self._waiting.values()]

    def go_on(self, operands: set[Operand]) -> None:
        """Let the calls that wait before one of `operands` make that product and run to their next stop."""
        for key, (worker, arrival) in list(self._waiting.items()):
            if arrival.operand in operands:
                del self._waiting[key]
                self._advance(worker)

    def close(self) -> None:
        """End the calls that still wait, where they are."""
        handler = warning_handler.present()
        for worker, _ in self._waiting.values():
            worker.throw()
            warning_handler.put_back(handler)
        self._waiting.clear()
