"""Prunes one model in several ways, one after the other, and measures each on the same text: the order of the steps."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from hf_sparse import checkpoint, environment
from hf_sparse.calibrate import limits_of, tokenizer_of
from hf_sparse.comparison import Comparison, Draw, Row
from hf_sparse.config.serialise import whole
from hf_sparse.data import Samples, read_samples
from hf_sparse.errors import CalibrationError, HfSparseError
from hf_sparse.evaluate import Measurement, evaluate
from hf_sparse.families import find_sites
from hf_sparse.memory import Growth
from hf_sparse.prune import prune_sharing_
from hf_sparse.recipes import Recipe, make_recipes, reference_of
from hf_sparse.report import Report
from hf_sparse.shared import Shared, Spent
from hf_sparse.snapshot import Snapshot


class ComparisonInterrupted(KeyboardInterrupt):
    """Raised at Ctrl-C once the model is dense again; `comparison` holds the recipes that were finished."""

    def __init__(self, comparison: Comparison) -> None:
        super().__init__(str(len(comparison.rows)))
        self.comparison = comparison


def compare(
    model: nn.Module,
    recipes: Iterable[Any],
    text: Any,
    *,
    tokenizer: Any = None,
    tokenizer_options: Mapping[str, Any] | None = None,
    window: int | None = None,
    max_windows: int | None = None,
    draws: int = 1,
    reference: str | None = None,
    same_text_allowed: bool = False,
) -> Comparison:
    """Prune a model by each of the recipes in turn and measure what that costs on `text`; in the end the model is as it was.

    `recipes` are SparsityConfigs, or mappings of their fields with a "name". `draws` repeats each that looks at calibration data
    with as many seeds, from its own seed on. What gaps and times are set against is the first recipe or the one called `reference`.
    The weights of the blocks are kept a second time meanwhile, all weights where a recipe permutes.

    Raises: ConfigError, ModelError and CalibrationError before anything is pruned; a recipe that fails later tells so in its row.
    ComparisonInterrupted at Ctrl-C.
    """
    checked = make_recipes(recipes)
    chosen = reference_of(checked, reference)
    whole("draws", draws, 1)
    model = checkpoint.unwrap(model)
    checkpoint.check_prunable(model)
    work = _Work(model, tokenizer, tokenizer_options, window)
    runs = [(recipe, _seeded(recipe, draws)) for recipe in checked]
    samples = [work.calibration(one) for _, several in runs for one in several]
    work.read_text(text, max_windows, [found for found in samples if found], same_text_allowed)
    comparison = _empty(model, work.measure(), chosen.name, draws, len(checked))
    dense = _Dense(model, any(recipe.config.permute for recipe in checked))
    try:
        comparison.rows.extend(_rows(work, runs, dense))
    except KeyboardInterrupt:
        comparison.interrupted = True
        raise ComparisonInterrupted(comparison) from None
    return comparison


def _rows(work: "_Work", runs: Sequence[tuple[Recipe, list[Recipe]]], dense: "_Dense") -> Iterator[Row]:
    """One row after the other, each as soon as it is complete."""
    with transformers_logging.tqdm(total=sum(len(several) for _, several in runs), desc="Comparing", unit="run") as bar:
        for recipe, several in runs:
            row = Row(recipe.name, recipe.config.to_dict())
            for one in several:
                bar.set_postfix_str(one.name if len(several) == 1 else f"{one.name}, seed {one.config.seed}")
                work.run(one, row, dense)
                bar.update()
            yield row


def _seeded(recipe: Recipe, draws: int) -> list[Recipe]:
    """The recipe with each seed; one without calibration data gives the same every time and is run once."""
    first = recipe.config.seed
    return [recipe.with_seed(first + i) for i in range(draws if recipe.config.calibration is not None else 1)]


def _empty(model: nn.Module, dense: Measurement, reference: str, draws: int, planned: int) -> Comparison:
    return Comparison(
        model=getattr(getattr(model, "config", None), "name_or_path", "") or "", model_class=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(getattr(model, "dtype", "")).removeprefix("torch."), dense=dense.to_dict(), reference=reference, draws=draws,
        versions=environment.versions(), threads=torch.get_num_threads(), planned=planned,
    )  # fmt: skip


class _Work:
    """The model with what all recipes share: the text to measure on, the calibration samples and what was seen in the dense model."""

    def __init__(self, model: nn.Module, tokenizer: Any, options: Mapping[str, Any] | None, window: int | None) -> None:
        self._model, self._tokenizer, self._options = model, tokenizer, options
        longest = limits_of(model).length
        self._window = min(512, longest or 512) if window is None else window
        self._shared = Shared(tokenizer, options)
        self._text = Samples([], "", "", 0)
        self._most: int | None = None  # windows of it

    def calibration(self, recipe: Recipe) -> Samples | None:
        """Read what a recipe calibrates on, so that what is missing is said before anything runs."""
        if recipe.config.calibration is None:
            return None
        try:
            return self._shared.samples(self._model, recipe.config)
        except CalibrationError as error:
            raise CalibrationError(f"recipe {recipe.name!r}: {error}") from error

    def read_text(self, text: Any, most: int | None, used: Sequence[Samples], same_allowed: bool) -> None:
        """Read the text to measure on, once for all; one that was calibrated on is refused unless allowed."""
        whole("window", self._window, 2)
        if most is not None:
            whole("max_windows", most, 1)
        tokenizer = tokenizer_of(self._model, self._tokenizer, self._options)
        found = read_samples(
            text, tokenizer=tokenizer, num_samples=1, sequence_length=self._window, limits=limits_of(self._model), all_rows=True,
        )  # fmt: skip
        earlier = checkpoint.report(self._model)
        items = {item for samples in used for item in samples.items}
        items |= set((earlier.calibration or {}).get("items", ())) if earlier else set()
        if not same_allowed and (common := items & set(found.items)):
            raise CalibrationError(
                f"{len(common)} of the texts in {found.source} are calibrated on, so figures on it would flatter; measure on other "
                "text, or allow it explicitly."
            )
        self._text, self._most = replace(found, rows=found.rows[:most]), most

    def measure(self) -> Measurement:
        """The model as it is now, on the text; the text of a model was compared with its calibration's before."""
        found = evaluate(
            self._model, self._text.rows, tokenizer=self._tokenizer, window=self._window, same_text_allowed=True
        )
        return replace(found, text=self._text.source, max_windows=self._most)

    def run(self, recipe: Recipe, row: Row, dense: "_Dense") -> None:
        """Prune, measure and make dense again; the row gets the draw, or the reason why there is none."""
        if row.error is not None:
            return
        try:
            report, spent, grown = self._prune(recipe)
            value = self.measure().value
            row.draws.append(_draw(recipe, report, value, spent, grown))
            row.notes = row.notes or report.notes
        except Exception as error:  # whatever goes wrong with one recipe, the others shall run
            kind = "" if isinstance(error, HfSparseError) else f"{type(error).__name__}: "
            row.error = kind + ((str(error).splitlines() or [""])[0] or "no message")
        finally:
            dense.restore()

    def _prune(self, recipe: Recipe) -> tuple[Report, Spent, int | None]:
        # On an accelerator most of the memory is not the process's own.
        growth = Growth() if recipe.config.device in (None, "cpu") else None
        start, saved = Spent.now(), self._shared.saved
        report = prune_sharing_(self._model, recipe.config, self._shared)
        spent = Spent.now().since(start).plus(self._shared.saved.since(saved))
        return report, spent, None if growth is None else growth.peak()


def _draw(recipe: Recipe, report: Report, value: float, spent: Spent, grown: int | None) -> Draw:
    keys = ("source", "fingerprint", "samples", "tokens")
    data = None if report.calibration is None else {key: report.calibration[key] for key in keys}
    return Draw(recipe.config.seed, value, report.sparsity, spent.cpu, spent.wall, grown, data)


class _Dense:
    """The model as it was given: its weights, its report and its claim."""

    def __init__(self, model: nn.Module, everything: bool) -> None:
        blocks = find_sites(model).blocks
        self._model, self._blocks = model, Snapshot(blocks)
        inside = {id(t) for block in blocks for t in (*block.module.parameters(), *block.module.buffers())}
        # Only the order of the residual stream reaches beyond the blocks.
        rest = [t for t in (*model.parameters(), *model.buffers()) if everything and id(t) not in inside]
        self._rest = [(t, t.detach().clone()) for t in rest if t.device.type != "meta"]
        self._report = checkpoint.report(model)
        self._claim = getattr(getattr(model, "config", None), checkpoint.CONFIG_KEY, None)

    def restore(self) -> None:
        """Put everything back, bit for bit."""
        self._blocks.restore()
        with torch.no_grad():
            for tensor, kept in self._rest:
                tensor.copy_(kept)
        checkpoint.detach(self._model)
        if self._report is not None:
            checkpoint.attach_report(self._model, self._report)
        if self._claim is not None:
            setattr(self._model.config, checkpoint.CONFIG_KEY, self._claim)
