"""Measures the figures in the report again: the same text, windows and number format, for both models."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from hf_sparse.data.sources import open_source
from hf_sparse.data.text import kind_of, text_ids
from hf_sparse.errors import CalibrationError, CheckpointError, HfSparseError
from hf_sparse.evaluate import Measurement, evaluate
from hf_sparse.text import one_line
from hf_sparse.verify.base import Base
from hf_sparse.verify.loading import DTYPES, Loaded, load_as
from hf_sparse.verify.rows import AGREES, DIFFERS, Row, compared, skipped
from hf_sparse.verify.subject import Subject

CHECK = "evaluation"
_MOST_TOKENS, _ITEMS_PER_TOKEN = 2**24, 4  # of a data set on the Hub
_FILES = (".txt", ".jsonl", ".npy")


def check(subject: Subject, base: Base) -> Iterator[Row]:
    """Rows for each evaluation in the report: fingerprint of the text, tokens, the sparse and the dense figure."""
    from model_cards.evaluation import Evaluation

    known = subject.report.evaluations if subject.report else []
    if not known:
        yield skipped(CHECK, "figures", "the report holds none")
    tokenizer = _tokenizer(subject) if known else None
    for values in known:
        yield from _one(subject, base, Evaluation.from_dict(values), tokenizer)


def _one(subject: Subject, base: Base, told: Any, tokenizer: Any) -> Iterator[Row]:
    name = f"{told.metric} on {told.task or told.text or 'a text without a name'}"
    if told.task:
        yield skipped(CHECK, name, "a task of a harness: hf-sparse evaluate --tasks measures it again", told.sparse)
        return
    text = _text(subject, told.text)
    reason = "the text is not known here; give --text with the path of a file of that name" if text is None else ""
    if text is not None and _is_from_hub(subject, text):
        reason = _unbounded(told)
    if text is None or reason:
        yield skipped(CHECK, name, reason, told.sparse)
        return
    for which, loaded, missing, value in (
        ("sparse", subject.loaded, "", told.sparse),
        ("dense", base.loaded, base.reason, told.dense),
    ):
        item = f"{name}, {which}"
        if value is None:
            continue
        if loaded is None:
            yield skipped(CHECK, item, missing, value)
            continue
        try:
            found = _measure(subject, loaded, told, text, tokenizer)
        except (HfSparseError, OSError, RuntimeError) as error:
            yield skipped(CHECK, item, f"it cannot be measured here: {one_line(error, 200)}", value)
            continue
        yield from _rows(item, told, value, found, subject.options.tolerance)


def _rows(item: str, told: Any, value: float, found: Measurement, tolerance: float) -> Iterator[Row]:
    if told.fingerprint != found.fingerprint:
        reason = "another text, or another tokenizer, so the figures cannot be compared"
        yield compared(CHECK, f"{item}: fingerprint of the text", told.fingerprint, found.fingerprint, reason)
        return
    if told.metric != found.metric:
        yield compared(CHECK, f"{item}: metric", told.metric, found.metric)
        return
    yield compared(CHECK, f"{item}: tokens", told.tokens, found.tokens)
    # Kernels, threads and versions of the libraries round differently, so equal weights give nearly equal figures.
    near = abs(found.value - value) <= tolerance * max(abs(value), abs(found.value))
    reason = "" if near else f"more than {tolerance:g} of it apart"
    yield Row(CHECK, item, AGREES if near else DIFFERS, value, found.value, reason)


def windows_of(told: Any) -> int | None:
    """How many windows were measured: as stated, else from the number of predicted tokens; None for all that there are."""
    if told.max_windows is not None or not told.window or not told.tokens or told.metric != "perplexity":
        return int(told.max_windows) if told.max_windows is not None else None
    stride = told.stride or told.window
    if stride >= told.window:
        number, left = divmod(
            told.tokens, told.window - 1
        )  # the first token of a window has nothing to be predicted from
    else:
        number, left = divmod(told.tokens - (told.window - 1), stride)
        number += 1
    return int(number) if number > 0 and not left else None


def _measure(subject: Subject, loaded: Loaded, told: Any, text: str, tokenizer: Any) -> Measurement:
    model = loaded.model
    wanted = DTYPES.get(subject.options.dtype or told.dtype)
    if wanted is not None and wanted != model.dtype:
        # Converting the model at hand would round what a model of that format keeps wide, such as rotary frequencies.
        model = load_as(type(model), loaded.folder, dtype=wanted).model
    data = _first_items(text, told, tokenizer) if _is_from_hub(subject, text) else text
    return evaluate(
        model, data, tokenizer=tokenizer, window=told.window, stride=told.stride if told.stride != told.window else None,
        max_windows=windows_of(told), seed=told.seed or 0, same_text_allowed=True,
    )  # fmt: skip


def _text(subject: Subject, name: str) -> str | None:
    """What to open for the name of a text. A report may come from anyone: no file is opened that the user did not give."""
    if name in subject.options.texts:
        return subject.options.texts[name]
    if name.startswith("stdlib:"):
        return name
    here = Path(name).suffix.lower() in _FILES or not name or "/" not in name or Path(name).exists()
    return None if here or name.startswith((".", "/", "~")) else name


def _is_from_hub(subject: Subject, text: str) -> bool:
    return text not in subject.options.texts.values() and not text.startswith("stdlib:")


def _tokens_needed(told: Any) -> int | None:
    """How many tokens of one long text the windows of a figure take; None where their number is not told."""
    windows = windows_of(told)
    if windows is None or windows < 1 or not told.window or told.window < 1:
        return None
    return int(told.window + (windows - 1) * (told.stride or told.window))


def _unbounded(told: Any) -> str:
    """Why a data set on the Hub is not read, which may have no end; empty where it is."""
    needed = _tokens_needed(told)
    if needed is None:
        return "the report does not tell how many windows of that data set were used; give --text with a file of them"
    if needed > _MOST_TOKENS:
        return f"its windows take {needed:,} tokens of a data set on the Hub, at most {_MOST_TOKENS:,} are read; give --text"
    return ""


def _first_items(name: str, told: Any, tokenizer: Any) -> Iterator[Any]:
    """No more of a data set on the Hub than the windows of a figure need: texts until they have so many tokens, else as many rows."""
    needed = _tokens_needed(told) or 0
    source, items = open_source(name)
    windows, tokens = windows_of(told) or 0, 0
    for number, item in enumerate(items):
        yield item
        if tokenizer is None or kind_of(item, source) != "text":
            done = number + 1 >= windows
        else:
            with suppress(CalibrationError):  # an empty text
                tokens += text_ids([item], tokenizer, 1, None, source).numel()
            done = tokens >= needed
        # Many texts of a data set may be empty.
        if done or number >= _ITEMS_PER_TOKEN * needed:
            return


def _tokenizer(subject: Subject) -> Any:
    from transformers import AutoTokenizer

    options = {"trust_remote_code": subject.options.trust_remote_code, "local_files_only": True}
    try:
        return AutoTokenizer.from_pretrained(subject.folder, **options)
    except (OSError, ValueError, ImportError, KeyError, TypeError):  # each class has its own way to say "not here"
        return None


def texts_by_name(paths: Iterable[str | Path]) -> dict[str, str]:
    """Paths by the names that reports give them; raises CheckpointError for one that is not there."""
    found = {Path(path).name: str(path) for path in paths}
    for path in found.values():
        if not (Path(path).is_file() and Path(path).suffix.lower() in _FILES):
            raise CheckpointError(f"{one_line(path)!r} is no text here; give the path of a .txt, .jsonl or .npy file.")
    return found
