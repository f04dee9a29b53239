"""Reorders channels so that N:M groups lose less, with the dense model's function unchanged: the order of the steps."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from hf_sparse import checkpoint
from hf_sparse.blockwise import Run
from hf_sparse.calibrate import forward, kind_of, short, survey
from hf_sparse.data import Batch, Sample
from hf_sparse.errors import ConfigError
from hf_sparse.permute.blocks import Tally, permute_blocks_
from hf_sparse.permute.importance import Norms, measure_norms
from hf_sparse.permute.places import Channels, aliases, permuted_state_dict
from hf_sparse.permute.proof import answers, called_modules, same, tolerance
from hf_sparse.permute.stream import residual_order

__all__ = ["Permutations", "check_permutable", "permute_", "permuted_state_dict"]


@dataclass
class Permutations:
    """What was reordered in a model. `orders[name][i]` is the old index of the channel that now stands at i."""

    orders: dict[str, list[int]] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)  # name -> where in the stored tensors the order holds
    done: list[tuple[int | None, Channels, torch.Tensor]] = field(default_factory=list)  # with the block, to undo it
    resumed: bool = (
        False  # whether an interrupted run of the same pruning made the orders, so that they hold in the model
    )
    aliases: dict[str, list[str]] = field(
        default_factory=dict
    )  # name of a tensor -> all its names, where it has several

    def add(self, block: int | None, channels: Channels, order: torch.Tensor) -> None:
        self.orders[channels.name] = order.tolist()
        places = [
            place._replace(tensor=name)
            for place in channels.places
            for name in self.aliases.get(place.tensor, [place.tensor])
        ]
        self.places[channels.name] = list(dict.fromkeys(map(str, places)))
        self.done.append((block, channels, order))

    def undo_(self, run: Run) -> None:
        """Put every channel back, bit for bit."""
        while self.done:
            self.drop_last_(run)

    def drop_last_(self, run: Run) -> None:
        """Put the channels that were reordered last back, bit for bit."""
        index, channels, order = self.done.pop()
        if index is None:
            _take_everywhere_(run, channels, order.argsort())
        else:
            with run.inventory.blocks[index].loaded():
                channels.take_(run.model, order.argsort())
                run.inventory.blocks[index].commit()
        del self.orders[channels.name], self.places[channels.name]


def permute_(run: Run, rows: Sequence[Sample], batches: Sequence[Batch], done: Permutations) -> None:
    """Reorder channels of a dense model: of its MLPs, of values within each head, of the residual stream.

    Each order is the one that keeps most importance under the pattern, as in Plug-and-Play (ICLR 2024, section 3.2), but only
    where neighbouring weights absorb it, so nothing is left to do at run time. None is trusted before a sample has shown that
    the outputs are the same but for rounding; what fails is put back bit for bit, and the run's notes say so. Nothing is done
    where the configuration does not ask for it, or `done` holds orders already. No rows: a sample is made up.
    """
    _carry_over(run, done)
    if not run.config.permute or done.orders:
        return
    rows = rows or _made_up(run)
    if not rows:
        return
    norms = measure_norms(run, batches)
    samples = [short(row) for row in {kind_of(row): row for row in reversed(rows)}.values()]
    try:
        done.aliases = aliases(run.model)
        with called_modules() as called:
            dense = [answers(run.model, row) for row in samples]
        notes = permute_blocks_(run, samples, norms, done.add)
        if done.done and not _agree(run, samples, dense):
            done.undo_(run)
            notes = ["permute: the model's output changed, so all channels were put back"]
        run.notes += notes
        _permute_residual_(run, samples, norms, (dense, called), done)
    except BaseException:
        done.undo_(run)
        raise


def _carry_over(run: Run, done: Permutations) -> None:
    """Orders of an earlier pruning still tell where the weights came from; those channels stay as they are."""
    earlier = checkpoint.report(run.model)
    if not done.orders and earlier is not None and earlier.permutations:
        done.orders, done.places = dict(earlier.permutations), dict(earlier.permuted)
        if run.config.permute:
            run.notes.append("permute: the channels were reordered by an earlier pruning and stay as they are")


def check_permutable(wrapper: nn.Module, model: nn.Module) -> None:
    """Raises ConfigError where something around the model was trained for its channels in order, such as a prompt or prefix."""
    inside = {id(parameter) for parameter in model.parameters()}
    outside = [name for name, parameter in wrapper.named_parameters() if id(parameter) not in inside]
    if outside:
        raise ConfigError(
            f"permute=True would reorder channels that {outside[0]}, which lies around the model, expects in order; leave it False, or "
            "prune the model itself."
        )


def _agree(run: Run, samples: Sequence[Sample], dense: Sequence[list[torch.Tensor]]) -> bool:
    found = [answers(run.model, row) for row in samples]
    allowed = tolerance(run.model)
    return all(same(before, after, allowed) for before, after in zip(dense, found, strict=True))


def _permute_residual_(
    run: Run,
    samples: Sequence[Sample],
    norms: Norms,
    seen: tuple[Sequence[list[torch.Tensor]], set[int]],
    done: Permutations,
) -> None:
    dense, called = seen
    tally = Tally("the residual stream")
    found = residual_order(run, norms, called, tally)
    if isinstance(found, str):
        run.notes.append(f"permute: the residual stream stays in order: {found}")
        return
    channels, order = found
    _take_everywhere_(run, channels, order)
    done.add(None, channels, order)  # so that whatever happens now is undone
    if _agree(run, samples, dense):
        run.notes += tally.notes()
        return
    done.drop_last_(run)
    run.notes.append("permute: the residual stream stays in order: the model's output would change")


def _take_everywhere_(run: Run, channels: Channels, order: torch.Tensor) -> None:
    """Reorder channels in the whole model; blocks whose weights are elsewhere have their turns one after the other."""
    rest = list(channels.places)
    for block in run.inventory.blocks:
        own = [place for place in rest if block.source.elsewhere and place.tensor.startswith(f"{block.name}.")]
        if own:
            with block.loaded():
                replace(channels, places=tuple(own)).take_(run.model, order)
                block.commit()
            rest = [place for place in rest if place not in own]
    replace(channels, places=tuple(rest)).take_(run.model, order)


def _made_up(run: Run) -> list[Sample]:
    """A sample for metrics that look at no data, after a survey with it; none where the model does not take it."""
    try:
        row = {key: value for key, value in run.model.dummy_inputs.items() if isinstance(value, torch.Tensor)}  # type: ignore[operator, union-attr]
        if getattr(run.model.config, "is_encoder_decoder", False):
            row.setdefault("decoder_input_ids", row["input_ids"])
        forward(run.model, row)()
        run.survey = survey(run.model, run.inventory, [row], True, run.config.device)
    except Exception as error:  # whatever the model's code says about a sample that nobody gave
        run.notes.append(
            f"permute: nothing was reordered, as no sample could be made up ({type(error).__name__}); give calibration data"
        )
        return []
    return [row]
