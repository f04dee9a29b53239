"""Predictors as they run: with the weights of their networks in the model's own number format, while those on disk stay float32."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from hf_sparse.native import Arranged, arrange, available, dense_matmul
from hf_sparse.predictors.networks import LowRank, Predictor
from hf_sparse.runtime import ArrangedForm

_FEW_TOKENS = 16  # for more, torch's product is faster


def as_run(predictor: Predictor, model: nn.Module) -> Predictor:
    """The same predictor with networks in bfloat16, for a model in bfloat16 on the CPU; for any other model the predictor itself.

    Inputs, sums and scores are float32 all the same, so only the weights are rounded. Changes of the predictor's weights afterwards
    do not reach it.
    """
    weight = next(model.parameters())
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return predictor
    running = copy.copy(predictor)
    running._modules = {name: module and _rounded(module) for name, module in predictor._modules.items()}
    return running


def _rounded(module: nn.Module) -> nn.Module:
    if isinstance(module, LowRank):
        return Rounded(module)
    return nn.ModuleList(_rounded(one) for one in module) if isinstance(module, nn.ModuleList) else module


class Rounded(nn.Module):
    """A `LowRank` with bfloat16 weights, which lie in the order of our kernels where those are there."""

    def __init__(self, network: LowRank) -> None:
        super().__init__()
        self._layers = [_layer(network.first), _layer(network.second)]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = F.rms_norm(hidden.float(), hidden.shape[-1:])
        return self._product(1, torch.tanh(self._product(0, normed)))

    def _product(self, at: int, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self._layers[at]
        if isinstance(weight, torch.Tensor):
            return F.linear(x, weight, bias)
        if x.numel() > _FEW_TOKENS * x.shape[-1]:
            return F.linear(x, ArrangedForm(weight).unpack().float(), bias)
        return dense_matmul(x, weight, bias)


def _layer(linear: nn.Linear) -> tuple[torch.Tensor | Arranged, torch.Tensor]:
    weight, bias = linear.weight.detach().bfloat16(), linear.bias.detach().float().clone()
    return (arrange(weight) if available() else weight.float()), bias
