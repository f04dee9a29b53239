"""Allocations give every site its share: the target holds exactly, in every stack, in whole weights or whole N of N:M."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from hypothesis import given, settings
from hypothesis import strategies as st
from models import bert, llama, mixtral, t5, token_rows
from torch import nn

import hf_sparse
from hf_sparse import SparsityConfig, prune_
from hf_sparse.allocations import BlockSize, Shares, conserved, stacks, whole_counts
from hf_sparse.allocations.owl import outlier_share
from hf_sparse.allot import measure, shares, whole_groups
from hf_sparse.errors import CalibrationError, ConfigError
from hf_sparse.families import find_sites
from hf_sparse.plan import select
from hf_sparse.registry import ALLOCATIONS
from hf_sparse.report import Report
from hf_sparse.sites import read

ROWS = token_rows()
BLOCKS = [
    BlockSize("model.layers.0", "model.layers", {"model.layers.0.q": 64, "model.layers.0.down": 100}, 2.0),
    BlockSize("model.layers.1", "model.layers", {"model.layers.1.q": 64}, 0.5),
]
OPTIONS: dict[str, dict[str, Any]] = {"atp": {"step": 0.25}}  # where the defaults do not suffice
SITES = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=4),
    st.tuples(st.floats(0, 1), st.integers(1, 10**7)),
    min_size=1,
    max_size=12,
)


def blocks_of(*sizes: list[int], measured: list[float] | None = None) -> list[BlockSize]:
    """One block with one site for each size, one stack for each list."""
    made = [
        BlockSize(f"{stack}.{index}", f"stack{stack}", {f"{stack}.{index}.up": size})
        for stack, own in enumerate(sizes)
        for index, size in enumerate(own)
    ]
    figures = measured or [0.0] * len(made)
    return [
        BlockSize(block.name, block.stack, block.sites, figure) for block, figure in zip(made, figures, strict=True)
    ]


def mean(found: Shares, blocks: list[BlockSize]) -> float:
    return sum(found[site] * n for block in blocks for site, n in block.sites.items()) / sum(b.size for b in blocks)


STACKS = st.lists(st.lists(st.integers(1, 10**6), min_size=1, max_size=9), min_size=1, max_size=3)


# ------------------------------------------------------------------------------------------------ each allocation


@pytest.mark.parametrize("target", [0.01, 0.5, 0.75, 2 / 3])
def test_uniform_gives_every_site_the_target(target: float) -> None:
    shares = ALLOCATIONS["uniform"].function(target, BLOCKS)
    assert shares == {"model.layers.0.q": target, "model.layers.0.down": target, "model.layers.1.q": target}


@pytest.mark.parametrize("entry", list(ALLOCATIONS), ids=lambda entry: entry.name)
def test_every_allocation_names_every_site_once_and_meets_the_target(entry: Any) -> None:
    shares = entry.function(0.5, BLOCKS, **{**entry.options, **OPTIONS.get(entry.name, {})})
    assert shares.keys() == {name for block in BLOCKS for name in block.sites}
    assert all(0 <= share <= 1 for share in shares.values())
    assert mean(shares, BLOCKS) == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize(
    ("sizes", "target", "step", "expected"),
    [
        ([[10, 10, 10]], 0.5, 0.1, [0.4, 0.5, 0.6]),
        ([[10, 10, 10]], 0.5, -0.1, [0.6, 0.5, 0.4]),
        ([[10, 10, 10]], 0.7, 0.3, [0.4, 0.7, 1.0]),  # the bound itself
        ([[10, 10], [5, 5, 5]], 0.5, 0.2, [0.4, 0.6, 0.3, 0.5, 0.7]),  # each stack has its own ramp
        ([[10], [5, 5]], 0.5, 0.2, [0.5, 0.4, 0.6]),  # one block is no ramp
        ([[10, 30]], 0.5, 0.4, [0.2, 0.6]),  # 0.3 and 0.7 moved down by 0.1
        ([[30, 10]], 0.5, 1.0, [1 / 3, 1.0]),  # 0.25 and 1.25: the second stays at 1, the first takes over the rest
    ],
)  # fmt: skip
def test_atp_is_a_ramp_in_each_stack(sizes: list[list[int]], target: float, step: float, expected: list[float]) -> None:
    found = ALLOCATIONS["atp"].function(target, blocks_of(*sizes), step=step)
    assert list(found.values()) == pytest.approx(expected, abs=1e-12)  # type: ignore[attr-defined]


@pytest.mark.parametrize("step", [0.31, -0.31])
def test_a_step_outside_its_bound_is_refused_and_the_bound_named(step: float) -> None:
    with pytest.raises(ConfigError) as caught:
        ALLOCATIONS["atp"].function(0.7, blocks_of([9, 9, 9]), step=step)
    for said in (f"step={step}", "min(2S/(L-1), 2(1-S)/(L-1)) = 0.3,", "S=0.7", "L=3", "stack0"):
        assert said in str(caught.value)


def test_searching_for_a_step_needs_data() -> None:
    with pytest.raises(CalibrationError, match="allocation 'atp' looks at activations"):
        prune_(llama(), SparsityConfig(metric="magnitude", allocation="atp"))


@given(sizes=STACKS, target=st.floats(0.01, 0.99), part=st.floats(-1, 1))
def test_atp_meets_the_target_in_every_stack_of_any_sizes(sizes: list[list[int]], target: float, part: float) -> None:
    blocks, intervals = blocks_of(*sizes), max(1, max(map(len, sizes)) - 1)
    step = part * min(2 * target, 2 * (1 - target)) / intervals
    found: Shares = ALLOCATIONS["atp"].function(target, blocks, step=step)  # type: ignore[assignment]
    for stack in stacks(blocks):
        assert mean(found, stack) == pytest.approx(target, abs=1e-9)
        ramp = [found[site] for block in stack for site in block.sites]
        assert ramp == sorted(ramp, reverse=step < 0)
        assert all(0 <= share <= 1 for share in ramp)


@pytest.mark.parametrize(
    ("sizes", "measured", "limit", "expected"),
    [
        ([[10, 10, 10]], [2.0, 1.0, 0.0], 0.1, [0.5, 0.6, 0.7]),  # kept: 0.2, 0.1, 0 and 0.3 to each for the mean of 0.4
        ([[10, 10]], [3.0, 3.0], 0.1, [0.6, 0.6]),  # nothing to tell them apart
        ([[10, 30]], [1.0, 0.0], 0.1, [0.45, 0.65]),  # the mean is weighted by size
        ([[10, 10], [10, 10]], [9.0, 8.0, 0.1, 0.2], 0.1, [0.5, 0.7, 0.7, 0.5]),  # stacks are not compared
        ([[10]], [1.0], 0.1, [0.6]),
    ],
)  # fmt: skip
def test_owl_keeps_more_where_more_outliers_are(
    sizes: list[list[int]], measured: list[float], limit: float, expected: list[float]
) -> None:
    found = ALLOCATIONS["owl"].function(0.6, blocks_of(*sizes, measured=measured), threshold=5.0, limit=limit)
    assert list(found.values()) == pytest.approx(expected, abs=1e-12)  # type: ignore[attr-defined]


def test_the_outlier_share_counts_over_all_sites_of_a_block() -> None:
    # |W| * norm: [1 2 / 0 20] and [3 0]; the mean is 26 / 6 = 4.33
    one = (torch.tensor([[1.0, -1.0], [0.0, 10.0]]), {"norm": torch.tensor([1.0, 2.0])})
    other = (torch.tensor([[-1.0, 0.0]]), {"norm": torch.tensor([3.0, 7.0])})
    for threshold, share in ((5, 0), (4, 100 / 6), (0.6, 200 / 6), (0, 400 / 6)):
        assert outlier_share([one, other], {"threshold": threshold}) == pytest.approx(share)
    config = SparsityConfig(allocation="owl", options={"owl": {"threshold": 4}})
    assert measure(config, [one, other]) == pytest.approx(100 / 6)


@given(sizes=STACKS, target=st.floats(0.01, 0.99), limit=st.floats(0, 0.5), data=st.data())
def test_owl_meets_the_target_in_every_stack_of_any_sizes(
    sizes: list[list[int]], target: float, limit: float, data: st.DataObject
) -> None:
    number = sum(map(len, sizes))
    measured = data.draw(st.lists(st.floats(0, 100), min_size=number, max_size=number))
    blocks = blocks_of(*sizes, measured=measured)
    found: Shares = ALLOCATIONS["owl"].function(target, blocks, limit=limit)  # type: ignore[assignment]
    for stack in stacks(blocks):
        own = [found[site] for block in stack for site in block.sites]
        assert mean(found, stack) == pytest.approx(target, abs=1e-9)
        assert max(own) - min(own) <= 2 * limit + 1e-9


# ------------------------------------------------------------------------------------------------ exact totals


@given(
    wanted=st.lists(st.tuples(st.floats(-2, 2), st.integers(1, 10**7)), min_size=1, max_size=20),
    part=st.floats(0.01, 0.99),
    most=st.floats(0.1, 1),
)
def test_shares_are_moved_alike_until_the_target_holds(
    wanted: list[tuple[float, int]], part: float, most: float
) -> None:
    sizes = [size for _, size in wanted]
    found = conserved([share for share, _ in wanted], sizes, part * most, most)
    assert sum(share * size for share, size in zip(found, sizes, strict=True)) / sum(sizes) == pytest.approx(
        part * most
    )
    assert all(0 <= share <= most for share in found)
    moved = [after - before for (before, _), after in zip(wanted, found, strict=True) if 0 < after < most]
    assert not moved or max(moved) - min(moved) < 1e-9


@given(sites=SITES)
def test_whole_counts_keep_the_total_and_are_whole(sites: dict[str, tuple[float, int]]) -> None:
    shares, sizes = (
        {name: share for name, (share, _) in sites.items()},
        {name: size for name, (_, size) in sites.items()},
    )
    found = whole_counts(shares, sizes)
    counts = {name: found[name] * sizes[name] for name in sizes}
    assert found.keys() == sizes.keys()
    assert all(abs(count - round(count)) < 1e-6 for count in counts.values())
    assert sum(round(count) for count in counts.values()) == round(sum(shares[name] * sizes[name] for name in sizes))
    for name in sizes:
        assert 0 <= round(counts[name]) <= sizes[name]
        assert abs(counts[name] - shares[name] * sizes[name]) < 1 + 1e-6


@given(sites=SITES)
def test_whole_counts_change_nothing_that_is_whole(sites: dict[str, tuple[float, int]]) -> None:
    shares, sizes = (
        {name: share for name, (share, _) in sites.items()},
        {name: size for name, (_, size) in sites.items()},
    )
    once = whole_counts(shares, sizes)
    again = whole_counts(once, sizes)
    assert {name: round(once[name] * sizes[name]) for name in sizes} == {
        name: round(again[name] * sizes[name]) for name in sizes
    }


def test_the_largest_remainders_are_rounded_up_and_of_equals_the_first() -> None:
    assert whole_counts({"a": 0.25, "b": 0.5, "c": 0.75}, {"a": 1, "b": 1, "c": 1}) == {"a": 0.0, "b": 1.0, "c": 1.0}
    assert whole_counts({"a": 0.5, "b": 0.5}, {"a": 3, "b": 3}) == {"a": 2 / 3, "b": 1 / 3}


# ------------------------------------------------------------------------------------------------ an N for every block


def kept(found: Shares, blocks: list[BlockSize], group: int) -> list[int]:
    """N of each block; it is whole."""
    exact = [group * (1 - share) for block in blocks for share in {found[site] for site in block.sites}]
    assert all(abs(number - round(number)) < 1e-9 for number in exact)
    return [round(number) for number in exact]


@pytest.mark.parametrize(
    ("sizes", "wanted", "target", "group", "expected"),
    [
        ([10, 10, 10], [0.375, 0.5, 0.625], 0.5, 8, [5, 4, 3]),
        ([10] * 5, [0.375, 0.4375, 0.5, 0.5625, 0.625], 0.5, 8, [5, 5, 4, 3, 3]),  # 4.5 and 3.5: the first is raised
        ([10] * 3, [0.45, 0.5, 0.55], 0.5, 4, [2, 2, 2]),  # 2.2, 2, 1.8: too flat a ramp for quarters
        ([10] * 3, [0.0, 0.5, 1.0], 0.5, 4, [4, 1, 1]),  # one of four is always kept; the others make good for it
        ([10, 10], [0.0, 0.0], 0.01, 4, [4, 4]),  # nearer to 0.01 than one block of 3:4
        ([20, 10, 10], [0.6, 0.4, 0.4], 0.5, 4, [2, 2, 2]),  # 1.6, 2.4, 2.4: raising the large one is exact
    ],
)  # fmt: skip
def test_n_is_rounded_down_and_raised_where_most_was_lost(
    sizes: list[int], wanted: list[float], target: float, group: int, expected: list[int]
) -> None:
    blocks = blocks_of(sizes)
    allotted = {site: share for block, share in zip(blocks, wanted, strict=True) for site in block.sites}
    assert kept(whole_groups(allotted, blocks, target, group), blocks, group) == expected


@given(
    stack=st.lists(st.floats(0, 1), min_size=1, max_size=40), size=st.integers(1, 10**8), group=st.integers(2, 32), data=st.data()
)  # fmt: skip
def test_blocks_of_one_size_keep_exactly_the_target(
    stack: list[float], size: int, group: int, data: st.DataObject
) -> None:
    number = data.draw(st.integers(len(stack), group * len(stack) - 1))  # sum of N that the target asks for
    blocks = blocks_of([size] * len(stack))
    allotted = {site: share for block, share in zip(blocks, stack, strict=True) for site in block.sites}
    found = kept(whole_groups(allotted, blocks, 1 - number / group / len(stack), group), blocks, group)
    assert sum(found) == number
    assert all(1 <= n <= group for n in found)


@settings(deadline=None)
@given(sizes=STACKS, group=st.integers(2, 16), part=st.floats(0.05, 0.95), data=st.data())
def test_blocks_of_any_sizes_come_as_near_as_half_the_largest(
    sizes: list[list[int]], group: int, part: float, data: st.DataObject
) -> None:
    blocks, target = blocks_of(*sizes), part * (1 - 1 / group)
    wanted = data.draw(st.lists(st.floats(0, 1), min_size=len(blocks), max_size=len(blocks)))
    allotted = {site: share for block, share in zip(blocks, wanted, strict=True) for site in block.sites}
    found = whole_groups(allotted, blocks, target, group)
    assert all(1 <= n <= group for n in kept(found, blocks, group))
    for stack in stacks(blocks):
        size = sum(block.size for block in stack)
        off = abs(mean(found, stack) - target) * size * group
        assert off <= max(block.size for block in stack) / 2 + 1e-3 * size


# ------------------------------------------------------------------------------------------------ lists and mappings


def allotted(model: nn.Module, **changes: Any) -> Shares:
    config = SparsityConfig(**{"metric": "magnitude", "pattern": "unstructured", **changes})
    inventory = find_sites(model)
    return shares(inventory, select(inventory, config)[0], config)


def test_a_list_gives_each_block_with_targeted_sites_its_share() -> None:
    found = allotted(llama(3), allocation=[0.0, 0.5], exclude=("*.layers.1.*",))
    assert {site: found[site] for site in found if site.endswith("down_proj")} == {
        "model.layers.0.mlp.down_proj": 0.0, "model.layers.2.mlp.down_proj": 0.5,
    }  # fmt: skip


def test_of_the_globs_that_match_a_site_the_longest_decides_in_any_order() -> None:
    globs = {"*": 0.5, "*.mlp.*": 0.25, "*.layers.1.mlp.up_proj": 0.0}
    for given_globs in (globs, dict(reversed(globs.items()))):
        found = allotted(llama(), allocation=given_globs)
        assert found["model.layers.0.self_attn.q_proj"] == 0.5
        assert found["model.layers.0.mlp.up_proj"] == 0.25
        assert found["model.layers.1.mlp.up_proj"] == 0.0


BAD: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"allocation": [0.5, 0.5, 0.5]}, ("gives 3 sparsities", "2 blocks", "model.layers.0 to model.layers.1")),
    ({"allocation": [0.5, 0.5], "exclude": ("*.layers.0.*",)}, ("gives 2 sparsities", "1 blocks")),
    ({"allocation": {"*.mlp.*": 0.5}}, ("8 of 14", "model.layers.0.self_attn.q_proj", "exclude")),
    ({"allocation": {"*": 0.5, "*.experts.*": 0.5}}, ("'*.experts.*' matches no targeted site", "model.layers.0")),
    ({"allocation": {"*": 0.5, "*.mlp.*": 0.2}, "targets": "attention"}, ("'*.mlp.*' matches no targeted site",)),
    ({"allocation": {"*": 0.1, "*.up_*": 0.2, "*up_p*": 0.3}}, ("'*.up_*' and '*up_p*'", "up_proj", "longer")),
    ({"allocation": [0.5, 0.25], "sparsity": 0.5}, ("sparsity=0.5 contradicts", "0.375", "leave sparsity out")),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "said"), BAD, ids=lambda value: repr(value)[:60])
def test_what_does_not_fit_the_model_is_refused_before_anything_changes(
    fields: dict[str, Any], said: tuple[str, ...]
) -> None:
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError) as caught:
        prune_(model, SparsityConfig(**{"metric": "magnitude", "pattern": "unstructured", **fields}))
    for part in said:
        assert part in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("given_sparsity", [None, 0.375])
def test_a_given_sparsity_may_repeat_the_mean_of_the_allocation(given_sparsity: float | None) -> None:
    assert allotted(llama(), allocation=[0.5, 0.25], sparsity=given_sparsity)


# ------------------------------------------------------------------------------------------------ whole models


def pruned(model: nn.Module, **changes: Any) -> Report:
    report = prune_(model, {"metric": "wanda", "calibration": ROWS, "num_samples": len(ROWS), **changes})
    for site in find_sites(model).all():
        entry = next((entry for entry in report.sites if entry.name == site.name), None)
        assert entry is None or entry.zeros == int((read(model, site) == 0).sum())
    return report


NAMED = [
    {"allocation": "atp", "options": {"atp": {"step": 0.07}}},
    {"allocation": "atp", "options": {"atp": {"step": -0.2}}},
    {"allocation": "owl"},
    {"allocation": "owl", "options": {"owl": {"threshold": 3, "limit": 0.3}}},
]


@pytest.mark.parametrize("make", [lambda: llama(4), t5, bert, mixtral], ids=["llama", "t5", "bert", "mixtral"])
@pytest.mark.parametrize("fields", NAMED, ids=repr)
def test_the_zeros_of_a_model_are_exactly_the_targets(make: Callable[[], nn.Module], fields: dict[str, Any]) -> None:
    report = pruned(make(), pattern="unstructured", sparsity=0.573, **fields)
    assert report.zeros == round(0.573 * sum(block.size for block in report.blocks))
    assert len({block.sparsity for block in report.pruned_blocks}) > 1
    for stack in {block.stack for block in report.blocks}:
        own = [block for block in report.blocks if block.stack == stack]
        assert abs(sum(block.zeros for block in own) - 0.573 * sum(block.size for block in own)) <= 1


def test_a_block_that_runs_several_times_is_measured_over_all_its_runs() -> None:
    from families_table import FAMILIES

    model, inputs = FAMILIES["albert"].build()
    fields = {"metric": "magnitude", "pattern": "unstructured", "sparsity": 0.5, "allocation": "owl"}
    report = prune_(model, {**fields, "calibration": [inputs], "num_samples": 1})
    assert all(block.measured is not None for block in report.pruned_blocks)
    assert report.zeros == round(0.5 * sum(block.size for block in report.blocks))


def test_a_ramp_and_given_shares_need_no_data() -> None:
    for fields, share in (({**NAMED[0], "sparsity": 0.5}, 0.5), ({"allocation": [0.0, 0.5]}, 0.25)):
        report = prune_(llama(), {"metric": "magnitude", "pattern": "unstructured", **fields})
        assert report.zeros == round(share * sum(block.size for block in report.blocks))


def test_excluded_sites_leave_the_total_exact() -> None:
    report = pruned(llama(3), pattern="unstructured", sparsity=0.5, exclude=("*.0.mlp.*", "*.2.*.o_proj"), **NAMED[0])
    assert report.zeros == round(0.5 * sum(block.size for block in report.blocks))


@pytest.mark.parametrize("make", [lambda: llama(4), t5], ids=["llama", "t5"])
@pytest.mark.parametrize(
    ("fields", "target"),
    [
        ({"pattern": "4:8", "allocation": "atp", "options": {"atp": {"step": 0.125}}}, 0.5),
        ({"pattern": "4:8", "sparsity": 0.625, "allocation": "atp", "options": {"atp": {"step": 0.1}}}, 0.625),
        ({"pattern": "4:8", "allocation": "owl", "options": {"owl": {"threshold": 3, "limit": 0.3}}}, 0.5),
        ({"pattern": "2:4", "allocation": [0.25, 0.75, 0.25, 0.75]}, 0.5),
    ],
    ids=repr,
)
def test_each_block_gets_an_n_of_its_own_and_the_average_holds(
    make: Callable[[], nn.Module], fields: dict[str, Any], target: float
) -> None:
    model = make()
    report = pruned(model, **fields)
    assert report.sparsity == target
    group = int(fields["pattern"].partition(":")[2])
    sites = {site.name: site for site in find_sites(model).all()}
    for block in report.blocks:
        (pattern,) = {site.pattern for site in block.sites}
        number = int(pattern.partition(":")[0])
        for site in block.sites:
            assert bool(((read(model, sites[site.name]) != 0).unflatten(1, (-1, group)).sum(-1) == number).all())


def test_what_the_allocation_leaves_dense_keeps_its_weights_whatever_the_update() -> None:
    model, dense = llama(), llama()
    report = pruned(model, pattern="2:4", update="sparsegpt", allocation={"*": 0.5, "*.mlp.*": 0, "*.q_proj": 0.0})
    left = {site.name for site in report.sites if site.pattern == "dense"}
    assert left == {site.name for site in report.sites if ".mlp." in site.name or "q_proj" in site.name}
    for name, weight in model.state_dict().items():
        assert not any(name.startswith(site) for site in left) or torch.equal(weight, dense.state_dict()[name])
    assert "8 sites: left dense by the allocation" in report.notes
    assert {site.metric for site in report.sites if site.name in left} == {"none"}


def test_the_report_tells_the_pattern_of_every_block_and_which_hardware_runs() -> None:
    report = pruned(llama(4), pattern="2:4", allocation=[0.0, 0.25, 0.5, 0.75])
    text = str(report)
    assert "dense (7), 3:4 (7), 2:4 (7), 1:4 (7) wanda" in text
    assert "pattern, axis, metric" in text
    assert "3:4; input; wanda" in text
    assert "14 of 28 sites; all sites of model.layers.2, model.layers.3" in text
    assert Report.from_dict(report.to_dict()) == report
    assert "tensor cores" not in str(pruned(llama(), pattern="2:4"))
    assert "no block as a whole" in str(pruned(llama(), pattern="4:8", allocation=[0.5, 0.625]))


def test_what_was_measured_stands_in_the_report_and_comes_from_the_dense_model() -> None:
    dense = llama(3)
    inputs: dict[str, torch.Tensor] = {}
    linears = {name: m for name, m in dense.named_modules() if isinstance(m, nn.Linear) and "layers" in name}
    for name, module in linears.items():
        module.register_forward_hook(lambda _, args, __, name=name: inputs.__setitem__(name, args[0].flatten(0, 1)))
    with torch.no_grad():
        dense(input_ids=ROWS)
    report = pruned(llama(3), pattern="unstructured", sparsity=0.6, allocation="owl", batch_size=3)
    for block in report.blocks:
        seen = [
            (module.weight.detach(), {"norm": inputs[name].norm(dim=0)})
            for name, module in linears.items()
            if name.startswith(block.name)
        ]
        assert block.measured == pytest.approx(outlier_share(seen, {"threshold": 5.0}), abs=0.02)
    assert any(note.startswith("allocation owl measured the dense blocks: from ") for note in report.notes)
    older = report.to_dict()
    for block in older["blocks"]:
        del block["measured"]
    assert all(block.measured is None for block in Report.from_dict(older).blocks)


def test_an_offloaded_model_is_measured_and_pruned_like_one_in_memory() -> None:
    plain, offloaded = llama(3), llama(3)
    fields = {"pattern": "unstructured", "sparsity": 0.6, "allocation": "owl"}
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    one = pruned(plain, **fields)
    other = prune_(offloaded, {"metric": "wanda", "calibration": ROWS, "num_samples": len(ROWS), **fields})
    assert [block.measured for block in one.blocks] == [block.measured for block in other.blocks]
    assert any(parameter.device.type == "meta" for parameter in offloaded.parameters())
    left, right = hf_sparse.masks(plain), hf_sparse.masks(offloaded)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_metric_without_data_can_have_an_allocation_with_data() -> None:
    report = pruned(llama(3), metric="magnitude", pattern="unstructured", sparsity=0.6, allocation="owl")
    assert all(block.measured is not None for block in report.blocks)
    with pytest.raises(CalibrationError, match="allocation 'owl'"):
        prune_(llama(), SparsityConfig(metric="magnitude", allocation="owl"))


def test_blocks_that_the_data_never_run_are_refused() -> None:
    from families_table import FAMILIES

    model, _ = FAMILIES["llava"].build()
    words = {"input_ids": token_rows(2, 10).clamp_max(50)}
    with pytest.raises(CalibrationError, match="never run"):
        prune_(model, SparsityConfig(metric="magnitude", allocation="owl", calibration=words, num_samples=2))


def test_a_measuring_pass_without_memory_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    import hf_sparse.measure as module

    sizes = []

    def forward(model: nn.Module, values: dict[str, torch.Tensor]) -> Any:
        sizes.append(len(values["input_ids"]))
        if sizes[-1] > 2:
            raise MemoryError
        return real(model, values)

    real = module.forward
    monkeypatch.setattr(module, "forward", forward)
    report = pruned(llama(), pattern="unstructured", sparsity=0.5, allocation="owl", batch_size=8)
    assert report.calibration is not None
    assert report.calibration["batch_size"] == 2
    assert sizes == [8, 4, 2, 2, 2, 2]


def test_a_new_allocation_that_measures_is_one_registration() -> None:
    name = "test_largest_weight"

    @ALLOCATIONS.register(name, needs=("norm",), measure=lambda sites, _: max(float(w.abs().max()) for w, _ in sites))
    def by_largest_weight(target: float, blocks: list[BlockSize]) -> Shares:
        """All from the block with the smallest weights first."""
        assert all(block.measured for block in blocks)
        found = conserved([-1e3 * (block.measured or 0) for block in blocks], [b.size for b in blocks], target)
        return {site: share for block, share in zip(blocks, found, strict=True) for site in block.sites}

    try:
        report = pruned(llama(), pattern="unstructured", sparsity=0.25, allocation=name)
    finally:
        del ALLOCATIONS._entries[name]
    assert report.zeros == round(0.25 * sum(block.size for block in report.blocks))


def test_config_and_claim_of_a_pruned_model_say_how_to_do_it_again(tmp_path: Any) -> None:
    for allocation in ([0.25, 0.5], {"*": 0.5, "*.mlp.*": 0.25}):
        model = llama()
        report = pruned(model, pattern="unstructured", allocation=allocation)
        model.save_pretrained(tmp_path / "saved")
        again = type(model).from_pretrained(tmp_path / "saved")
        claim = again.config.hf_sparse
        assert claim["config"]["allocation"] == allocation
        assert claim["totals"]["zeros"] == report.zeros
        second = llama()
        prune_(second, {**claim["config"], "calibration": ROWS})
        left, right = hf_sparse.masks(second), hf_sparse.masks(again)
        assert all(torch.equal(left[name], right[name]) for name in left)
