"""Weight sparsity for Hugging Face models: prune, keep the zeros, publish.

Importing the package gives `from_pretrained` its `sparsity_config` argument; `uninstall()` takes it out again.
"""

from importlib import import_module
from typing import Any

from hf_sparse.checkpoint import is_sparse, masks, report
from hf_sparse.config import PredictorConfig, SparsityConfig
from hf_sparse.errors import HfSparseError
from hf_sparse.execution import use_dense_kernels_, use_sparse_kernels_
from hf_sparse.hooks import install, uninstall
from hf_sparse.kept import KeptMasks
from hf_sparse.prune import prune_
from hf_sparse.report import Report

__version__ = "0.1.0"
# Conveniences from sibling packages, and what needs PEFT: loaded when they are first asked for.
_LAZY = {
    "train_predictors_": "hf_sparse.contextual",
    "predictors_disabled": "hf_sparse.contextual",
    "Distillation": "trainer_callbacks",
    "GradualPruning": "trainer_callbacks",
    "KeepMasks": "trainer_callbacks",
    "SparseModelCard": "model_cards",
    "Sparsify": "trainer_callbacks",
    "TrainPredictors": "trainer_callbacks",
    "forecast": "hf_sparse.forecast",
    "prune_checkpoint": "hf_sparse.stream",
    "mask_lora_": "hf_sparse.adapters",
    "merge_and_unload": "hf_sparse.adapters",
    "sparse_shira_config": "hf_sparse.adapters",
}
__all__ = [
    "HfSparseError",
    "KeptMasks",
    "PredictorConfig",
    "Report",
    "SparsityConfig",
    "install",
    "is_sparse",
    "masks",
    "prune_",
    "report",
    "uninstall",
    "use_dense_kernels_",
    "use_sparse_kernels_",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


install()
