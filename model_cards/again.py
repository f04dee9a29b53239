"""How to load a pruned model and how to prune again: the commands and snippets of a card."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import yaml

from hf_sparse.config import SparsityConfig
from hf_sparse.report import Report
from model_cards.escape import json_text, python_literal, shell_word

# Ending of the model's class -> its Auto class and the Hub's name of the task, where the class leaves no doubt.
_TASKS = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
    "ForImageClassification": ("AutoModelForImageClassification", "image-classification"),
    "ForObjectDetection": ("AutoModelForObjectDetection", "object-detection"),
    "ForAudioClassification": ("AutoModelForAudioClassification", "audio-classification"),
}
YOUR_DATA = "YOUR_CALIBRATION_DATA"


def auto_class(model_class: str) -> str:
    """The class to load with: an Auto class where the name tells which, else the model's own class of Transformers."""
    for ending, (name, _) in _TASKS.items():
        if model_class.endswith(ending):
            return name
    return model_class if model_class.isidentifier() and model_class in _classes() else "AutoModel"


@cache
def _classes() -> frozenset[str]:
    """The names that Transformers offers; they are listed without loading the models, which takes a quarter of a second."""
    import transformers

    return frozenset(dir(transformers))


def task(model_class: str) -> str | None:
    """The Hub's `pipeline_tag`, or None where the class does not tell."""
    return next((tag for ending, (_, tag) in _TASKS.items() if model_class.endswith(ending)), None)


def chosen(report: Report) -> dict[str, Any]:
    """The config's fields that matter for doing it again: pattern, metric and update, and whatever differs from its default."""
    defaults = SparsityConfig().to_dict()
    config = {key: value for key, value in report.config.items() if key != "version"}
    always = ("pattern", "metric", "update")
    found = {k: v for k, v in config.items() if k in always or k not in defaults or defaults[k] != v}
    if report.calibration is not None and not found.get("calibration"):
        found["calibration"] = YOUR_DATA  # it was given in memory, so no name could be recorded
    return found


def prune_command(report: Report, base: str) -> str:
    """The command line that prunes `base` in the same way."""
    words = [f"hf-sparse prune {shell_word(base or 'BASE')} DEST"]
    fields, comment = chosen(report), ""
    if isinstance(fields.get("allocation"), list | Mapping):  # no flag takes it
        comment = "# sparsity_config.json holds the exact config that stands below\n"
        words.append("--config sparsity_config.json")
        fields = {name: value for name, value in fields.items() if value == YOUR_DATA}
    for name, value in fields.items():
        words.extend(_flags(name, value))
    return comment + " \\\n  ".join(words)


def _flags(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if name == "options" and isinstance(value, Mapping):
        pairs = ((f"{group}.{key}", given) for group, options in value.items() for key, given in dict(options).items())
        return [f"--option {shell_word(f'{key}={_yaml(given)}')}" for key, given in pairs]
    if value is True:
        return [shell_word(flag)]
    if isinstance(value, list | tuple):
        return [" ".join([shell_word(flag), *(shell_word(_scalar(item)) for item in value)])]
    return [f"{shell_word(flag)} {shell_word(_scalar(value))}"]


def _scalar(value: Any) -> str:
    """A string as it is, anything else as JSON."""
    return value if isinstance(value, str) else json_text(value, indent=None)


def _yaml(value: Any) -> str:
    """As `_scalar`, in the spelling that YAML 1.1, which reads options, takes for the same value."""
    if isinstance(value, float):
        text = repr(value)
        return text if "." in text or "e" not in text else text.replace("e", ".0e")  # 1e-05 would be read as text
    try:
        return value if isinstance(value, str) and yaml.safe_load(value) == value else json_text(value, indent=None)
    except yaml.YAMLError:
        return json_text(value, indent=None)


def prune_snippet(report: Report, base: str) -> str:
    """The Python that prunes `base` in the same way while loading it."""
    name = auto_class(report.model_class)
    fields = (f"        {key}={_value(value)}," for key, value in chosen(report).items() if key.isidentifier())
    return "\n".join(
        [
            "import hf_sparse  # adds sparsity_config= to from_pretrained",
            "from hf_sparse import SparsityConfig",
            f"from transformers import {name}",
            "",
            f"model = {name}.from_pretrained(",
            f"    {python_literal(base or 'BASE')},",
            "    sparsity_config=SparsityConfig(",
            *fields,
            "    ),",
            ")",
            'model.save_pretrained("DEST")',
        ]
    )


def _value(value: Any) -> str:
    return YOUR_DATA if value == YOUR_DATA else python_literal(value)


def load_snippet(report: Report, compressed: bool = False) -> str:
    """The Python that loads the pruned model, with Transformers alone or, where its weights are compressed, with hf_sparse."""
    name = auto_class(report.model_class)
    needs = "import hf_sparse\n" if compressed else ""
    return f'{needs}from transformers import {name}\n\nmodel = {name}.from_pretrained("PATH_OR_REPOSITORY")'
