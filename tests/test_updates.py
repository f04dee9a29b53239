"""Updates: what every registered one owes, and what each promises about the values and masks it chooses."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_sparse.config  # noqa: F401  (fills the registries)
from hf_sparse.errors import ModelError
from hf_sparse.normal_equations import damped
from hf_sparse.patterns import Pattern
from hf_sparse.registry import STATISTICS, UPDATES
from hf_sparse.updates import Part, Problem

# Pure functions that return a sparse weight; the others need a model or only set what the rest shall reproduce.
IMPURE = ("runs_blocks", "second_stream", "sets_target")
NAMES = [entry.name for entry in UPDATES if not any(entry.traits.get(trait) for trait in IMPURE)]
PATTERNS = ["2:4", "4:8", "1:4", "unstructured"]


def measured(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """All statistics of an input (tokens, in)."""
    found = {}
    for entry in STATISTICS:
        statistic = entry.function(x.shape[1])
        statistic.add(x)
        found[entry.name] = statistic.value
    return found


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, features: int, seed: int = 0) -> torch.Tensor:
    """An input whose features are correlated, of different sizes, and have a mean."""
    mixed = random(tokens, features, seed=seed) @ (
        torch.eye(features) + 0.5 * random(features, features, seed=seed + 1)
    )
    return mixed * random(features, seed=seed + 2).exp() + random(features, seed=seed + 3)


def problem_of(
    weight: torch.Tensor,
    x: torch.Tensor,
    pattern: str = "2:4",
    axis: str = "input",
    sparsity: float = 0.5,
    *,
    parts: tuple[Part, ...] | None = None,
    chosen: bool = True,
) -> Problem:
    """A problem whose mask Wanda chose, or with chosen=False none."""
    parts = parts or (Part(0, len(weight), Pattern.parse(pattern), sparsity, axis),)
    scores = weight.abs() * torch.linalg.vector_norm(x, dim=0)
    problem = Problem(weight, weight, scores.to(weight.dtype), None, measured(x), parts)
    return replace(problem, mask=problem.choose(problem.scores)) if chosen else problem


def run(name: str, problem: Problem, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight as it would be written, and the mask."""
    resolved = UPDATES.resolve_options(name, options)
    weight, mask = UPDATES[name].function(replace(problem, options=resolved))
    return torch.where(mask, weight, 0), mask


def given_mask(name: str) -> dict[str, str]:
    """The option of updates that choose masks by default which makes them keep the metric's."""
    return {"mask": "given"} if "mask" in UPDATES[name].options else {}


def error(problem: Problem, weight: torch.Tensor, damping: float = 0.01) -> float:
    """The damped squared error of the output, (W - T) H (W - T)^T summed over rows."""
    lost = (weight - problem.target).double()
    return float((lost @ damped(problem.statistics["gram"], damping) * lost).sum())


def mean_error(problem: Problem, weight: torch.Tensor) -> torch.Tensor:
    """How far the mean of each output is off, (out,)."""
    return ((problem.target - weight).double() @ problem.statistics["moments"][0].double()).abs()


def holds(part: Part, mask: torch.Tensor) -> None:
    """The mask of a part has exactly the counts of its pattern, group by group and line by line."""
    lines = mask.T if part.axis == "output" else mask
    pattern = part.pattern
    if pattern.group is not None and pattern.keep is not None:
        for start in range(0, lines.shape[1], pattern.group):
            cells = lines[:, start : start + pattern.group]
            due = round(cells.shape[1] * pattern.keep / pattern.group)
            assert (cells.sum(1) == due).all(), (part, start)
    elif part.rounding == "exact":
        assert int((~mask).sum()) == round(part.sparsity * mask.numel()), part
        counts = lines.sum(1)
        assert part.axis == "site" or counts.max() - counts.min() <= 1, part
    else:
        lines = lines.reshape(1, -1) if part.axis == "site" else lines
        assert ((~lines).sum(1) == int(lines.shape[1] * part.sparsity)).all(), part


# What every update owes.


@dataclass(frozen=True)
class Case:
    """Stacked sites over one input; some features may be dead or the copy of another."""

    parts: tuple[Part, ...]
    columns: int
    seed: int
    dead: bool
    twins: bool
    chosen: bool

    def problem(self, dtype: torch.dtype = torch.float32) -> Problem:
        x = correlated(2 * self.columns + 3, self.columns, self.seed)
        if self.dead:
            x[:, 0] = 0.0
        if self.twins:
            x[:, -1] = x[:, self.columns // 2]
        weight = random(self.parts[-1].stop, self.columns, seed=self.seed + 9).to(dtype)
        return problem_of(weight, x, parts=self.parts, chosen=self.chosen)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    parts: list[Part] = []
    for rows in draw(st.lists(st.integers(1, 20), min_size=1, max_size=3)):
        start, pattern = parts[-1].stop if parts else 0, Pattern.parse(draw(st.sampled_from([*PATTERNS, "3:5"])))
        axis = draw(st.sampled_from(["input", "output"] if pattern.group else ["input", "output", "site"]))
        sparsity, rounding = draw(st.floats(0.05, 0.95)), draw(st.sampled_from(["exact", "truncate"]))
        parts.append(Part(start, start + rows, pattern, pattern.sparsity or sparsity, axis, rounding))
    return Case(
        tuple(parts), draw(st.integers(1, 20)), draw(st.integers(0, 1000)), *(draw(st.booleans()) for _ in range(3))
    )


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(case=cases())
def test_patterns_are_kept_exactly_and_values_are_finite(name: str, case: Case) -> None:
    problem = case.problem()
    weight, mask = run(name, problem)
    assert weight.shape == mask.shape == problem.target.shape
    assert (weight.dtype, mask.dtype) == (problem.target.dtype, torch.bool)
    assert torch.isfinite(weight).all()
    assert torch.equal(mask, weight != 0)  # no dense weight was zero, and none of the kept ones became so
    for part in case.parts:
        holds(part, mask[part.start : part.stop])


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15)
@given(case=cases())
def test_an_update_is_a_function_that_changes_nothing(name: str, case: Case) -> None:
    problem = case.problem()

    def tensors() -> Mapping[str, torch.Tensor]:
        mask = {} if problem.mask is None else {"mask": problem.mask}
        return {"target": problem.target, "scores": problem.scores, **mask, **problem.statistics}

    before = {key: value.clone() for key, value in tensors().items()}
    first, second = run(name, problem), run(name, problem)
    assert all(torch.equal(value, before[key]) for key, value in tensors().items())
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("axis", ["input", "output"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", [(13, 30), (30, 13), (1, 9), (9, 1), (3, 300)])
def test_ragged_tails_thin_shapes_and_several_blocks(
    name: str, axis: str, pattern: str, shape: tuple[int, int]
) -> None:
    weight, x = random(*shape), correlated(40, shape[1])
    for chosen in (True, False):
        problem = problem_of(weight, x, pattern, axis, Pattern.parse(pattern).sparsity or 0.37, chosen=chosen)
        new, mask = run(name, problem)
        assert torch.isfinite(new).all()
        holds(problem.parts[0], mask)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "dsnot"])  # whose purpose is another mask
def test_a_given_mask_stays(name: str) -> None:
    problem = problem_of(random(12, 16), correlated(64, 16))
    assert torch.equal(run(name, problem, **given_mask(name))[1], problem.mask)


@pytest.mark.parametrize("name", NAMES)
def test_double_precision_stays(name: str) -> None:
    weight, x = random(8, 12), correlated(64, 12)
    wide, mask = run(name, problem_of(weight.double(), x))
    narrow, same = run(name, problem_of(weight, x))
    assert wide.dtype == torch.float64
    assert torch.equal(mask, same)
    torch.testing.assert_close(wide.float(), narrow, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_depend_on_their_neighbours(name: str) -> None:
    weight, x = random(24, 16), correlated(64, 16)
    parts = (Part(0, 8, Pattern(2, 4), 0.5, "input"), Part(8, 24, Pattern(), 0.5, "input"))
    together = run(name, problem_of(weight, x, parts=parts), **given_mask(name))
    for part in parts:
        own = (replace(part, start=0, stop=part.stop - part.start),)
        alone = run(
            name,
            problem_of(weight[part.start : part.stop], x, parts=own),
            **given_mask(name),
        )
        assert torch.equal(together[1][part.start : part.stop], alone[1])
        torch.testing.assert_close(together[0][part.start : part.stop], alone[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in NAMES if "gram" in UPDATES[name].needs])
def test_a_gram_matrix_that_is_not_finite_is_refused(name: str) -> None:
    problem = problem_of(random(4, 8), correlated(32, 8))
    broken = problem.statistics["gram"].clone()
    broken[2, 3] = broken[3, 2] = torch.nan
    with pytest.raises(ModelError, match="Gram matrix of 8 inputs"):
        run(name, replace(problem, statistics={**problem.statistics, "gram": broken}))


# Least squares.


def exact_solution(problem: Problem, damping: float = 0.01) -> torch.Tensor:
    """Row by row: the kept rows and columns of H, solved directly."""
    hessian, target = damped(problem.statistics["gram"], damping), problem.target.double()
    solution = torch.zeros_like(target)
    for row, kept in enumerate(problem.mask):
        right = (hessian @ target[row])[kept]
        solution[row, kept] = torch.linalg.solve(hessian[kept][:, kept], right)
    return solution


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("axis", ["input", "output"])
@pytest.mark.parametrize("seed", range(3))
def test_least_squares_is_the_exact_solution_of_each_row(pattern: str, axis: str, seed: int) -> None:
    weight = random(12, 24, seed=seed).double()
    problem = problem_of(weight, correlated(200, 24, seed), pattern, axis)
    found, _ = run("least_squares", problem, iterations=200)
    expected = exact_solution(problem)
    assert torch.linalg.vector_norm(found - expected) <= 1e-4 * torch.linalg.vector_norm(expected)


@settings(max_examples=30)
@given(case=cases())
def test_least_squares_has_no_larger_error_than_any_other_values_on_the_same_mask(case: Case) -> None:
    problem = replace(case, chosen=True).problem(torch.float64)
    best = error(problem, run("least_squares", problem, iterations=300)[0])
    for name, options in (("none", {}), ("sparsegpt", {}), ("admm", {"mask": "given"})):
        other = error(problem, run(name, problem, **options)[0])
        assert best <= other * (1 + 1e-6) + 1e-9 * error(problem, torch.zeros_like(problem.target)), name


def test_every_iteration_of_least_squares_makes_the_error_smaller() -> None:
    problem = problem_of(random(16, 32).double(), correlated(200, 32))
    errors = [error(problem, run("least_squares", problem, iterations=number)[0]) for number in range(12)]
    assert errors[0] == pytest.approx(error(problem, run("none", problem)[0]))
    assert all(later < earlier for earlier, later in pairwise(errors))


def test_least_squares_starts_from_what_the_update_before_it_left() -> None:
    problem = problem_of(random(8, 16), correlated(100, 16))
    before = replace(problem, weight=run("sparsegpt", problem)[0])
    assert torch.equal(run("least_squares", before, iterations=0)[0], before.weight)


# SparseGPT.


def test_uncorrelated_inputs_leave_nothing_for_sparsegpt_to_compensate() -> None:
    problem = problem_of(random(8, 16), correlated(64, 16))
    diagonal = torch.diag(problem.statistics["gram"].diagonal())
    found, mask = run("sparsegpt", replace(problem, statistics={"gram": diagonal}))
    assert torch.equal(found, torch.where(mask, problem.target, 0))


@pytest.mark.parametrize("column", [0, 5, 11])
def test_one_dropped_weight_is_compensated_as_by_the_optimal_brain_surgeon(column: int) -> None:
    problem = problem_of(random(3, 12).double(), correlated(64, 12))
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[:, column] = False
    found, _ = run("sparsegpt", replace(problem, mask=mask))
    # Inputs before the dropped one are past, so the surgeon works on those that remain.
    inverse = torch.linalg.inv(damped(problem.statistics["gram"], 0.01)[column:, column:])
    expected = problem.target.clone()
    expected[:, column:] -= expected[:, column : column + 1] / inverse[0, 0] * inverse[0]
    torch.testing.assert_close(found, torch.where(mask, expected, 0), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_sparsegpt_chooses_groups_by_the_weights_that_the_sweep_has_come_to(pattern: str) -> None:
    problem = problem_of(random(16, 24).double(), correlated(100, 24), pattern, chosen=False)
    found, mask = run("sparsegpt", problem)
    holds(problem.parts[0], mask)
    beforehand = problem_of(problem.target, correlated(100, 24), pattern)
    assert error(problem, found) < error(beforehand, run("sparsegpt", beforehand)[0])
    first = Pattern.parse(pattern).group
    factor = torch.linalg.cholesky(torch.linalg.inv(damped(problem.statistics["gram"], 0.01)), upper=True)
    saliency = (problem.target / factor.diagonal())[:, :first] ** 2
    assert torch.equal(mask[:, :first], problem.parts[0].pattern.mask(saliency, 0.5, "input"))


@settings(max_examples=30)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(100, 300),
    sparsity=st.floats(0.01, 0.99),
    axis=st.sampled_from(["input", "output", "site"]),
    rounding=st.sampled_from(["exact", "truncate"]),
    width=st.sampled_from([1, 20, 128]),
)
def test_masks_chosen_piece_by_piece_have_the_counts_of_the_whole(
    rows: int, columns: int, sparsity: float, axis: str, rounding: str, width: int
) -> None:
    part, scores = Part(0, rows, Pattern(), sparsity, axis, rounding), random(rows, columns).abs()
    problem = Problem(scores, scores, scores, None, {}, (part,))
    starts = range(0, columns, width)
    mask = torch.cat([problem.choose_some(scores[:, start : start + width], start) for start in starts], dim=1)
    holds(part, mask)


# ADMM.


def test_admm_chooses_better_masks_than_wanda_on_correlated_inputs() -> None:
    shares = []
    for seed in range(6):
        problem = problem_of(random(24, 32, seed=seed).double(), correlated(300, 32, seed))
        wanda = error(problem, run("least_squares", problem, iterations=200)[0])
        shares.append(error(problem, run("admm", problem)[0]) / wanda)
    assert sum(shares) / len(shares) < 0.95
    assert max(shares) < 1.05


def test_admm_with_a_given_mask_is_least_squares() -> None:
    problem = problem_of(random(12, 16).double(), correlated(200, 16))
    found, mask = run("admm", problem, mask="given", final_iterations=100)
    assert torch.equal(mask, problem.mask)
    torch.testing.assert_close(found, exact_solution(problem), rtol=1e-4, atol=1e-5)


# A Gram matrix that rounding made indefinite.


def test_damping_is_raised_until_the_factorisation_succeeds_and_the_report_says_so() -> None:
    problem = problem_of(random(6, 8), correlated(64, 8))
    values, vectors = torch.linalg.eigh(problem.statistics["gram"])
    values[0] = -0.05 * values.mean()
    broken = (vectors * values) @ vectors.T
    found, _ = run("sparsegpt", replace(problem, statistics={"gram": broken}))
    assert torch.isfinite(found).all()
    assert problem.notes == ["damping raised from 0.01 to 0.1 of the mean diagonal to factorise"]


# DSnoT.


def test_dsnot_swaps_the_weight_that_repairs_the_mean() -> None:
    # Row 0 lost 0.9 of its mean with the second weight; the third, which is kept, adds nothing to it.
    weight = torch.tensor([[1.0, 0.9, 1.2, 0.8], [1.0, 0.9, 1.2, 0.8]])
    moments = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5]])
    mask = torch.tensor([[True, False, True, False], [True, True, False, False]])
    part = Part(0, 2, Pattern(2, 4), 0.5, "input")
    problem = Problem(weight, weight, weight.abs(), mask, {"moments": moments}, (part,))
    found, new = run("dsnot", problem)
    assert new.tolist() == [[False, True, True, False], [True, True, False, False]]
    assert mean_error(problem, torch.where(mask, weight, 0)).tolist() == pytest.approx([0.9, 0.0])
    assert mean_error(problem, found).tolist() == [0.0, 0.0]


@settings(max_examples=60)
@given(case=cases(), power=st.sampled_from([0.0, 0.5, 1.0]), threshold=st.sampled_from([0.0, 0.1, 0.5]))
def test_dsnot_never_moves_a_mean_away_and_never_trains_a_weight(case: Case, power: float, threshold: float) -> None:
    problem = replace(case, chosen=True).problem()
    found, mask = run("dsnot", problem, variance_power=power, threshold=threshold)
    assert torch.equal(found, torch.where(mask, problem.target, 0))
    before = mean_error(problem, torch.where(problem.mask, problem.target, 0))
    contributions = (problem.target.abs().double() @ problem.statistics["moments"][0].abs().double()) + 1
    assert (mean_error(problem, found) <= before + 1e-6 * contributions).all()
    for part in case.parts:
        holds(part, mask[part.start : part.stop])
        if part.axis == "input":  # rows keep what they had, which says more than the counts of the part
            rows = slice(part.start, part.stop)
            assert torch.equal(mask[rows].sum(1), problem.mask[rows].sum(1))


@pytest.mark.parametrize("axis", ["input", "output"])
@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_dsnot_makes_the_mean_error_and_the_error_of_uncorrelated_inputs_smaller(pattern: str, axis: str) -> None:
    x = random(4000, 32) * random(32, seed=1).exp() + 2 * random(32, seed=2)
    problem = problem_of(random(32, 32, seed=3), x, pattern, axis)
    before, (found, _) = torch.where(problem.mask, problem.target, 0), run("dsnot", problem)
    assert mean_error(problem, found).sum() < 0.7 * mean_error(problem, before).sum()
    assert error(problem, found, 0.0) < error(problem, before, 0.0)


@pytest.mark.parametrize("cycles", [0, 1, 3])
def test_dsnot_stops_at_its_cycles(cycles: int) -> None:
    problem = problem_of(random(32, 64), correlated(200, 64), "unstructured")
    _, mask = run("dsnot", problem, cycles=cycles, threshold=0.0)
    swaps = (mask ^ problem.mask).sum(1) // 2
    assert swaps.max() <= cycles
    assert bool(swaps.any()) == (cycles > 0)


def test_the_scale_of_weights_and_inputs_does_not_matter_to_dsnot() -> None:
    weight, x = random(16, 32), correlated(200, 32)
    _, mask = run("dsnot", problem_of(weight, x))
    assert not torch.equal(mask, problem_of(weight, x).mask)
    for factor in (2.0**-6, 2.0**6):
        assert torch.equal(run("dsnot", problem_of(factor * weight, x))[1], mask)
        assert torch.equal(run("dsnot", problem_of(weight, factor * x))[1], mask)


def test_inputs_without_a_mean_give_dsnot_nothing_to_do() -> None:
    problem = problem_of(random(8, 16), correlated(64, 16))
    moments = torch.stack([torch.zeros(16), problem.statistics["moments"][1]])
    assert torch.equal(run("dsnot", replace(problem, statistics={"moments": moments}))[1], problem.mask)


def test_dsnot_keeps_the_values_of_an_update_before_it() -> None:
    problem = problem_of(random(8, 16), correlated(200, 16))
    updated = run("least_squares", problem)[0]
    found, mask = run("dsnot", replace(problem, weight=updated))
    assert torch.equal(found, torch.where(mask, torch.where(problem.mask, updated, problem.target), 0))
    assert (mean_error(problem, found) <= mean_error(problem, updated) + 1e-5).all()


def test_defaults_are_as_published() -> None:
    assert UPDATES["dsnot"].options == {"cycles": 50, "threshold": 0.1, "variance_power": 1.0}
    assert UPDATES["sparsegpt"].options == {"damping": 0.01}


def test_admm_reaches_as_far_by_factorisations_as_by_eigenvalues(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(random(48, 64), correlated(300, 64))
    errors = []
    for most in (1024, 1):
        monkeypatch.setattr("hf_sparse.updates.admm._EIGEN_UPTO", most)
        errors.append(error(problem, run("admm", problem)[0]))
    assert errors[1] <= 1.05 * errors[0]
