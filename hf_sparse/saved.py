"""A sparse model as it lies in a folder: whether it is whole and what it says it is, and which of its files are published."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from hf_sparse.checkpoint import CONFIG_KEY
from hf_sparse.errors import CheckpointError
from hf_sparse.hashes import hashes_of, model_files
from hf_sparse.report import FILE_NAME as REPORT_FILE
from hf_sparse.report import Report
from hf_sparse.schema import read_json
from hf_sparse.storage import is_compressed
from hf_sparse.storage.names import INDEX, WEIGHTS

_LARGEST_JSON = 64 * 2**20
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
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
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{str(folder)!r} holds an adapter beside a model, and whoever loads both from the Hub gets the base that "
            "adapter_config.json names instead of this model; move adapter_config.json and adapter_model.* out of the folder, and push "
            "the adapter to a repository of its own."
        )
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
    compressed = is_compressed(read_json(folder / "config.json", _LARGEST_JSON, "config.json"))
    whole, index = (WEIGHTS, folder / INDEX) if compressed else (_WHOLE, folder / _INDEX)
    if index.is_file():
        values = read_json(index, _LARGEST_JSON, index.name)
        shards = values.get("weight_map") if isinstance(values, dict) else None
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise CheckpointError(f"{str(index)!r} is no index of shards; load the model and save it again.")
        missing = sorted(name for name in set(shards.values()) if not (folder / Path(name).name).is_file())
        if missing:
            raise CheckpointError(f"{str(folder)!r} is not whole: {', '.join(missing[:3])} is missing; save it again.")
    elif not (folder / whole).is_file():
        raise CheckpointError(
            f"{str(folder)!r} holds no {whole}; save the model with hf_sparse, which writes safetensors only."
        )


def files_to_publish(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """Names of the files to publish; of those left out, pickles and what a training leaves behind; and of links that lead elsewhere.

    Hidden files are not named. A link is followed inside the folder and into the Hub's cache, of which a downloaded model consists.

    Raises: CheckpointError where a file of the model itself is a link that leads elsewhere.
    """
    every = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if _is_file_or_link(path)}
    shown = [name for name in sorted(every) if not any(_is_hidden(part) for part in name.split("/"))]
    left_out = [name for name in shown if _LEFT_OUT.fullmatch(name)]
    outside = [name for name in shown if name not in left_out and _leads_outside(every[name], folder)]
    needed = [path.name for path in model_files(folder) if path.name in outside]
    if needed:
        raise CheckpointError(
            f"{needed[0]} in {str(folder)!r} is a link to a file elsewhere, and such are not published; put the file itself there."
        )
    return [name for name in shown if name not in left_out and name not in outside], left_out, outside


def _is_file_or_link(path: Path) -> bool:
    return path.is_symlink() or path.is_file()


def _is_hidden(part: str) -> bool:
    return part.startswith((".", "_")) and part != "__pycache__"


def _leads_outside(path: Path, folder: Path) -> bool:
    """Whether a link leads to no file, or to one outside of the folder and of the Hub's cache."""
    if not path.is_symlink():
        return False
    # A snapshot in the cache: models--USER--NAME/snapshots/COMMIT/NAME is a link to models--USER--NAME/blobs/HASH.
    places = [folder, Path(constants.HF_HUB_CACHE)]
    if folder.resolve().parent.name == "snapshots":
        places.append(folder.resolve().parent.parent / "blobs")
    target = path.resolve()
    return not (target.is_file() and any(target.is_relative_to(place.resolve()) for place in places))
