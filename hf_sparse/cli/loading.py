"""What the commands share: options for loading a model, and loading it with its tokenizer."""

import argparse
import logging
from typing import Any

from hf_sparse import embedded
from hf_sparse.data.text import is_made_up
from hf_sparse.errors import ConfigError

_DEVICE = "accelerator to compute on, such as cuda:0; the model stays on the CPU while it is pruned"


def add_loading(parser: argparse.ArgumentParser, device: str = _DEVICE) -> None:
    """Add the options; `device` is what the command says of its `--device`."""
    group = parser.add_argument_group("loading")
    group.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 or auto (as saved; the default)")
    group.add_argument("--device", default=None, help=device)
    group.add_argument("--revision", default=None, help="branch, tag or commit on the Hub")
    group.add_argument("--token", default=None, help="access token for the Hub")
    group.add_argument("--cache-dir", default=None, help="where files from the Hub are kept")
    group.add_argument("--trust-remote-code", action="store_true", help="run the model's own code from its repository")


def hub_options(arguments: argparse.Namespace) -> dict[str, Any]:
    options = {
        name: getattr(arguments, name)
        for name in ("revision", "token", "cache_dir")
        if getattr(arguments, name) is not None
    }
    return {**options, "trust_remote_code": True} if arguments.trust_remote_code else options


def model_name(arguments: argparse.Namespace) -> str:
    """The path or Hub id; `embedded` is the model in the package."""
    return str(embedded.model_path()) if arguments.model == embedded.NAME else str(arguments.model)


def check_dtype(name: str) -> None:
    """Raises ConfigError for a number format that models are not loaded in."""
    dtypes = ("auto", "float32", "bfloat16", "float16")
    if name not in dtypes:
        raise ConfigError(f"dtype {name!r} is not known; give one of {', '.join(dtypes)}.")


def load_model(arguments: argparse.Namespace) -> Any:
    """The model as the class that it was saved as, in inference mode."""
    from transformers import AutoConfig

    from hf_sparse.verify.loading import auto_class

    check_dtype(arguments.dtype)
    name, options = model_name(arguments), hub_options(arguments)
    try:
        config = AutoConfig.from_pretrained(name, **options)
    except ValueError as error:
        raise ConfigError(
            f"{name!r} is not a model that Transformers can load: {str(error).splitlines()[0]}"
        ) from error
    return auto_class(config).from_pretrained(name, config=config, dtype=arguments.dtype, **options)


def load_processor(arguments: argparse.Namespace) -> Any:
    """The tokenizer or processor beside the model, or None where there is none."""
    from transformers import AutoProcessor, AutoTokenizer

    for auto in (AutoTokenizer, AutoProcessor):
        try:
            found = auto.from_pretrained(model_name(arguments), **hub_options(arguments))
            return None if is_made_up(found) else found
        except (
            OSError,
            ValueError,
            ImportError,
            KeyError,
            TypeError,
            RecursionError,
        ) as error:  # each class has its own way to say "not here"
            logging.getLogger(__name__).debug("no %s: %s", auto.__name__, error)
    return None
