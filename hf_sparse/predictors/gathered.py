"""Gathered execution: what is left out is neither computed nor read from memory, in the passes that decode one token at a time."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from hf_sparse.errors import ConfigError
from hf_sparse.families import find_sites
from hf_sparse.predictors.masked import Masked, check_ready, switched_on
from hf_sparse.predictors.networks import GateFirst, Oracle, Predictor
from hf_sparse.predictors.rows import Rows, dots, in_runs, rows_of_mask, sums, transposed
from hf_sparse.predictors.select import Selection
from hf_sparse.predictors.skipping import Feed, Heads
from hf_sparse.predictors.units import BlockUnits, activation_of

Forward = Callable[[torch.Tensor], torch.Tensor]
LEAST_WEIGHTS = 1 << 18  # of a query or output projection: a smaller one is done before its rows are put together


@contextmanager
def gathered(
    model: nn.Module, predictor: Predictor, selection: Selection, *, refresh_every: int = 1
) -> Iterator["Gathered"]:
    """As `masked` with a dense prompt, with the same choices, but passes of one token for each sequence compute only what is chosen.

    On the CPU, in bfloat16 or float32. Other passes after the prompt (several tokens at once, gradients, autocast) are masked.
    Meanwhile the weights whose columns are chosen lie in memory column after column; `.weight` shows them as ever.

    Raises: ModelError as `masked`, and for modules whose rows cannot be read one by one; ConfigError for an oracle.
    """
    check_ready(model, refresh_every)
    if isinstance(predictor, Oracle):
        raise ConfigError(
            'kind="oracle" measures texts without a cache; it cannot generate. Take hf_sparse.predictors.masked.'
        )
    running = Gathered(model, predictor, selection, refresh_every)
    with ExitStack() as stack:
        stack.enter_context(switched_on(running))
        for weight in running.columns():
            stack.enter_context(transposed(weight))
        for module, forward in running.forwards():
            stack.enter_context(_replaced(module, forward))
        yield running


@contextmanager
def _replaced(module: nn.Module, forward: Forward) -> Iterator[None]:
    module.forward = torch.compiler.disable(forward)  # the choices of a token are not known when a graph is made
    try:
        yield
    finally:
        del module.forward


class Gathered(Masked):
    """The forwards of the modules that skip, and the rows that are chosen for the tokens of the pass at hand."""

    PARTS = (
        "_tell",
        "_choose_by_gate",
        "_chosen",
    )  # methods in which, beside the predictor's own, scores become choices

    def __init__(self, model: nn.Module, predictor: Predictor, selection: Selection, every: int) -> None:
        super().__init__(model, predictor, selection, every, "dense")
        sites = find_sites(model).sites
        self._rows: dict[tuple[int, str], Rows] = {}  # of this pass
        self._gathers = False
        self._up_first: set[int] = set()  # blocks of this pass whose `up` was computed before the gate had chosen
        self.feeds: dict[int, Feed] = {}  # position in the layout -> modules, where something is skipped
        self.attentions: dict[int, Heads] = {}
        for position, block in enumerate(self.units):
            if selection.shares(self.layout, "neurons")[position] != 1:
                self.feeds[position] = Feed(model, block)
            if selection.shares(self.layout, "heads")[position] != 1:
                self.attentions[position] = Heads(model, block, sites[block.index])

    def columns(self) -> list[torch.Tensor]:
        """The weights of which columns are chosen, which is why they have to lie transposed."""
        weights: list[torch.Tensor] = [feed.down.weight for feed in self.feeds.values()]
        weights += [heads.o.weight for heads in self.attentions.values() if heads.o.weight.numel() >= LEAST_WEIGHTS]
        return list(dict.fromkeys(weights))

    def forwards(self) -> Iterator[tuple[nn.Module, Forward]]:
        """Modules and what they do instead."""
        for position, feed in self.feeds.items():
            by_gate = isinstance(self.predictor, GateFirst)
            for module, starts in feed.starts.items():
                if by_gate and module is feed.gate:
                    yield module, self._fused_gate(position, feed) if feed.fused else self._whole_gate(feed)
                else:
                    yield module, self._first_rows(position, module, starts)
            yield feed.down, self._down(position, feed)
        for position, heads in self.attentions.items():
            if heads.q is not None and heads.q_rows.numel() * heads.q.in_features >= LEAST_WEIGHTS:
                yield heads.q, self._query(position, heads, heads.q)
            if heads.o.weight.numel() >= LEAST_WEIGHTS:
                yield heads.o, self._output(position, heads)

    # ------------------------------------------------------------------------------------------------ which rows

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        super()._begin(module, args, kwargs)
        self._rows.clear()
        self._up_first.clear()
        given = [kwargs.get(name) for name in ("input_ids", "inputs_embeds")] + list(args[:1])
        tokens = next((value for value in given if value is not None), None)
        plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        self._gathers = not self._off() and plain and tokens is not None and tokens.shape[1] == 1

    def _neurons(self, position: int) -> Rows | None:
        """The neurons of each token, once they are chosen."""
        block = self.units[position]
        return self._chosen(position, "neurons", lambda mask: rows_of_mask(self.layout.expand(mask, block.neurons)))

    def _heads(self, position: int) -> Rows | None:
        """The channels of the heads of each token."""
        return self._chosen(position, "heads", lambda mask: in_runs(rows_of_mask(mask), self.units[position].head_size))

    def _chosen(self, position: int, kind: str, rows: Callable[[torch.Tensor], Rows]) -> Rows | None:
        masks = self.masks.get(position) if self._gathers else None
        mask = None if masks is None else getattr(masks, kind)
        if mask is None:
            return None
        if (position, kind) not in self._rows:
            self._rows[position, kind] = rows(mask.reshape(-1, mask.shape[-1]))
        return self._rows[position, kind]

    # ------------------------------------------------------------------------------------------------ neurons

    def _first_rows(self, position: int, module: nn.Linear, starts: list[int]) -> Forward:
        def forward(x: torch.Tensor) -> torch.Tensor:
            rows = self._neurons(position)
            if rows is None:
                self._up_first.add(position)
                return nn.Linear.forward(module, x)
            return dots(
                module, x, torch.cat([rows.indices + start for start in starts], 1) if starts != [0] else rows.indices
            )

        return forward

    def _down(self, position: int, feed: Feed) -> Forward:
        def forward(x: torch.Tensor) -> torch.Tensor:
            rows = self._rows.get((position, "neurons"))
            return nn.Linear.forward(feed.down, x) if rows is None else sums(feed.down, x, rows)

        return forward

    def _mask_neurons(self, position: int, block: BlockUnits) -> Callable[..., Any]:
        change = super()._mask_neurons(position, block)
        return lambda module, args: None if (position, "neurons") in self._rows else change(module, args)

    def _read_gate(self, position: int, block: BlockUnits) -> Callable[..., Any]:
        look = super()._read_gate(position, block)

        def choose(module: nn.Module, args: Any, product: torch.Tensor) -> torch.Tensor | None:
            if (position, "neurons") in self._rows:
                return None  # a fused gate that has chosen already
            look(module, args, product)
            rows = None if position in self._up_first else self._neurons(position)
            return None if rows is None else product.gather(-1, rows.indices.view(*product.shape[:-1], -1))

        return choose

    def _whole_gate(self, feed: Feed) -> Forward:
        """All rows of the gate; for one token our product is faster than torch's."""
        rows = torch.arange(feed.first_row_of_gate, feed.first_row_of_gate + feed.block.neurons)

        def forward(x: torch.Tensor) -> torch.Tensor:
            if not self._gathers:
                return nn.Linear.forward(feed.gate, x)
            return dots(feed.gate, x, rows.repeat(x.shape[0], 1))

        return forward

    def _fused_gate(self, position: int, feed: Feed) -> Forward:
        """The gate's part of a fused matrix whole, then the chosen rows of the other."""
        module, activation, whole_gate = feed.gate, activation_of(self.model, feed.block), self._whole_gate(feed)

        def forward(x: torch.Tensor) -> torch.Tensor:
            if not self._gathers:
                return nn.Linear.forward(module, x)
            gate = whole_gate(x)
            self._choose_by_gate(position, activation(gate))
            rows = self._neurons(position)
            if rows is None:
                return nn.Linear.forward(module, x)
            kept = gate.gather(-1, rows.indices.view(*gate.shape[:-1], -1))
            parts = [
                kept if start == feed.first_row_of_gate else dots(module, x, rows.indices + start)
                for start in feed.starts[module]
            ]
            return torch.cat(parts, -1)

        return forward

    # ------------------------------------------------------------------------------------------------ heads

    def _mask_heads(self, position: int, block: BlockUnits) -> Callable[..., Any]:
        change = super()._mask_heads(position, block)
        cut = position in self.attentions and self.attentions[position].o.weight.numel() >= LEAST_WEIGHTS
        return lambda module, args: None if cut and self._gathers else change(module, args)

    def _query(self, position: int, heads: Heads, module: nn.Linear) -> Forward:
        def forward(x: torch.Tensor) -> torch.Tensor:
            rows = self._heads(position)
            if rows is None:
                return nn.Linear.forward(module, x)
            indices = heads.q_rows[rows.indices]
            indices = torch.cat([indices, heads.others.expand(len(indices), -1)], 1)
            products = dots(module, x, indices).view(len(indices), -1)
            whole = products.new_zeros(len(indices), module.out_features).scatter_(1, indices, products)
            return whole.view(*x.shape[:-1], -1)

        return forward

    def _output(self, position: int, heads: Heads) -> Forward:
        def forward(x: torch.Tensor) -> torch.Tensor:
            rows = self._heads(position)
            if rows is None:
                return nn.Linear.forward(heads.o, x)
            columns = rows.indices.view(*x.shape[:-1], -1)
            return sums(heads.o, x.gather(-1, columns), rows)

        return forward
