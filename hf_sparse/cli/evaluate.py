"""Measure a model: token perplexity, or its own loss where that makes no sense."""

import argparse
import json

from hf_sparse.cli.loading import add_loading, load_model, load_processor, model_name
from hf_sparse.evaluate import evaluate
from hf_sparse.prune import check_device


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="path or Hub id of the model, or 'embedded'")
    parser.add_argument(
        "--text",
        default="stdlib:evaluation",
        help="a .txt, .jsonl or .npy path, a Hub data set id, or stdlib:evaluation (the default)",
    )
    parser.add_argument("--window", type=int, default=None, help="tokens a window (default 512)")
    parser.add_argument(
        "--stride", type=int, default=None, help="tokens between the starts of two windows (default: the window)"
    )
    parser.add_argument("--max-windows", type=int, default=None, help="use only the first windows of the text")
    parser.add_argument("--seed", type=int, default=0, help="for the masked positions of a masked model")
    parser.add_argument(
        "--allow-same-text", action="store_true", help="allow the text that the model was calibrated on"
    )
    add_loading(parser)


def run(arguments: argparse.Namespace) -> None:
    model = load_model(arguments)
    if arguments.device is not None:
        check_device(arguments.device)
        model = model.to(arguments.device)
    found = evaluate(
        model, arguments.text, tokenizer=load_processor(arguments), window=arguments.window, stride=arguments.stride,
        max_windows=arguments.max_windows, seed=arguments.seed, same_text_allowed=arguments.allow_same_text,
    )  # fmt: skip
    if arguments.json:
        print(json.dumps({"model": model_name(arguments), **found.to_dict()}))
        return
    window = (
        ""
        if found.window is None
        else f", windows of {found.window} tokens" + (f", stride {found.stride}" if found.stride else "")
    )
    print(
        f"{found.metric} {found.value:.4f} on {found.text} ({found.tokens} predicted tokens{window}, fingerprint {found.fingerprint})"
    )
