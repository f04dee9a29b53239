"""Modules that multiply with sparse weights: forms of a matrix, modules that hold one, and which form is faster here."""

from hf_sparse.runtime.forms import ArrangedForm, Form, PackedForm, StackedForm
from hf_sparse.runtime.holding import hold_, refuse_sparse, release_, sparse_modules, why_not_module
from hf_sparse.runtime.modules import SparseModule

__all__ = [
    "ArrangedForm",
    "Form",
    "PackedForm",
    "SparseModule",
    "StackedForm",
    "hold_",
    "refuse_sparse",
    "release_",
    "sparse_modules",
    "why_not_module",
]
