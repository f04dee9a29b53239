"""The variables of a card's template; what is text is made harmless for Markdown, what is called a block is a block of code.

| variable | what it holds |
|---|---|
| `card_data` | the header, as YAML; every value in it (`license`, `base_model`, ...) is a variable of its own too |
| `begin`, `end` | the markers of the section that is renewed, each for a line of its own |
| `title` | a heading: the base and the pattern |
| `base` | name of the model that was pruned, as code |
| `model_class` | its class, as code |
| `pattern`, `pattern_words` | the pattern as code; what it means, in a sentence |
| `axes`, `metrics`, `chosen_metric` | where weights competed and by which metric, in numbers of sites; the metric in the config |
| `allocation`, `update`, `targets`, `exclude` | these fields of the config |
| `number_of_sites`, `number_of_blocks` | numbers |
| `in_sites`, `in_blocks`, `in_model` | zeros and their share in the pruned sites, in all matrices of the blocks, in all parameters |
| `recounted` | a sentence where the zeros counted at the save are others than those after pruning, or None |
| `calibration` | pairs of name and value |
| `evaluations`, `before_recovery` | rows of a Markdown table; whether it has a column for figures before recovery |
| `task_columns`, `task_line`, `task_rows` | first and second line and the rows of the table of tasks; no rows where none was measured |
| `same_text`, `trained_text` | whether a figure was measured on the text of the calibration, or of a training |
| `trainings`, `left_away` | for each training pairs of name and value; how many earlier ones are left to the report |
| `has_errors` | whether output errors were measured |
| `block_rows`, `fold` | rows of a Markdown table; whether it is long enough to be folded |
| `picture` | address of the picture, or None |
| `remarks`, `left_out` | lines: fall-backs and notes; matrices that were not pruned |
| `compressed` | whether the weights are saved in the format that needs hf_sparse |
| `load` | a block: how to load the model |
| `files`, `fold_files` | rows of a Markdown table of names and SHA-256; whether it is long enough to be folded |
| `speeds` | for each machine on which speed was measured its description and the rows of a Markdown table |
| `tensor_core_sites`, `input_sites`, `output_sites` | numbers of sites: fit for 2:4 tensor cores, with groups along that axis |
| `is_n_m` | whether the pattern is N:M |
| `typed`, `command`, `snippet` | blocks: what was typed (or None), and how to prune again on the command line and in Python |
| `data_placeholder` | what stands in them for calibration data that are not recorded, or None |
| `train`, `train_placeholder` | a block: how to train on (None without a training); what stands in it for the data |
| `config` | a block: the exact config |
| `versions` | pairs of name and version |
"""

from typing import Any
from urllib.parse import quote

from hf_sparse.report import Report
from hf_sparse.storage import is_compressed_weights
from hf_sparse.text import one_line
from model_cards import again, evaluation, facts, files, recovery, speed
from model_cards.escape import code, fenced, json_text, plain
from model_cards.source import CardSource


def variables_of(source: CardSource) -> dict[str, Any]:
    """All variables of the table above but for `card_data`, `begin` and `end`."""
    report, evaluations = source.report, source.evaluations
    return {
        "title": plain(source.title),
        "evaluations": evaluation.rows(evaluations),
        "before_recovery": evaluation.with_recovery(evaluations),
        "task_columns": evaluation.task_columns(evaluations),
        "task_line": evaluation.task_line(evaluations),
        "task_rows": evaluation.task_rows(evaluations),
        "same_text": _calibrated_on(source),
        "trained_text": recovery.trained_on(report, [item.fingerprint for item in evaluations]),
        "picture": quote(one_line(source.plot_name)) if source.plot_name else None,
        "typed": fenced(source.command, "bash") if source.command else None,
        "recounted": facts.recounted(report, source.model_config),
        "files": files.rows(report.files),
        "compressed": any(map(is_compressed_weights, report.files)),
        "speeds": speed.tables(report.speeds),
        "fold_files": len(report.files) >= facts.FOLD_FROM,
        **_pruning(source),
        **_figures(report),
        **_doing_it_again(source),
        **_trainings(report),
    }


def _calibrated_on(source: CardSource) -> bool:
    """Whether a figure was measured on the very text that was calibrated on."""
    data = source.report.calibration or {}
    return any(item.fingerprint and item.fingerprint == data.get("fingerprint") for item in source.evaluations)


def _pruning(source: CardSource) -> dict[str, Any]:
    report = source.report
    config, base = report.config, source.shown_base
    return {
        "base": code(base) if base else "a model made in memory",
        "model_class": code(report.model_class),
        "pattern": code(facts.pattern_name(report) or config.get("pattern")),
        "pattern_words": facts.pattern_words(report),
        "axes": facts.axes(report.sites),
        "metrics": facts.counts(site.metric for site in report.sites),
        "chosen_metric": code(config.get("metric")),
        "allocation": facts.listed(config.get("allocation")),
        "update": facts.listed(config.get("update")),
        "targets": facts.listed(config.get("targets")),
        "exclude": facts.listed(config.get("exclude", ())),
        "calibration": facts.calibration(report),
        "remarks": facts.remarks(report),
        "left_out": facts.left_out(report),
        "versions": [(plain(name), plain(value)) for name, value in report.versions.items()],
        "is_n_m": (pattern := facts.pattern_of(report)) is not None and pattern.group is not None,
    }


def _figures(report: Report) -> dict[str, Any]:
    sites, blocks = report.sites, report.pruned_blocks
    return {
        "number_of_sites": len(sites),
        "number_of_blocks": len(blocks),
        "in_sites": facts.share(report.zeros, sum(block.size for block in report.blocks)),
        "in_blocks": facts.share(report.zeros, sum(block.all_matrices for block in report.blocks)),
        "in_model": facts.share(report.zeros, report.parameters),
        "block_rows": facts.block_rows(blocks),
        "fold": len(blocks) >= facts.FOLD_FROM,
        "tensor_core_sites": sum(site.fits_tensor_cores for site in sites),
        "input_sites": sum(site.axis == "input" for site in sites),
        "output_sites": sum(site.axis == "output" for site in sites),
    }


def _doing_it_again(source: CardSource) -> dict[str, Any]:
    report, base = source.report, source.shown_base
    not_recorded = again.chosen(report).get("calibration") == again.YOUR_DATA
    return {
        "config": fenced(json_text(dict(report.config)), "json"),
        "command": fenced(again.prune_command(report, base), "bash"),
        "snippet": fenced(again.prune_snippet(report, base), "python"),
        "load": fenced(again.load_snippet(report, any(map(is_compressed_weights, report.files))), "python"),
        "data_placeholder": again.YOUR_DATA if not_recorded else None,
    }


def _trainings(report: Report) -> dict[str, Any]:
    return {
        "trainings": recovery.tables(report),
        "left_away": recovery.left_away(report),
        "has_errors": any(block.output_error is not None for block in report.pruned_blocks),
        "train": fenced(recovery.train_snippet(report), "python") if report.recoveries else None,
        "train_placeholder": recovery.YOUR_DATA,
    }
