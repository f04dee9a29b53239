"""Every kind of data becomes rows without padding; what cannot be used is refused with one clear sentence."""

import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from transformers import BatchEncoding, PreTrainedTokenizerFast

from hf_sparse import stdlib_text
from hf_sparse.data import Limits, Sample, Samples, batches, fingerprint, read_samples, tokens_of
from hf_sparse.errors import CalibrationError

WORDS = ["<s>", "</s>", "<unk>", "user", "assistant", "system", *(f"w{number}" for number in range(100))]
BOS, EOS = 0, 1
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'nobody' %}{{ raise_exception('nobody may not speak') }}{% endif %}"
    "{{ '<s> ' + m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
)


def tokenizer(bos: bool = False, template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a word."""
    model = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", eos_token="</s>", **({"bos_token": "<s>"} if bos else {})
    )
    made.chat_template = template
    return made


TOKENIZER = tokenizer()


def no_tokenizer() -> Any:
    pytest.fail("token ids need no tokenizer")


def read(source: Any, number: int = 1, length: int = 8, **more: Any) -> Samples:
    return read_samples(
        source, **{"tokenizer": lambda: TOKENIZER, "num_samples": number, "sequence_length": length, **more}
    )


def ids(samples: Samples, key: str = "input_ids") -> list[list[int]]:
    """The token ids of all samples; every sample is one row of int64."""
    for row in samples.rows:
        assert row[key].shape[0] == 1
        assert row[key].dtype == torch.int64
    return [row[key][0].tolist() for row in samples.rows]


def words(start: int, stop: int) -> str:
    return " ".join(f"w{number}" for number in range(start, stop))


def word_ids(start: int, stop: int) -> list[int]:
    return [number + WORDS.index("w0") for number in range(start, stop)]


# ------------------------------------------------------------------------------------------------ texts

TEXTS: dict[str, Callable[[Path], Any]] = {
    "texts": lambda folder: [words(0, 10), words(10, 30), words(30, 32)],
    "one long text": lambda folder: [words(0, 32)],
    "tuple": lambda folder: (words(0, 10), words(10, 32)),
    "generator": lambda folder: (words(start, start + 8) for start in range(0, 32, 8)),
    "dicts with text": lambda folder: [{"text": words(0, 16)}, {"text": words(16, 32), "id": 3}],
    "dicts with content": lambda folder: [{"content": words(0, 32)}],
    "one dict": lambda folder: {"text": words(0, 32)},
    "blank texts between": lambda folder: ["", words(0, 16), "  \n", words(16, 32)],
    "Dataset": lambda folder: datasets.Dataset.from_dict({"id": [1, 2], "text": [words(0, 16), words(16, 32)]}),
    "torch Dataset": lambda folder: datasets.Dataset.from_dict(
        {"id": [1, 2], "text": [words(0, 16), words(16, 32)]}
    ).with_format("torch"),
    "IterableDataset": lambda folder: datasets.Dataset.from_dict(
        {"text": [words(0, 16), words(16, 32)]}
    ).to_iterable_dataset(),
    "tagged words": lambda folder: [{"tokens": ["w0", "w1"], "text": words(0, 32)}],
    ".txt": lambda folder: written(folder / "a.txt", words(0, 32)),
    ".txt with a mark": lambda folder: written(folder / "a.txt", "\ufeff" + words(0, 32)),
    ".TXT as str": lambda folder: str(written(folder / "a.TXT", words(0, 32))),
    ".jsonl": lambda folder: written(
        folder / "a.jsonl", "\n".join(json.dumps({"text": words(start, start + 16)}) for start in (0, 16))
    ),
    ".jsonl of strings": lambda folder: written(folder / "a.jsonl", f'"{words(0, 16)}"\n\n"{words(16, 32)}"\n'),
}


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("make", TEXTS.values(), ids=TEXTS)
def test_texts_are_joined_and_cut_into_full_windows(make: Callable[[Path], Any], tmp_path: Path) -> None:
    found = read(make(tmp_path), number=4, length=8)
    assert ids(found) == [word_ids(start, start + 8) for start in range(0, 32, 8)]
    assert found.tokens == 32


def test_every_text_starts_with_its_first_token_mark() -> None:
    found = read([words(0, 3), "", words(3, 7)], number=3, length=3, tokenizer=lambda: tokenizer(bos=True))
    assert list(itertools.chain(*ids(found))) == [BOS, *word_ids(0, 3), BOS, *word_ids(3, 7)]


def test_what_is_left_behind_the_last_window_is_dropped() -> None:
    assert ids(read([words(0, 20)], number=2, length=8)) == [word_ids(0, 8), word_ids(8, 16)]


def test_windows_are_no_longer_than_the_model_allows() -> None:
    found = read([words(0, 32)], number=4, length=2048, limits=Limits(length=8))
    assert ids(found) == [word_ids(start, start + 8) for start in range(0, 32, 8)]


def test_all_rows_takes_every_window_and_stride_lets_them_overlap() -> None:
    source = [words(0, 12)]
    assert ids(read(source, number=1, length=4, all_rows=True)) == [word_ids(start, start + 4) for start in (0, 4, 8)]
    overlapping = read(source, number=1, length=8, all_rows=True, stride=2)
    assert ids(overlapping) == [word_ids(start, start + 8) for start in (0, 2, 4)]


def test_the_choice_of_windows_follows_the_seed_alone() -> None:
    source = [words(0, 100)]

    def chosen(seed: int, disturb: int) -> list[list[int]]:
        random.seed(disturb)
        torch.manual_seed(disturb)
        numpy.random.seed(disturb)
        return ids(read(source, number=5, length=4, seed=seed))

    states = random.getstate(), torch.random.get_rng_state()
    by_seed = [chosen(seed, disturb=1) for seed in range(4)]
    assert [chosen(seed, disturb=2) for seed in range(4)] == by_seed
    assert len({str(found) for found in by_seed}) == 4
    every = [word_ids(start, start + 4) for start in range(0, 100, 4)]
    for found in by_seed:
        positions = [every.index(window) for window in found]
        assert positions == sorted(set(positions))  # no window twice, in the order of the text
    random.setstate(states[0])
    read(source, number=5, length=4, seed=3)
    assert random.getstate() == states[0]


def test_no_more_text_is_read_than_the_choice_needs() -> None:
    def endless() -> Iterator[str]:
        for number in range(1000):
            assert number < 100, "read on without need"
            yield words(0, 8)

    assert len(read(endless(), number=2, length=8).rows) == 2


def test_the_standard_library_serves_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdlib_text, "texts", lambda split: [words(0, 32)] if split == "calibration" else [])
    found = read("stdlib:calibration", number=4)
    assert (found.source, len(found.rows)) == ("stdlib:calibration", 4)
    with pytest.raises(CalibrationError, match="stdlib:development is empty"):
        read("stdlib:development")


def test_an_unknown_split_of_the_standard_library_is_refused() -> None:
    with pytest.raises(CalibrationError, match="Did you mean 'evaluation'"):
        read("stdlib:evaluatoin")


# ------------------------------------------------------------------------------------------------ chats

CHATS = [
    [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}],
    [{"role": "system", "content": "w4"}, {"role": "user", "content": "w5"}],
]
SHARE_GPT = [
    [{"from": "human", "value": "w1 w2"}, {"from": "gpt", "value": "w3"}],
    [{"from": "system", "value": "w4"}, {"from": "human", "value": "w5"}],
]
CHAT_IDS = [
    [WORDS.index(word) for word in text.split()]
    for text in ("<s> user w1 w2 </s> <s> assistant w3 </s>", "<s> system w4 </s> <s> user w5 </s>")
]


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: CHATS,
        lambda folder: (tuple(chat) for chat in CHATS),
        lambda folder: SHARE_GPT,
        lambda folder: [{"messages": chat, "id": 1} for chat in CHATS],
        lambda folder: [{"conversations": chat} for chat in SHARE_GPT],
        lambda folder: [{"chat": chat, "text": "rendered"} for chat in CHATS],
        lambda folder: datasets.Dataset.from_list([{"messages": chat} for chat in CHATS]),
        lambda folder: datasets.Dataset.from_list(
            [{"conversations": chat} for chat in SHARE_GPT]
        ).to_iterable_dataset(),
        lambda folder: written(folder / "c.jsonl", "\n".join(json.dumps({"messages": chat}) for chat in CHATS)),
        lambda folder: written(folder / "c.jsonl", "\n".join(json.dumps(chat) for chat in CHATS)),
    ],
    ids=[
        "lists",
        "tuples",
        "from and value",
        "messages",
        "conversations",
        "chat",
        "Dataset",
        "IterableDataset",
        ".jsonl",
        ".jsonl lists",
    ],
)
def test_every_conversation_goes_through_the_template(make: Callable[[Path], Any], tmp_path: Path) -> None:
    assert ids(read(make(tmp_path), number=2, length=20)) == CHAT_IDS


def test_one_conversation_is_one_sample_and_is_cut_at_the_length() -> None:
    assert ids(read(CHATS[0], number=1, length=20)) == CHAT_IDS[:1]
    assert ids(read({"messages": CHATS[0]}, number=1, length=20)) == CHAT_IDS[:1]
    assert ids(read(CHATS, number=2, length=5)) == [row[:5] for row in CHAT_IDS]


@pytest.mark.parametrize(
    ("source", "template", "said"),
    [
        ([[{"role": "nobody", "content": "w1"}]], CHAT_TEMPLATE, "nobody may not speak"),
        (CHATS, None, "chat_template"),
        ([[{"role": "user"}]], "{{ raise_exception('') }}", "refused a conversation"),
    ],
)
def test_a_template_that_refuses_is_named(source: Any, template: str | None, said: str) -> None:
    with pytest.raises(CalibrationError, match="chat template") as caught:
        read(source, tokenizer=lambda: tokenizer(template=template))
    assert said in str(caught.value)


# ------------------------------------------------------------------------------------------------ token rows

ROWS = [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]
RAGGED = [[5, 6, 7, 8], [9, 10], [13, 14, 15]]


class MapStyle(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(RAGGED)

    def __getitem__(self, index: int) -> Sample:
        return {"input_ids": torch.tensor(RAGGED[index])}


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.tensor(ROWS))


def saved(path: Path, rows: Any) -> Path:
    with path.open("wb") as file:  # numpy.save would add a suffix
        numpy.save(file, numpy.asarray(rows))
    return path


TENSOR = torch.tensor(ROWS)
EQUAL: dict[str, Callable[[Path], Any]] = {
    "tensor": lambda folder: TENSOR,
    "int32 tensor": lambda folder: TENSOR.int(),
    "uint8 tensor": lambda folder: TENSOR.to(torch.uint8),
    "array": lambda folder: TENSOR.numpy(),
    "array of another byte order": lambda folder: TENSOR.numpy().astype(">i4"),
    "array that is read-only": lambda folder: numpy.broadcast_to(TENSOR.numpy(), (3, 4)),
    "list of tensors": lambda folder: list(TENSOR),
    "list of 2-D tensors": lambda folder: [TENSOR[:1], TENSOR[1:]],
    "list of arrays": lambda folder: list(TENSOR.numpy().astype("uint16")),
    "lists": lambda folder: ROWS,
    "generator": lambda folder: (row for row in TENSOR),
    "dict": lambda folder: {"input_ids": TENSOR},
    "dict of lists": lambda folder: {"input_ids": ROWS, "attention_mask": [[1] * 4] * 3},
    "BatchEncoding": lambda folder: BatchEncoding({"input_ids": ROWS}, tensor_type="pt"),
    "dicts": lambda folder: [{"input_ids": row} for row in ROWS],
    "dicts of rows": lambda folder: [{"input_ids": row[None]} for row in TENSOR],
    "dicts of tokens": lambda folder: [{"tokens": row} for row in ROWS],
    "dicts with the text left in": lambda folder: [{"text": "w1", "input_ids": row} for row in ROWS],
    "DataLoader": lambda folder: DataLoader(list(TENSOR), batch_size=2),
    "DataLoader of dicts": lambda folder: DataLoader([{"input_ids": row} for row in TENSOR], batch_size=2),
    "DataLoader without a length": lambda folder: DataLoader(Stream(), batch_size=2),
    "DataLoader of a TensorDataset": lambda folder: DataLoader(TensorDataset(TENSOR, TENSOR), batch_size=2),
    "TensorDataset": lambda folder: TensorDataset(TENSOR),
    "Dataset": lambda folder: datasets.Dataset.from_dict({"input_ids": ROWS, "id": [1, 2, 3]}),
    "torch Dataset": lambda folder: datasets.Dataset.from_dict({"input_ids": ROWS}).with_format("torch"),
    "numpy Dataset": lambda folder: datasets.Dataset.from_dict({"input_ids": ROWS}).with_format("numpy"),
    "IterableDataset": lambda folder: datasets.Dataset.from_dict({"input_ids": ROWS}).to_iterable_dataset(),
    ".npy": lambda folder: saved(folder / "a.npy", TENSOR.int()),
    ".jsonl": lambda folder: written(folder / "a.jsonl", "\n".join(json.dumps({"input_ids": row}) for row in ROWS)),
    ".jsonl of lists": lambda folder: written(folder / "a.jsonl", "\n".join(map(json.dumps, ROWS))),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("make", EQUAL.values(), ids=EQUAL)
def test_token_rows_are_samples_as_they_are(make: Callable[[Path], Any], tmp_path: Path) -> None:
    found = read(make(tmp_path), number=3, tokenizer=no_tokenizer)
    assert ids(found) == ROWS
    assert found.tokens == 12
    assert all(set(row) <= {"input_ids", "attention_mask"} for row in found.rows)
    # The same tokens have the same fingerprint, wherever they come from.
    bare = [{"input_ids": row["input_ids"]} for row in found.rows]
    assert fingerprint(bare) == fingerprint([{"input_ids": row[None]} for row in TENSOR])


@pytest.mark.parametrize(
    "source",
    [
        [torch.tensor(row) for row in RAGGED],
        [numpy.array(row) for row in RAGGED],
        RAGGED,
        {"input_ids": RAGGED},
        {"input_ids": [torch.tensor(row) for row in RAGGED]},
        [{"input_ids": row} for row in RAGGED],
        MapStyle(),
        datasets.Dataset.from_dict({"input_ids": RAGGED}),
    ],
    ids=["tensors", "arrays", "lists", "dict of lists", "dict of tensors", "dicts", "torch Dataset", "Dataset"],
)
def test_rows_may_differ_in_length(source: Any) -> None:
    assert ids(read(source, number=3, tokenizer=no_tokenizer)) == RAGGED


@pytest.mark.parametrize(
    "make",
    [lambda folder: torch.arange(20), lambda folder: numpy.arange(20), lambda folder: list(range(20)),
     lambda folder: saved(folder / "a.npy", numpy.arange(20, dtype="uint16"))],
    ids=["tensor", "array", "list", ".npy"],
)  # fmt: skip
def test_one_long_row_is_cut_into_windows(make: Callable[[Path], Any], tmp_path: Path) -> None:
    found = read(make(tmp_path), number=2, length=8, tokenizer=no_tokenizer)
    assert ids(found) == [list(range(8)), list(range(8, 16))]


def test_the_first_rows_are_taken_and_long_ones_cut() -> None:
    assert ids(read(TENSOR, number=2)) == ROWS[:2]
    assert ids(read(TENSOR, number=3, length=2)) == [row[:2] for row in ROWS]
    assert ids(read(TENSOR, number=1, all_rows=True)) == ROWS
    short = read(
        {"input_ids": TENSOR, "labels": TENSOR, "pixel_values": torch.zeros(3, 2, 5, 5)}, number=3, length=2
    ).rows[0]
    assert {key: tuple(value.shape) for key, value in short.items()} == {
        "input_ids": (1, 2),
        "labels": (1, 2),
        "pixel_values": (1, 2, 5, 5),
    }


# ------------------------------------------------------------------------------------------------ padding


@pytest.mark.parametrize("form", ["tensors", "lists", "one a dict", "Dataset"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_padding_is_never_in_a_sample(left: bool, form: str) -> None:
    def padded(row: list[int], filler: int) -> list[int]:
        filling = [filler] * (4 - len(row))
        return [*filling, *row] if left else [*row, *filling]

    batch = {
        "input_ids": [padded(row, 0) for row in RAGGED],
        "attention_mask": [padded([1] * len(row), 0) for row in RAGGED],
        "labels": [padded(row, -100) for row in RAGGED],
        "token_type_ids": [padded([1] * len(row), 0) for row in RAGGED],
    }
    tensors = {key: torch.tensor(value) for key, value in batch.items()}
    source = {
        "tensors": tensors,
        "lists": batch,
        "one a dict": [{key: value[index] for key, value in tensors.items()} for index in range(3)],
        "Dataset": datasets.Dataset.from_dict(batch),
    }[form]
    found = read(source, number=3)
    assert ids(found) == ids(found, "labels") == RAGGED
    assert found.tokens == 9
    for row in found.rows:
        assert row["attention_mask"].bool().all()
        assert row["token_type_ids"].tolist() == row["attention_mask"].tolist()


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6), left=st.booleans(), size=st.integers(1, 4))
def test_padding_is_dropped_and_batches_never_add_any(lengths: list[int], left: bool, size: int) -> None:
    width = max(lengths)
    mask = torch.stack([torch.arange(width) < length for length in lengths]).long()
    mask = mask.flip(1) if left else mask
    tokens = torch.where(mask.bool(), torch.arange(1, mask.numel() + 1).view_as(mask), 0)
    found = read({"input_ids": tokens, "attention_mask": mask}, number=len(lengths))
    assert [len(row) for row in ids(found)] == lengths
    assert list(itertools.chain(*ids(found))) == tokens[mask.bool()].tolist()
    assert all((batch.values["input_ids"] > 0).all() for batch in batches(found.rows, size))


def test_embeddings_lose_their_padding_with_the_mask() -> None:
    embedded, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    rows = read({"inputs_embeds": embedded, "attention_mask": mask}, number=2).rows
    assert [tuple(row["inputs_embeds"].shape) for row in rows] == [(1, 4, 3), (1, 2, 3)]
    torch.testing.assert_close(rows[1]["inputs_embeds"], embedded[1:, 2:])


def test_a_mask_that_nothing_lies_along_drops_nothing() -> None:
    spectrogram, mask = torch.randn(2, 8, 6), torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    for row in read({"input_features": spectrogram, "attention_mask": mask}, number=2).rows:
        assert row["input_features"].shape == (1, 8, 6)
        assert row["attention_mask"].shape == (1, 6)


def test_images_are_samples_without_token_ids() -> None:
    found = read({"pixel_values": torch.randn(2, 3, 4, 4)}, number=2)
    assert [tuple(row["pixel_values"].shape) for row in found.rows] == [(1, 3, 4, 4)] * 2
    assert found.tokens == 2


def test_a_dict_that_cannot_be_taken_apart_stays_whole() -> None:
    patches = {"input_ids": TENSOR[:1].int(), "attention_mask": torch.ones(1, 4), "pixel_values": torch.randn(7, 5)}
    (row,) = read([patches], number=1).rows
    assert {key: tuple(value.shape) for key, value in row.items()} == {
        "input_ids": (1, 4),
        "attention_mask": (1, 4),
        "pixel_values": (7, 5),
    }
    assert row["input_ids"].dtype == torch.int64


class TestEncoderDecoder:
    """Labels belong to the decoder: they are never cut by the encoder's mask, and lose their own padding."""

    MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    ENCODER = {"input_ids": TENSOR[:2], "attention_mask": MASK}

    def test_labels_of_another_length_lose_their_padding(self) -> None:
        labels = torch.tensor([[7, 8, 9, 1, 1, 1], [7, 8, 1, -100, -100, -100]])
        found = read({**self.ENCODER, "labels": labels}, number=2)
        assert ids(found) == [ROWS[0], ROWS[1][:2]]
        assert ids(found, "labels") == [[7, 8, 9, 1, 1, 1], [7, 8, 1]]

    @pytest.mark.parametrize("told_by", ["limits", "decoder_input_ids"])
    def test_labels_that_happen_to_be_as_long_as_the_input_stay(self, told_by: str) -> None:
        labels = torch.tensor([[7, 8, 9, 1], [7, 8, 9, -100]])
        more = (
            {"decoder_input_ids": torch.tensor([[0, 7, 8, 9], [0, 7, 8, 9]])} if told_by == "decoder_input_ids" else {}
        )
        found = read(
            {**self.ENCODER, "labels": labels, **more}, number=2, limits=Limits(encoder_decoder=told_by == "limits")
        )
        assert ids(found) == [ROWS[0], ROWS[1][:2]]
        assert ids(found, "labels") == [[7, 8, 9, 1], [7, 8, 9]]
        if more:
            assert ids(found, "decoder_input_ids") == [[0, 7, 8, 9], [0, 7, 8]]

    def test_the_decoder_has_a_mask_of_its_own(self) -> None:
        decoder = {
            "decoder_input_ids": torch.tensor([[0, 7, 8], [0, 7, 3]]), "decoder_attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
            "labels": torch.tensor([[7, 8, 1], [7, 1, 3]]),
        }  # fmt: skip
        found = read({**self.ENCODER, **decoder}, number=2)
        assert ids(found) == [ROWS[0], ROWS[1][:2]]
        assert ids(found, "decoder_input_ids") == [[0, 7, 8], [0, 7]]
        assert ids(found, "labels") == [[7, 8, 1], [7, 1]]
        assert tokens_of({"decoder_input_ids": torch.zeros(1, 3)}) == 3

    def test_classes_are_no_token_ids(self) -> None:
        found = read({**self.ENCODER, "labels": torch.tensor([3, 4])}, number=2)
        assert [row["labels"].tolist() for row in found.rows] == [[3], [4]]
        single = read([{"input_ids": [5, 6], "attention_mask": [1, 0], "labels": 1}], number=1)
        assert (ids(single), single.rows[0]["labels"].tolist()) == ([[5]], [1])


# ------------------------------------------------------------------------------------------------ batches and fingerprints

SHAPED = st.lists(st.tuples(st.integers(1, 4), st.booleans()), max_size=12)


@given(shapes=SHAPED, size=st.integers(1, 5))
def test_batches_join_equal_shapes_only_and_keep_the_numbers(shapes: list[tuple[int, bool]], size: int) -> None:
    rows: list[Sample] = []
    for number, (length, masked) in enumerate(shapes):
        row = {"input_ids": torch.full((1, length), number)}
        rows.append({**row, "attention_mask": torch.ones(1, length)} if masked else row)
    found = batches(rows, size)
    assert sorted(number for batch in found for number in batch.numbers) == list(range(len(rows)))
    for batch in found:
        assert 1 <= len(batch.numbers) <= size
        assert list(batch.numbers) == sorted(batch.numbers)
        for position, number in enumerate(batch.numbers):
            assert batch.values.keys() == rows[number].keys()
            for key, value in batch.values.items():
                assert torch.equal(value[position : position + 1], rows[number][key])
    # As few batches as the size allows.
    kinds = {shape: shapes.count(shape) for shape in shapes}
    assert len(found) == sum(-(-count // size) for count in kinds.values())


def test_what_has_no_batch_dimension_is_never_joined() -> None:
    rows = [{"input_ids": torch.ones(1, 2), "pixel_values": torch.ones(7, 5)} for _ in range(3)]
    assert [batch.numbers for batch in batches(rows, 8)] == [(0,), (1,), (2,)]
    assert [batch.numbers for batch in batches([{"x": torch.tensor(1.0)}] * 2, 8)] == [(0,), (1,)]


def test_the_fingerprint_is_of_tokens_not_of_types() -> None:
    rows = [{"input_ids": row[None]} for row in TENSOR]
    print_ = fingerprint(rows)
    assert len(print_) == 16
    assert int(print_, 16) >= 0
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert fingerprint([{"input_ids": row["input_ids"].to(dtype)} for row in rows]) == print_
    assert fingerprint([{"input_ids": TENSOR.T.contiguous().T[index : index + 1]} for index in range(3)]) == print_
    assert fingerprint(iter(rows)) == print_ == read(TENSOR, number=3).fingerprint


@pytest.mark.parametrize(
    "rows",
    [
        [],
        ROWS[:2],
        [ROWS[1], ROWS[0], ROWS[2]],
        [[6, 5, 7, 8], *ROWS[1:]],
        [[5, 6, 7], [8, 9, 10, 11, 12], ROWS[2]],
    ],
    ids=["none", "fewer", "other order", "other tokens", "other lengths"],
)
def test_other_tokens_have_another_fingerprint(rows: list[list[int]]) -> None:
    assert fingerprint([{"input_ids": torch.tensor([row])} for row in rows]) != read(TENSOR, number=3).fingerprint


def test_names_and_other_tensors_count_in_the_fingerprint() -> None:
    row = {"input_ids": TENSOR[:1]}
    others = [
        {"decoder_input_ids": TENSOR[:1]},
        {**row, "labels": TENSOR[:1]},
        {**row, "pixel_values": torch.ones(1, 2, dtype=torch.bfloat16)},
    ]
    assert len({fingerprint([given]) for given in [row, *others]}) == 4
    assert fingerprint([dict(reversed(others[1].items()))]) == fingerprint([others[1]])


# ------------------------------------------------------------------------------------------------ where it came from


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda folder: TENSOR, "a tensor of (3, 4) token ids"),
        (lambda folder: {"input_ids": TENSOR}, "a dict of tensors"),
        (lambda folder: ROWS, "list of 3"),
        (lambda folder: (row for row in ROWS), "generator"),
        (lambda folder: DataLoader(TENSOR, batch_size=2), "DataLoader of 2"),
        (lambda folder: saved(folder / "a.npy", TENSOR), "a.npy"),
    ],
    ids=["tensor", "dict", "list", "generator", "DataLoader", "file"],
)
def test_the_source_is_told(make: Callable[[Path], Any], name: str, tmp_path: Path) -> None:
    assert read(make(tmp_path), number=3).source == name


# ------------------------------------------------------------------------------------------------ what is refused


def pickled(folder: Path) -> Path:
    return saved(folder / "a.npy", numpy.array([{"a": 1}], dtype=object))


def archive(folder: Path) -> Path:
    with (folder / "a.npy").open("wb") as file:
        numpy.savez(file, rows=TENSOR.numpy())
    return folder / "a.npy"


def latin(path: Path) -> Path:
    path.write_bytes(b'{"text": "w1"}\n{"text": "\xe9"}\n')
    return path


def empty_npy(folder: Path) -> Path:
    (folder / "a.npy").write_bytes(b"")
    return folder / "a.npy"


BAD: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "nothing": (lambda folder: None, ("no data",)),
    "a number": (lambda folder: 5, ("int", "texts")),
    "an empty list": (lambda folder: [], ("is empty",)),
    "an empty generator": (lambda folder: iter(()), ("is empty",)),
    "an empty tensor": (lambda folder: torch.zeros(0, dtype=torch.long), ("is empty",)),
    "rows without tokens": (lambda folder: [torch.zeros(0, dtype=torch.long)] * 2, ("sample 0 has no tokens",)),
    "a batch without tokens": (lambda folder: {"input_ids": torch.zeros(2, 0, dtype=torch.long)}, ("sample 0 has no tokens",)),
    "empty texts": (lambda folder: ["", " \n"], ("is empty",)),
    "an empty dict": (lambda folder: {}, ("dict",)),
    "an empty .txt": (lambda folder: written(folder / "a.txt", ""), ("a.txt", "is empty")),
    "an empty .jsonl": (lambda folder: written(folder / "a.jsonl", "\n\n"), ("a.jsonl", "is empty")),
    "an empty .npy": (empty_npy, ("a.npy",)),
    "an array of no rows": (lambda folder: saved(folder / "a.npy", numpy.zeros((0, 4), dtype=int)), ("a.npy", "0 samples")),
    "a missing .txt": (lambda folder: folder / "no.txt", ("no.txt", "does not exist")),
    "a missing .jsonl": (lambda folder: str(folder / "no.jsonl"), ("no.jsonl", "does not exist")),
    "a missing .npy": (lambda folder: folder / "no.npy", ("no.npy", "does not exist")),
    "another kind of file": (lambda folder: written(folder / "a.csv", "a"), ("a.csv", ".jsonl")),
    "a folder": (lambda folder: folder, ("is not a .txt",)),
    "bad JSON": (lambda folder: written(folder / "a.jsonl", '{"text": "w1"}\n\n{"text": \n'), ("a.jsonl", "line 3", "JSON")),
    "deep JSON": (lambda folder: written(folder / "a.jsonl", '{"text": "w1"}\n' + "[" * 100_000), ("line 2", "JSON")),
    "a number in JSON lines": (lambda folder: written(folder / "a.jsonl", "5\n"), ("a.jsonl", "int")),
    "bytes that are no UTF-8": (lambda folder: latin(folder / "a.jsonl"), ("a.jsonl", "UTF-8")),
    "text that is no UTF-8": (lambda folder: latin(folder / "a.txt"), ("a.txt", "UTF-8")),
    "a pickle": (pickled, ("a.npy", "no plain array")),
    "an archive": (archive, ("a.npy", "archive")),
    "garbage": (lambda folder: written(folder / "a.npy", "garbage"), ("a.npy", "no plain array")),
    "floats in a file": (lambda folder: saved(folder / "a.npy", [[0.5]]), ("float64", "whole numbers")),
    "a float tensor": (lambda folder: torch.rand(2, 3), ("(2, 3)", "float32", "whole numbers")),
    "a bool tensor": (lambda folder: torch.ones(2, 3, dtype=torch.bool), ("bool", "whole numbers")),
    "a 3-D tensor": (lambda folder: torch.ones(2, 3, 4, dtype=torch.long), ("(2, 3, 4)",)),
    "an array of words": (lambda folder: numpy.array(["a", "b"]), ("the data",)),
    "lists of floats": (lambda folder: [[0.5, 1.0]], ("float", "no row of token ids")),
    "float ids in a dict": (lambda folder: {"input_ids": torch.rand(1, 3)}, ("input_ids", "float32")),
    "a number for ids": (lambda folder: {"input_ids": 5}, ("input_ids",)),
    "words for ids": (lambda folder: [{"input_ids": ["a", "b"], "other": 1}], ("no row of token ids",)),
    "too large ids": (lambda folder: [[2**70]], ("no row of token ids",)),
    "unknown columns": (lambda folder: [{"question": "w1", "answer": "w2"}], ("'answer'", "'question'", "no known column")),
    "bytes": (lambda folder: [b"w1"], ("bytes",)),
    "numbers": (lambda folder: [1.5], ("float",)),
    "columns of different length": (lambda folder: {"input_ids": ROWS, "labels": [[1]]}, ("differ in their number of rows",)),
    "a mask of nothing": (lambda folder: {"input_ids": TENSOR[:1], "attention_mask": torch.zeros(1, 4)}, ("attention_mask", "every position")),
    "padding beside patches": (
        lambda folder: {"input_ids": TENSOR, "attention_mask": TENSOR > 5, "pixel_values": torch.ones(7, 5)},
        ("padded", "one sample a dict"),
    ),
    "padding in 3 dimensions": (
        lambda folder: {"input_ids": TENSOR[None].repeat(2, 1, 1), "attention_mask": TENSOR[None].repeat(2, 1, 1) > 5},
        ("3-dimensional", "unpadded"),
    ),
    "a text, then ids": (lambda folder: ["w1", [1, 2]], ("after texts", "list", "do not mix")),
    "a text, then None": (lambda folder: [{"text": "w1"}, {"text": None}], ("after texts", "dict")),
    "ids, then a text": (lambda folder: [[1, 2], "w1"], ("str",)),
    "a chat, then a text": (lambda folder: [CHATS[0], "w1"], ("after chats", "str", "do not mix")),
    "a long text": (lambda folder: "w1 " * 1000, ("is a text", "[text]")),
    "a text of two lines": (lambda folder: "w1\nw2", ("is a text", "[text]")),
    "a sentence": (lambda folder: "Once upon a time.", ("neither a file nor", "list")),
    "an id that cannot be reached": (lambda folder: "nobody-at-all/nothing:subset:train", ("nobody-at-all/nothing", "neither a file nor", ".jsonl")),
    "a name without an owner": (lambda folder: "no-such-file", ("no-such-file", "neither a file nor")),
}  # fmt: skip


@pytest.mark.parametrize(("make", "said"), BAD.values(), ids=BAD)
def test_what_cannot_be_used_is_refused_in_one_sentence(
    make: Callable[[Path], Any], said: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError) as caught:
        read(make(tmp_path), number=2, length=4)
    for part in said:
        assert part in str(caught.value)


@pytest.mark.parametrize("source", [torch.arange(5), torch.zeros(0, 5, dtype=torch.long)], ids=["short", "no rows"])
def test_all_rows_of_nothing_are_too_few_as_well(source: torch.Tensor) -> None:
    with pytest.raises(CalibrationError, match=r"0 (samples|windows)"):
        read(source, length=8, all_rows=True)


@pytest.mark.parametrize(
    ("source", "number", "said"),
    [
        (TENSOR, 8, ("3 samples", "8 were asked for", "num_samples=3")),
        (CHATS, 5, ("2 samples", "5 were asked for", "num_samples=2")),
        ([words(0, 20)], 4, ("2 windows of 8 tokens", "4 were asked for", "num_samples=2", "shorter sequence_length")),
        (
            torch.arange(20),
            4,
            ("2 windows of 8 tokens", "4 were asked for", "num_samples=2", "shorter sequence_length"),
        ),
        ([words(0, 5)], 4, ("0 windows of 8 tokens", "4 were asked for", "shorter sequence_length")),
        (torch.arange(5), 1, ("0 windows of 8 tokens", "1 were asked for", "shorter sequence_length")),
    ],
    ids=["rows", "chats", "text", "row", "short text", "short row"],
)
def test_too_few_samples_are_counted(source: Any, number: int, said: tuple[str, ...]) -> None:
    with pytest.raises(CalibrationError) as caught:
        read(source, number=number)
    for part in said:
        assert part in str(caught.value)
    assert "num_samples=0" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "limits", "said"),
    [
        ([[1, 2], [3, 50]], Limits(vocabulary=50), ("sample 1", "token id 50", "0 to 49", "tokenizer")),
        ([[1, 2], [3, -1]], Limits(vocabulary=50), ("sample 1", "token id -1")),
        ([words(0, 10)], Limits(vocabulary=7), ("sample 0", "token id 7", "0 to 6")),
        (
            {"input_ids": TENSOR[:2], "decoder_input_ids": TENSOR[:2] + 90},
            Limits(vocabulary=100),
            ("sample 1", "token id 100"),
        ),
        ([[1, 2], [1, 2, 3, 4]], Limits(length=3), ("sample 1", "4 tokens", "allows 3", "sequence_length=3")),
    ],
    ids=["too large", "negative", "text", "decoder", "too long"],
)
def test_samples_that_do_not_fit_the_model_are_named(source: Any, limits: Limits, said: tuple[str, ...]) -> None:
    with pytest.raises(CalibrationError) as caught:
        read(source, number=2, length=4, limits=limits)
    for part in said:
        assert part in str(caught.value)


def test_errors_while_a_data_set_is_read_over_the_network_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def streamed(name: str, subset: str | None, *, split: str, streaming: bool) -> Iterator[dict[str, str]]:
        assert (name, subset, split, streaming) == ("user/name", "small", "train", True)
        yield {"text": words(0, 8)}
        raise ConnectionError  # without a message

    monkeypatch.setattr(datasets, "load_dataset", streamed)
    with pytest.raises(CalibrationError, match="ConnectionError"):
        read("user/name:small", number=4)
    assert ids(read("user/name:small", number=1, length=2)) in [
        [word_ids(start, start + 2)] for start in range(0, 8, 2)
    ]


def test_a_hub_data_set_is_streamed_with_subset_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, subset: str | None, *, split: str, streaming: bool) -> list[dict[str, str]]:
        asked.append((name, subset, split, streaming))
        return [{"text": words(0, 8)}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in ("name", "user/name", "user/name:subset", "user/name::validation", "user/name:subset:train[:10]"):
        assert read(name).source == name
    assert asked == [
        ("name", None, "train", True), ("user/name", None, "train", True), ("user/name", "subset", "train", True),
        ("user/name", None, "validation", True), ("user/name", "subset", "train[:10]", True),
    ]  # fmt: skip
