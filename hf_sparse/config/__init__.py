"""What to prune and how: frozen dataclasses that check themselves and go to JSON and back."""

from hf_sparse.config.predictor import PredictorConfig
from hf_sparse.config.serialise import FILE_NAME
from hf_sparse.config.sparsity import SparsityConfig

__all__ = ["FILE_NAME", "PredictorConfig", "SparsityConfig"]
