"""Gradual pruning: from dense, or sparse, to a target while a model trains. Nothing here knows the Trainer."""

from hf_sparse.gradual.engine import Gradual
from hf_sparse.gradual.fitting import fitting
from hf_sparse.gradual.schedule import Schedule, Timing

__all__ = ["Gradual", "Schedule", "Timing", "fitting"]
