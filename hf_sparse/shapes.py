"""Tells the formulas of `cost` what a model looks like: blocks, the inputs of their sites, and who reads which of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_sparse.config import SparsityConfig
from hf_sparse.cost import BlockShape, InputShape, Recipe
from hf_sparse.families import Inventory
from hf_sparse.patterns import Pattern
from hf_sparse.registry import ALLOCATIONS, METRICS, UPDATES
from hf_sparse.sites import Site

_SHARED = {"q": "q k v", "k": "q k v", "v": "q k v", "gate": "gate up", "up": "gate up"}
_CHOSEN_EXPERTS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "top_k",
    "num_selected_experts",
)
_ALL_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class ModelShape:
    """A model in figures; nothing of its weights is in it."""

    blocks: tuple[BlockShape, ...]
    parameters: int  # tied ones once
    hidden: int
    itemsize: int  # bytes of a weight
    vocabulary: int
    outside: int  # parameters that belong to no block
    head: int  # of them, those of an output layer of its own
    largest: int  # parameters in the largest tensor
    strange: str = ""  # why time cannot be foretold for it

    @property
    def weights_pruned(self) -> int:
        return sum(block.weights_pruned for block in self.blocks)


def shape_of(model: nn.Module, inventory: Inventory, chosen: Mapping[int, Sequence[Site]]) -> ModelShape:
    """The figures of a model, on any device; `chosen` are the sites that are pruned.

    Sites read one input where their roles say so (q, k and v; gate and up) or one matrix holds them; others count as having one each.
    """
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    width = _width(text)
    blocks = tuple(
        _block(
            block.module, inventory.sites[block.index], {site.name for site in chosen.get(block.index, ())}, width, text
        )
        for block in inventory.blocks
    )
    floating = [parameter for parameter in parameters.values() if parameter.is_floating_point()]
    total = sum(parameter.numel() for parameter in parameters.values())
    inside = {id(parameter) for block in inventory.blocks for parameter in block.module.parameters()}
    embeddings = _module(model, "get_input_embeddings")
    head = _module(model, "get_output_embeddings")
    weight = getattr(head, "weight", None)
    tied = embeddings is not None and weight is getattr(embeddings, "weight", None)
    tied = tied or bool(getattr(text, "tie_word_embeddings", False))
    return ModelShape(
        blocks=blocks, parameters=total, hidden=width,
        itemsize=max((parameter.element_size() for parameter in floating), default=4),
        vocabulary=int(getattr(embeddings, "num_embeddings", 0) or 0),
        outside=sum(parameter.numel() for key, parameter in parameters.items() if key not in inside),
        head=0 if tied or weight is None else weight.numel(),
        largest=max((parameter.numel() for parameter in parameters.values()), default=0), strange=_strange(config, width),
    )  # fmt: skip


def _module(model: nn.Module, getter: str) -> Any:
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None


def _width(text: Any) -> int:
    for name in ("hidden_size", "d_model", "n_embd", "dim"):
        if isinstance(found := getattr(text, name, None), int) and found > 0:
            return found
    return 0


def _strange(config: Any, width: int) -> str:
    if not width:
        return "its configuration does not say how wide its hidden states are"
    parts = [name for name in ("vision_config", "audio_config") if getattr(config, name, None) is not None]
    return f"it has a {parts[0].partition('_')[0]} part, whose inputs are no tokens" if parts else ""


def _number(text: Any, names: Sequence[str]) -> int:
    found = (getattr(text, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool) and value > 0), 0)


def _reached(text: Any, experts: int) -> float:
    """The share of tokens that one of the experts sees, were all chosen equally often."""
    chosen = _number(text, _CHOSEN_EXPERTS)
    return min(1.0, chosen / experts) if chosen and experts else 1.0


def _block(module: nn.Module, sites: Sequence[Site], pruned: set[str], width: int, text: Any) -> BlockShape:
    groups: dict[tuple[Any, ...], list[Site]] = {}
    for site in sites:
        path = site.module.rpartition(".")[0] if site.rows is None and site.expert is None else site.module
        shared = _SHARED.get(site.role or "")
        key = (path, site.expert, shared, site.shape[1]) if shared else (site.name,)
        groups.setdefault(key, []).append(site)
    experts = _number(text, _ALL_EXPERTS)
    counted: dict[InputShape, int] = {}
    for members in groups.values():
        first = members[0]
        of_expert = first.expert is not None or ".experts." in first.module
        shape = InputShape(
            first.shape[1], sum(site.shape[0] for site in members),
            tuple(site.shape[0] for site in members if site.name in pruned), _reached(text, experts) if of_expert else 1.0,
        )  # fmt: skip
        counted[shape] = counted.get(shape, 0) + 1
    inputs = tuple(
        InputShape(shape.columns, shape.rows, shape.pruned, shape.reached, number) for shape, number in counted.items()
    )
    heads = _number(text, ("num_attention_heads", "num_heads", "n_head"))
    size = _number(text, ("head_dim", "d_kv")) or (width // heads if heads else 0)
    attends = any(site.role in ("q", "o") for site in sites)
    parameters = sum(parameter.numel() for parameter in {id(p): p for p in module.parameters()}.values())
    return BlockShape(parameters, inputs, width, heads * size if attends else 0)


def recipe_of(config: SparsityConfig) -> Recipe:
    """What decides about cost in a configuration."""
    entry = METRICS[config.metric]
    updates = [UPDATES[name] for name in config.update]
    names = {entry.name, *([str(entry.traits["otherwise"])] if "otherwise" in entry.traits else [])}
    measured = {need for name in names for need in (*METRICS[name].needs, *METRICS[name].consumer_needs)}
    first = next((update for update in updates if not update.traits.get("sets_target")), None)
    return Recipe(
        metrics=tuple(sorted(names)), statistics=frozenset(measured.union(*(update.needs for update in updates))),
        updates=tuple(config.update), options={update.name: config.options_of(update.name) for update in updates},
        grouped=Pattern.parse(config.pattern).group is not None,
        own_choice=first is not None and first.traits.get("own_metric") == config.metric,
        two_streams=any(update.traits.get("second_stream") for update in updates),
    )  # fmt: skip


def dense_passes(config: SparsityConfig) -> frozenset[str]:
    """What an allocation wants to know of the dense model, which takes a pass of its own; empty where it looks at nothing."""
    entry = ALLOCATIONS[config.allocation] if isinstance(config.allocation, str) else None
    return frozenset(entry.needs) if entry is not None and "measure" in entry.traits else frozenset()
