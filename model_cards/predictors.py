"""What a README says of contextual predictors: a part of its own, made from the file that they are saved in."""

import math
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import ModelCardData

from hf_sparse.config import PredictorConfig
from hf_sparse.predictors.figures import Figure
from hf_sparse.predictors.saving import FILE, About, read_about
from hf_sparse.replace import write_whole
from hf_sparse.report_text import percent
from model_cards import facts, header, parts
from model_cards.escape import code, fenced, json_text, plain
from model_cards.parts import PREDICTORS
from model_cards.source import inherited, is_repository, known_name, local_card

_SHOWN = 20  # numbers of blocks
_KINDS = {
    "shadow": "one network for the whole model, read at the input of the first block that skips",
    "dejavu": "one network for each block",
    "gate_first": "the gate of each feed-forward, computed whole, tells its neurons; a network tells the heads",
    "static": "the same heads and neurons for every token",
}
_SNIPPET = """import hf_sparse
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH_OR_REPOSITORY")  # predictors are on while it generates
with hf_sparse.predictors_disabled(model):
    ...  # dense"""


def with_predictors(readme: str, folder: Path) -> str:
    """A README with the part about the predictors in a folder, or without that part where there are none.

    Raises: CheckpointError for a file of predictors that cannot be read.
    """
    body = header.split(readme)[1]
    top = readme[: len(readme) - len(body)]
    if not (folder / FILE).is_file():
        return top + parts.without_part(body, PREDICTORS)
    newline = "\r\n" if "\r\n" in readme else "\n"
    return top + parts.replace_part(body, PREDICTORS, section(read_about(folder / FILE)), newline)


def write_part(folder: Path, base: str = "") -> bool:
    """Renew the part in a folder's README.md, which is made where there is none; False where it is a person's own.

    Raises: as `with_predictors`.
    """
    file = folder / "README.md"
    present = (folder / FILE).is_file()
    if not file.exists():
        if present:
            write_whole(file, with_predictors(_start(base), folder).encode("utf-8"))
        return present
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    if parts.part_of(text) is None and parts.part_of(text, PREDICTORS) is None:
        return False
    renewed = with_predictors(text, folder)
    if renewed != text:
        write_whole(file, renewed.encode("utf-8"))
    return True


def _start(base: str) -> str:
    """Header and heading of the card of a model that is not sparse itself."""
    on_hub = is_repository(base)
    data = ModelCardData(
        base_model=base if on_hub else None, library_name="transformers", tags=["hf_sparse", "contextual-sparsity"],
        **inherited(local_card(base), base),
    )  # fmt: skip
    name = base if on_hub else facts.short_name(known_name(base))
    return f"---\n{data}\n---\n\n# {plain(name or 'Model')} with contextual predictors\n"


def section(about: About) -> str:
    """The part's Markdown, without markers."""
    config, layout = about.config, about.layout
    rows = [
        ("Kind", f"{code(config.kind)}: {plain(_KINDS.get(config.kind, 'not known'))}"),
        ("Learned to tell", code(config.criterion)),
        ("Neurons kept", f"{100 * config.keep_neurons:g} %, in blocks of {config.neuron_block}"),
        ("Heads kept", f"{100 * config.keep_heads:g} %"),
        ("Chosen", _chosen(config)),
        (
            "Blocks",
            f"{len(layout.blocks)} of {layout.total_blocks} skip; dense: {_numbers(layout.dense_blocks)}",
        ),
        ("Numbers in the file", f"{about.weights:,}"),
        ("Learned from", _learned(about)),
    ]
    lines = [
        "## Contextual sparsity", "",
        f"While the model generates, the predictors in `{FILE}` tell which neurons and attention heads a token needs, and hf_sparse leaves "
        "out the others. Prompts are computed whole. The weights of the model are unchanged: without hf_sparse it runs as ever, dense.",
        "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), "", *_figures(about.figures),
        fenced(_SNIPPET, "python"), "", "The exact config:", "", fenced(json_text(config.to_dict()), "json"),
    ]  # fmt: skip
    return "\n".join(lines)


def _numbers(blocks: tuple[int, ...]) -> str:
    more = f" and {len(blocks) - _SHOWN} more" if len(blocks) > _SHOWN else ""
    return (", ".join(map(str, blocks[:_SHOWN])) or "none") + more


def _chosen(config: PredictorConfig) -> str:
    where = "in each block for itself" if config.selection == "block" else "over all blocks that skip"
    return f"{where}, {'for every token' if config.refresh_every == 1 else f'anew every {config.refresh_every} tokens'}"


def _learned(about: About) -> str:
    learned = about.learned
    if learned is None:
        return "not told"
    return f"{plain(learned.source)}, {learned.tokens:,} tokens, fingerprint {code(learned.fingerprint)}"


def _figures(figures: list[Figure]) -> Iterator[str]:
    if not figures:
        yield "What they cost in quality and gain in time was not measured: `hf-sparse predictor evaluate FOLDER --record`."
        yield ""
        return
    yield "| Neurons, heads kept | Perplexity, dense | with predictors | Right ones among the chosen: neurons, heads | Text | Window | Tokens | Fingerprint |"
    yield "|---|---|---|---|---|---|---|---|"
    for figure in figures:
        recalls = ", ".join(
            "–" if value is None else percent(value) for value in (figure.recall_neurons, figure.recall_heads)
        )
        yield (
            f"| {plain(figure.neurons)}, {plain(figure.heads)} | {_perplexity(figure.dense)} | {_perplexity(figure.loss)} | {recalls} | "
            f"{plain(figure.text)} | {figure.window:,} | {figure.tokens:,} | {code(figure.fingerprint)} |"
        )
    yield ""
    yield "Token perplexity with a mask for each token, chosen from that token and those before it; the dense one on the same tokens."
    yield ""
    timed = [figure for figure in figures if figure.speed is not None and figure.dense_speed]
    for figure in timed:
        own = (
            "" if figure.share_of_time is None else f", {percent(figure.share_of_time)} of it the predictors' own work"
        )
        yield (
            f"* {plain(figure.neurons)}, {plain(figure.heads)}: {figure.speed:.1f} tokens a second, {figure.speed / figure.dense_speed:.2f} "  # type: ignore[operator]
            f"times as fast as dense{own}. {plain(figure.machine)}; another machine gives other figures."
        )
    if timed:
        yield ""


def _perplexity(loss: float) -> str:
    return f"{math.exp(min(loss, 700.0)):.4g}"
