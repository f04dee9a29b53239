"""Perplexity and the models' own losses, equal to what a few plain lines compute."""

import math
from typing import Any

import pytest
import torch
from models import VOCABULARY, bert, llama, t5, text, token_rows, tokenizer
from torch import nn
from transformers import AutoModelForImageClassification, ViTConfig

from hf_sparse import prune_
from hf_sparse.errors import CalibrationError, ConfigError, ModelError
from hf_sparse.evaluate import evaluate

STREAM = token_rows(1, 300)[0]


def plain_perplexity(model: nn.Module, stream: torch.Tensor, window: int, stride: int) -> tuple[float, int]:
    total, count, predicted_to = 0.0, 0, 0
    for start in range(0, len(stream) - window + 1, stride):
        ids = stream[None, start : start + window]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].log_softmax(-1)
        for position in range(1, window):
            if start + position > predicted_to:
                total -= float(logits[position - 1, ids[0, position]])
                count += 1
        predicted_to = start + window - 1
    return math.exp(total / count), count


@pytest.mark.parametrize(("window", "stride"), [(16, None), (16, 16), (16, 8), (20, 7), (64, 1), (2, 2)])
def test_token_perplexity(window: int, stride: int | None) -> None:
    model = llama()
    found = evaluate(model, STREAM, window=window, stride=stride)
    value, tokens = plain_perplexity(model, STREAM, window, stride or window)
    assert found.metric == "perplexity"
    assert found.tokens == tokens
    assert found.value == pytest.approx(value, rel=1e-4)
    assert (found.window, found.stride) == (window, stride or window)


def test_max_windows_and_text() -> None:
    model = llama()
    found = evaluate(model, [text(300)], tokenizer=tokenizer(), window=16, max_windows=3)
    assert found.tokens == 3 * 15
    assert (
        found.fingerprint
        != evaluate(model, [text(301)[4:]], tokenizer=tokenizer(), window=16, max_windows=3).fingerprint
    )


def test_a_masked_model_gets_its_loss_on_masked_tokens() -> None:
    found = [evaluate(bert(), [text(400)], tokenizer=tokenizer(), window=32, seed=seed) for seed in (0, 0, 1)]
    assert found[0].metric == "masked loss"
    assert found[0].value == found[1].value != found[2].value
    assert found[0].value == pytest.approx(math.log(VOCABULARY), abs=0.5)  # a random model guesses


def test_other_models_get_the_loss_that_they_compute() -> None:
    rows = token_rows(4, 8)
    found = evaluate(t5(), [{"input_ids": row[None], "labels": row[None]} for row in rows])
    with torch.no_grad():
        expected = t5()(input_ids=rows, labels=rows).loss
    assert found.metric == "loss"
    assert found.value == pytest.approx(float(expected), rel=1e-5)
    torch.manual_seed(0)
    vit = AutoModelForImageClassification.from_config(
        ViTConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4, num_labels=3)
    )  # fmt: skip
    images = {"pixel_values": torch.rand(4, 3, 8, 8), "labels": torch.tensor([0, 1, 2, 0])}
    assert evaluate(vit, images).value == pytest.approx(float(vit.eval()(**images).loss), rel=1e-5)


def test_the_model_keeps_its_mode() -> None:
    model = llama().train()
    evaluate(model, STREAM, window=16)
    assert model.training


BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (STREAM, {"window": 65}, ConfigError, "window=65.*64"),
    (STREAM, {"window": 1}, ConfigError, "window=1"),
    (STREAM, {"window": 16, "stride": 17}, ConfigError, "stride=17"),
    (STREAM, {"window": 16, "stride": 0}, ConfigError, "stride=0"),
    ([], {}, CalibrationError, "empty"),
    (STREAM, {"window": 16, "max_windows": -1}, ConfigError, "max_windows=-1"),
    (token_rows(8, 16), {"window": 16, "stride": 4}, ConfigError, "stride=4"),
    (STREAM[:5], {"window": 16}, CalibrationError, "empty|longer|window"),
]


@pytest.mark.parametrize(("data", "options", "error", "message"), BAD)
def test_bad_input(data: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        evaluate(llama(), data, **options)


def test_an_encoder_decoder_needs_labels() -> None:
    with pytest.raises(CalibrationError, match="labels"):
        evaluate(t5(), [{"input_ids": row[None], "decoder_input_ids": row[None]} for row in token_rows(2, 8)])


def test_the_text_that_was_calibrated_on_is_refused_unless_told() -> None:
    model = llama()
    rows = token_rows(8, 16)
    prune_(model, {"metric": "wanda", "calibration": rows, "num_samples": 8})
    with pytest.raises(CalibrationError, match="calibrated on 8 of the texts"):
        evaluate(model, rows, window=16)
    assert evaluate(model, rows, window=16, same_text_allowed=True).value > 1
    assert evaluate(model, token_rows(8, 16, seed=1), window=16).value > 1


def test_the_same_text_is_found_however_it_is_cut() -> None:
    model = llama()
    prune_(model, {"metric": "wanda", "calibration": [text(600)], "num_samples": 4, "sequence_length": 32}, tokenizer())
    with pytest.raises(CalibrationError, match="calibrated on 1 of the texts"):
        evaluate(model, [text(20), text(600)], tokenizer=tokenizer(), window=16)
    assert evaluate(model, [text(500)], tokenizer=tokenizer(), window=16).value > 1


def test_a_figure_of_the_models_own_loss_does_not_depend_on_the_batches() -> None:
    rows = [{"input_ids": row[None, :8], "labels": row[None, : 3 + 2 * i]} for i, row in enumerate(token_rows(3, 8))]
    model = t5()
    found = evaluate(model, rows)
    with torch.no_grad():
        losses = [model(**row).loss.item() * row["labels"].numel() for row in rows]
    assert found.tokens == sum(row["labels"].numel() for row in rows)
    assert found.value == pytest.approx(sum(losses) / found.tokens, rel=1e-5)


def test_a_broken_model_gives_no_figure() -> None:
    model = llama()
    model.model.embed_tokens.weight.data[:] = float("nan")
    with pytest.raises(ModelError, match="nan"):
        evaluate(model, STREAM, window=16)
