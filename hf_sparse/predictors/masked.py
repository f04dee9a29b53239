"""Masked execution: a model computes everything and what is skipped is set to zero. Slow, exact, and the measure for faster ways."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_sparse.blocks import find_blocks
from hf_sparse.config.serialise import whole
from hf_sparse.errors import ConfigError, ModelError, unknown
from hf_sparse.forwards import main_tensor
from hf_sparse.predictors.criteria import Scores, criterion_of
from hf_sparse.predictors.held import Held
from hf_sparse.predictors.networks import GateFirst, Oracle, Predictor
from hf_sparse.predictors.running import as_run
from hf_sparse.predictors.select import Selection
from hf_sparse.predictors.units import BlockUnits, activation_of, module_of
from hf_sparse.predictors.watch import Scorer, rows_of

_MARK = "_hf_sparse_predicted"  # on a model: how predictors run on it now
_NOTHING = Scores(None, None)  # nothing is skipped


@contextmanager
def masked(
    model: nn.Module,
    predictor: Predictor,
    selection: Selection,
    *,
    refresh_every: int = 1,
    prompt: str = "dense",
    softness: float | None = None,
) -> Iterator["Masked"]:
    """Inside, `model` skips the units that `predictor` leaves out; keys and values of all heads are still computed.

    `prompt="dense"`: a pass that starts a sequence skips nothing, later ones (which find a cache) do, each token by what it and
    the tokens before it say. `prompt="masked"`: every position is treated so, which is how a text is measured in one pass.
    Choices are made every `refresh_every` tokens, counted from the start of the sequence, and hold in between.

    With `softness` gradients reach the predictor, as if a unit faded in over about that much of its (scaled) score.

    Raises: ModelError for a model in training mode, of another size, or with predictors already on.
    """
    if prompt not in ("dense", "masked"):
        raise ConfigError(unknown("prompt", prompt, ("dense", "masked")))
    running = Masked(model, predictor, selection, refresh_every, prompt, softness)
    with switched_on(running):
        yield running


def switched_on(running: "Masked") -> ExitStack:
    """A way of running, switched on until what is returned is closed.

    A model may carry that for good and be thrown away with it, and then nothing may run any more: so no generator waits here.
    """
    with ExitStack() as stack:
        running.switch_on(stack)
        return stack.pop_all()


def check_ready(model: nn.Module, refresh_every: int) -> None:
    """Refuse what no way of running with predictors allows."""
    whole("refresh_every", refresh_every, 1)
    if model.training:
        raise ModelError(
            "predictors do not run in training mode, their choices have no gradient; call model.eval() first."
        )
    if runs_now(model):
        raise ModelError("predictors are already on; leave the first `with` before another.")


def runs_now(model: nn.Module) -> str:
    """ "masked" or "gathered" where predictors are on; empty where not."""
    return str(getattr(model, _MARK, ""))


def check_choices(predictor: Predictor, units: Sequence[BlockUnits], selection: Selection) -> None:
    """Refuse a predictor that cannot tell what a selection asks for, or not of these blocks.

    Raises: ModelError for a gate that is not there, ConfigError for choices that the predictor cannot make.
    """
    gated = isinstance(predictor, GateFirst)
    if gated and (plain := [block.name for block in units if block.gate is None]):
        raise ModelError(f'kind="gate_first" needs gated feed-forwards; {plain[0]} is plain. Take kind="shadow".')
    told = set(predictor.tells) | ({"neurons"} if gated else set())
    for kind in ("neurons", "heads"):
        keep = getattr(selection, f"keep_{kind}")
        if keep != 1 and kind not in told:
            raise ConfigError(
                f"keep_{kind}={keep!r} needs a predictor that tells {kind}; this one tells {sorted(told)}."
            )
        selection.kept(predictor.layout, kind)
    if selection.needs_all_blocks() and (gated or len(predictor.reads()) > 1):
        raise ConfigError(
            f'selection="global" needs the scores of all blocks at once, kind={predictor.kind!r} tells them one by one; '
            'give selection="block" or kind="shadow".'
        )


class Masked:
    """What is known during one pass of the model: where its tokens stand, and the masks of every block."""

    name = "masked"

    def __init__(
        self, model: nn.Module, predictor: Predictor, selection: Selection, every: int, prompt: str,
        softness: float | None = None,
    ) -> None:  # fmt: skip
        check_ready(model, every)
        predictor = predictor.to(_device(model))
        self.model, self.selection, self.layout = model, selection, predictor.layout
        self.predictor = (
            predictor if softness is not None else as_run(predictor, model)
        )  # one that learns stays as it is
        self.units = self.layout.units(model)
        self.masks: dict[int, Scores] = {}  # position in the layout -> masks of the last pass
        self.scores: dict[int, Scores] = {}  # what they were chosen by
        self._every, self._prompt, self._softness = every, prompt, softness
        self._start, self._on, self._dense_pass = 0, False, False
        self._held = Held(every)
        check_choices(self.predictor, self.units, selection)
        oracle = isinstance(predictor, Oracle)
        self._scorer = Scorer(model, self.units, criterion_of(predictor.criterion)) if oracle else None

    # ------------------------------------------------------------------------------------------------ hooks

    def switch_on(self, stack: ExitStack) -> None:
        """Put the hooks in, and into `stack` what takes them out."""
        for handle in self.hooks():
            stack.callback(handle.remove)
        setattr(self.model, _MARK, self.name)
        stack.callback(delattr, self.model, _MARK)
        own = getattr(
            self.model, "_reorder_cache", None
        )  # what `generate` calls, if it is there, when beams change places
        object.__setattr__(self.model, "_reorder_cache", partial(self.reorder, own))
        stack.callback(object.__delattr__, self.model, "_reorder_cache")

    def hooks(self) -> Iterator[Any]:
        """Handles of all hooks, to be removed afterwards."""
        blocks = find_blocks(self.model)
        yield self.model.register_forward_pre_hook(self._begin, with_kwargs=True)
        for source in self.predictor.reads():
            yield blocks[source].module.register_forward_pre_hook(self._read(source), with_kwargs=True)
        for position, block in enumerate(self.units):
            yield module_of(self.model, block.o).register_forward_pre_hook(self._mask_heads(position, block))
            yield module_of(self.model, block.down).register_forward_pre_hook(self._mask_neurons(position, block))
            if isinstance(self.predictor, GateFirst) and block.gate is not None:
                owner = module_of(self.model, block.gate)
                yield owner.register_forward_hook(self._read_gate(position, block))

    def _begin(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._dense_pass:
            return
        if self.model.training:
            raise ModelError(
                "predictors are on, and they do not run in training mode; switch them off with hf_sparse.predictors_disabled(model), or "
                "call model.eval()."
            )
        cache = kwargs.get("past_key_values")
        self._start = int(cache.get_seq_length()) if cache is not None else 0
        self._on = self._prompt == "masked" or self._start > 0
        if kwargs.get("use_cache") is False and self._prompt == "dense" and cache is None:
            raise ConfigError(
                "without a cache every pass is a whole prompt, so nothing would be skipped; give use_cache=True, or "
                'prompt="masked" to measure a text.'
            )
        if self._start == 0:
            self._held.clear()
        self.masks.clear()
        self.scores.clear()
        if self._scorer is not None and self._on:
            self._look_at_dense(args, kwargs)

    def _look_at_dense(self, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("past_key_values") is not None or args or "input_ids" not in kwargs:
            raise ConfigError('kind="oracle" measures texts given as input_ids without a cache; it cannot generate.')
        values = {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
        shape = values["input_ids"].shape
        found: dict[int, Scores] = {}

        def take(index: int, scores: Scores) -> None:
            position = self.layout.blocks.index(index)
            n, h = self.predictor.scales[position]
            grouped = self.layout.group(scores.neurons) / n  # type: ignore[arg-type]
            found[position] = Scores(grouped.view(*shape, -1), (scores.heads / h).view(*shape, -1))  # type: ignore[operator]

        self._dense_pass = True
        try:
            self._scorer(values, take)  # type: ignore[misc]
        finally:
            self._dense_pass = False
        self._tell(found)

    def _read(self, source: int) -> Callable[..., None]:
        def look(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if self._off():
                return
            hidden = main_tensor((args, kwargs))
            if hidden is not None:
                self._tell(self.predictor(source, hidden.detach()))

        return look

    def _read_gate(self, position: int, block: BlockUnits) -> Callable[..., Any]:
        activation = activation_of(self.model, block)

        def look(_: nn.Module, args: Any, product: torch.Tensor) -> None:
            if not self._off() and block.gate is not None:
                gates = rows_of(product.detach(), block.gate).view(*product.shape[:-1], -1)
                self._choose_by_gate(position, activation(gates))

        return look

    def _choose_by_gate(self, position: int, activated: torch.Tensor) -> None:
        scores = self._refreshed(position, Scores(self.predictor.gate_scores(position, activated), None))  # type: ignore[operator]
        chosen = self._choose(position, scores)
        self.scores[position] = Scores(scores.neurons, self.scores.get(position, _NOTHING).heads)
        self.masks[position] = Scores(chosen.neurons, self.masks.get(position, _NOTHING).heads)

    def _mask_heads(self, position: int, block: BlockUnits) -> Callable[..., Any]:
        def change(_: nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
            mask = None if self._off() else self.masks.get(position, _NOTHING).heads
            if mask is None:
                return None
            values = args[0].unflatten(-1, (block.heads, block.head_size))
            return ((values * mask.view(*values.shape[:-1], 1).to(values.dtype)).flatten(-2), *args[1:])

        return change

    def _mask_neurons(self, position: int, block: BlockUnits) -> Callable[..., Any]:
        def change(_: nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
            mask = None if self._off() else self.masks.get(position, _NOTHING).neurons
            if mask is None:
                return None
            return (args[0] * self.layout.expand(mask, block.neurons).view(args[0].shape).to(args[0].dtype), *args[1:])

        return change

    def _off(self) -> bool:
        return not self._on or self._dense_pass

    # ------------------------------------------------------------------------------------------------ choices

    def _tell(self, scores: dict[int, Scores]) -> None:
        fresh = {position: self._refreshed(position, found) for position, found in scores.items()}
        self.scores.update(fresh)
        if self.selection.needs_all_blocks():
            chosen = self.selection.choose_all([fresh[position] for position in sorted(fresh)], self.predictor.scales)
            self.masks.update(dict(zip(sorted(fresh), chosen)))
            return
        for position, found in fresh.items():
            self.masks[position] = self._choose(position, found)

    def _choose(self, position: int, scores: Scores) -> Scores:
        masks = self.selection.choose(self.layout, position, scores)
        if self._softness is None:
            return masks
        return Scores(*[None if mask is None else through(mask, s, self._softness) for mask, s in zip(masks, scores)])  # type: ignore[arg-type]

    def _refreshed(self, position: int, scores: Scores) -> Scores:
        """The scores that hold at every token: those of the last token at which a choice is made."""
        if self._every == 1:
            return scores
        return Scores(
            *[
                None if value is None else self._held((position, kind), value, self._start)
                for kind, value in zip(("neurons", "heads"), scores)
            ]
        )

    def reorder(self, own: Callable[[Any, torch.Tensor], Any] | None, cache: Any, beams: torch.Tensor) -> Any:
        """Let the cache, and the choices that still hold, follow the beams: row i becomes what row `beams[i]` was."""
        self._held.reorder(beams)
        if own is not None:
            return own(cache, beams)
        cache.reorder_cache(beams)
        return cache


def through(mask: torch.Tensor, scores: torch.Tensor, softness: float) -> torch.Tensor:
    """The mask as numbers 0 and 1, with the gradient of a sigmoid around the border between kept and left out."""
    low = scores.masked_fill(~mask, float("inf")).amin(-1, keepdim=True)
    high = scores.masked_fill(mask, float("-inf")).amax(-1, keepdim=True)
    soft = torch.sigmoid((scores - (low + high).detach() / 2) / softness)
    return mask.to(scores.dtype) + soft - soft.detach()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
