"""Modules that multiply with sparse weights: forms of a matrix, modules that hold one, and which form is faster here."""

from hf_sparse.runtime.forms import ArrangedForm, Form, PackedForm
from hf_sparse.runtime.modules import SparseModule, hold_, refuse_sparse, release_, sparse_modules, why_not_module

__all__ = [
    "ArrangedForm",
    "Form",
    "PackedForm",
    "SparseModule",
    "hold_",
    "refuse_sparse",
    "release_",
    "sparse_modules",
    "why_not_module",
]
