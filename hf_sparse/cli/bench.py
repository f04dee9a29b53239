"""Measure what sparse kernels gain on this machine: each shape of matrix, generating and reading a prompt."""

import argparse
import json
import logging
from typing import Any

import torch

from hf_sparse.bench import TOKENS, Bench, bench
from hf_sparse.cli.loading import add_loading, hub_options, load_model, model_name
from hf_sparse.cli.recording import check_recordable, record_speeds
from hf_sparse.config import SparsityConfig
from hf_sparse.errors import ConfigError
from hf_sparse.prune import prune_
from hf_sparse.speed import Speed

_log = logging.getLogger(__name__)


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="path or Hub id of the model, or 'embedded'")
    parser.add_argument(
        "--pattern", default=None, help="prune by magnitude first: N:M, or unstructured with --sparsity"
    )
    parser.add_argument("--sparsity", type=float, default=None, help="share of weights to drop first")
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="read only the config of a causal language model: speed does not need more",
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=list(TOKENS), help="numbers of tokens for single matrices"
    )
    parser.add_argument("--prompt", type=int, default=16, help="tokens before those that are generated (default 16)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to generate (default 32)")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompt that is only read (default 512)")
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="time for each matrix and number of tokens (default 0.5)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="runs of the whole model that are timed, at least 5")
    parser.add_argument("--threads", type=int, default=None, help="number of threads (default: torch's)")
    parser.add_argument(
        "--record",
        action="store_true",
        help="write the speeds into the report and the card of the model's local folder",
    )
    add_loading(parser, "only cpu: on other devices nothing is measured in this version")


def run(arguments: argparse.Namespace) -> None:
    _check(arguments)
    folder = check_recordable(model_name(arguments), arguments.dtype) if arguments.record else None
    before = torch.get_num_threads()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    try:
        model = _model(arguments)
        found = bench(
            model, name=model_name(arguments), tokens=arguments.tokens, prompt=arguments.prompt,
            new_tokens=arguments.new_tokens, prefill=arguments.prefill, seconds=arguments.seconds, rounds=arguments.rounds,
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)
    if folder is not None and not record_speeds(folder, speeds_of(found)):
        _log.warning("the card in %s was not renewed, so only the report has the speeds.", folder)
    print(json.dumps(found.to_dict()) if arguments.json else found.markdown())


def speeds_of(found: Bench) -> list[Speed]:
    """As a report keeps them."""
    machine = ", ".join(f"{name} {value}" for name, value in found.machine.items())
    shared = ("work", "tokens", "way", "milliseconds", "low", "high", "rounds", "speedup")
    return [
        Speed(**{name: getattr(row, name) for name in shared}, machine=machine, whole_model=whole)
        for rows, whole in ((found.end_to_end, True), (found.kernels, False))
        for row in rows
    ]


def _check(arguments: argparse.Namespace) -> None:
    if arguments.device not in (None, "cpu"):
        raise ConfigError(f"only --device cpu can be measured, given is {arguments.device!r}; leave it out.")
    changed = arguments.random_weights or arguments.pattern is not None or arguments.sparsity is not None
    if arguments.record and changed:
        raise ConfigError(
            "--record tells of the saved model, and --random-weights, --pattern and --sparsity measure another one; leave one out."
        )
    numbers = {name: getattr(arguments, name) for name in ("prompt", "new_tokens", "prefill", "rounds")}
    numbers.update(tokens=min(arguments.tokens), threads=1 if arguments.threads is None else arguments.threads)
    wrong = next((name for name, value in numbers.items() if value < 1), None)
    if wrong:
        raise ConfigError(f"--{wrong.replace('_', '-')} is {numbers[wrong]}; give at least 1.")
    if not 0 <= arguments.seconds < float("inf"):
        raise ConfigError(f"--seconds is {arguments.seconds}; give a number of at least 0.")


def _model(arguments: argparse.Namespace) -> Any:
    model = _random_model(arguments) if arguments.random_weights else load_model(arguments)
    if arguments.pattern is not None or arguments.sparsity is not None:
        pattern = arguments.pattern or "unstructured"
        prune_(model, SparsityConfig(pattern=pattern, sparsity=arguments.sparsity, metric="magnitude"))
    return model.eval()


def _random_model(arguments: argparse.Namespace) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_name(arguments), **hub_options(arguments))
    dtype = torch.bfloat16 if arguments.dtype == "auto" else getattr(torch, arguments.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"dtype {arguments.dtype!r} is not known; give float32, bfloat16 or auto.")
    return AutoModelForCausalLM.from_config(config, dtype=dtype)
