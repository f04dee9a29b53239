"""Train a sparse model on text until it is good again, with every zero kept, and write it with its report and card."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from hf_sparse.cli import resuming
from hf_sparse.cli.loading import add_loading, load_model, load_processor, model_name
from hf_sparse.cli.sequences import Data, training_data
from hf_sparse.cli.teaching import base_name, is_same, load_teacher, typed_name
from hf_sparse.cli.training import Plan, check_kind, restore_, training_device, training_dtype, tune, widen_
from hf_sparse.config.serialise import whole
from hf_sparse.destination import check_destination, complete_folder
from hf_sparse.errors import ConfigError, ModelError
from hf_sparse.evaluate import Measurement, as_evaluation, evaluate


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="path or Hub id of a sparse model, such as `hf-sparse prune` writes")
    parser.add_argument("destination", type=Path, help="folder to write; must be empty or absent")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a destination that is not empty, once the new one is complete"
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="TEXT",
        help="what to train on: a .txt, .jsonl or .npy path, a Hub data set id, or stdlib:training",
    )
    how = parser.add_argument_group("training")
    how.add_argument(
        "--tokens",
        type=int,
        default=1_000_000,
        help="tokens to train on in all; shorter data are repeated (default 1000000)",
    )
    how.add_argument(
        "--sequence-length",
        type=int,
        default=None,
        help="tokens a sequence (default 512, or less where the model takes less)",
    )
    how.add_argument("--batch-size", type=int, default=8, help="sequences a step (default 8)")
    how.add_argument(
        "--accumulate", type=int, default=1, metavar="N", help="make each step in N parts, which takes less memory"
    )
    how.add_argument(
        "--learning-rate",
        type=float,
        default=None,
        help="the highest (default: 0.2 over the hidden size, with LoRA 0.6)",
    )
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--lora", action="store_true", help="train a masked LoRA and merge it, instead of all weights")
    how.add_argument("--rank", type=int, default=16, help="of the LoRA (default 16)")
    how.add_argument("--bf16", action="store_true", help="compute in bfloat16 (mixed precision)")
    how.add_argument("--gradient-checkpointing", action="store_true", help="less memory for a third more time")
    how.add_argument(
        "--checkpoints",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="save there ten times on the way; the same command goes on from the last one",
    )
    teacher = parser.add_argument_group("distillation")
    teacher.add_argument(
        "--teacher",
        default=None,
        metavar="MODEL",
        help="dense model to learn from, a path, a Hub id or 'embedded' (default: the one that the sparse model was made from)",
    )
    teacher.add_argument("--no-distillation", action="store_true", help="learn from the text alone")
    teacher.add_argument("--temperature", type=float, default=1.0)
    measure = parser.add_argument_group("measuring")
    measure.add_argument(
        "--evaluate",
        default=None,
        metavar="TEXT",
        help="measure before and after on this text, and the dense model where it is at hand",
    )
    measure.add_argument("--window", type=int, default=None, help="tokens a window (default 512)")
    measure.add_argument("--max-windows", type=int, default=None, help="use only the first windows of the text")
    add_loading(
        parser,
        device="cpu, or the first visible accelerator, such as cuda, to train and measure on (default: the latter where there is one)",
    )


def _plan(arguments: argparse.Namespace) -> Plan:
    for name in ("tokens", "batch_size", "accumulate", "rank"):
        whole(name, getattr(arguments, name), 1)
    if arguments.sequence_length is not None:
        whole("sequence_length", arguments.sequence_length, 2)
    if arguments.learning_rate is not None and not 0 < arguments.learning_rate < 1:
        raise ConfigError(
            f"learning_rate={arguments.learning_rate} is not allowed; give a number between 0 and 1, such as 0.0001."
        )
    if arguments.batch_size % arguments.accumulate:
        raise ConfigError(
            f"batch_size={arguments.batch_size} cannot be made in {arguments.accumulate} equal parts; give a divisor to --accumulate."
        )
    if not 0 < arguments.temperature < float("inf"):
        raise ConfigError(f"temperature={arguments.temperature} is not allowed; give a number above 0, such as 1.")
    if arguments.no_distillation and arguments.teacher:
        raise ConfigError("--teacher and --no-distillation contradict each other; leave one of them out.")
    names = ("tokens", "sequence_length", "batch_size", "accumulate", "learning_rate", "seed", "lora", "rank", "bf16", "gradient_checkpointing",
             "checkpoints", "temperature")  # fmt: skip
    return Plan(
        **{name: getattr(arguments, name) for name in names},
        device=training_device(arguments.device),
        distils=not arguments.no_distillation,
        quiet=arguments.json,
    )


def _checked(arguments: argparse.Namespace) -> Plan:
    """The plan, once all is refused that can be without loading anything."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise ConfigError(
            f"`recover` trains in one process, and WORLD_SIZE is {processes}; call it without a launcher, or train by transformers.Trainer "
            "with trainer_callbacks.KeepMasks and Distillation in a script under accelerate launch."
        )
    plan = _plan(arguments)
    sources = [model_name(arguments), arguments.data, arguments.evaluate, typed_name(arguments)]
    check_destination(arguments.destination, arguments.overwrite, [source for source in sources if source])
    if plan.checkpoints:
        resuming.check_checkpoints(plan.checkpoints, arguments.destination)
    if arguments.evaluate == arguments.data:
        raise ConfigError(f"training and evaluation both name {arguments.data!r}; measure on other text.")
    return plan


def run(arguments: argparse.Namespace) -> None:
    plan = _checked(arguments)
    try:
        _recover(arguments, plan)
    except KeyboardInterrupt:
        last = resuming.last_checkpoint(plan.checkpoints) if plan.checkpoints else None
        if last is not None:
            print(f"the same command goes on from {last}.", file=sys.stderr)
        raise


def _recover(arguments: argparse.Namespace, plan: Plan) -> None:
    from hf_sparse.checkpoint import is_sparse, report

    model, processor = load_model(arguments), load_processor(arguments)
    check_kind(model)
    if not is_sparse(model):
        raise ModelError(
            f"{arguments.model!r} is dense, so there is nothing to keep; prune it first: hf-sparse prune {arguments.model} DESTINATION --pattern 2:4 ..."
        )
    data = training_data(model, processor, arguments.data, plan.tokens, plan.sequence_length, plan.seed)
    if arguments.evaluate:
        data.refuse_overlap(model, processor, arguments.evaluate, arguments.window, arguments.max_windows)
    base = base_name(report(model))
    name = typed_name(arguments) or base
    last = _begin(arguments, plan, model, data, name)
    teacher = _teacher(arguments, model, name, plan)
    model = model.to(plan.device)
    figures = _measured(arguments, processor, {"before": model})
    if teacher is not None and arguments.evaluate:
        role = "dense" if base and name and is_same(name, base) else "teacher"
        figures |= _measured(arguments, processor, {role: teacher.to(plan.device)})
    teacher = teacher if plan.distils else None  # its memory
    had = widen_(model, plan.lora)
    model = tune(model, data, plan, teacher, processor, last)
    restore_(model, had)
    figures |= _measured(arguments, processor, {"after": model.to(plan.device)})
    _write(arguments, model.cpu(), processor, figures)


def _begin(arguments: argparse.Namespace, plan: Plan, model: Any, data: Data, teacher: str | None) -> Path | None:
    """The checkpoint to go on from; tells where the plan differs from what was asked for."""
    steps, tokens = plan.steps(data)
    if tokens != plan.tokens and not plan.quiet:
        print(f"{steps} steps, which take {tokens} of the {plan.tokens} tokens asked for")
    if plan.checkpoints is None:
        return None
    last = resuming.begin(plan.checkpoints, plan.settings(model, model_name(arguments), data, teacher))
    if last is not None and resuming.steps_done(last) >= steps:
        print(
            f"nothing is left to train: {last} is the end of this run; its model is written once more.", file=sys.stderr
        )
    return last


def _teacher(arguments: argparse.Namespace, model: Any, name: str | None, plan: Plan) -> Any:
    """The dense model, to learn from or only to be measured; None where it is not needed, or to be measured and not at hand."""
    if not plan.distils and not (name and arguments.evaluate):
        return None
    if not name:
        raise ConfigError(
            f"{arguments.model!r} does not say which dense model it was made from; name it with --teacher, or give --no-distillation."
        )
    try:
        return load_teacher(arguments, model, name, training_dtype(model, plan.lora) if plan.distils else model.dtype)
    except ConfigError as error:
        if plan.distils:
            raise
        print(f"note: the dense model is not measured: {error}", file=sys.stderr)
        return None


def _measured(arguments: argparse.Namespace, processor: Any, models: dict[str, Any]) -> dict[str, Measurement]:
    """The figure of each model; nothing without --evaluate."""
    if not arguments.evaluate:
        return {}
    options = {"tokenizer": processor, "window": arguments.window, "max_windows": arguments.max_windows}
    return {role: evaluate(model, arguments.evaluate, **options) for role, model in models.items()}


def _write(arguments: argparse.Namespace, model: Any, processor: Any, figures: dict[str, Measurement]) -> None:
    from hf_sparse.checkpoint import report

    known = report(model)
    if known is not None and figures:
        known.add_evaluation(as_evaluation(figures["after"], figures.get("dense"), figures["before"]))
        if known.recoveries:
            entry, after = known.recoveries[-1], figures["after"]
            entry.metric, entry.before, entry.after = after.metric, figures["before"].value, after.value
    with complete_folder(arguments.destination, arguments.overwrite) as folder:
        if processor is not None:
            processor.save_pretrained(folder)
        model.save_pretrained(folder)
    measured = {name: found.to_dict() for name, found in figures.items()}
    if arguments.json:
        found = known.to_dict() if known else None
        place = str(arguments.destination)
        print(json.dumps({"model": model_name(arguments), "destination": place, "figures": measured, "report": found}))
        return
    if known is not None:
        print(known)
    for name, figure in figures.items():
        print(f"{name}: {figure.metric} {figure.value:.4f} on {figure.text}, windows of {figure.window} tokens")
    print(f"written to {arguments.destination}")
