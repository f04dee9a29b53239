"""What a figure depends on beside the model: versions, and the memory that the process took."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("hf_sparse", "torch", "transformers", "peft", "accelerate", "datasets", "huggingface_hub", "safetensors")


def versions() -> dict[str, str]:
    """Versions of everything that a result depends on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def peak_memory() -> int | None:
    """Most bytes that the process ever held, as the system counts them; None where it does not."""
    try:
        import resource
    except ImportError:  # Windows has no such count
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
