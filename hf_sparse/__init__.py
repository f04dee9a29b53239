"""Weight sparsity for Hugging Face models: prune, keep the zeros, publish.

Importing the package gives `from_pretrained` its `sparsity_config` argument; `uninstall()` takes it out again.
"""

from typing import Any

from hf_sparse.checkpoint import is_sparse, masks, report
from hf_sparse.config import PredictorConfig, SparsityConfig
from hf_sparse.errors import HfSparseError
from hf_sparse.hooks import install, uninstall
from hf_sparse.prune import prune_
from hf_sparse.report import Report

__version__ = "0.1.0"
__all__ = [
    "HfSparseError",
    "PredictorConfig",
    "Report",
    "SparseModelCard",
    "SparsityConfig",
    "install",
    "is_sparse",
    "masks",
    "prune_",
    "report",
    "uninstall",
]


def __getattr__(name: str) -> Any:
    # A convenience from a sibling package, loaded when it is first asked for.
    if name == "SparseModelCard":
        from model_cards import SparseModelCard

        return SparseModelCard
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


install()
