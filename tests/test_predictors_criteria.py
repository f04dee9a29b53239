"""Criteria give what their formulas say, worked out by hand and by autograd."""

from typing import Any

import pytest
import torch
from models import token_rows
from predictor_cases import FAMILIES, made
from torch import nn

from hf_sparse.calibrate import ready
from hf_sparse.errors import ConfigError, ModelError
from hf_sparse.predictors.criteria import FIELDS, Scores, Seen, criterion_of, sees_labels
from hf_sparse.predictors.units import find_units, module_of
from hf_sparse.predictors.watch import Scorer, next_labels
from hf_sparse.registry import CRITERIA
from hf_sparse.sites import parameter_of, read

NAMES = [entry.name for entry in CRITERIA]


class Weights:
    """Two neurons and one head of two values, whose weights are easy to multiply with."""

    down_norm = torch.tensor([1.0, 10.0])
    head_gram = torch.tensor([[[4.0, 0.0], [0.0, 1.0]]])
    up_size = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    gate_size = torch.tensor([[0.0, 1.0], [1.0, 1.0]])


SEEN = Seen(
    Weights(),  # type: ignore[arg-type]
    activation=torch.tensor([[-3.0, 1.0]]),
    heads=torch.tensor([[[3.0, 8.0]]]),
    pre_activation=torch.tensor([[-5.0, 2.0]]),
    input=torch.tensor([[-1.0, 2.0]]),
    activation_gradient=torch.tensor([[0.5, -4.0]]),
    heads_gradient=torch.tensor([[[-3.0, 1.0]]]),
    up_gradient=torch.tensor([[-1.0, 2.0]]),
    gate_gradient=torch.tensor([[10.0, 0.0]]),
)

BY_HAND = {  # name -> scores of the two neurons, score of the head
    "magnitude": ([3.0, 10.0], 10.0),  # sqrt(4 * 9 + 64)
    "l2_pre_activation": ([5.0, 2.0], 73.0**0.5),
    "l2_activation": ([3.0, 1.0], 73.0**0.5),
    "plainact": ([1.5, 4.0], 1.0),  # |-9 + 8|
    "plainact_weight": ([1 * 5 + 10 * 2, 2 * 3 + 0.0], 1.0),
    "fisher": ([2.25, 16.0], 145.0),  # 81 + 64
    "gradnorm": ([0.5, 4.0], 10.0**0.5),
}


@pytest.mark.parametrize("name", NAMES)
def test_scores_by_hand(name: str) -> None:
    neurons, head = BY_HAND[name]
    scores = criterion_of(name).function(SEEN)
    torch.testing.assert_close(scores.neurons, torch.tensor([neurons]))
    torch.testing.assert_close(scores.heads, torch.tensor([[head]]))


def test_only_those_with_gradients_see_labels() -> None:
    assert {name for name in NAMES if sees_labels(criterion_of(name))} == {
        "plainact",
        "plainact_weight",
        "fisher",
        "gradnorm",
    }


@pytest.mark.parametrize("name", NAMES)
def test_needs_are_what_can_be_recorded(name: str) -> None:
    assert criterion_of(name).needs <= FIELDS


def test_an_unknown_criterion_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'fisher'"):
        criterion_of("fischer")


def scored(model: Any, name: str, rows: torch.Tensor) -> dict[int, Scores]:
    found: dict[int, Scores] = {}
    with ready(model):
        Scorer(model, find_units(model), criterion_of(name))({"input_ids": rows}, found.__setitem__)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_every_family_has_finite_scores_for_every_token(family: str, name: str) -> None:
    found = scored(made(family), name, token_rows(2, 5))
    assert sorted(found) == [0, 1, 2]
    for scores in found.values():
        assert scores.neurons.shape == (10, 48)
        assert scores.heads.shape == (10, 4)
        assert all(bool(part.isfinite().all()) and bool((part >= 0).all()) and bool(part.any()) for part in scores)


def summed_loss(model: Any, rows: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=rows).logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits, rows[:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_the_weight_form_is_weights_times_their_gradients(family: str) -> None:
    """Of a single token, where the gradient of a weight is that token's alone."""
    model, rows = made(family), token_rows(1, 2)
    block = find_units(model)[-1]  # in the last block only the first token's neurons reach the one loss
    scores = scored(model, "plainact_weight", rows)[block.index].neurons[0]
    sites = [site for site in (block.up, block.gate) if site]
    expected = torch.zeros(48)
    for site in sites:
        parameter = parameter_of(model, site)
        (gradient,) = torch.autograd.grad(summed_loss(model, rows), parameter)
        whole = (parameter * gradient).abs().sum(1).detach()
        expected += (
            whole if site.rows is None else whole.unflatten(0, (2, -1))[site.rows.start // (site.rows.parts // 2)]
        )
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-6)


def test_plainact_is_the_slope_of_the_loss() -> None:
    """Making one neuron a little smaller or larger at one token changes the loss by its score."""
    model, rows, step = made("llama"), token_rows(1, 6), 0.05
    block = find_units(model)[1]
    scores = scored(model, "plainact", rows)[1].neurons[2]
    largest, factor = int(scores.argmax()), 1.0

    def change(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        z = args[0].clone()
        z[:, 2, largest] *= factor
        return (z,)

    module_of(model, block.down).register_forward_pre_hook(change)
    losses = []
    for factor in (1 - step, 1 + step):  # noqa: B007
        losses.append(float(summed_loss(model, rows).detach()))
    assert float(scores[largest]) == pytest.approx(abs(losses[1] - losses[0]) / (2 * step), rel=0.03)


def test_magnitude_is_the_length_of_what_a_unit_adds() -> None:
    model, rows, seen = made("llama"), token_rows(1, 4), {}
    block = find_units(model)[2]
    for name, site in (("z", block.down), ("a", block.o)):
        module_of(model, site).register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))
    scores = scored(model, "magnitude", rows)[2]
    added = seen["z"][0, 3, 5] * read(model, block.down)[:, 5]
    head = read(model, block.o)[:, 8:16] @ seen["a"][0, 3, 8:16]
    torch.testing.assert_close(scores.neurons[3, 5], added.norm())
    torch.testing.assert_close(scores.heads[3, 1], head.norm())


def test_a_run_leaves_the_model_as_it_was() -> None:
    model, rows = made("llama"), token_rows(2, 5)
    before = model(input_ids=rows).logits
    scored(model, "plainact", rows)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(input_ids=rows).logits, before)


def test_a_model_that_goes_around_its_modules_is_refused() -> None:
    model = made("llama")
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.act_fn(mlp.gate_proj(x)) @ mlp.down_proj.weight.T
    with pytest.raises(ModelError, match="ran without calling the modules"):
        scored(model, "magnitude", token_rows(1, 4))


def test_labels_of_positions() -> None:
    values = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    assert next_labels(values).tolist() == [[6, 7, -100, -100]]
    given = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[-100, -100, 7]])}
    assert next_labels(given).tolist() == [[-100, 7, -100]]
