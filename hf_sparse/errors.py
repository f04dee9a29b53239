"""Every error that hf_sparse raises on purpose."""

from collections.abc import Iterable
from difflib import get_close_matches

from hf_sparse.text import without_secrets


class HfSparseError(ValueError):
    """Base of all: the input cannot be used as given, and the message says what to do. Tokens in it are hidden."""

    def __init__(self, *details: object) -> None:
        super().__init__(*(without_secrets(detail) if isinstance(detail, str) else detail for detail in details))


class ConfigError(HfSparseError):
    """Raised when a configuration names or combines things that do not exist or contradict."""


class ModelError(HfSparseError):
    """Raised when a model cannot be pruned as it is (quantized, on the meta device, NaN weights, no sites)."""


class CalibrationError(HfSparseError):
    """Raised when calibration or evaluation data are missing, empty or do not fit the model."""


class CheckpointError(HfSparseError):
    """Raised when files on disk cannot be read as a sparse model or must not be overwritten."""


class HubError(CheckpointError):
    """Raised when a repository on the Hub cannot be looked at or changed: absent, private, offline, no answer."""


class KernelError(HfSparseError):
    """Raised when a weight, an input or packed buffers are not what the sparse kernels can work on."""


class PruningInterrupted(HfSparseError):
    """Raised when a run fails after some blocks were changed; `blocks` holds the indices of those already pruned."""

    def __init__(self, message: str, blocks: list[int]) -> None:
        super().__init__(message)
        self.blocks = blocks


class ProcessLost(HfSparseError):
    """Raised when another of the processes that prune together was killed, stopped or could not be reached in time."""


def unknown(kind: str, given: object, allowed: Iterable[str]) -> str:
    """The sentence for a name that is not known, with the nearest known one."""
    names = sorted(allowed)
    near = get_close_matches(str(given), names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    allows = f"Allowed: {', '.join(map(repr, names))}." if names else "None is known."
    return f"{kind} {given!r} does not exist.{hint} {allows}"
