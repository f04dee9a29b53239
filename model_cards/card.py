"""The model card of a sparse model, made from its report, and the README that it becomes."""

import logging
from collections.abc import Mapping, Sequence
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from hf_sparse import embedded
from hf_sparse.errors import CheckpointError
from hf_sparse.replace import write_whole
from hf_sparse.report import Report
from model_cards import again, evaluation, facts, recovery
from model_cards.escape import clean, code, fenced, json_text, plain
from model_cards.evaluation import Evaluation
from model_cards.merge import BEGIN, END, header_comment, merge, section_of

_log = logging.getLogger(__name__)
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")


class SparseModelCard(ModelCard):
    """A card whose figures all come from a report and from evaluations, in a section that can be renewed."""

    @classmethod
    def from_report(
        cls,
        report: Report,
        *,
        base_model: str | None = None,
        evaluations: Sequence[Evaluation] = (),
        base_card: str | None = None,
        plot_name: str | None = None,
        command: str | None = None,
        model_config: dict[str, Any] | None = None,
        files: Mapping[str, str] | None = None,
    ) -> Self:
        """Tell what the report holds.

        `evaluations` stand in the place of the report's own; `base_card` is the text of the base model's card, whose
        license is inherited; `plot_name` a picture beside the card;
        `command` what was typed; `model_config` the saved config.json; `files` names of other files with what they hold.

        Raises: CheckpointError where the report is damaged.
        """
        facts.check(report)
        recovery.check(report)
        base = base_model or _base_of(report)
        evaluations = evaluations or [Evaluation.from_dict(values) for values in report.evaluations]
        data = _card_data(report, base, evaluations, base_card)
        variables = {
            "begin": BEGIN,
            "end": END,
            "header_comment": header_comment(data.to_dict()),
            "title": plain(_title(report, base)),
            "evaluations": evaluation.rows(evaluations),
            "before_recovery": evaluation.with_recovery(evaluations),
            "same_text": _calibrated_on(report, evaluations),
            "trained_text": recovery.trained_on(report, [item.fingerprint for item in evaluations]),
            "picture": quote(clean(plot_name)) if plot_name else None,
            "typed": fenced(command, "bash") if command else None,
            "recounted": facts.recounted(report, model_config),
            "files": [(code(name), plain(text)) for name, text in (files or {}).items()],
            **_told(report, base),
            **_trainings(report),
        }
        return cls.from_template(data, template_str=_template(), **variables)

    @classmethod
    def of_model(cls, model: Any, report: Report, *, plot_name: str | None = None) -> Self:
        """The card of a model in memory; the license comes from the base model's card where that lies in a local folder."""
        return cls.from_report(
            report, plot_name=plot_name, model_config=model.config.to_dict(), base_card=_local_card(report.model)
        )

    def merged_into(self, existing: str) -> str:
        """A README with our section renewed or added at its end; what a person wrote outside the markers is kept.

        Header: a person's values stay, ours fill what is absent and replace what we wrote before; results of other tools stay.

        Raises: CheckpointError where the README's header is not valid YAML.
        """
        return merge(existing, self.content)


def write_card(folder: str | Path, card: SparseModelCard) -> bool:
    """Write README.md if there is none, or renew our section in it; False where it is a person's own and was left alone."""
    file = Path(folder) / "README.md"
    text = card.content
    if file.exists():
        try:
            existing = file.read_bytes().decode("utf-8")
            mark = "\ufeff" if existing.startswith("\ufeff") else ""
            if section_of(existing) is None:
                return False
            text = mark + card.merged_into(existing.removeprefix(mark))
        except UnicodeDecodeError:
            return False
        except CheckpointError as error:
            # A save must not fail after hours of work because of a slip in a README.
            _log.warning("%s was not renewed: %s", file, error)
            return False
    write_whole(file, text.encode("utf-8"))
    return True


def _local_card(base: str) -> str | None:
    file = Path(base or ".") / "README.md"
    try:
        return file.read_text(encoding="utf-8") if base and (file.parent / "config.json").is_file() else None
    except (OSError, UnicodeDecodeError):
        return None  # no card, nothing to inherit


def _template() -> str:
    """Read as data of this very package: neither the working folder nor another `model_cards` on the path matters."""
    return package_files(__package__ or "model_cards").joinpath("template.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------- the header


def _card_data(report: Report, base: str, evaluations: Sequence[Evaluation], base_card: str | None) -> ModelCardData:
    inherited = _inherited(base_card)
    task = inherited.pop("pipeline_tag", None) or again.task(report.model_class)
    results = evaluation.results(evaluations, task)
    on_hub = _is_repository(base)
    pattern = facts.pattern_name(report)
    return ModelCardData(
        base_model=base if on_hub else None,
        # The Hub knows adapter, merge, quantized and finetune. Pruning gives full weights of the same architecture and number
        # format with other values, which is what it lists as finetune; "quantized" would promise a smaller file and number format.
        base_model_relation="finetune" if on_hub else None,
        library_name="transformers",
        pipeline_tag=task,
        tags=["hf_sparse", "sparse", "pruned", *([pattern] if pattern else [])],
        model_name=clean(_title(report, base)) if results else None,
        eval_results=results or None,
        **inherited,
    )


def _base_of(report: Report) -> str:
    """The model's name; the one in the package goes by the name that the command line takes."""
    return embedded.NAME if report.model == str(embedded.model_path()) else report.model


def _is_repository(name: str) -> bool:
    """Whether a name can be a repository's id; a folder of that name is taken for the folder, as Transformers does."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name != embedded.NAME and not Path(name).exists()


def _inherited(card: str | None) -> dict[str, Any]:
    """License, language and task from the base model's card; a header that cannot be read gives nothing."""
    match = REGEX_YAML_BLOCK.search(card or "")
    try:
        values = yaml.safe_load(match[2]) if match else None
    except yaml.YAMLError:
        return {}
    if not isinstance(values, dict):
        return {}
    # Other types are slips such as `language: no`, which YAML reads as False.
    found = {key: values[key] for key in _INHERITED if isinstance(values.get(key), str | list)}
    return {
        key: [clean(item) for item in value] if isinstance(value, list) else clean(value)
        for key, value in found.items()
    }


# ---------------------------------------------------------------------------------------------------- the text


def _title(report: Report, base: str) -> str:
    pattern = facts.pattern_name(report)
    return f"{facts.short_name(base) or report.model_class or 'model'}, {pattern or 'pruned'}{' sparse' if pattern else ''}"


def _calibrated_on(report: Report, evaluations: Sequence[Evaluation]) -> bool:
    """Whether a figure was measured on the very text that was calibrated on."""
    data = report.calibration or {}
    return any(item.fingerprint and item.fingerprint == data.get("fingerprint") for item in evaluations)


def _told(report: Report, base: str) -> dict[str, Any]:
    sites, config = report.sites, report.config
    on_hub = _is_repository(base)
    given = base if on_hub else facts.short_name(base)
    size = sum(block.size for block in report.blocks)
    all_matrices = sum(block.all_matrices for block in report.blocks)
    return {
        "base": code(given) if given else "a model made in memory",
        "model_class": code(report.model_class),
        "pattern": code(facts.pattern_name(report) or config.get("pattern")),
        "pattern_words": facts.pattern_words(report),
        "axes": facts.axes(sites),
        "metrics": facts.counts(site.metric for site in sites),
        "chosen_metric": code(config.get("metric")),
        "allocation": facts.listed(config.get("allocation")),
        "update": facts.listed(config.get("update")),
        "targets": facts.listed(config.get("targets")),
        "exclude": facts.listed(config.get("exclude", ())),
        "number_of_sites": len(sites),
        "number_of_blocks": len(report.pruned_blocks),
        "in_sites": facts.share(report.zeros, size),
        "in_blocks": facts.share(report.zeros, all_matrices),
        "in_model": facts.share(report.zeros, report.parameters),
        "calibration": facts.calibration(report),
        "block_rows": facts.block_rows(report.pruned_blocks),
        "fold": len(report.pruned_blocks) >= facts.FOLD_FROM,
        "remarks": facts.remarks(report),
        "left_out": facts.left_out(report),
        "config": fenced(json_text(dict(config)), "json"),
        "command": fenced(again.prune_command(report, given), "bash"),
        "snippet": fenced(again.prune_snippet(report, given), "python"),
        "load": fenced(again.load_snippet(report), "python"),
        "data_placeholder": again.YOUR_DATA if again.chosen(report).get("calibration") == again.YOUR_DATA else None,
        "versions": [(plain(name), plain(value)) for name, value in report.versions.items()],
        "tensor_core_sites": sum(site.fits_tensor_cores for site in sites),
        "input_sites": sum(site.axis == "input" for site in sites),
        "output_sites": sum(site.axis == "output" for site in sites),
        "is_n_m": (pattern := facts.pattern_of(report)) is not None and pattern.group is not None,
    }


def _trainings(report: Report) -> dict[str, Any]:
    return {
        "trainings": recovery.tables(report),
        "left_away": recovery.left_away(report),
        "has_errors": any(block.output_error is not None for block in report.pruned_blocks),
        "train": fenced(recovery.train_snippet(report), "python") if report.recoveries else None,
        "train_placeholder": recovery.YOUR_DATA,
    }
