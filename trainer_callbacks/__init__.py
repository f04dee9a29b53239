"""Callbacks for `transformers.Trainer` that make and keep models sparse while they train."""

from trainer_callbacks.distillation import Distillation
from trainer_callbacks.gradual_pruning import GradualPruning
from trainer_callbacks.keep_masks import KeepMasks
from trainer_callbacks.sparsify import Sparsify
from trainer_callbacks.train_predictors import TrainPredictors

__all__ = ["Distillation", "GradualPruning", "KeepMasks", "Sparsify", "TrainPredictors"]
