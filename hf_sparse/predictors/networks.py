"""The kinds of predictors: networks that tell scores from hidden states, fixed scores, the gate itself, and the true criterion."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from hf_sparse.config.serialise import known_version, whole
from hf_sparse.errors import CheckpointError, ConfigError, unknown
from hf_sparse.predictors.criteria import Scores, criterion_of
from hf_sparse.predictors.layout import Layout
from hf_sparse.predictors.learned import Learned
from hf_sparse.predictors.traces import Statistics

LARGEST_SHARE = 0.03  # of the model's weights, for a rank that nobody gave
TELLS = ("neurons", "heads")


class LowRank(nn.Module):
    """Hidden size -> rank -> scores. Only the direction of the hidden state is read, so its size needs no learning."""

    def __init__(self, hidden_size: int, rank: int, start: torch.Tensor) -> None:
        super().__init__()
        self.first = nn.Linear(hidden_size, rank)
        self.second = nn.Linear(rank, len(start))
        with torch.no_grad():
            self.second.bias.copy_(start)  # the average score: what a predictor that knew nothing would say

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = nn.functional.rms_norm(hidden.to(self.first.weight.dtype), hidden.shape[-1:])
        return self.second(torch.tanh(self.first(normed)))


class Predictor(nn.Module):
    """Tells scores of neurons and heads, divided by their block's mean, for the blocks of a layout.

    `reads` says at which blocks' input it has to be asked, and about which blocks (positions in the layout) it then tells.
    """

    kind: ClassVar[str]
    trained: ClassVar[bool] = False  # whether it has weights to learn
    scales: torch.Tensor  # (blocks, 2): means of the criterion for neurons and heads; score times this is the criterion

    def __init__(self, layout: Layout, criterion: str, statistics: Statistics, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.learned: Learned | None = None  # from what; None for one that was never trained
        self.layout, self.criterion, self.options = layout, criterion_of(criterion).name, dict(options)
        self.register_buffer("scales", statistics.scales())

    @property
    def tells(self) -> tuple[str, ...]:
        """The units it has scores for: "neurons", "heads" or both."""
        return tuple(self.options.get("tells", TELLS))

    def reads(self) -> dict[int, tuple[int, ...]]:
        """Block whose input is read -> positions in the layout that are told from it."""
        return {self.layout.blocks[0]: tuple(range(len(self.layout.blocks)))}

    def forward(self, block: int, hidden: torch.Tensor) -> dict[int, Scores]:
        """Scores from the input of a block, for every position that `reads` names."""
        raise NotImplementedError

    def weight_count(self) -> int:
        """Weights that have to be read for one token."""
        return sum(parameter.numel() for parameter in self.parameters())

    def to_tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Everything that it is, as a flat dict of tensors and a description that JSON can hold."""
        tensors = {name: value.detach().contiguous().cpu().clone() for name, value in self.state_dict().items()}
        about = {
            "kind": self.kind, "criterion": self.criterion, "layout": self.layout.to_dict(),
            "options": {name: list(value) if isinstance(value, tuple) else value for name, value in self.options.items()},
            "learned": None if self.learned is None else self.learned.to_dict(), "version": 1,
        }  # fmt: skip
        return tensors, about

    def start(self, statistics: Statistics, position: int) -> torch.Tensor:
        """The average scaled scores of one block: neurons, then heads, as far as they are told."""
        parts = {"neurons": statistics.neurons, "heads": statistics.heads}
        scales = statistics.scales()[position]
        told = [parts[kind][position] / scales[at] for at, kind in enumerate(TELLS) if kind in self.tells]
        return torch.cat([torch.zeros(0), *told])

    def widths(self, position: int) -> tuple[int, int]:
        """How many scores it tells of a block: for neurons (in blocks) and for heads."""
        return (
            self.layout.groups[position] if "neurons" in self.tells else 0,
            self.layout.heads[position] if "heads" in self.tells else 0,
        )

    def cut(self, position: int, values: torch.Tensor) -> Scores:
        """A block's scores, laid side by side, as those of neurons and of heads."""
        neurons, heads = values.split(self.widths(position), -1)
        return Scores(neurons if neurons.shape[-1] else None, heads if heads.shape[-1] else None)


class Shadow(Predictor):
    """One network for the whole model, which reads what goes into the first block that skips (ShadowLLM, arXiv 2406.16635)."""

    kind = "shadow"
    trained = True

    def __init__(self, layout: Layout, criterion: str, statistics: Statistics, options: Mapping[str, Any]) -> None:
        super().__init__(layout, criterion, statistics, options)
        start = torch.cat([self.start(statistics, position) for position in range(len(layout.blocks))])
        if len(start):
            self.network = LowRank(layout.hidden_size, rank_of(self.options), start)

    def forward(self, block: int, hidden: torch.Tensor) -> dict[int, Scores]:
        widths = [sum(self.widths(position)) for position in range(len(self.layout.blocks))]
        parts = self.network(hidden).split(widths, -1)
        return {position: self.cut(position, part) for position, part in enumerate(parts)}


class Dejavu(Predictor):
    """One network for each block, which reads that block's input, or with `look_ahead` that of the block before (DejaVu, ICML 2023).

    The published code reads what attention gives out, and trains for the sign of ReLU neurons; gated models have no such sign.
    """

    kind = "dejavu"
    trained = True

    def __init__(self, layout: Layout, criterion: str, statistics: Statistics, options: Mapping[str, Any]) -> None:
        super().__init__(layout, criterion, statistics, options)
        rank = rank_of(self.options)
        starts = [self.start(statistics, position) for position in range(len(layout.blocks))]
        self.networks = nn.ModuleList(LowRank(layout.hidden_size, rank, start) for start in starts)

    def reads(self) -> dict[int, tuple[int, ...]]:
        found: dict[int, tuple[int, ...]] = {}
        for position, block in enumerate(self.layout.blocks):
            source = max(0, block - bool(self.options.get("look_ahead", False)))
            found[source] = (*found.get(source, ()), position)
        return found

    def forward(self, block: int, hidden: torch.Tensor) -> dict[int, Scores]:
        return {position: self.cut(position, self.networks[position](hidden)) for position in self.reads()[block]}


class Static(Predictor):
    """The same units for every token: those that matter most on average."""

    kind = "static"

    def __init__(self, layout: Layout, criterion: str, statistics: Statistics, options: Mapping[str, Any]) -> None:
        super().__init__(layout, criterion, statistics, options)
        for position in range(len(layout.blocks)):
            self.register_buffer(f"table_{position}", self.start(statistics, position))

    def forward(self, block: int, hidden: torch.Tensor) -> dict[int, Scores]:
        tables = {position: getattr(self, f"table_{position}") for position in range(len(self.layout.blocks))}
        return {
            position: self.cut(position, table.expand(*hidden.shape[:-1], -1)) for position, table in tables.items()
        }


class Oracle(Predictor):
    """The true criterion, from a pass of the dense model over the same tokens: an upper bound, not something to run with."""

    kind = "oracle"

    def reads(self) -> dict[int, tuple[int, ...]]:
        return {}


class GateFirst(Shadow):
    """No network for neurons: the gate is computed whole, and its activations choose (as CATS does, arXiv 2404.08763).

    The score is |act(g_i)| times the root mean square of u_i times ||D_i||, so that what the gate is multiplied by counts on
    average. Heads are chosen by a `shadow` network, or all kept where `tells` leaves them out.
    """

    kind = "gate_first"

    def __init__(
        self,
        layout: Layout,
        criterion: str,
        statistics: Statistics,
        options: Mapping[str, Any],
        gate_weights: list[torch.Tensor] | None = None,
    ) -> None:
        given = {**options, "tells": [kind for kind in options.get("tells", ("heads",)) if kind == "heads"]}
        super().__init__(layout, criterion, statistics, given)
        for position, neurons in enumerate(layout.neurons):
            weight = gate_weights[position] if gate_weights is not None else torch.zeros(neurons)
            self.register_buffer(f"gate_{position}", weight)

    def reads(self) -> dict[int, tuple[int, ...]]:
        return super().reads() if self.tells else {}

    def weight_count(self) -> int:
        return super().weight_count() + sum(self.layout.neurons)

    def gate_scores(self, position: int, activated: torch.Tensor) -> torch.Tensor:
        """Scores of neurons from their gate behind its activation function."""
        return self.layout.group(activated.float().abs() * getattr(self, f"gate_{position}"))


KINDS: dict[str, type[Predictor]] = {kind.kind: kind for kind in (Shadow, Dejavu, Static, Oracle, GateFirst)}
_OPTIONS = {
    "shadow": {"rank", "tells"}, "dejavu": {"rank", "tells", "look_ahead"}, "static": {"tells"}, "oracle": set(),
    "gate_first": {"rank", "tells"},
}  # fmt: skip


def rank_of(options: Mapping[str, Any]) -> int:
    """The rank of the networks, which a trained predictor always has among its options."""
    rank = options.get("rank")
    whole("rank", rank, 1)
    return int(rank)  # type: ignore[arg-type]


def rank_for(weights: int, layout: Layout, kind: str, tells: Sequence[str] = TELLS) -> int:
    """The largest rank, in steps of 8, with which a predictor has at most 3 % of a model's weights; at least 8.

    Neurons in blocks make room for a larger one: the output layer is nearly all of a predictor.
    """
    told = "heads" in tells, "neurons" in tells and kind != "gate_first"
    outputs = told[0] * sum(layout.heads) + told[1] * sum(layout.groups)
    networks = len(layout.blocks) if kind == "dejavu" else 1
    each = outputs + networks * (layout.hidden_size + 1)  # weights that a rank of one more adds
    return max(8, min(layout.hidden_size, int((LARGEST_SHARE * weights - outputs) / each)) // 8 * 8)


def kind_of(kind: str, options: Mapping[str, Any]) -> type[Predictor]:
    """The class of a kind, its options checked."""
    if kind not in KINDS:
        raise ConfigError(unknown("predictor kind", kind, KINDS))
    for name in options:
        if name not in _OPTIONS[kind]:
            raise ConfigError(unknown(f"option of predictor kind {kind!r}:", name, _OPTIONS[kind]))
    for one in options.get("tells", ()):
        if one not in TELLS:
            raise ConfigError(unknown("unit", one, TELLS))
    return KINDS[kind]


def blank(layout: Layout) -> Statistics:
    """Averages of nothing, for a predictor that gets its numbers later."""
    return Statistics(
        [torch.ones(groups) for groups in layout.groups], [torch.ones(heads) for heads in layout.heads], []
    )


def from_tensors(tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> Predictor:
    """The predictor that `to_tensors` took apart."""
    known_version("predictor", about.get("version"))
    try:
        layout = Layout.from_dict(about["layout"])
        found = kind_of(about["kind"], about["options"])(layout, about["criterion"], blank(layout), about["options"])
        found.load_state_dict(dict(tensors))
    except (KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"the predictor's tensors do not fit its description ({str(error).splitlines()[0]}); train it anew."
        ) from error
    found.learned = Learned.from_dict(about["learned"]) if about.get("learned") is not None else None
    return found
