"""Masks: exact counts, the highest scores kept, ties broken by index, for any N:M, axis and shape."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hf_sparse.errors import ConfigError
from hf_sparse.patterns import Pattern, n_m

SHAPES = arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40)
# Few distinct values: nearly every group has ties. All are exact in float32.
SCORES = SHAPES.flatmap(
    lambda shape: arrays.arrays("float32", shape, elements=st.sampled_from([0.0, 0.25, 0.5, 1.0, 7.0]))
)
TENSORS = SCORES.map(torch.from_numpy)
N_M = st.integers(2, 20).flatmap(lambda group: st.tuples(st.integers(1, group - 1), st.just(group)))
SHARES = st.floats(0.01, 0.99)


def naive_n_m(scores: torch.Tensor, keep: int, group: int) -> torch.Tensor:
    """The definition, group by group: sort by score, then by index; drop from the front."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for row in range(scores.shape[0]):
        for start in range(0, scores.shape[1], group):
            columns = range(start, min(start + group, scores.shape[1]))
            kept = keep if len(columns) == group else round(len(columns) * keep / group)
            order = sorted(columns, key=lambda column: (scores[row, column].item(), column))
            mask[row, order[len(order) - kept :]] = True
    return mask


def lowest_kept_and_highest_dropped(scores: torch.Tensor, mask: torch.Tensor) -> tuple[float, float]:
    kept, dropped = scores[mask], scores[~mask]
    return (kept.min().item() if len(kept) else float("inf")), (dropped.max().item() if len(dropped) else -float("inf"))


@given(scores=TENSORS, n_m_=N_M)
def test_n_m_equals_the_definition_on_any_shape(scores: torch.Tensor, n_m_: tuple[int, int]) -> None:
    mask = Pattern(*n_m_).mask(scores, 0.0, "input")
    assert mask.dtype == torch.bool
    assert mask.shape == scores.shape
    assert torch.equal(mask, naive_n_m(scores, *n_m_))


@given(scores=TENSORS, n_m_=N_M)
def test_every_full_group_keeps_n_and_the_tail_its_share(scores: torch.Tensor, n_m_: tuple[int, int]) -> None:
    keep, group = n_m_
    mask = Pattern(keep, group).mask(scores, 0.0, "input")
    whole = scores.shape[1] // group * group
    assert (mask[:, :whole].unflatten(1, (-1, group)).sum(-1) == keep).all() if whole else True
    tail = scores.shape[1] - whole
    assert (mask[:, whole:].sum(-1) == round(tail * keep / group)).all()


@given(scores=TENSORS, n_m_=N_M, data=st.data())
def test_the_output_axis_is_the_input_axis_of_the_transpose(
    scores: torch.Tensor, n_m_: tuple[int, int], data: st.DataObject
) -> None:
    assert torch.equal(
        Pattern(*n_m_).mask(scores, 0.0, "output"), Pattern(*n_m_).mask(scores.T.contiguous(), 0.0, "input").T
    )
    share, rounding = data.draw(SHARES), data.draw(st.sampled_from(["exact", "truncate"]))
    across = Pattern().mask(scores.T.contiguous(), share, "input", rounding).T
    assert torch.equal(Pattern().mask(scores, share, "output", rounding), across)


@given(scores=TENSORS, n_m_=N_M)
def test_sorting_and_comparing_pairs_agree(scores: torch.Tensor, n_m_: tuple[int, int]) -> None:
    compared = n_m.n_m_mask(scores, *n_m_)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(n_m, "_PAIRWISE", 0)
        assert torch.equal(n_m.n_m_mask(scores, *n_m_), compared)


@pytest.mark.parametrize(
    ("pattern", "scores", "kept"),
    [
        ("2:4", [1, 1, 1, 1], [0, 0, 1, 1]),  # of equals the lower index goes first
        ("2:4", [3, 1, 1, 1], [1, 0, 0, 1]),
        ("1:4", [5, 2, 5, 5], [0, 0, 0, 1]),
        ("3:4", [0, 0, 0, 0], [0, 1, 1, 1]),
        ("2:4", [9, 8, 1, 2, 3], [1, 1, 0, 0, 0]),  # tail of 1: round(0.5) is 0
        ("2:4", [9, 8, 1, 2, 3, 4, 5], [1, 1, 0, 0, 0, 1, 1]),  # tail of 3: round(1.5) is 2
        ("3:4", [1, 2, 3, 4, 7], [0, 1, 1, 1, 1]),  # tail of 1: round(0.75) is 1
        ("2:4", [5, 6], [0, 1]),  # a row shorter than a group
    ],
)
def test_n_m_by_hand(pattern: str, scores: list[float], kept: list[int]) -> None:
    assert Pattern.parse(pattern).mask(torch.tensor([scores], dtype=torch.float), 0.0, "input").int().tolist() == [kept]


@given(scores=TENSORS, share=SHARES, axis=st.sampled_from(["input", "output", "site"]))
def test_unstructured_drops_the_exact_total_and_the_lowest(scores: torch.Tensor, share: float, axis: str) -> None:
    mask = Pattern().mask(scores, share, axis)
    assert (~mask).sum().item() == round(share * scores.numel())
    lines, kept = {
        "input": (scores, mask),
        "output": (scores.T, mask.T),
        "site": (scores.reshape(1, -1), mask.reshape(1, -1)),
    }[axis]
    counts = (~kept).sum(1)
    assert counts.max() - counts.min() <= 1
    for line, line_kept in zip(lines, kept, strict=True):
        low, high = lowest_kept_and_highest_dropped(line, line_kept)
        assert low >= high
        # Of equal scores at the border, all dropped ones stand before all kept ones.
        if low == high:
            border = line_kept[line == low]
            assert torch.equal(border, border.sort(stable=True).values)


@given(scores=TENSORS, share=SHARES)
def test_truncating_drops_int_of_the_share_in_every_row(scores: torch.Tensor, share: float) -> None:
    mask = Pattern().mask(scores, share, "input", "truncate")
    assert (~mask).sum(1).tolist() == [int(scores.shape[1] * share)] * len(scores)


@pytest.mark.parametrize(
    ("axis", "kept"),
    [("input", [[0, 1], [0, 1]]), ("output", [[0, 0], [1, 1]]), ("site", [[0, 0], [1, 1]])],
)
def test_where_weights_compete(axis: str, kept: list[list[int]]) -> None:
    assert Pattern().mask(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 0.5, axis).int().tolist() == kept


@pytest.mark.parametrize("text", ["1:2", "2:4", "4:8", "1:4", "3:7", "16:32", "1:9999"])
def test_patterns_are_read_and_printed(text: str) -> None:
    pattern = Pattern.parse(text)
    assert str(pattern) == text
    assert pattern.sparsity == pytest.approx(1 - int(text.split(":")[0]) / int(text.split(":")[1]))


def test_unstructured_is_read_and_printed() -> None:
    assert Pattern.parse("unstructured") == Pattern()
    assert str(Pattern()) == "unstructured"
    assert Pattern().sparsity is None


BAD = [
    "", ":", "2:", ":4", "2", "2:4:1", " 2:4", "2:4 ", "2:4\n", "2 : 4", "2/4", "-2:4", "2:-4", "2.0:4", "two:four", "02:4", "2:04",
    "\u0662:\u0664", "\uff12:\uff14",
    "12345:99999", "Unstructured", "dense", "0:4", "4:4", "5:4", "0:0", 2.4, 24, None, True, b"2:4",
    ("2", "4"), ["2:4"],
]  # fmt: skip


@pytest.mark.parametrize("text", BAD, ids=repr)
def test_anything_else_is_refused_by_name(text: object) -> None:
    with pytest.raises(ConfigError) as caught:
        Pattern.parse(text)
    assert repr(text) in str(caught.value)
    assert "2:4" in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "axis"), [("2:4", "site"), ("2:4", "auto"), ("unstructured", "auto"), ("unstructured", "row")]
)
def test_an_axis_that_a_pattern_has_not_is_refused(pattern: str, axis: str) -> None:
    with pytest.raises(ConfigError, match=axis):
        Pattern.parse(pattern).mask(torch.ones(4, 4), 0.5, axis)


def test_an_unknown_rounding_is_refused() -> None:
    with pytest.raises(ConfigError, match="'up'"):
        Pattern().mask(torch.ones(4, 4), 0.5, "input", "up")
