"""Metrics: importance scores for a site's weights, one file each; every module in this folder registers itself."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules

import torch


@dataclass(frozen=True)
class Inputs:
    """What was measured for a site.

    `own`: statistic name -> value for the site's input; a norm has shape (in,).
    `consumer`: the same for the input that the site's rows become, brought to the site's rows; a norm has shape (out,).
    `options`: the metric's options, defaults filled in.
    """

    own: Mapping[str, torch.Tensor] = field(default_factory=dict)
    consumer: Mapping[str, torch.Tensor] = field(default_factory=dict)
    options: Mapping[str, float] = field(default_factory=dict)


for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
