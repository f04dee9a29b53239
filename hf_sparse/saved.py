"""A sparse model as it lies in a folder: whether it is whole and what it says it is, and which of its files are published."""

import re
from pathlib import Path
from typing import Any

from hf_sparse.checkpoint import CONFIG_KEY
from hf_sparse.errors import CheckpointError
from hf_sparse.hashes import hashes_of
from hf_sparse.report import FILE_NAME as REPORT_FILE
from hf_sparse.report import Report
from hf_sparse.schema import read_json

_LARGEST_JSON = 64 * 2**20
_INDEX = "model.safetensors.index.json"
# What a training leaves in its folder, and files that run code when they are loaded.
_LEFT_OUT = re.compile(
    r"(checkpoint-\d+|runs|logs|__pycache__)/.*|.*\.(bin|pt|pth|pkl|pickle|ckpt|h5|msgpack|tmp|partial|pyc)"
    r"|(trainer_state|hf_sparse_run)\.json"
)


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a sparse model.

    Raises: CheckpointError where it is missing, damaged, or that of another kind of folder, with the way out.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{str(folder)!r} is no folder; give one that a sparse model was saved into.")
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{str(folder)!r} holds an adapter, not a model; push it from Python with model.push_to_hub(...), or merge it first "
                "with hf_sparse.merge_and_unload(model)."
            )
        raise CheckpointError(f"{str(folder)!r} is no model folder: there is no config.json.")
    config = read_json(folder / "config.json", _LARGEST_JSON, "config.json")
    if not isinstance(config, dict) or not isinstance(config.get(CONFIG_KEY), dict):
        raise CheckpointError(
            f"the config.json in {str(folder)!r} does not say that hf_sparse pruned this model; prune it first, or publish it with "
            "`hf upload` as it is."
        )
    return config


def read_report(folder: Path) -> Report:
    """The report of a whole folder: every weight file is there, and is the one that was saved with the report.

    A report of a save that had no hashes yet, or of a config.json that was edited since, gets the present ones.
    Raises: CheckpointError.
    """
    if not (folder / REPORT_FILE).is_file():
        raise CheckpointError(f"{str(folder)!r} has no {REPORT_FILE}; load the model with hf_sparse and save it again.")
    report = Report.load(folder)
    _check_whole(folder)
    found = hashes_of(folder)
    weights = {name for name in {*found, *report.files} if name != "config.json"}
    changed = sorted(name for name in weights if report.files and found.get(name) != report.files.get(name))
    if changed:
        raise CheckpointError(
            f"{', '.join(changed[:3])} in {str(folder)!r} is not what was saved with the report, so the card's figures may be wrong; "
            "load the model with hf_sparse and save it again."
        )
    report.files = found
    return report


def _check_whole(folder: Path) -> None:
    index = folder / _INDEX
    if index.is_file():
        values = read_json(index, _LARGEST_JSON, _INDEX)
        shards = values.get("weight_map") if isinstance(values, dict) else None
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise CheckpointError(f"{str(index)!r} is no index of shards; load the model and save it again.")
        missing = sorted(name for name in set(shards.values()) if not (folder / Path(name).name).is_file())
        if missing:
            raise CheckpointError(f"{str(folder)!r} is not whole: {', '.join(missing[:3])} is missing; save it again.")
    elif not (folder / "model.safetensors").is_file():
        raise CheckpointError(
            f"{str(folder)!r} holds no model.safetensors; save the model with hf_sparse, which writes safetensors only."
        )


def files_to_publish(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the files to publish, and of those left out: pickles and what a training leaves behind; hidden ones are not named."""
    every = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    shown = [
        name
        for name in every
        if not any(part.startswith((".", "_")) and part != "__pycache__" for part in name.split("/"))
    ]
    left_out = [name for name in shown if _LEFT_OUT.fullmatch(name)]
    return [name for name in shown if name not in left_out], left_out
