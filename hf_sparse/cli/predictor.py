"""Train contextual predictors for a model, or measure what kinds of them cost in quality."""

import argparse
import json
import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hf_sparse.cli.loading import add_loading, load_model, load_processor, model_name
from hf_sparse.cli.prune import options as read_options
from hf_sparse.config import PredictorConfig
from hf_sparse.config.serialise import read_fields
from hf_sparse.contextual import Carried, carried_by, detach, selection_of, train_predictors_
from hf_sparse.destination import check_destination, complete_folder
from hf_sparse.errors import ConfigError, HfSparseError
from hf_sparse.plot import new_figure
from hf_sparse.predictors.criteria import criterion_of
from hf_sparse.predictors.evaluate import evaluate_predictors, read_batches
from hf_sparse.predictors.figures import measured_again
from hf_sparse.predictors.layout import Layout
from hf_sparse.predictors.networks import Predictor
from hf_sparse.predictors.recording import record
from hf_sparse.predictors.saving import FILE, put_figures
from hf_sparse.predictors.select import Selection
from hf_sparse.predictors.speeds import check_room
from hf_sparse.predictors.table import PredictorTable
from hf_sparse.predictors.train import Training, train
from hf_sparse.side_files import describe_predictors

_log = logging.getLogger(__name__)
OWN = "own"
LEARNING = ("shadow", "dejavu", "gate_first")  # differ from seed to seed
KINDS = (*LEARNING, "static", "oracle")
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
    measures = actions.add_parser("evaluate", help="perplexity and speed against the share kept, for several kinds")
    measures.add_argument("model", help="path or Hub id of the model, or 'embedded'")
    measures.add_argument(
        "--kinds",
        nargs="+",
        default=None,
        choices=(OWN, *KINDS),
        help=f"{OWN}: the predictors that the model carries (default: these, or where it carries none all the others, which are trained)",
    )
    measures.add_argument(
        "--criterion", nargs="+", default=None, metavar="NAME", help="one or several (default: magnitude)"
    )
    measures.add_argument(
        "--keep", type=float, nargs="+", default=None,
        help="shares of neurons and heads to keep (default: 0.75 0.5; of its own predictors the shares that they are used with)",
    )  # fmt: skip
    measures.add_argument("--neuron-block", type=int, default=1, choices=(1, 16, 32))
    measures.add_argument("--seeds", type=int, default=1, metavar="N", help="train so many of each kind (default 1)")
    measures.add_argument("--text", default="stdlib:evaluation", help="text to measure on (default: stdlib:evaluation)")
    measures.add_argument("--window", type=int, default=256, help="tokens a window (default 256)")
    measures.add_argument("--max-windows", type=int, default=32, help="use only the first windows (default 32)")
    measures.add_argument(
        "--new-tokens",
        type=int,
        default=None,
        metavar="N",
        help="generate so many tokens, too, to tell how fast that is",
    )
    measures.add_argument("--threads", type=int, default=None, help="number of threads (default: torch's)")
    measures.add_argument("--plot", type=Path, default=None, metavar="FILE", help="draw it (.png, .svg or .pdf)")
    measures.add_argument(
        "--record", action="store_true", help="write the figures of its own predictors into the model's folder and card"
    )
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


def run(arguments: argparse.Namespace) -> int:
    return _train(arguments) if arguments.action == "train" else _evaluate(arguments)


def _training(arguments: argparse.Namespace) -> dict[str, Any]:
    given = read_options(arguments.option)
    if strange := next((name for name in given if name != "training"), None):
        raise ConfigError(f"option {strange!r} is not known; give training.KEY=VALUE, such as training.epochs=12.")
    return given.get("training", {})


def _train(arguments: argparse.Namespace) -> int:
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
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    _check(arguments)
    if arguments.plot is not None:
        new_figure(arguments.plot)  # refuses what it cannot draw before minutes of work
    model, processor = load_model(arguments), load_processor(arguments)
    carried = carried_by(model)
    kinds = arguments.kinds or ([OWN] if carried is not None else list(KINDS))
    if OWN in kinds and carried is None:
        raise ConfigError(
            f"{model_name(arguments)!r} carries no predictors, so --kinds {OWN} and --record have nothing to measure."
        )
    if arguments.record and OWN not in kinds:
        raise ConfigError(f"--record tells of the predictors that the model carries; add {OWN} to --kinds.")
    detach(model)
    read_batches(model, arguments.text, tokenizer=processor, window=arguments.window, max_windows=arguments.max_windows)
    if arguments.new_tokens is not None:
        check_room(model, arguments.new_tokens)
    before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads or before)
    try:
        table = _table(arguments, model, processor, kinds, carried)
    finally:
        torch.set_num_threads(before)
    print(json.dumps(table.to_dict()) if arguments.json else table)
    try:
        if arguments.record and carried is not None:
            figures = measured_again(carried.figures, [table.figure(row) for row in table.rows if row.name == OWN])
            put_figures(model, Path(model_name(arguments)), figures)
            describe_predictors(Path(model_name(arguments)))
        if arguments.plot is not None:
            table.plot(arguments.plot)
    except (HfSparseError, OSError) as error:  # what was measured has been told, so this must not be told in its place
        _log.error("the figures above were not recorded or drawn: %s", error)
        return 1
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.text == arguments.calibration:
        raise ConfigError(f"calibration and evaluation both name {arguments.text!r}; measure on other text.")
    for name in ("seeds", "new_tokens", "threads", "window", "max_windows"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; give at least 1.")
    for name in arguments.criterion or ():
        criterion_of(name)
    Training.of(_training(arguments), arguments.seed)
    if arguments.plot is not None and arguments.plot.is_dir():
        raise ConfigError(f"--plot {str(arguments.plot)!r} is a folder; name a file, such as picture.png.")
    if arguments.record and not (Path(model_name(arguments)) / FILE).is_file():
        raise ConfigError(
            f"--record writes into a local folder with predictors, and {model_name(arguments)!r} holds no {FILE}; train some "
            "with hf-sparse predictor train, or leave --record out."
        )


def _table(
    arguments: argparse.Namespace, model: Any, processor: Any, kinds: list[str], carried: Carried | None
) -> PredictorTable:
    shares = arguments.keep or ([] if kinds == [OWN] else [0.75, 0.5])
    selections = [Selection(keep_neurons=share, keep_heads=share) for share in shares]
    predictors = _trained(arguments, model, processor, [kind for kind in kinds if kind != OWN])
    measuring: dict[str, Any] = {
        "tokenizer": processor, "window": arguments.window, "max_windows": arguments.max_windows, "speed_tokens": arguments.new_tokens,
    }  # fmt: skip
    tables = []
    if predictors:
        tables.append(evaluate_predictors(model, predictors, arguments.text, selections, **measuring))
    if OWN in kinds and carried is not None:
        config = carried.config
        used = selection_of(config)
        others = [one for one in selections if one != used]
        tables.append(
            evaluate_predictors(
                model,
                {OWN: [carried.predictor]},
                arguments.text,
                [used, *others],
                refresh_every=config.refresh_every,
                **measuring,
            )
        )
    return replace(tables[-1], rows=tuple(row for table in reversed(tables) for row in table.rows))


def _trained(arguments: argparse.Namespace, model: Any, processor: Any, kinds: list[str]) -> dict[str, list[Predictor]]:
    """Predictors of these kinds, for each criterion and seed."""
    if not kinds:
        return {}
    layout, found = Layout.of(model, neuron_block=arguments.neuron_block), {}
    training = Training.of(_training(arguments), arguments.seed)
    criteria = arguments.criterion or ["magnitude"]
    for criterion in criteria:
        with tempfile.TemporaryDirectory() as folder:
            traces = record(
                model, arguments.calibration, folder, criterion=criterion, layout=layout, tokenizer=processor,
                num_samples=arguments.num_samples, sequence_length=arguments.sequence_length, seed=arguments.seed,
            )  # fmt: skip
            for kind in kinds:
                seeds = range(training.seed, training.seed + (arguments.seeds if kind in LEARNING else 1))
                name = kind if len(criteria) == 1 else f"{kind} {criterion}"
                found[name] = [train(model, traces, kind, replace(training, seed=seed)) for seed in seeds]
    return found
