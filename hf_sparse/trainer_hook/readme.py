"""README.md in the output folder of a Trainer: programs write it anew again and again, and what a person wrote stays."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_sparse.replace import write_whole
from hf_sparse.side_files import SPOILED

_log = logging.getLogger(__name__)


class Readme:
    """A README through the life of a Trainer.

    The file holds a person's text, the Trainer's between two comments, and our section between two others. What a program writes
    is known only from following the program: any other change of the file is a person's.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._text = ""  # the README with what a person wrote, whatever a program has made of the file since
        self._left: bytes | None = None  # the file as the last program has left it
        self._generated: str | None = None  # the last text of `create_model_card`
        self._pushed: Any = None  # a person's text of the last push
        self._depth = 0

    @contextmanager
    def saved_over(self) -> Iterator[None]:
        """Inside, a save writes the file: PEFT puts a text of its own there."""
        self._note()
        try:
            yield
        finally:
            self._left = _content(self.file)

    @contextmanager
    def generated_over(self) -> Iterator[None]:
        """Inside, `create_model_card` writes the file; what it has written then stands in a part of its own."""
        if not self._depth:
            self._note()
        before = _content(self.file)
        self._depth += 1
        try:
            yield
        except BaseException:
            self._left = _content(self.file)
            raise
        finally:
            self._depth -= 1
        if self._depth or _content(self.file) == before:  # a method that calls that of its base class is one program
            return
        try:
            self._put_generated((before or b"").decode("utf-8", errors="replace"))
        except SPOILED as error:
            if self._text.strip():
                self._set_aside(f"cannot be kept together with the Trainer's text ({error})")
            self._left = _content(self.file)

    def to_push(self, card: Any, there: str | None, repository: str) -> str:
        """The README that goes to the repository, which has `there` now; the file is the same afterwards.

        Raises: CheckpointError where the header of one of the two is not valid YAML.
        """
        from model_cards.own import own_text, with_title_of

        self._note()
        text = self._with_generated(self._chosen(there, repository))
        text = with_title_of(card.content, _merged(text, card)) if text.strip() else str(card.content)
        self._put(text)
        self._pushed = own_text(text)
        return text

    def _note(self) -> None:
        """Take in what a person has done to the file."""
        content = _content(self.file)
        if content is not None and content == self._left:
            return
        try:
            self._text = (content or b"").decode("utf-8-sig")
        except UnicodeDecodeError as error:
            self._text = ""
            self._set_aside(f"is not UTF-8 text ({error.reason})", content)
        self._left = content

    def _chosen(self, there: str | None, repository: str) -> str:
        """The README to start from: that of the repository, unless it lacks what a person wrote into the file."""
        from model_cards.own import own_text

        if there is None:
            return self._text
        here, theirs = own_text(self._text), own_text(there)
        # What has stayed as we have pushed it gives way to what somebody has changed since, be it by taking something away.
        if here == self._pushed:
            return there
        if theirs == self._pushed:
            return self._text
        if here.is_in(theirs):
            return there
        if theirs.is_in(here):
            return self._text
        self._set_aside(f"has other text than that of {repository!r}, which is pushed with the card")
        return there

    def _with_generated(self, text: str) -> str:
        from model_cards.merge import merge_trainer
        from model_cards.own import own_text, with_place_for_trainer
        from model_cards.parts import TRAINER, part_of

        if self._generated is None:
            return text
        if part_of(text, TRAINER) is None and not own_text(text):
            text = with_place_for_trainer(text)
        return merge_trainer(text, self._generated)

    def _put_generated(self, before: str) -> None:
        from model_cards.merge import merge
        from model_cards.parts import part_of

        self._generated = self.file.read_bytes().decode("utf-8-sig")
        text = self._with_generated(self._text)
        if part_of(before) is not None:  # the last save's section
            text = merge(text, before, generated=_trainers_values(text))
        self._put(text)

    def _put(self, text: str) -> None:
        self._text, self._left = text, text.encode("utf-8")
        write_whole(self.file, self._left)

    def _set_aside(self, why: str, content: bytes | None = None) -> None:
        """Keep a person's text under another name; files whose names begin with `_` are not pushed."""
        content = self._text.encode("utf-8") if content is None else content
        number = 1
        while (aside := self.file.with_name(f"_README{f'-{number}' if number > 1 else ''}.md")).exists():
            if aside.read_bytes() == content:
                break
            number += 1
        write_whole(aside, content)
        _log.warning(
            "%s %s; it is kept as %s. Put into README.md what of it shall be published.", self.file, why, aside
        )


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _merged(text: str, card: Any) -> str:
    """A README with the card; what the Trainer wrote into the header gives way to ours, but not what a person wrote."""
    from model_cards.merge import merge

    trainers = _trainers_values(text)
    return str(card.merged_into(merge(text, card.content, generated=trainers) if trainers else text))


def _trainers_values(text: str) -> dict[str, Any]:
    from model_cards.parts import TRAINER, part_of, remembered

    return remembered(part_of(text, TRAINER), TRAINER)
