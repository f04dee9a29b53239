"""Searched allocations: scored on held-out samples only, never worse there than uniform, and nothing of the trials is left behind."""

import weakref
from typing import Any

import pytest
import torch
from families_table import FAMILIES
from models import bert, llama, t5, token_rows

from hf_sparse import SparsityConfig, prune_, trials
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


@pytest.mark.parametrize("sure", [True, False])
def test_what_is_said_of_uniform_tells_where_it_comes_from(sure: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    true_score = Trials.score

    def score(self: Trials, shares: dict[str, float]) -> float:
        # Without `sure`, trials that are far from the truth, so that uniform has to be pruned with as well.
        return true_score(self, shares) + (0.0 if sure else 5.0) - (1.0 if shares != self.run.shares else 0.0)

    def real(self: Trials, shares: dict[str, float]) -> Any:
        pruned.append(shares)
        run, value = true_real(self, shares)
        return run, value - (1.0 if sure else 0.0)

    pruned: list[dict[str, float]] = []
    true_real = Trials.real
    monkeypatch.setattr(Trials, "score", score)
    monkeypatch.setattr(Trials, "real", real)
    _, report = searched()
    assert ("uniform about" in note_of(report)) == ("in a trial" in note_of(report)) == sure
    assert len(pruned) == 1 if sure else len(pruned) > 1


@pytest.mark.parametrize("sign", [1, -1])
def test_a_ramp_goes_out_to_its_bound_either_way_while_the_outermost_is_best(
    sign: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[float] = []

    def score(self: Trials, shares: dict[str, float]) -> float:
        rise = max(share for name, share in shares.items() if ".3." in name) - max(
            share for name, share in shares.items() if ".0." in name
        )
        tried.append(round(sign * rise / 0.6, 6))  # of the bound, which is 0.2 a block
        return -sign * rise

    monkeypatch.setattr(Trials, "score", score)
    searched()
    outwards = [0, 0.25, 0.5, 0.75, 1] if sign == 1 else [0, -0.25, -0.5, 0.25, 0.5, 0.75, 1]
    assert tried[: len(outwards)] == pytest.approx(outwards, abs=0.01)  # whole weights


@pytest.mark.parametrize(("allocation", "at_most"), [("atp", 11), ("search", 11 + 2 * 9)])
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


def t5_without_labels() -> Any:
    return t5()


def llama_whose_loss_is_nan() -> Any:
    model = llama(4)
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    return model


@pytest.mark.parametrize("build", [bert, t5_without_labels, llama_whose_loss_is_nan])
def test_what_gives_no_loss_is_refused_before_anything_is_tried(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trials, "score", lambda *_: pytest.fail("a trial was made"))
    with pytest.raises(CalibrationError, match='"selector": "alignment"'):
        searched(model=build())


def test_only_the_dense_outputs_are_held_for_the_alignment(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, made, alive = 8, [], []

    def main_tensor(output: Any) -> torch.Tensor | None:
        found = real(output)
        made.append(weakref.ref(found))
        alive.append(sum(one() is not None for one in made))
        return found

    real = trials.main_tensor
    monkeypatch.setattr(trials, "main_tensor", main_tensor)
    searched(layers=layers, options={"atp": {"selector": "alignment"}})
    assert len(alive) > 2 * layers
    assert max(alive) <= layers + 4  # one held-out batch: what the dense blocks gave, and what is at hand


# ---------------------------------------------------------------------------------------------------- kinds of samples


def words(number: int) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row[None]} for row in token_rows(number, 12).clamp_max(50)]


def pictures(number: int) -> list[dict[str, torch.Tensor]]:
    """Samples that Llava's vision tower sees as well."""
    made = []
    while len(made) < number:
        _, batch = FAMILIES["llava"].build()
        made += [{name: value[row : row + 1] for name, value in batch.items()} for row in range(2)]
    return made[:number]


@pytest.mark.parametrize("selector", ["loss", "alignment"])
@pytest.mark.parametrize(
    ("rows", "held_out"),
    [
        (lambda: words(8) + pictures(4), 3),
        (lambda: pictures(4) + words(8), 3),
        (lambda: words(8) + pictures(1), 2),  # the only one of its kind is calibrated on
        (lambda: words(2) + pictures(2), 2),
    ],
)
def test_every_kind_of_sample_is_on_both_sides(
    rows: Any, held_out: int, selector: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "_TOKENS", 16)  # a trial takes only the first samples
    given = rows()
    model, _ = FAMILIES["llava"].build()
    options = {"atp": {"selector": selector}}
    report = prune_(
        model, SparsityConfig(**TARGET, allocation="atp", calibration=given, num_samples=len(given), options=options)
    )
    assert f"{selector} on {held_out} held-out samples" in note_of(report)
    assert 0.69 < report.sparsity < 0.71


@pytest.mark.parametrize("first", ["input_ids", "inputs_embeds"])
def test_each_held_out_batch_has_its_own_kind_of_loss(first: str) -> None:
    model = llama(4)
    embedded = [
        {"inputs_embeds": model.model.embed_tokens(row[None]).detach(), "labels": row[None]} for row in ROWS[:8]
    ]
    plain = [{"input_ids": row[None]} for row in ROWS[8:]]
    pairs = zip(plain, embedded, strict=True) if first == "input_ids" else zip(embedded, plain, strict=True)
    given = [row for pair in pairs for row in pair]
    report = prune_(model, SparsityConfig(**TARGET, allocation="atp", calibration=given, num_samples=16))
    assert "loss on 4 held-out samples" in note_of(report)


def test_samples_that_are_each_of_another_kind_cannot_be_shared() -> None:
    model, _ = FAMILIES["llava"].build()
    with pytest.raises(CalibrationError, match="num_samples"):
        prune_(model, SparsityConfig(**TARGET, allocation="atp", calibration=words(1) + pictures(1), num_samples=2))


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
