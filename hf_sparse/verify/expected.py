"""The card that a report gives: what a README is compared with."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from hf_sparse import embedded
from hf_sparse.remote import CONFIG, LARGEST_CONFIG, is_repository
from hf_sparse.report import PICTURE_FILE
from hf_sparse.schema import read_json
from hf_sparse.verify.subject import Subject, is_embedded
from model_cards import card_class, facts, parts, recovery
from model_cards.card import SparseModelCard
from model_cards.evaluation import Evaluation
from model_cards.render import render
from model_cards.source import CardSource

# A comment that no reader sees; it remembers the header, which is compared by itself. JSON in it holds no ">".
_REMEMBERED = re.compile(r"<!-- hf_sparse:header \{[^>]*\} -->")
_TYPED = "\nThis was typed:\n\n"


@dataclass(frozen=True, kw_only=True)
class Source(CardSource):
    """As on the machine that wrote the card: whether the base was a folder there is not asked of this one."""

    from_hub: bool = False

    @property
    def on_hub(self) -> bool:
        return self.from_hub


@dataclass(frozen=True)
class Section:
    """The lines of our section, those of the report's card, and in what they differ."""

    stated: list[str]
    expected: list[str]
    typed: bool  # whether it tells a command, which the report does not hold

    @property
    def extra(self) -> list[str]:
        """What only the README has."""
        return list((Counter(self.stated) - Counter(self.expected)).elements())

    @property
    def missing(self) -> list[str]:
        """What only the report gives."""
        return list((Counter(self.expected) - Counter(self.stated)).elements())

    @property
    def distance(self) -> int:
        return len(self.extra) + len(self.missing)


def compare_section(subject: Subject, text: str) -> Section:
    """Our section of a README, beside that of the report's card which is nearest to it.

    Which class of card wrote it and whether the base was a folder there is not told, so every such card is made.

    Raises: CheckpointError and what else comes of a damaged report; ConfigError for a template of the user's own.
    """
    stated = lines_of(text)
    kinds: set[type[SparseModelCard]] = {card_class(), SparseModelCard}
    best: Section | None = None
    for source in _sources(subject, text):
        for kind in kinds:
            # Results stand in the header, which is not looked at here; YAML of thousands takes long to write.
            card = render(kind, kind.header_data(replace(source, evaluations=())), kind.template_variables(source))
            found = Section(stated, lines_of(parts.content_of(card.text) or ""), source.command is not None)
            if best is None or found.distance < best.distance:
                best = found
            if best.stated == best.expected:
                return best
    return best or Section(stated, [], False)


def header_of(subject: Subject) -> dict[str, Any]:
    """The values of the header that the report's card has, without the results."""
    source = replace(next(iter(_sources(subject, ""))), evaluations=())
    values: dict[str, Any] = card_class().header_data(source).to_dict()
    return values


def lines_of(section: str) -> list[str]:
    """The lines that are shown, or could be, without white space at their ends."""
    lines = (line.rstrip(" \t") for line in section.replace("\r\n", "\n").split("\n"))
    return [line for line in lines if line and not _REMEMBERED.fullmatch(line)]


def _sources(subject: Subject, section: str) -> Iterator[Source]:
    """What the card may have been made from: the report and the saved config, the base named in each way that there is."""
    known = subject.report
    if known is None:
        return
    facts.check(known)
    recovery.check(known)
    first = Source(
        report=known, base=known.model, from_hub=not is_embedded(known.model) and is_repository(known.model),
        evaluations=[Evaluation.from_dict(values) for values in known.evaluations],
        plot_name=PICTURE_FILE if f"]({PICTURE_FILE})" in section else None, command=_typed(section),
        model_config=read_json(subject.folder / CONFIG, LARGEST_CONFIG, "the config"),
    )  # fmt: skip
    if is_embedded(known.model):
        yield replace(first, base=embedded.NAME)
    yield first
    if first.from_hub:
        yield replace(first, from_hub=False)


def _typed(section: str) -> str | None:
    """The command in the block of code below "This was typed", where there is one; the report does not hold it."""
    block = section.partition(_TYPED)[2]
    fence, _, rest = block.partition("bash\n")
    command, end, _ = rest.partition(f"\n{fence}\n")
    return command if end and len(fence) >= 3 and set(fence) == {"`"} else None
