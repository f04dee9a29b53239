"""Searched allocations: scored on held-out samples only, never worse there than uniform, and nothing of the trials is left behind."""

from typing import Any

import pytest
import torch
from models import bert, llama, t5, token_rows

from hf_sparse import SparsityConfig, prune_
from hf_sparse.errors import CalibrationError
from hf_sparse.report import Report
from hf_sparse.trials import Trials

ROWS = token_rows(16, 24)
TARGET = {"pattern": "unstructured", "sparsity": 0.7, "metric": "wanda"}
UPDATES = ["none", "admm", ("dense_stream", "least_squares")]


def config(rows: torch.Tensor = ROWS, **changes: Any) -> SparsityConfig:
    return SparsityConfig(**{**TARGET, "calibration": rows, "num_samples": len(rows), **changes})


def searched(allocation: str = "atp", layers: int = 4, model: Any = None, **changes: Any) -> tuple[Any, Report]:
    model = model or llama(layers)
    return model, prune_(model, config(allocation=allocation, **changes))


def loss(model: Any, rows: torch.Tensor) -> float:
    with torch.no_grad():
        return float(model(rows, labels=rows).loss)


def note_of(report: Report) -> str:
    return next(note for note in report.notes if "searched with" in note)


@pytest.mark.parametrize("allocation", ["atp", "search"])
@pytest.mark.parametrize("update", UPDATES)
def test_it_is_never_worse_than_uniform_on_the_held_out_samples(allocation: str, update: Any) -> None:
    options = {"search": {"rounds": 1}}
    model, report = searched(allocation, update=update, options=options)
    uniform = llama(4)
    prune_(uniform, config(ROWS[:12], update=update))
    assert loss(model, ROWS[12:]) <= loss(uniform, ROWS[12:]) + 1e-6
    assert report.zeros == round(0.7 * sum(block.size for block in report.blocks))


@pytest.mark.parametrize("update", UPDATES)
def test_the_result_is_that_of_pruning_with_what_was_found(update: Any) -> None:
    model, report = searched(update=update)
    again = llama(4)
    shares = {site.name: site.sparsity for site in report.sites}
    plain = prune_(again, config(ROWS[:12], update=update, allocation=shares, sparsity=None))
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))
    assert [block.output_error for block in report.blocks] == [block.output_error for block in plain.blocks]
    assert [site.tokens for site in report.sites] == [12 * 24] * 28


def test_n_m_gives_each_block_a_whole_n_and_keeps_the_average() -> None:
    _, report = searched("search", pattern="4:8", sparsity=None, options={"search": {"width": 0.125, "rounds": 2}})
    assert report.sparsity == 0.5
    assert {site.pattern.partition(":")[2] or site.pattern for site in report.sites} <= {"8", "dense"}
    for block in report.blocks:
        assert len({site.pattern for site in block.sites}) == 1


def test_the_cost_and_the_scores_are_in_the_report() -> None:
    _, report = searched()
    note = note_of(report)
    assert "times the cost of one pruning" in note
    assert "loss on 4 held-out samples" in note


@pytest.mark.parametrize(("allocation", "at_most"), [("atp", 9), ("search", 9 + 2 * 9)])
def test_it_stops(allocation: str, at_most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    true_score = Trials.score
    monkeypatch.setattr(Trials, "score", lambda self, shares: tried.append(shares) or true_score(self, shares))
    searched(allocation, options={"search": {"rounds": 2}})
    assert 3 <= len(tried) <= at_most
    assert all(tried.count(shares) == 1 for shares in tried)


@pytest.mark.parametrize("build", [bert, llama, t5])
def test_agreement_of_activations_needs_no_loss(build: Any) -> None:
    options = {"atp": {"selector": "alignment"}}
    _, report = searched(model=build(), options=options)
    assert "alignment on 4 held-out samples" in note_of(report)


def test_a_model_without_a_loss_says_what_to_do_and_is_left_as_it_was() -> None:
    model = bert()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CalibrationError, match="alignment"):
        searched(model=model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_failure_in_a_trial_leaves_the_model_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def fail(self: Trials) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trials, "_score", fail)
    with pytest.raises(KeyboardInterrupt):
        searched(model=model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_one_sample_cannot_be_shared() -> None:
    with pytest.raises(CalibrationError, match="num_samples"):
        searched(rows=ROWS[:1])


def test_a_step_that_is_given_is_not_searched_for() -> None:
    _, report = searched(options={"atp": {"step": 0.05}})
    assert not any("searched" in note for note in report.notes)
    assert [round(block.sparsity, 2) for block in report.blocks] == [0.62, 0.67, 0.72, 0.77] or report.sparsity == 0.7
