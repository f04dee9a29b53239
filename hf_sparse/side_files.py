"""What stands beside the weights of a sparse model: its report, a picture of it, and its card."""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_sparse import checkpoint
from hf_sparse.errors import HfSparseError
from hf_sparse.hashes import hashes_of
from hf_sparse.replace import write_whole
from hf_sparse.report import PICTURE_FILE, Report
from hf_sparse.text import one_line

# What can be wrong with a report of unknown origin, a picture or a card; the weights must not be lost for the sake of one.
SPOILED = (HfSparseError, LookupError, ValueError, TypeError, OverflowError, OSError)


def describe(model: Any, folder: Path) -> None:
    """Write report, picture and card beside weights that have just been saved; the report then has the hashes of the files.

    A README without our section is a person's own and stays as it is.
    """
    # A user's own folder of that name must not break the import of hf_sparse, so this one waits until it is needed.
    from model_cards import write_card

    report = checkpoint.report(model)
    if report is None:
        describe_predictors(folder, str(getattr(model.config, "name_or_path", "") or ""))
        return
    try:
        report.files = hashes_of(folder)
        report.save(folder)
        write_card(folder, card_of(model, report, draw(report, folder)))
    except SPOILED as error:
        warnings.warn(f"the model card was not written: {one_line(error)}", stacklevel=5)
    describe_predictors(folder)


def describe_predictors(folder: Path, base: str = "") -> None:
    """Write what the predictors in a folder are into its README, or take that out where there are none any more.

    A README without any part of ours is a person's own and stays as it is. `base` names the model that was loaded.
    """
    from model_cards.predictors import write_part

    try:
        write_part(folder, base)
    except SPOILED as error:
        warnings.warn(f"the model card does not tell of the predictors: {one_line(error)}", stacklevel=5)


def card_of(model: Any, report: Report, picture: str | None, base_card: str | None = None) -> Any:
    """The card of a model in memory, of the class that was chosen for cards."""
    from model_cards import card_class

    tags = getattr(model, "model_tags", None) or ()
    return card_class().of_model(model, report, plot_name=picture, base_card=base_card, tags=tags)


def draw(report: Report, folder: Path) -> str | None:
    """Draw the report's picture into a folder, where matplotlib is installed; the name of the file.

    The picture is kept with the report and drawn again only when what it shows has changed.
    """
    if find_spec("matplotlib") is None:  # plots are an extra; the card says what there is
        return None
    shown = [(block.name, block.sparsity, block.output_error, block.measured) for block in report.blocks]
    drawn = getattr(report, "_drawn", None)
    file = folder / PICTURE_FILE
    if drawn is None or drawn[0] != shown:
        report.plot(file)
        report._drawn = (shown, file.read_bytes())  # type: ignore[attr-defined]
    elif not file.exists() or file.read_bytes() != drawn[1]:
        write_whole(file, drawn[1])
    return file.name
