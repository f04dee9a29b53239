"""What a README says of predictors: a part of its own, made from their file, which a person's text and the card of pruning leave alone."""

from pathlib import Path
from typing import Any

import pytest
from hub.client import Hub
from models import llama, token_rows
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import PredictorConfig, SparsityConfig
from hf_sparse.contextual import detach, train_predictors_
from hf_sparse.predictors.figures import Figure
from hf_sparse.predictors.saving import FILE, put_figures
from hf_sparse.remote import Repository, read_card
from hf_sparse.side_files import describe_predictors
from model_cards import parts
from model_cards.predictors import with_predictors

pytestmark = pytest.mark.usefixtures("little_garbage")
CONFIG = PredictorConfig(
    keep_neurons=0.75, neuron_block=1, refresh_every=2, options={"training": {"epochs": 1, "batch_size": 64}}
)


def carrying(pruned: bool = False) -> Any:
    model = llama()
    if pruned:
        hf_sparse.prune_(model, SparsityConfig(pattern="2:4", metric="magnitude"))
    train_predictors_(model, CONFIG, token_rows(8, 12), num_samples=8, sequence_length=12)
    return model


def part(text: str) -> str:
    found = parts.content_of(text, parts.PREDICTORS)
    assert found is not None
    return found


@pytest.mark.parametrize("pruned", [False, True], ids=["dense", "pruned"])
def test_a_save_tells_of_the_predictors(pruned: bool, tmp_path: Path) -> None:
    model = carrying(pruned)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| Neurons kept | 75 %, in blocks of 1 |" in part(text)
    assert "anew every 2 tokens" in part(text)
    assert "was not measured" in part(text)
    assert ("## Weight sparsity" in text) == pruned
    assert ("with contextual predictors" in text) != pruned
    assert text.startswith("---\n")
    assert "- hf_sparse" in text
    detach(model)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert parts.part_of(text, parts.PREDICTORS) is None
    assert ("## Weight sparsity" in text) == pruned


def test_figures_are_told(tmp_path: Path) -> None:
    carrying().save_pretrained(tmp_path)
    figure = Figure(
        neurons="75 %", heads="100 %", text="a | text", fingerprint="0" * 16, window=16, tokens=1600, dense=1.0, loss=2.0,
        recall_neurons=0.71, dense_speed=10.0, speed=15.0, share_of_time=0.04, machine="a machine", versions="torch 2",
    )  # fmt: skip
    put_figures(AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path, [figure])
    describe_predictors(tmp_path)
    told = part((tmp_path / "README.md").read_text())
    assert "| 75 %, 100 % | 2.718 | 7.389 | 71.00 %, – | a &#124; text | 16 | 1,600 |" in told
    assert "15.0 tokens a second, 1.50 times as fast as dense, 4.00 % of it the predictors' own work. a machine" in told


def test_a_persons_readme_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Mine\n")
    carrying().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


def test_a_persons_words_around_the_part_stay(tmp_path: Path) -> None:
    carrying().save_pretrained(tmp_path)
    file = tmp_path / "README.md"
    file.write_text(file.read_text().replace("# ", "# My ", 1) + "\nMore of mine.\n")
    carrying().save_pretrained(tmp_path)
    text = file.read_text()
    assert "# My " in text
    assert text.endswith("\nMore of mine.\n")
    assert parts.count(text, parts.PREDICTORS) == 1
    (tmp_path / FILE).unlink()
    without = with_predictors(text, tmp_path)
    assert parts.PREDICTORS + ":begin" not in without
    assert "More of mine." in without
    assert "# My " in without


@pytest.mark.parametrize("pruned", [False, True], ids=["dense", "pruned"])
def test_a_push_tells_of_the_predictors(pruned: bool, hub: Hub) -> None:
    carrying(pruned).push_to_hub("user/model")
    text = read_card(Repository("user/model"))
    assert "75 %" in part(text)
    assert ("## Weight sparsity" in text) == pruned
