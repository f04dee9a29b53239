"""Keeps what lm-eval does to its surroundings in bounds: seeds, modes, prints, logging and progress bars."""

import contextlib
import io
import logging
import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch import nn
from transformers.utils import logging as transformers_logging


@contextlib.contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """Puts back the modes of the model and the random states, which lm-eval sets."""
    modes = [(module, module.training) for module in model.modules()]
    states = random.getstate(), numpy.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def level(level: int) -> Iterator[None]:
    """lm-eval tells no more than Transformers is asked to tell."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps lm-eval's prints out of our output, and its progress bars away where Transformers' are switched off."""
    import datasets
    from lm_eval import evaluator

    loud = transformers_logging.get_verbosity() <= logging.INFO
    hide_data_bars = not transformers_logging.is_progress_bar_enabled() and not datasets.are_progress_bars_disabled()
    ask_git = evaluator.get_git_commit_hash
    try:
        if hide_data_bars:
            datasets.disable_progress_bars()
        evaluator.get_git_commit_hash = lambda: None  # git itself would complain of any folder that is no repository
        with _without_bars(), contextlib.redirect_stdout(sys.stderr if loud else io.StringIO()):
            yield
    finally:
        evaluator.get_git_commit_hash = ask_git
        if hide_data_bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """lm-eval makes its bars in a dozen places, half of which cannot be told to make none."""
    from tqdm import tqdm

    start = tqdm.__init__

    def without_bar(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **{**kwargs, "disable": True})

    try:
        if not transformers_logging.is_progress_bar_enabled():
            tqdm.__init__ = without_bar
        yield
    finally:
        tqdm.__init__ = start
