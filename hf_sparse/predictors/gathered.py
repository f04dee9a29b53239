"""Gathered execution: what is left out is neither computed nor read from memory, in the passes that decode one token at a time."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from hf_sparse.errors import ConfigError
from hf_sparse.families import find_sites
from hf_sparse.native.largest import largest
from hf_sparse.native.layout import STRIPE_ROWS
from hf_sparse.predictors.criteria import Scores
from hf_sparse.predictors.masked import Masked, switched_on
from hf_sparse.predictors.networks import TELLS, GateFirst, Oracle, Predictor
from hf_sparse.predictors.rows import (
    Rows,
    counted_from,
    dots,
    hold_in_rows,
    in_runs,
    is_packed,
    lay_by_columns,
    rows_of_mask,
    stripe_dots,
    stripes_of,
    sums,
    whole,
)  # fmt: skip
from hf_sparse.predictors.select import Selection, top
from hf_sparse.predictors.skipping import Feed, Forward, Heads, replace_forward
from hf_sparse.predictors.units import BlockUnits, activation_of

LEAST_WEIGHTS = 1 << 18  # of a query or output projection: a smaller one is done before its rows are put together


@contextmanager
def gathered(
    model: nn.Module, predictor: Predictor, selection: Selection, *, refresh_every: int = 1
) -> Iterator["Gathered"]:
    """As `masked` with a dense prompt, with the same choices, but passes of one token for each sequence compute only what is chosen.

    On the CPU, in bfloat16 or float32, dense or on sparse kernels. Other passes after the prompt (several tokens, gradients, autocast) are
    masked. Meanwhile weights of which columns or rows are chosen lie in memory so; `.weight` shows them as ever.

    Raises: ModelError as `masked`, and for modules whose rows cannot be read one by one; ConfigError for an oracle.
    """
    running = Gathered(model, predictor, selection, refresh_every)
    with switched_on(running):
        yield running


def large(module: nn.Linear) -> bool:
    """Whether a projection of heads takes longer than putting together which parts of it are computed."""
    return module.in_features * module.out_features >= LEAST_WEIGHTS


class Gathered(Masked):
    """The forwards of the modules that skip, and the rows that are chosen for the tokens of the pass at hand."""

    name = "gathered"
    PARTS = ("_tell", "_choose_by_gate", "_chosen")  # in which, beside the predictor's own, scores become choices

    def __init__(self, model: nn.Module, predictor: Predictor, selection: Selection, every: int) -> None:
        if isinstance(predictor, Oracle):
            raise ConfigError(
                'kind="oracle" measures texts without a cache, it cannot generate; take hf_sparse.predictors.masked.'
            )
        super().__init__(model, predictor, selection, every, "dense")
        sites = find_sites(model).sites
        self._rows: dict[tuple[int, str], Rows] = {}  # of this pass
        self._striped: dict[int, torch.Tensor] = {}  # of this pass, the neurons' rows as stripes
        self._gathers = False
        self._counts: tuple[Selection | None, dict[str, tuple[int, ...]]] = None, {}  # kept by a selection
        self._up_first: set[int] = set()  # blocks of this pass whose `up` was computed before the gate had chosen
        self.feeds: dict[int, Feed] = {}  # position in the layout -> modules, where something is skipped
        self.attentions: dict[int, Heads] = {}
        for position, block in enumerate(self.units):
            if selection.shares(self.layout, "neurons")[position] != 1:
                self.feeds[position] = Feed(model, block)
            if selection.shares(self.layout, "heads")[position] != 1:
                self.attentions[position] = Heads(model, block, sites[block.index])

    def switch_on(self, stack: ExitStack) -> None:
        super().switch_on(stack)
        for undo in self._lay_weights():
            stack.callback(undo)
        for module, forward in self.forwards():
            stack.callback(replace_forward(module, forward))

    def _lay_weights(self) -> Iterator[Callable[[], None]]:
        """Bring weights into an order in which single rows, or single columns, can be read; gives what undoes each step."""
        columns = [feed.down for feed in self.feeds.values()]
        columns += [heads.o for heads in self.attentions.values() if large(heads.o)]
        for module in dict.fromkeys(columns):
            yield hold_in_rows(module, columns=True) if is_packed(module) else lay_by_columns(module)
        rows = [
            module
            for feed in self.feeds.values()
            for module in feed.starts
            if not self._by_stripes(feed, module) and not self._is_whole(feed, module)
        ]
        queries = [heads for heads in self.attentions.values() if self._cuts_query(heads) and not heads.fills_stripes]
        rows += [heads.q for heads in queries if heads.q is not None]
        for module in dict.fromkeys(rows):
            if is_packed(module):  # dense rows can be read as they lie
                yield hold_in_rows(module, columns=False)

    def _by_stripes(self, feed: Feed, module: nn.Linear) -> bool:
        # Which takes the gate's rows and the others apart.
        by_gate = isinstance(self.predictor, GateFirst) and feed.fused
        return is_packed(module) and not by_gate and feed.fills_stripes(module, self.layout.neuron_block)

    def _stripes(self, position: int, rows: Rows) -> torch.Tensor:
        """The same for gate and up."""
        if position not in self._striped:
            self._striped[position] = stripes_of(rows.indices)
        return self._striped[position]

    def _is_whole(self, feed: Feed, module: nn.Linear) -> bool:
        return isinstance(self.predictor, GateFirst) and module is feed.gate and not feed.fused

    def _cuts_query(self, heads: Heads) -> bool:
        return heads.q is not None and heads.q_rows.numel() * heads.q.in_features >= LEAST_WEIGHTS

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
            if heads.q is not None and self._cuts_query(heads):
                yield heads.q, self._query(position, heads, heads.q)
            if large(heads.o):
                yield heads.o, self._output(position, heads)

    # ------------------------------------------------------------------------------------------------ which rows

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        super()._begin(module, args, kwargs)
        self._rows.clear()
        self._striped.clear()
        self._up_first.clear()
        given = [kwargs.get(name) for name in ("input_ids", "inputs_embeds")] + list(args[:1])
        tokens = next((value for value in given if value is not None), None)
        plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        self._gathers = not self._off() and plain and tokens is not None and tokens.shape[1] == 1

    def _choose(self, position: int, scores: Scores) -> Scores:
        """Rows at once, and masks only of what is not computed by rows alone."""
        if not self._gathers:
            return super()._choose(position, scores)
        if self._counts[0] is not self.selection:
            self._counts = self.selection, {kind: self.selection.kept(self.layout, kind) for kind in TELLS}
        return Scores(*[self._picked(position, kind, values) for kind, values in zip(TELLS, scores)])

    def _picked(self, position: int, kind: str, values: torch.Tensor | None) -> torch.Tensor | None:
        if values is None:
            return None
        count, block = self._counts[1][kind][position], self.units[position]
        if count == values.shape[-1]:
            return None
        size = self.layout.neuron_block if kind == "neurons" else block.head_size
        fits = block.neurons % size == 0 if kind == "neurons" else large(self.attentions[position].o)
        if not fits:
            return top(values, count)
        self._rows[position, kind] = Rows(largest(values.reshape(-1, values.shape[-1]), count, size), None)
        return None

    def _neurons(self, position: int) -> Rows | None:
        """The neurons of each token, once they are chosen."""
        block = self.units[position]
        return self._chosen(position, "neurons", lambda mask: rows_of_mask(self.layout.expand(mask, block.neurons)))

    def _heads(self, position: int) -> Rows | None:
        """The channels of the heads of each token."""
        return self._chosen(position, "heads", lambda mask: in_runs(rows_of_mask(mask), self.units[position].head_size))

    def _chosen(self, position: int, kind: str, rows: Callable[[torch.Tensor], Rows]) -> Rows | None:
        if not self._gathers:
            return None
        if (position, kind) not in self._rows:
            masks = self.masks.get(position)
            mask = None if masks is None else getattr(masks, kind)
            if mask is None:
                return None
            self._rows[position, kind] = rows(mask.reshape(-1, mask.shape[-1]))
        return self._rows[position, kind]

    # ------------------------------------------------------------------------------------------------ neurons

    def _first_rows(self, position: int, module: nn.Linear, starts: list[int]) -> Forward:
        stripes = self._by_stripes(self.feeds[position], module)
        firsts = [start // STRIPE_ROWS for start in starts]

        def forward(x: torch.Tensor) -> torch.Tensor:
            rows = self._neurons(position)
            if rows is None:
                self._up_first.add(position)
                return whole(module, x)
            if stripes:
                return stripe_dots(module, x, counted_from(self._stripes(position, rows), firsts))
            return dots(module, x, counted_from(rows.indices, starts))

        return forward

    def _down(self, position: int, feed: Feed) -> Forward:
        def forward(x: torch.Tensor) -> torch.Tensor:
            rows = self._rows.get((position, "neurons"))
            return whole(feed.down, x) if rows is None else sums(feed.down, x, rows)

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
            if not self._gathers or (is_packed(feed.gate) and not feed.fused):
                return whole(feed.gate, x)
            return dots(feed.gate, x, rows.repeat(x.shape[0], 1))

        return forward

    def _fused_gate(self, position: int, feed: Feed) -> Forward:
        """The gate's part of a fused matrix whole, then the chosen rows of the other."""
        module, activation, whole_gate = feed.gate, activation_of(self.model, feed.block), self._whole_gate(feed)

        def forward(x: torch.Tensor) -> torch.Tensor:
            if not self._gathers:
                return whole(module, x)
            gate = whole_gate(x)
            self._choose_by_gate(position, activation(gate))
            rows = self._neurons(position)
            if rows is None:
                return whole(module, x)
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
        cut = position in self.attentions and large(self.attentions[position].o)
        return lambda module, args: None if cut and self._gathers else change(module, args)

    def _query(self, position: int, heads: Heads, module: nn.Linear) -> Forward:
        stripes = is_packed(module) and heads.fills_stripes

        def forward(x: torch.Tensor) -> torch.Tensor:
            rows = self._heads(position)
            if rows is None:
                return whole(module, x)
            indices = heads.q_rows[rows.indices]
            if heads.others.numel():
                indices = torch.cat([indices, heads.others.expand(len(indices), -1)], 1)
            products = stripe_dots(module, x, stripes_of(indices)) if stripes else dots(module, x, indices)
            products = products.view(len(indices), -1)
            spread = products.new_zeros(len(indices), module.out_features).scatter_(1, indices, products)
            return spread.view(*x.shape[:-1], -1)

        return forward

    def _output(self, position: int, heads: Heads) -> Forward:
        def forward(x: torch.Tensor) -> torch.Tensor:
            rows = self._heads(position)
            if rows is None:
                return whole(heads.o, x)
            columns = rows.indices.view(*x.shape[:-1], -1)
            return sums(heads.o, x.gather(-1, columns), rows)

        return forward
