"""Predictors that a model carries: trained for it, switched on and off, saved beside it and loaded with it."""

import copy
import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from hf_sparse import checkpoint
from hf_sparse.config import PredictorConfig
from hf_sparse.errors import ConfigError, HfSparseError, ModelError
from hf_sparse.predictors import saving
from hf_sparse.predictors.criteria import criterion_of
from hf_sparse.predictors.gathered import Gathered
from hf_sparse.predictors.layout import Layout
from hf_sparse.predictors.masked import Masked, check_choices, runs_now, switched_on
from hf_sparse.predictors.networks import Predictor, blank, kind_of
from hf_sparse.predictors.recording import record
from hf_sparse.predictors.saving import Saved
from hf_sparse.predictors.select import Selection
from hf_sparse.predictors.train import Training, train

CONFIG_KEY = "hf_sparse_predictors"
_CARRIED = "_hf_sparse_predictors"
_log = logging.get_logger(__name__)


@dataclass(kw_only=True)
class Carried(saving.Saved):
    """What a model carries: what is saved beside it, and the way to take it off."""

    running: ExitStack = field(default_factory=ExitStack)


def train_predictors_(
    model: nn.Module, config: PredictorConfig, calibration: Any, *, tokenizer: Any = None, num_samples: int | None = 128,
    sequence_length: int = 512, seed: int = 0, folder: str | Path | None = None,
) -> Predictor:  # fmt: skip
    """Train predictors for a model on text, and switch them on; the model itself is not changed. Returns the predictor.

    calibration: texts in any form that pruning takes. Traces are written to `folder` (a temporary one without it): a few bytes for
    each token and unit, see `hf_sparse.predictors.traces.bytes_per_token`. `config.options` are those of the kind, and `training`,
    a mapping of the fields of `hf_sparse.predictors.train.Training`.

    Raises: ConfigError for kinds that cannot run (`oracle`), ModelError for models whose units cannot be told, CalibrationError for data
        that are missing or do not fit.
    """
    inner: Any = checkpoint.unwrap(model)
    layout = check(inner, config)
    options = dict(config.options)
    training = Training.of(options.pop("training", {}), seed)
    with ExitStack() as stack:
        stack.enter_context(predictors_paused(inner, "be trained for"))
        place = folder if folder is not None else stack.enter_context(tempfile.TemporaryDirectory())
        traces = record(
            inner, calibration, place, criterion=config.criterion, layout=layout, tokenizer=tokenizer, num_samples=num_samples,
            sequence_length=sequence_length, seed=seed,
        )  # fmt: skip
        predictor = train(inner, traces, config.kind, training, **options)
    attach_(inner, Saved(predictor=predictor, config=config, trained_on=saving.print_of(inner, predictor)))
    return predictor


def check(model: nn.Module, config: PredictorConfig) -> Layout:
    """Refuse, before any work, what cannot be trained for a model; what the predictors will have to tell.

    Raises: ConfigError for the kind `oracle` and options that are not known, ModelError for models whose units cannot be told.
    """
    if config.kind == "oracle":
        raise ConfigError(
            'kind="oracle" looks at the true activations, so it can be measured but not run; take another kind.'
        )
    criterion_of(config.criterion)
    options = dict(config.options)
    Training.of(options.pop("training", {}), 0)
    layout = Layout.of(model, config.dense_blocks, config.neuron_block)
    with torch.random.fork_rng([]):  # one without anything learned, to see what it could tell
        predictor = kind_of(config.kind, options)(layout, config.criterion, blank(layout), {"rank": 1, **options})
    check_choices(predictor, layout.units(model), selection_of(config))
    return layout


def attach_(model: Any, saved: Saved) -> None:
    """Let a model carry a predictor, and switch it on; one that it carried before is taken off, unless this one cannot be used."""
    before = carried_by(model)
    detach(model)
    carried = Carried(**{item.name: getattr(saved, item.name) for item in dataclasses.fields(Saved)})
    try:
        _switch_on(model, carried)
    except HfSparseError:
        if before is not None:
            attach_(model, before)
        raise
    object.__setattr__(model, _CARRIED, carried)
    if hasattr(model, "config"):
        setattr(model.config, CONFIG_KEY, {"kind": saved.config.kind, "version": 1})


def detach(model: Any) -> None:
    """Take predictors off for good; a model without any stays as it is."""
    carried = carried_by(model)
    if carried is not None:
        carried.running.close()
        object.__delattr__(checkpoint.unwrap(model), _CARRIED)
    if CONFIG_KEY in getattr(getattr(model, "config", None), "__dict__", {}):
        delattr(model.config, CONFIG_KEY)


def carried_by(model: Any) -> Carried | None:
    found = checkpoint.unwrap(model).__dict__.get(_CARRIED)
    return found if isinstance(found, Carried) else None


@contextmanager
def predictors_disabled(model: Any) -> Iterator[None]:
    """Inside, a model computes all of its heads and neurons; raises ModelError where it carries no predictors."""
    carried = carried_by(model)
    if carried is None:
        raise ModelError("the model carries no predictors; train_predictors_ gives it some.")
    inner = checkpoint.unwrap(model)
    was_on = bool(runs_now(inner))  # not inside another `with` of this
    carried.running.close()
    try:
        yield
    finally:
        if was_on:
            _switch_on(inner, carried)


@contextmanager
def predictors_paused(model: nn.Module, doing: str) -> Iterator[None]:
    """Inside, predictors that a model carries are off, for work on the matrices that they read; models without any stay as they are.

    Raises: ModelError for predictors that a `with` of `gathered` holds; `doing` says what cannot be done meanwhile.
    """
    carried = carried_by(model)
    if carried is not None and runs_now(model):
        with predictors_disabled(model):
            yield
        return
    if runs_now(model) == "gathered":
        raise ModelError(
            f"predictors read the model's matrices, so it cannot {doing}; leave the `with` of gathered first."
        )
    yield


def selection_of(config: PredictorConfig) -> Selection:
    """What a configuration keeps."""
    return Selection(keep_neurons=config.keep_neurons, keep_heads=config.keep_heads, mode=config.selection)


def _switch_on(model: Any, carried: Carried) -> None:
    with evaluating(model):  # that a model in training mode is refused is said when it runs
        carried.running = _run(model, carried.predictor, selection_of(carried.config), carried.config.refresh_every)
    carried.running.callback(object.__delattr__, model, "__deepcopy__")
    object.__setattr__(model, "__deepcopy__", partial(_copied, model))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, all modules are in inference mode; each has the mode that it had again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _run(model: Any, predictor: Predictor, selection: Selection, every: int) -> ExitStack:
    """Switches a predictor on: gathered, which leaves work out; where a model's modules do not allow that, masked, which says so."""
    try:
        return switched_on(Gathered(model, predictor, selection, every))
    except ModelError as error:
        _log.warning(
            "the predictors choose, but save no time, as what they leave out is computed all the same: %s", error
        )
        return switched_on(Masked(model, predictor, selection, every, "dense"))


def _copied(model: Any, memo: dict[int, Any]) -> Any:
    """A copy with predictors of its own; what is hooked into a model's modules knows that model only."""
    carried: Any = carried_by(model)
    with predictors_disabled(model):
        object.__delattr__(model, _CARRIED)
        try:
            made = copy.deepcopy(model, memo)
        finally:
            object.__setattr__(model, _CARRIED, carried)
    attach_(made, dataclasses.replace(carried, predictor=copy.deepcopy(carried.predictor, memo)))
    return made


# ---------------------------------------------------------------------------------------------------- files


def write_beside(model: Any, folder: Path) -> None:
    """Write the predictors that a model carries into the folder that it was saved to; those of a save before are taken away."""
    carried = carried_by(model)
    if carried is None:
        (folder / saving.FILE).unlink(missing_ok=True)
    else:
        saving.save(carried, folder)


def read_beside(model: Any, file: Path | None) -> None:
    """Let a model that was loaded carry the predictors found beside it; stale ones are named."""
    if file is None:
        _log.warning("config.json tells of predictors, but there is no %s: the model runs dense.", saving.FILE)
        delattr(model.config, CONFIG_KEY)
        return
    saved = saving.load(model, file)
    _warn_if_stale(model, saved, f"the predictors in {saving.FILE}")
    attach_(model, saved)


def tell_of_stale(model: Any) -> None:
    """Warn where the weights of a model are no longer those that the predictors it carries were trained on."""
    carried = carried_by(model)
    if carried is not None:
        _warn_if_stale(checkpoint.unwrap(model), carried, "the predictors that the model carries")


def _warn_if_stale(model: Any, saved: Saved, which: str) -> None:
    if saving.print_of(model, saved.predictor) != saved.trained_on:
        _log.warning(
            "%s were trained on other weights than the model has now, so they choose worse; train them anew with "
            "hf_sparse.train_predictors_.", which,
        )  # fmt: skip
