"""The sequences that `recover` trains on, how they are batched, and whether a text to measure on overlaps with them."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from hf_sparse.calibrate import limits_of, tokenizer_of
from hf_sparse.checkpoint import report
from hf_sparse.data import Samples, fingerprint, read_samples
from hf_sparse.data.sources import open_source
from hf_sparse.data.text import hashed, text_ids
from hf_sparse.errors import CalibrationError, ConfigError, ModelError

_LENGTH = 512
_IGNORED = -100  # the label that losses leave out


@dataclass(frozen=True)
class Data:
    """Sequences to train on, each at most `length` tokens long; a torch Dataset."""

    samples: Samples
    length: int

    @property
    def source(self) -> str:
        """What the account of the training calls it."""
        return self.samples.source

    @property
    def _fingerprint(self) -> str:
        return self.samples.fingerprint

    @property
    def is_labelled(self) -> bool:
        """Whether the source says itself what is to be predicted."""
        return "labels" in self.samples.rows[0]

    def __len__(self) -> int:
        return len(self.samples.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.samples.rows[index]
        return {key: row[key][0] for key in ("input_ids", "labels") if key in row}

    def steps(self, tokens: int, sequences: int, parts: int) -> tuple[int, int]:
        """Steps of that many sequences, each made in parts, for at most so many tokens; and the tokens that they take.

        A pass over the data ends with a smaller step where the sequences do not divide evenly.
        Raises: ConfigError where the tokens are fewer than one step takes.
        """
        each = self.samples.tokens / len(self)
        in_step = min(sequences, len(self)) * each
        if tokens < math.floor(in_step):
            raise ConfigError(
                f"tokens={tokens} is fewer than one step takes ({min(sequences, len(self))} sequences of {each:.0f} tokens); give "
                f"--tokens {math.ceil(in_step)} or more, or a smaller --batch-size."
            )
        in_pass = math.ceil(math.ceil(len(self) / (sequences // parts)) / parts)
        passes, rest = divmod(tokens, self.samples.tokens)
        more = min(math.floor(rest / in_step), in_pass - 1)
        steps = max(1, passes * in_pass + more)
        return steps, round(passes * self.samples.tokens + more * in_step) or round(in_step)

    def refuse_overlap(
        self, model: Any, processor: Any, text: str, window: int | None, max_windows: int | None
    ) -> None:
        """Refuse to measure on what the model was calibrated on, or on windows of what is trained on.

        Raises: CalibrationError.
        """
        tokenizer = tokenizer_of(model, processor)
        other = read_samples(
            text, tokenizer=tokenizer, num_samples=1, sequence_length=self.length, limits=limits_of(model), all_rows=True
        )  # fmt: skip
        known = report(model)
        if common := set((known.calibration or {}).get("items", ()) if known else ()) & set(other.items):
            raise CalibrationError(
                f"the model was calibrated on {len(common)} of the texts in {text}, so a figure on it would flatter; measure on other text."
            )
        found = _hashes(other)
        if max_windows is not None and not set(_hashes(self.samples)).isdisjoint(found):
            limit = limits_of(model).length
            measured = max_windows * (window or min(_LENGTH, limit or _LENGTH))
            texts = {
                "text": lambda: _texts_within(text, tokenizer, measured),
                "stream": lambda: found[: -(-measured // self.length)],
            }
            found = texts.get(other.kind, lambda: found[:max_windows])()  # fmt: skip
        if common := set(_hashes(self.samples)) & set(found):
            raise CalibrationError(
                f"{len(common)} texts of {text} are in {self.samples.source} as well, so a figure on it would flatter; measure on other text."
            )


def _hashes(samples: Samples) -> Sequence[str]:
    """One of each text; of what came as tokens, one of each row's, whatever lies beside them."""
    if samples.kind == "text":
        return samples.items
    return [fingerprint([{"input_ids": row["input_ids"]}]) for row in samples.rows if "input_ids" in row]


def _texts_within(source: str, tokenizer: Callable[[], Any], tokens: int) -> list[str]:
    """Hashes of the texts that the first so many tokens of a source come from."""
    name, items = open_source(source)
    found: list[str] = []
    for item in hashed(items, found):
        with suppress(CalibrationError):  # an empty text has no tokens
            tokens -= text_ids([item], tokenizer(), 1, None, name).numel()
        if tokens <= 0:
            break
    return found


# ---------------------------------------------------------------------------------------------------- reading


def training_data(model: Any, processor: Any, source: str, tokens: int, sequence_length: int | None, seed: int) -> Data:
    """The sequences of a source, no more than so many tokens need.

    Raises: ConfigError for a length that the model does not take; CalibrationError for data that do not fit; ModelError for
    sequences without token ids, or a masked model without a mask token.
    """
    limits = limits_of(model)
    length = sequence_length or min(_LENGTH, limits.length or _LENGTH)
    if limits.length and length > limits.length:
        raise ConfigError(f"sequence_length={length} is not allowed; the model takes 2 to {limits.length} tokens.")
    wanted = -(-tokens // length)
    while True:
        samples = read_samples(
            source, tokenizer=tokenizer_of(model, processor), num_samples=wanted, sequence_length=length, seed=seed, limits=limits,
            fewer_allowed=True,
        )  # fmt: skip
        if samples.tokens >= tokens or len(samples.rows) < wanted:
            break
        wanted = max(wanted + 1, math.ceil(tokens * len(samples.rows) / samples.tokens))  # rows shorter than the length
    if any("input_ids" not in row or row["input_ids"].ndim != 2 for row in samples.rows):
        raise CalibrationError(
            f"{samples.source} holds rows without token ids, and `recover` trains on nothing else; give text or input_ids."
        )
    data = Data(samples, length)
    if is_masked_model(model) and not data.is_labelled and mask_token(processor) is None:
        raise ModelError(
            f"a {type(model).__name__} learns to fill in masked tokens, and there is no tokenizer with a mask token beside it; save its "
            "tokenizer there, or give rows with labels."
        )
    return data


def is_masked_model(model: Any) -> bool:
    return type(model).__name__.endswith("ForMaskedLM")


def _tokenizer(processor: Any) -> Any:
    return getattr(processor, "tokenizer", processor)


def mask_token(processor: Any) -> int | None:
    """The id of the mask token, or None."""
    found = getattr(_tokenizer(processor), "mask_token_id", None)
    return None if found is None else int(found)


# ---------------------------------------------------------------------------------------------------- batching

Features = Sequence[dict[str, torch.Tensor]]


def collator(model: Any, data: Data, processor: Any) -> Callable[[Features], dict[str, torch.Tensor]]:
    """What makes a batch of sequences: padded where they differ in length, with tokens masked for a masked model."""
    if not is_masked_model(model) or data.is_labelled:
        return padded
    from transformers import DataCollatorForLanguageModeling

    tokenizer = _tokenizer(processor)
    masking = DataCollatorForLanguageModeling(tokenizer)
    special = torch.tensor(tokenizer.all_special_ids)

    def masked(features: Features) -> dict[str, torch.Tensor]:
        batch = padded(features)
        ids = batch["input_ids"]
        left_out = torch.isin(ids, special) | (
            batch["attention_mask"] == 0 if "attention_mask" in batch else torch.zeros_like(ids).bool()
        )
        batch["input_ids"], batch["labels"] = masking.torch_mask_tokens(ids, special_tokens_mask=left_out)
        return batch

    return masked


def padded(features: Features) -> dict[str, torch.Tensor]:
    """A batch, (sequences, longest). Positions behind a sequence's end hold token 0, which neither attention nor loss sees."""
    ids = [feature["input_ids"] for feature in features]
    labels = [feature.get("labels", feature["input_ids"]) for feature in features]
    batch = {"input_ids": _stacked(ids, 0), "labels": _stacked(labels, _IGNORED)}
    if len({len(row) for row in ids}) > 1:
        batch["attention_mask"] = _stacked([torch.ones_like(row) for row in ids], 0)
    return batch


def _stacked(rows: list[torch.Tensor], filler: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)
