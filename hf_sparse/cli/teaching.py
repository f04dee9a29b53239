"""The dense model beside the sparse one that `recover` trains: to learn from, and to be measured."""

import argparse
from pathlib import Path
from typing import Any

import torch

from hf_sparse import embedded
from hf_sparse.cli.loading import hub_options, model_name
from hf_sparse.errors import ConfigError, ModelError

_REMEDY = "name the dense model with --teacher, or give --no-distillation to learn from the text alone."
_FILES = ["*.json", "*.safetensors"]


def base_name(known: Any) -> str | None:
    """The path or Hub id of the model that a report says was pruned; the embedded one is found wherever it was pruned."""
    name = known.model if known is not None else ""
    parts = Path(name.replace("\\", "/")).parts
    if name and not Path(name).exists() and parts[-3:] == ("hf_sparse", "embedded", embedded.model_path().name):
        return str(embedded.model_path())
    return name or None


def typed_name(arguments: argparse.Namespace) -> str | None:
    """The path or Hub id behind --teacher.

    Raises: ConfigError where it is the model that is to be trained.
    """
    if arguments.teacher is None:
        return None
    name = str(embedded.model_path()) if arguments.teacher == embedded.NAME else str(arguments.teacher)
    if is_same(name, model_name(arguments)):
        raise ConfigError(
            f"--teacher {arguments.teacher!r} is the sparse model itself, which has nothing to teach it; {_REMEDY}"
        )
    return name


def is_same(one: str, other: str) -> bool:
    """Whether two paths or Hub ids lead to one model."""
    return one == other or (
        Path(one).exists() and Path(other).exists() and Path(one).resolve() == Path(other).resolve()
    )


def load_teacher(arguments: argparse.Namespace, model: Any, name: str, dtype: torch.dtype) -> Any:
    """The dense model in inference mode, in that number format.

    Raises: ConfigError where it cannot be loaded as the student's class, lacks weights, or is sparse itself.
    """
    from hf_sparse import checkpoint
    from trainer_callbacks.distillation_teacher import is_dense, loaded

    if is_same(name, model_name(arguments)):
        raise ConfigError(f"the teacher {name!r} is the sparse model itself, which has nothing to teach it; {_REMEDY}")
    try:
        teacher: Any = loaded(_at_hand(arguments, name), model, dtype)
    except (ModelError, OSError) as error:
        first = str(error).splitlines()[0].partition(" Pass the dense model")[0].rstrip(".")
        raise ConfigError(f"the dense model {name!r} cannot be loaded ({first}); {_REMEDY}") from error
    if checkpoint.report(teacher) is not None or not is_dense(teacher):
        raise ConfigError(f"the teacher {name!r} is sparse itself; {_REMEDY}")
    teacher.config.name_or_path = name
    return teacher.eval()


def _at_hand(arguments: argparse.Namespace, name: str) -> str:
    """A folder with the files of a Hub id, where the user said how to reach the Hub; else the name as it is.

    The revision is that of a model which was named on the command line, so it never is the teacher's. No code of a repository
    is run: the teacher has the class of the student.
    """
    options = {key: value for key, value in hub_options(arguments).items() if key in ("token", "cache_dir")}
    if not options or Path(name).exists():
        return name
    from huggingface_hub import snapshot_download

    folder = snapshot_download(name, allow_patterns=_FILES, ignore_patterns=["*/*"], **options)
    if not list(Path(folder).glob("*.safetensors")):
        folder = snapshot_download(name, allow_patterns=["*.json", "*.bin"], ignore_patterns=["*/*"], **options)
    return folder
