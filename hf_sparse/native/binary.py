"""Finds the compiled kernels, or the reason why there are none."""

import os
from functools import cache
from typing import Any

import torch  # noqa: F401  # first: its OpenMP library then serves the kernels as well

from hf_sparse.errors import ConfigError

VARIABLE = "HF_SPARSE_KERNELS"  # portable, avx512 or amx; unset takes the best one that the processor has


@cache
def load() -> tuple[Any, str]:
    """The extension module and an empty string, or None and why it is not there."""
    try:
        from hf_sparse.native import _kernels  # type: ignore[attr-defined]
    except ImportError as error:
        return None, (
            f"the compiled kernels could not be imported ({error}). They are built when hf_sparse is installed on a machine "
            "with a C++17 compiler: install one and then hf_sparse again."
        )
    return _kernels, ""


@cache
def kernels() -> Any:
    """The extension module, set to the instruction set that the environment names or the best one; None where there is none."""
    module, _ = load()
    if module is not None:
        choose(os.environ.get(VARIABLE, ""))
    return module


def choose(name: str) -> str:
    """Takes another instruction set; an empty name is the best one there is. Returns the one taken."""
    module, reason = load()
    if module is None:
        raise ConfigError(f"{VARIABLE} cannot be {name!r}: {reason}")
    try:
        return str(module.choose(name))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def available() -> bool:
    """Whether the compiled kernels are there; without them everything is computed with torch, slowly."""
    return kernels() is not None


def why_not() -> str:
    """Why the compiled kernels are not there; empty where they are."""
    return load()[1]


def instruction_sets() -> tuple[str, ...]:
    """Those that this build and this processor have, the best first; empty without the compiled kernels."""
    module, _ = load()
    return tuple(name for name in ("amx", "avx512", "portable") if module is not None and module.has(name))


def instruction_set() -> str:
    """The one in use: amx, avx512 or portable, or torch without the compiled kernels."""
    module = kernels()
    return "torch" if module is None else str(module.chosen())
