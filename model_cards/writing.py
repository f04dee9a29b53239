"""Writes cards beside models, and holds which class of card saves and pushes write."""

import logging
from pathlib import Path

from huggingface_hub import ModelCard

from hf_sparse.errors import CheckpointError, ConfigError
from hf_sparse.replace import write_whole
from model_cards.card import SparseModelCard
from model_cards.merge import merge
from model_cards.parts import part_of

_log = logging.getLogger(__name__)
_chosen: type[SparseModelCard] | None = None


def card_class() -> type[SparseModelCard]:
    """The class of the cards that saves and pushes write."""
    return _chosen or SparseModelCard


def set_card_class(kind: type[SparseModelCard] | None) -> None:
    """Let saves and pushes of this process write cards of a class of one's own; None gives SparseModelCard back.

    Raises: ConfigError for anything else than a subclass of SparseModelCard.
    """
    global _chosen
    if kind is not None and not (isinstance(kind, type) and issubclass(kind, SparseModelCard)):
        raise ConfigError(
            f"{kind!r} cannot be the class of cards; give a subclass of SparseModelCard, or None for that itself."
        )
    _chosen = kind


def write_card(folder: str | Path, card: ModelCard) -> bool:
    """Write README.md if there is none, or renew our section in it; False where it is a person's own and was left alone."""
    file = Path(folder) / "README.md"
    text = card.content
    if file.exists():
        try:
            existing = file.read_bytes().decode("utf-8")
            if part_of(existing) is None:
                return False
            text = merge(existing, text)
        except UnicodeDecodeError:
            return False
        except CheckpointError as error:
            # A save must not fail after hours of work because of a slip in a README.
            _log.warning("%s was not renewed: %s", file, error)
            return False
    write_whole(file, text.encode("utf-8"))
    return True
