"""The model card of a sparse model, made from its report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelCard, ModelCardData

from hf_sparse.report import PICTURE_FILE, Report
from hf_sparse.schema import read_json
from hf_sparse.text import one_line
from model_cards import again, evaluation, facts, recovery
from model_cards.evaluation import Evaluation
from model_cards.merge import merge
from model_cards.render import render
from model_cards.source import CardSource, local_card, name_of_base
from model_cards.variables import variables_of

_LARGEST_CONFIG = 16 * 2**20  # bytes


class SparseModelCard(ModelCard):
    """A card whose figures all come from a report and from evaluations, in a section that can be renewed.

    Subclass it to have cards of your own: name a template (Jinja, as in huggingface_hub) and add variables to it.

        class TeamCard(SparseModelCard):
            default_template_path = Path("team.md")

            @classmethod
            def template_variables(cls, source):
                return {**super().template_variables(source), "team": "Compression"}

        model_cards.set_card_class(TeamCard)  # from now on, saves and pushes write this card

    A template needs `{{ card_data }}` between two lines of `---` at its top, and `{{ begin }}` and `{{ end }}` each on a line of
    its own: what a later save renews stands between these two, and only that is put into a README that is there already. All
    other variables are listed in `model_cards.variables`; the values of the header (`license`, `base_model`, ...) are variables
    too. Text of unknown origin has to go through `model_cards.escape.plain` or `code` before it becomes a variable.
    """

    default_template_path = Path(__file__).with_name("template.md")

    @classmethod
    def header_data(cls, source: CardSource) -> ModelCardData:
        """The values of the card's header; a subclass may add some."""
        report, values = source.report, source.inherited
        task = values.pop("pipeline_tag", None) or again.task(report.model_class)
        results = evaluation.results(source.evaluations, task)
        pattern = facts.pattern_name(report)
        return ModelCardData(
            base_model=source.base if source.on_hub else None,
            # The Hub knows adapter, merge, quantized and finetune. Pruning gives full weights of the same architecture and number
            # format with other values, which is what it lists as finetune; "quantized" would promise a smaller file and format.
            base_model_relation="finetune" if source.on_hub else None,
            library_name="transformers",
            pipeline_tag=task,
            tags=list(dict.fromkeys(["hf_sparse", "sparse", "pruned", *([pattern] if pattern else []), *source.tags])),
            # No `datasets`: the report tells of data by the name they were given, which need not be that of a data set on the Hub.
            model_name=one_line(source.title) if results else None,
            eval_results=results or None,
            **values,
        )

    @classmethod
    def template_variables(cls, source: CardSource) -> dict[str, Any]:
        """The template's variables but for `card_data` and `begin`, as listed in `model_cards.variables`; a subclass may add some."""
        return variables_of(source)

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
        tags: Sequence[str] = (),
        model_config: Mapping[str, Any] | None = None,
        template_path: str | Path | None = None,
        template_str: str | None = None,
        **variables: Any,
    ) -> Self:
        """Tell what the report holds.

        `evaluations` stand in the place of the report's own; `base_card` is the text of the base model's card, whose
        license is inherited; `plot_name` a picture beside the card; `command` what was typed; `tags` further ones; `model_config` the saved
        config.json. `template_path` or `template_str` replace the class's template; further `variables` go to it.

        Raises: CheckpointError where the report is damaged, ConfigError for a template that cannot be used.
        """
        facts.check(report)
        recovery.check(report)
        source = CardSource(
            report=report,
            base=base_model or name_of_base(report),
            evaluations=evaluations or [Evaluation.from_dict(values) for values in report.evaluations],
            base_card=base_card,
            plot_name=plot_name,
            command=command,
            tags=[one_line(tag) for tag in tags],
            model_config=model_config,
        )
        given = {**cls.template_variables(source), **variables}
        return render(cls, cls.header_data(source), given, template_path, template_str)

    @classmethod
    def of_model(cls, model: Any, report: Report, *, base_card: str | None = None, **given: Any) -> Self:
        """The card of a model in memory; `given` are further arguments of `from_report`.

        Without a `base_card`, the license comes from the base model's card where that lies in the model's folder or in the
        Hub's cache. The network is not asked.
        """
        card = local_card(report.model) if base_card is None else base_card
        return cls.from_report(report, base_card=card, model_config=model.config.to_dict(), **given)

    @classmethod
    def from_folder(cls, folder: str | Path, *, base_card: str | None = None, **given: Any) -> Self:
        """The card of a saved model, from the report, config.json and picture in its folder; `given` as in `of_model`.

        Raises: CheckpointError where report or config.json are absent or damaged.
        """
        report = Report.load(folder)
        picture = PICTURE_FILE if (Path(folder) / PICTURE_FILE).is_file() else None
        values = read_json(Path(folder) / "config.json", _LARGEST_CONFIG, "the config")
        card = local_card(report.model) if base_card is None else base_card
        return cls.from_report(report, **{"plot_name": picture, "model_config": values, "base_card": card, **given})

    def merged_into(self, existing: str) -> str:
        """A README with our section renewed or added at its end; what a person wrote outside the markers is kept.

        Header: a person's values stay, ours fill what is absent and replace what we wrote before; results of other tools stay.

        Raises: CheckpointError where the README's header is not valid YAML.
        """
        return merge(existing, self.content)
