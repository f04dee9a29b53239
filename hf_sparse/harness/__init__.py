"""Measures a model on the tasks of lm-eval, EleutherAI's evaluation harness, which is an optional extra."""

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from hf_sparse.calibrate import tokenizer_of
from hf_sparse.checkpoint import unwrap
from hf_sparse.config.serialise import whole
from hf_sparse.errors import ConfigError, ModelError
from hf_sparse.evaluate import dtype_of, versions_in_words
from hf_sparse.harness.surroundings import as_before, level, quiet
from hf_sparse.harness.tasks import load

_NUMBERS = (int, float, numpy.number)
_SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")


@dataclass(frozen=True)
class TaskFigure:
    """One figure of one task with everything that it depends on."""

    task: str
    task_version: str
    metric: str  # such as "acc"
    filter: str  # how the answer was taken out of what the model wrote; "none" for the plain one
    few_shot: int | None  # examples in the prompt; None for a group of tasks that differ in it
    value: float
    standard_error: float | None  # as lm-eval estimates it; None where it gives none
    samples: int  # documents that were answered
    limit: int | None  # only so many were asked for; None: all
    seed: int | None  # None: lm-eval's own seeds
    dtype: str  # of the model while it was measured
    harness: str  # "lm-eval 0.4.13"

    def to_dict(self) -> dict[str, Any]:
        """Plain data; a value that is not finite, which JSON does not know, is None."""
        return {**asdict(self), "value": self.value if math.isfinite(self.value) else None}


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    include_path: str | Path | None = None,
    seed: int | None = None,
) -> list[TaskFigure]:
    """Measure a model that writes text on tasks: names of lm-eval's tasks, groups and tags, or globs over them.

    The figures are those of lm-eval's own command line with the same arguments and its defaults. `num_fewshot` replaces the
    tasks' own number of examples, but for tasks that fix it at 0; `limit` takes only the first documents of each task, which gives
    no figure to compare with others'; `include_path` is a folder with tasks of one's own, whose Python functions are run; `seed` takes
    the place of lm-eval's four seeds. Model, tokenizer and random state are as before afterwards.

    Raises: ConfigError where lm-eval is not installed or a task is unknown, CalibrationError where the data of a task cannot be had,
    ModelError for a model that writes no text or gives NaN.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if not names:
        raise ConfigError("no task is given; name at least one, such as arc_easy.")
    for name, value, least in (("num_fewshot", num_fewshot, 0), ("limit", limit, 1), ("batch_size", batch_size, 1)):
        if value is not None:
            whole(name, value, least)
    lm_eval = _lm_eval()
    model = _writer(model)
    tokenizer = tokenizer_of(model, tokenizer)()
    with as_before(model), quiet():
        verbosity = transformers_logging.get_verbosity()
        # Its warnings up to the run are about being called from Python, which is no matter of our users.
        with level(verbosity if verbosity < logging.WARNING else logging.ERROR):
            manager, loaded = load(names, include_path)
            adapter = _adapter(model, tokenizer, batch_size)
        seeds = {} if seed is None else dict.fromkeys(_SEEDS, seed)
        with level(verbosity):
            found = lm_eval.simple_evaluate(
                model=adapter, tasks=loaded, task_manager=manager, num_fewshot=num_fewshot, limit=limit, log_samples=False, **seeds
            )  # fmt: skip
    return _figures(found, limit, seed, dtype_of(model))


def as_evaluations(sparse: Sequence[TaskFigure], dense: Sequence[TaskFigure] = ()) -> list[dict[str, Any]]:
    """Figures as a report keeps them: the fields of model_cards.Evaluation, with the dense model's own figure of each."""
    known = {(item.task, item.metric, item.filter): item for item in dense}
    found = []
    for item in sparse:
        pair = known.get((item.task, item.metric, item.filter))
        told = {name: value for name, value in item.to_dict().items() if name != "value"}
        found.append({
            "dense": pair.value if pair else None, "sparse": item.value, **told,
            "dense_standard_error": pair.standard_error if pair else None, "versions": versions_in_words(),
        })  # fmt: skip
    return found


# ---------------------------------------------------------------------------------------------------- the run


def _lm_eval() -> Any:
    try:
        import lm_eval
        import lm_eval.evaluator  # lm_eval itself imports it when it is first asked for, too late to say what is missing
    except ImportError as error:
        raise ConfigError(
            f"tasks are measured by lm-eval, which cannot be imported ({error}); install it: pip install 'hf-sparse[evaluation]'."
        ) from error
    return lm_eval


def _writer(model: nn.Module) -> nn.Module:
    model = unwrap(model)
    if not (callable(getattr(model, "can_generate", None)) and model.can_generate()):  # type: ignore[operator]
        raise ModelError(
            f"tasks need a model that writes text, and a {type(model).__name__} does not; evaluate it on text."
        )
    return model


def _adapter(model: nn.Module, tokenizer: Any, batch_size: int) -> Any:
    """The model as lm-eval calls it; NaN is an error, as the best of several NaNs would count as an answer."""
    from lm_eval.models.huggingface import HFLM

    class Checked(HFLM):
        def _model_call(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            logits: torch.Tensor = super()._model_call(*args, **kwargs)
            if bool(logits.isnan().any()):
                raise ModelError("the model's logits are NaN, so its weights or this dtype are broken.")
            return logits

    # lm-eval gives the tokenizer a padding token where there is none.
    return Checked(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)


# ---------------------------------------------------------------------------------------------------- figures


def _figures(found: dict[str, Any], limit: int | None, seed: int | None, dtype: str) -> list[TaskFigure]:
    """Every figure of every task and group, in lm-eval's order."""
    counts = found["n-samples"]
    cut = any(count["effective"] < count["original"] for count in counts.values())
    figures = []
    for task, values in found["results"].items():
        one = counts.get(task)  # a group has none of its own
        # A limit that the task does not reach is none.
        used = limit if (one["effective"] < one["original"] if one else cut) else None
        samples = one["effective"] if one else values.get("sample_len", 0)
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, _NUMBERS):
                continue
            error = values.get(f"{metric}_stderr,{filter_name}")  # "N/A" where lm-eval knows none
            figures.append(TaskFigure(
                task, _word(found["versions"].get(task)), metric, filter_name, _whole(found["n-shot"].get(task)), float(value),
                float(error) if isinstance(error, _NUMBERS) and math.isfinite(error) else None, int(samples), used, seed, dtype,
                harness=f"lm-eval {version('lm_eval')}",
            ))  # fmt: skip
    return figures


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _word(value: object) -> str:
    return "" if value is None else str(value)
