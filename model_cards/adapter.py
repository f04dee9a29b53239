"""The card of an adapter on a sparse model: what it changes, what happens to the zeros, and how to load and merge it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from hf_sparse import checkpoint, environment
from hf_sparse.errors import ModelError
from hf_sparse.sites import count_zeros
from hf_sparse.text import one_line
from model_cards import again, facts, files
from model_cards.escape import code, fenced, plain, python_literal
from model_cards.merge import merge
from model_cards.render import render
from model_cards.source import inherited, is_repository, local_card

_PLACE = '"PATH_OR_REPOSITORY"'
_LIST_AT_MOST = 20


@dataclass(frozen=True)
class _Adapter:
    """One adapter, and what a plain merge of it would do to the zeros of the base."""

    name: str
    kind: str  # as PEFT calls it, such as "LORA"
    rank: int | None
    sites: int  # sparse tensors that it changes
    masked: int  # of these, those that `mask_lora_` has masked
    lost: int  # zeros that PEFT's own merge fills in after the adapter was saved and loaded again, when no mask is left

    def row(self) -> str:
        mask = "no" if not self.masked else "yes" if self.masked == self.sites else f"on {self.masked} of {self.sites}"
        rank = "none" if self.rank is None else f"{self.rank:,}"
        return f"| {code(self.name)} | {code(self.kind)} | {rank} | {self.sites:,} | {mask} | {self.lost:,} |"


class SparseAdapterCard(ModelCard):
    """The card of adapters on a sparse base, in the same markers as a SparseModelCard; a subclass may name another template.

    A template needs `{{ card_data }}`, `{{ begin }}` and `{{ end }}` as that of a SparseModelCard does. Its other variables:

    | variable | what it holds |
    |---|---|
    | `title` | a heading |
    | `base`, `pattern`, `metric` | the base, its pattern and the metric it was pruned by, as code; the last two may be None |
    | `zeros` | zeros and their share in the pruned sites, counted when the card was made |
    | `has_name` | whether it is known what the base was loaded from |
    | `pruned_here` | whether the base is not what its name gives, as it was pruned since it was loaded |
    | `rows` | rows of a Markdown table, one for each adapter |
    | `masked`, `unmasked` | the adapters that change only kept weights by a mask of ours; the others that lose zeros in a plain merge |
    | `load`, `merge` | blocks of code |
    | `files`, `fold_files` | rows of a Markdown table of names and SHA-256; whether it is long enough to be folded |
    | `versions` | pairs of name and version |
    """

    default_template_path = Path(__file__).with_name("adapter.md")
    _unwanted: Mapping[str, Any] = {}

    @classmethod
    def of_model(
        cls, model: nn.Module, *, base_card: str | None = None, file_hashes: Mapping[str, str] | None = None
    ) -> Self:
        """The card of the adapters on a sparse model: a PeftModel, or a Transformers model with adapters.

        `base_card` is the text of the base's card, whose license is inherited; without one it is looked for where `local_card`
        does. `file_hashes` are those of the saved files.

        Raises: ModelError for a model without adapters, or whose weights are not sparse.
        """
        from hf_sparse.adapters.adapted import check_names, peft_part

        check_names(model, None)
        counted = checkpoint.count(model).values()
        zeros, size = sum(zeros for zeros, _ in counted), sum(size for _, size in counted)
        if not checkpoint.is_sparse(model):
            raise ModelError(
                "the base of the adapters is not sparse, so PEFT's own card tells all; prune it first (prune_)."
            )
        configs = peft_part(model).peft_config
        base = _name_of_base(model, configs)
        data = _header_data(model, base, configs, local_card(base) if base_card is None else base_card)
        variables = {
            **_base_told(model, base),
            **_adapters_told(model, base, configs),
            "zeros": facts.share(zeros, size),
            "files": files.rows(file_hashes or {}),
            "fold_files": len(file_hashes or {}) >= facts.FOLD_FROM,
        }
        card = render(cls, data, variables)
        # PEFT writes the base's folder into the header, which the Hub refuses, and which is nobody's business.
        card._unwanted = {} if is_repository(base) else {"base_model": base, "tags": [f"base_model:adapter:{base}"]}
        return card

    def merged_into(self, existing: str) -> str:
        """A README, such as PEFT has written, with our section renewed or added at its end; otherwise as SparseModelCard's.

        The path of a local base, which PEFT writes into the header, is taken out.

        Raises: CheckpointError where the README's header is not valid YAML.
        """
        return merge(existing, self.content, unwanted=self._unwanted)


def _name_of_base(model: Any, configs: Mapping[str, Any]) -> str:
    """What the adapter's config, or else the model's, says it was loaded from."""
    names = [getattr(config, "base_model_name_or_path", None) for config in configs.values()]
    names.append(getattr(getattr(checkpoint.unwrap(model), "config", None), "name_or_path", None))
    return next((name for name in names if isinstance(name, str) and name), "")


def _header_data(model: Any, base: str, configs: Mapping[str, Any], base_card: str | None) -> ModelCardData:
    values = inherited(base_card, base)
    task = values.pop("pipeline_tag", None) or again.task(type(checkpoint.unwrap(model)).__name__)
    on_hub = is_repository(base)
    kinds = dict.fromkeys(one_line(_kind(config)).lower() for config in configs.values())
    return ModelCardData(
        base_model=base if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        library_name="peft",
        pipeline_tag=task,
        tags=["hf_sparse", "sparse", *kinds, *([f"base_model:adapter:{base}"] if on_hub else [])],
        **values,
    )


def _kind(config: Any) -> str:
    kind = getattr(config, "peft_type", None)
    return str(getattr(kind, "value", kind))


def _base_told(model: nn.Module, base: str) -> dict[str, Any]:
    report = checkpoint.report(model)
    shown = base if is_repository(base) else facts.short_name(base)
    return {
        "title": plain(f"Adapter on {facts.short_name(base) or 'a sparse model'}"),
        "base": code(shown) if shown else "a model made in memory",
        "pattern": code(facts.pattern_name(report) or report.config.get("pattern")) if report else None,
        "metric": code(report.config.get("metric")) if report else None,
        "pruned_here": report is not None and report.model == base != "",
        "has_name": bool(base),
        "versions": [(plain(name), plain(version)) for name, version in environment.versions().items()],
    }


def _adapters_told(model: nn.Module, base: str, configs: Mapping[str, Any]) -> dict[str, Any]:
    adapters = [_adapter(model, name, config) for name, config in configs.items()]
    masked = [adapter.name for adapter in adapters if adapter.masked]
    unmasked = [adapter.name for adapter in adapters if adapter.lost and not adapter.masked]
    shown = base if is_repository(base) else facts.short_name(base)
    return {
        "rows": [adapter.row() for adapter in adapters],
        "masked": facts.listed(masked) if masked else None,
        "unmasked": facts.listed(unmasked) if unmasked else None,
        "load": fenced(_load_snippet(type(checkpoint.unwrap(model)).__name__, shown, list(configs), masked), "python"),
        "merge": fenced('merged = hf_sparse.merge_and_unload(model)\nmerged.save_pretrained("MERGED")', "python"),
    }


def _adapter(model: nn.Module, name: str, config: Any) -> _Adapter:
    from hf_sparse.adapters.adapted import adapted_sites, is_masked, zeros_at_stake

    changed = [item for item in adapted_sites(model) if name in item.adapters()]
    zeros = [(is_masked(item.layer, name), count_zeros(item.weight.detach())) for item in changed]
    rank = getattr(config, "r", None)
    return _Adapter(
        name=name,
        kind=_kind(config),
        rank=rank if isinstance(rank, int) else None,
        sites=sum(count > 0 for _, count in zeros),
        masked=sum(count > 0 for masked, count in zeros if masked),
        lost=zeros_at_stake(model, [name]) + sum(count for masked, count in zeros if masked),
    )


def _load_snippet(model_class: str, base: str, adapters: list[str], masked: list[str]) -> str:
    """The Python that loads base and adapters; masked ones need their mask put back."""
    name = again.auto_class(model_class)
    # PEFT saves the adapter "default" into the folder itself, and each other one into a folder below.
    first, *others = sorted(adapters, key=lambda adapter: adapter != "default")[:_LIST_AT_MOST]
    lines = [
        "import hf_sparse",
        "from peft import PeftModel",
        f"from transformers import {name}",
        "",
        f"base = {name}.from_pretrained({python_literal(base or 'BASE')})",
        f"model = PeftModel.from_pretrained(base, {_PLACE}{_below(first)})",
        *(f"model.load_adapter({_PLACE}{_below(other)})" for other in others),
    ]
    if masked:
        only = "" if len(masked) == len(adapters) else f", {python_literal(masked)}"
        lines.append(f"hf_sparse.mask_lora_(model{only})")
    return "\n".join(lines)


def _below(adapter: str) -> str:
    name = python_literal(adapter)
    return "" if adapter == "default" else f", adapter_name={name}, subfolder={name}"
