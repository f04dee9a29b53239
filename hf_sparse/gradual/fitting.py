"""What of a configuration a training can meet step by step."""

from dataclasses import replace

from hf_sparse.allot import measured_by
from hf_sparse.config import SparsityConfig
from hf_sparse.errors import ConfigError
from hf_sparse.registry import METRICS

_MEASURED = {"norm"}  # of what statistics offer; a Gram matrix of each input would not be bounded


def fitting(config: SparsityConfig) -> SparsityConfig:
    """The configuration as gradual pruning takes it: the default recipe's updates fall away, as training itself changes the weights.

    Raises: ConfigError for what has to look at calibration data or at the dense model, or changes more than masks.
    """
    default = SparsityConfig()
    if (config.metric, config.update) == (default.metric, default.update):
        config = replace(config, update="none")
    for wrong in _obstacles(config):
        raise ConfigError(f"gradual pruning cannot use {wrong}.")
    return config


def _obstacles(config: SparsityConfig) -> list[str]:
    entry = METRICS[config.metric]
    missing = sorted((entry.needs | entry.consumer_needs) - _MEASURED)
    usable = [one.name for one in METRICS if one.needs | one.consumer_needs <= _MEASURED]
    closed = 'use "uniform", "atp" with options={"atp": {"step": ...}}, a list or a mapping'
    found = {
        f'update={list(config.update)!r}: the training itself gives the kept weights new values; leave it out, or give "none"': config.update != ("none",),
        f"metric={config.metric!r}, which needs the {', '.join(missing)} of each input; use one of {', '.join(usable)}": bool(missing),
        f"allocation={config.allocation!r}, which looks at the dense model; {closed}": measured_by(config) is not None,
        f"allocation={config.allocation!r} without a step, which is searched for on calibration data; {closed}": config.searches,
        "permute=True, as channels cannot be reordered under an optimizer; prune with permute=True before training": config.permute,
        "calibration=...: activations are those of the training itself; leave it out": config.calibration is not None,
        f"device={config.device!r}: masks are made where the weights are; leave it out": config.device is not None,
    }  # fmt: skip
    return [wrong for wrong, holds in found.items() if holds]
