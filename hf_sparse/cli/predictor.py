"""Train contextual predictors for a model, or measure what kinds of them cost in quality."""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from hf_sparse.cli.loading import add_loading, load_model, load_processor, model_name
from hf_sparse.cli.prune import options as read_options
from hf_sparse.config import PredictorConfig
from hf_sparse.config.serialise import read_fields
from hf_sparse.contextual import detach, train_predictors_
from hf_sparse.destination import check_destination, complete_folder
from hf_sparse.errors import ConfigError
from hf_sparse.predictors.evaluate import evaluate_predictors
from hf_sparse.predictors.layout import Layout
from hf_sparse.predictors.recording import record
from hf_sparse.predictors.select import Selection
from hf_sparse.predictors.train import Training, train

KINDS = ("shadow", "dejavu", "gate_first", "static", "oracle")
_FIELDS = {"kind": str, "criterion": str, "keep-neurons": float, "keep-heads": float, "neuron-block": int, "selection": str,
           "refresh-every": int}  # fmt: skip


def add(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    trains = actions.add_parser("train", help="train predictors and write the model with them to a folder")
    trains.add_argument("model", help="path or Hub id of the model, or 'embedded'")
    trains.add_argument("destination", type=Path, help="folder to write; must be empty or absent")
    trains.add_argument("--overwrite", action="store_true", help="replace a destination that is not empty")
    trains.add_argument(
        "--config", default=None, metavar="FILE", help="JSON or YAML file with the fields of PredictorConfig"
    )
    for name, kind in _FIELDS.items():
        trains.add_argument(f"--{name}", type=kind, default=None)
    trains.add_argument(
        "--dense-blocks", type=int, nargs="*", default=None, help="blocks that skip nothing (default: 0)"
    )
    measures = actions.add_parser("evaluate", help="perplexity against the share kept, for several kinds of predictors")
    measures.add_argument("model", help="path or Hub id of the model, or 'embedded'")
    measures.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="default: all")
    measures.add_argument("--criterion", default="magnitude")
    measures.add_argument(
        "--keep", type=float, nargs="+", default=[0.75, 0.5], help="shares of neurons and heads to keep"
    )
    measures.add_argument("--neuron-block", type=int, default=1, choices=(1, 16, 32))
    measures.add_argument("--text", default="stdlib:evaluation", help="text to measure on (default: stdlib:evaluation)")
    measures.add_argument("--window", type=int, default=256, help="tokens a window (default 256)")
    measures.add_argument("--max-windows", type=int, default=32, help="use only the first windows (default 32)")
    for action in (trains, measures):
        action.add_argument(
            "--calibration", default="stdlib:calibration", help="text to train on (default: stdlib:calibration)"
        )
        action.add_argument("--num-samples", type=int, default=128)
        action.add_argument("--sequence-length", type=int, default=256)
        action.add_argument("--seed", type=int, default=0)
        action.add_argument(
            "--option", action="append", default=[], metavar="training.KEY=VALUE", help="such as training.epochs=12"
        )
        action.add_argument("--json", action="store_true", help="print one JSON object instead of text for people")
        add_loading(action)


def run(arguments: argparse.Namespace) -> None:
    _train(arguments) if arguments.action == "train" else _evaluate(arguments)


def _training(arguments: argparse.Namespace) -> dict[str, Any]:
    given = read_options(arguments.option)
    if strange := next((name for name in given if name != "training"), None):
        raise ConfigError(f"option {strange!r} is not known; give training.KEY=VALUE, such as training.epochs=12.")
    return given.get("training", {})


def _train(arguments: argparse.Namespace) -> None:
    values = dict(read_fields(arguments.config)) if arguments.config else {}
    names = [name.replace("-", "_") for name in (*_FIELDS, "dense-blocks")]
    values |= {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if training := _training(arguments):
        values["options"] = {**values.get("options", {}), "training": training}
    config = PredictorConfig.from_dict(values)
    check_destination(arguments.destination, arguments.overwrite, [model_name(arguments), arguments.calibration])
    model, processor = load_model(arguments), load_processor(arguments)
    predictor = train_predictors_(
        model, config, arguments.calibration, tokenizer=processor, num_samples=arguments.num_samples,
        sequence_length=arguments.sequence_length, seed=arguments.seed,
    )  # fmt: skip
    with complete_folder(arguments.destination, arguments.overwrite) as folder:
        if processor is not None:
            processor.save_pretrained(folder)
        model.save_pretrained(folder)
    share = predictor.weight_count() / sum(parameter.numel() for parameter in model.parameters())
    told = {
        "model": model_name(arguments),
        "destination": str(arguments.destination),
        "config": config.to_dict(),
        "share_of_weights": share,
    }
    print(
        json.dumps(told)
        if arguments.json
        else f"{config.kind}: {100 * share:.2f} % of the model's weights; written to {arguments.destination}"
    )


def _evaluate(arguments: argparse.Namespace) -> None:
    if arguments.text == arguments.calibration:
        raise ConfigError(f"calibration and evaluation both name {arguments.text!r}; measure on other text.")
    model, processor = load_model(arguments), load_processor(arguments)
    detach(model)
    training = Training(**{"seed": arguments.seed, **_training(arguments)})
    layout = Layout.of(model, neuron_block=arguments.neuron_block)
    selections = [Selection(keep_neurons=keep, keep_heads=keep) for keep in arguments.keep]
    with tempfile.TemporaryDirectory() as folder:
        traces = record(
            model, arguments.calibration, folder, criterion=arguments.criterion, layout=layout, tokenizer=processor,
            num_samples=arguments.num_samples, sequence_length=arguments.sequence_length, seed=arguments.seed,
        )  # fmt: skip
        predictors = {kind: [train(model, traces, kind, training)] for kind in arguments.kinds}
    table = evaluate_predictors(
        model,
        predictors,
        arguments.text,
        selections,
        tokenizer=processor,
        window=arguments.window,
        max_windows=arguments.max_windows,
    )
    print(json.dumps(table.to_dict()) if arguments.json else table)
