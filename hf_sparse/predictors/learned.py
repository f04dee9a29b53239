"""What a predictor learned from: which data, and in whose tokens."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Self

from hf_sparse.errors import CalibrationError, CheckpointError

_DIGITS = 16


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Calibration data of a predictor; `tokenizer` is None where they were given as token ids."""

    source: str
    fingerprint: str
    tokens: int
    tokenizer: str | None = None

    @classmethod
    def from_dict(cls, values: object) -> Self:
        """Raises: CheckpointError for anything that `to_dict` does not give."""
        try:
            found = cls(**values)  # type: ignore[arg-type]
        except TypeError as error:
            raise CheckpointError("what the predictors learned from cannot be read; train them anew.") from error
        words = (found.source, found.fingerprint, found.tokenizer or "")
        if not all(isinstance(word, str) for word in words) or not isinstance(found.tokens, int):
            raise CheckpointError("what the predictors learned from cannot be read; train them anew.")
        return found

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def print_of_tokenizer(tokenizer: Any) -> str | None:
    """16 hexadecimal digits that tell a vocabulary from others; None for what has no list of its tokens."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # that of a processor
    try:
        vocabulary = tokenizer.get_vocab()
    except (AttributeError, NotImplementedError):
        return None
    listed = json.dumps(sorted(vocabulary.items()), ensure_ascii=True).encode("ascii")
    return hashlib.sha256(listed).hexdigest()[:_DIGITS]


class Remembering:
    """Loads a tokenizer when text asks for one, and knows afterwards which one that was."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load
        self.print: str | None = None  # None as long as no text was read

    def __call__(self) -> Any:
        tokenizer = self._load()
        self.print = print_of_tokenizer(tokenizer)
        return tokenizer


def check_tokenizer(learned: Learned | None, used: str | None, what: str) -> None:
    """Refuse text in other tokens than those that something was learned from; where one side is not known, nothing is said.

    Raises: CalibrationError.
    """
    known = learned.tokenizer if learned is not None else None
    if known is not None and used is not None and known != used:
        raise CalibrationError(
            f"{what} come from another tokenizer (its vocabulary has the print {known}, the one used here {used}), so their tokens mean "
            "something else; record and train with this tokenizer."
        )
