"""Puts what was measured later into the report and the card of a saved model, and leaves its weights alone."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from huggingface_hub import constants

from hf_sparse import speed
from hf_sparse.errors import CheckpointError, ConfigError
from hf_sparse.replace import write_whole
from hf_sparse.report import FILE_NAME, Report
from hf_sparse.speed import Speed


def check_recordable(name: str, dtype: str) -> Path:
    """The folder of a saved sparse model; call it before hours of measuring.

    Raises: ConfigError for a Hub id and for a number format other than the saved one, CheckpointError for a folder without a
    report that can be read and written.
    """
    folder = Path(name)
    if not folder.is_dir():
        raise ConfigError(
            f"--record writes into a local folder, and {name!r} is none; download the model (hf download {name} --local-dir FOLDER), "
            "record there, and push the folder."
        )
    if not (folder / FILE_NAME).is_file():
        raise CheckpointError(
            f"{name!r} holds no {FILE_NAME}, so there is no report to record in; prune with hf-sparse, or leave --record out."
        )
    Report.load(folder)
    for place in (folder, folder / FILE_NAME):
        if not os.access(place, os.W_OK):
            raise CheckpointError(
                f"{str(place)!r} cannot be written; make it writable, or record in a copy of the folder."
            )
    saved = _saved_dtype(folder)
    # A card's figure is taken for that of the model as it loads; one of another number format would not be found again.
    if dtype not in ("auto", saved):
        raise ConfigError(
            f"--dtype {dtype} is not the number format of the saved weights ({saved or 'not told'}), and what is recorded must hold for "
            "them as they are; leave --dtype out, or leave --record out."
        )
    return folder


def _saved_dtype(folder: Path) -> str | None:
    from transformers import PreTrainedConfig

    values = PreTrainedConfig.get_config_dict(folder)[0]
    found = values.get("dtype", values.get("torch_dtype"))
    return str(found).removeprefix("torch.") if found is not None else None


def _lock(folder: Path) -> FileLock:
    """A lock for a folder, kept beside the Hub's cache: nothing is left in the folder itself."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    place = Path(constants.HF_HOME) / "hf_sparse" / "locks"
    place.mkdir(parents=True, exist_ok=True)
    return FileLock(place / f"{name}.lock")


def record(folder: Path, evaluations: Sequence[Mapping[str, Any]]) -> bool:
    """Put figures (fields of model_cards.Evaluation) into the report of a folder, and renew its card.

    A figure that was measured in the same way before is replaced. Either both files are written or none. False where the README
    is a person's own, without our section, and was left as it is.

    Raises: CheckpointError for a report that cannot be read.
    """
    from model_cards.evaluation import measured_again

    def add(report: Report) -> None:
        for values in evaluations:
            report.evaluations = measured_again(report.evaluations, values)

    return _renew(folder, add)


def record_speeds(folder: Path, speeds: Sequence[Speed]) -> bool:
    """The same for speeds."""

    def add(report: Report) -> None:
        report.speeds = speed.measured_again(report.speeds, speeds)

    return _renew(folder, add)


def _renew(folder: Path, change: Callable[[Report], None]) -> bool:
    from model_cards import card_class, write_card

    with _lock(folder):  # two commands may measure at once, and both figures are to stay
        report = Report.load(folder)
        change(report)
        with tempfile.TemporaryDirectory() as aside:
            content = report.save(aside).read_bytes()
        with _both_or_none(folder / FILE_NAME, folder / "README.md"):
            # The report first: a card whose figures no report has could not be checked, should the process be killed in between.
            write_whole(folder / FILE_NAME, content)
            return write_card(folder, card_class().from_folder(folder))


@contextmanager
def _both_or_none(*files: Path) -> Iterator[None]:
    """Inside, files are written; if the block fails, they are as before."""
    before = {file: file.read_bytes() if file.exists() else None for file in files}
    try:
        yield
    except BaseException:
        for file, content in before.items():
            if content is None:
                file.unlink(missing_ok=True)
            else:
                write_whole(file, content)
        raise
