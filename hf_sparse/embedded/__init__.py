"""The embedded model: small, real, and always at hand for demonstrations and tests."""

from importlib.resources import files
from pathlib import Path

NAME = "embedded"  # what the command line calls it


def model_path() -> Path:
    """The folder of the embedded model, as `from_pretrained` takes it."""
    return Path(str(files("hf_sparse.embedded") / "model"))
