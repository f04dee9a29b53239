"""What a card is made from: a report and what is known of the base model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from hf_sparse import embedded
from hf_sparse.errors import CheckpointError
from hf_sparse.report import Report
from hf_sparse.text import one_line
from model_cards import facts, header
from model_cards.evaluation import Evaluation

_LARGEST_CARD = 4 * 2**20  # bytes


@dataclass(frozen=True, kw_only=True)
class CardSource:
    """What a card is made from."""

    report: Report
    base: str  # name of the model that was pruned: a repository's id, a folder, or empty
    evaluations: Sequence[Evaluation] = ()
    base_card: str | None = None  # text of the base model's card
    plot_name: str | None = None  # a picture beside the card
    command: str | None = None  # what was typed
    tags: Sequence[str] = ()  # of the model's own, beside those that the card gives it
    model_config: Mapping[str, Any] | None = None  # the saved config.json

    @property
    def on_hub(self) -> bool:
        return is_repository(self.base)

    @property
    def shown_base(self) -> str:
        """The base as a card may show it: a repository's id, of a folder the last part."""
        return self.base if self.on_hub else facts.short_name(self.base)

    @property
    def title(self) -> str:
        pattern = facts.pattern_name(self.report)
        name = facts.short_name(self.base) or self.report.model_class or "model"
        return f"{name}, {pattern or 'pruned'}{' sparse' if pattern else ''}"

    @property
    def inherited(self) -> dict[str, Any]:
        """License, language and task of the base model's card, as header values."""
        return inherited(self.base_card, self.base)


def name_of_base(report: Report) -> str:
    """The model's name; the one in the package goes by the name that the command line takes."""
    return known_name(report.model)


def known_name(model: str) -> str:
    return embedded.NAME if model == str(embedded.model_path()) else model


def is_repository(name: str) -> bool:
    """Whether a name can be a repository's id; a folder of that name is taken for the folder, as Transformers does."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name != embedded.NAME and not Path(name).exists()


def local_card(base: str) -> str | None:
    """The text of the base model's card where this machine has it: in the model's folder, or in the Hub's cache."""
    try:
        if (Path(base or ".") / "config.json").is_file():
            return _text(Path(base) / "README.md") if base else None
        cached = try_to_load_from_cache(base, "README.md") if is_repository(base) else None
        return _text(Path(cached)) if isinstance(cached, str) else None
    except (OSError, UnicodeDecodeError, ValueError):
        return None  # no card, nothing to inherit


def _text(file: Path) -> str | None:
    return file.read_text(encoding="utf-8-sig") if file.stat().st_size <= _LARGEST_CARD else None


def inherited(card: str | None, base: str = "") -> dict[str, Any]:
    """License, language and task from the base model's card; a header that cannot be read gives nothing."""
    try:
        values = header.read(header.split(card or "")[0])
    except CheckpointError:
        return {}
    # Other types are slips such as `language: no`, which YAML reads as False.
    found: dict[str, Any] = {}
    for key in header.INHERITED:
        value = values.get(key)
        if isinstance(value, str):
            found[key] = one_line(value)
        elif isinstance(value, list):
            found[key] = [one_line(item) for item in value if isinstance(item, str)]
    link = found.get("license_link")
    if isinstance(link, str) and "://" not in link and is_repository(base):  # a file of the base's repository
        found["license_link"] = f"{constants.ENDPOINT}/{base}/blob/main/{link.lstrip('/')}"
    return found
