"""Feed-forwards, projections and whole models that compute only what is chosen: `python tests/benchmarks/contextual.py`.

Random bfloat16 blocks in the shape of Llama, one token. A pass runs the feed-forwards of so many blocks that no cache holds their
weights; dense and gathered passes take turns in one process, each over weights of its own. One thread is measured by its own CPU
time, which leaves out what other processes take. Figures are ratios of medians, with the 10th and 90th percentile of single rounds.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from kernels import in_large_pages, measure, ratio
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sparse import environment as surroundings
from hf_sparse import native
from hf_sparse.predictors.criteria import Scores
from hf_sparse.predictors.gathered import Gathered, gathered
from hf_sparse.predictors.layout import Layout
from hf_sparse.predictors.networks import GateFirst, Predictor, Shadow, rank_for
from hf_sparse.predictors.rows import Rows
from hf_sparse.predictors.select import Selection, top
from hf_sparse.predictors.traces import Statistics

SHAPES = ((768, 2048), (2048, 8192), (4096, 11008))  # (hidden, neurons)
SHARES = (0.75, 0.5, 0.25)
BYTES = 600 << 20  # of feed-forwards in one pass
Task = Callable[[int], Any]


def built(hidden: int, neurons: int, blocks: int, large_pages: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=128, hidden_size=hidden, intermediate_size=neurons, num_hidden_layers=blocks, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256, max_position_embeddings=64, head_dim=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16().eval().requires_grad_(False)
    for layer in model.model.layers if large_pages else ():
        for module in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            module.weight.data = in_large_pages(module.weight.data)
    return model


def shadow(layout: Layout, options: dict[str, object]) -> Shadow:
    """One with random weights."""
    ones = Statistics([torch.ones(size) for size in layout.groups], [torch.ones(size) for size in layout.heads], [])
    return Shadow(layout, "magnitude", ones, options).eval().requires_grad_(False)


def predictor_of(kind: type[Predictor], model: LlamaForCausalLM, neuron_block: int) -> Predictor:
    """Random weights; `shadow` has the rank that it has by default."""
    layout = Layout.of(model, (), neuron_block)
    ones = Statistics([torch.ones(size) for size in layout.groups], [torch.ones(size) for size in layout.heads], [])
    if kind is GateFirst:
        return GateFirst(layout, "magnitude", ones, {"tells": ()}, [torch.ones(size) for size in layout.neurons]).eval()
    weights = sum(parameter.numel() for parameter in model.model.layers.parameters())
    rank = rank_for(weights, layout, "shadow", ("neurons",))
    return shadow(layout, {"tells": ("neurons",), "rank": rank})


class Passes:
    """One token through the feed-forwards of a model, in several ways."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.feeds = [layer.mlp for layer in model.model.layers]
        self.x = torch.randn(1, 1, model.config.hidden_size).bfloat16()

    def dense(self, turn: int) -> None:
        for feed in self.feeds:
            feed(self.x)

    def given(self, running: Gathered, share: float) -> Task:
        """Random neurons, known beforehand."""
        neurons = running.layout.neurons[0]
        some = Scores(torch.ones(1, 1, neurons, dtype=torch.bool), None)  # what is looked up before the rows are
        drawn = [torch.randperm(neurons)[: round(neurons * share)].sort().values.view(1, -1) for _ in self.feeds]

        def task(turn: int) -> None:
            running._rows = {(position, "neurons"): Rows(rows, None) for position, rows in enumerate(drawn)}
            running.masks = dict.fromkeys(range(len(drawn)), some)
            self.dense(turn)

        return task

    def predicted(self, running: Gathered, share: float) -> Task:
        """Neurons as the predictor tells them, all of its work included."""
        selection = Selection(keep_neurons=share)

        def task(turn: int) -> None:
            running.selection = selection
            running._rows.clear()
            running.masks.clear()
            for source in running.predictor.reads():
                running._tell(running.predictor(source, self.x + turn))
            self.dense(turn)

        return task


def table(hidden: int, neurons: int, seconds: float, large_pages: bool, neuron_blocks: tuple[int, ...]) -> None:
    blocks = max(2, -(-BYTES // (hidden * neurons * 6)))
    whole, cut = (built(hidden, neurons, blocks, large_pages) for _ in range(2))
    passes, dense = Passes(cut), Passes(whole)
    kinds = [(Shadow, size) for size in neuron_blocks] + [(GateFirst, 1)]
    for kind, size in kinds:
        predictor = predictor_of(kind, cut, size)
        with gathered(cut, predictor, Selection(keep_neurons=0.5)) as running:
            running._on = running._gathers = True
            tasks: dict[str, Task] = {"torch": dense.dense}
            for share in (1.0, *SHARES) if kind is Shadow and size == neuron_blocks[0] else ():
                tasks[f"given {share:.0%}"] = passes.given(running, share)
            for share in SHARES:
                tasks[f"{predictor.kind} {share:.0%}"] = passes.predicted(running, share)
            times = measure(tasks, seconds)
        share_of = predictor.weight_count() / sum(parameter.numel() for parameter in whole.model.layers.parameters())
        milliseconds = sorted(times["torch"])[len(times["torch"]) // 2] * 1000 / blocks
        for name in list(tasks)[1:]:
            note = f"{predictor.kind}, neurons in blocks of {size}, {share_of:.2%} of the weights"
            print(f"| {hidden}/{neurons} | {name} | {ratio(times['torch'], times[name])} | {milliseconds:.2f} | {note} | {len(times['torch'])} |", flush=True)  # fmt: skip


def heads_table(hidden: int, seconds: float) -> None:
    """Query and output projections of chosen heads, their rows put together in every pass."""
    blocks = max(2, min(64, -(-BYTES // (hidden * hidden * 8))))
    whole, cut = (built(hidden, 64, blocks, False) for _ in range(2))
    x, layout = torch.randn(1, 1, hidden).bfloat16(), Layout.of(cut, ())
    predictor = shadow(layout, {"tells": ("heads",), "rank": 8})

    def task(model: LlamaForCausalLM, share: float) -> Task:
        def run(turn: int) -> None:
            running._rows.clear()
            mask = top(torch.rand(1, 1, layout.heads[0]), max(1, round(share * layout.heads[0])))
            running.masks = dict.fromkeys(range(blocks), Scores(None, mask))
            for layer in model.model.layers:
                layer.self_attn.o_proj(layer.self_attn.q_proj(x))

        return run

    with gathered(cut, predictor, Selection(keep_neurons=1.0, keep_heads=0.5)) as running:
        running._on = running._gathers = True
        times = measure(
            {"torch": task(whole, 1.0)} | {f"heads {share:.0%}": task(cut, share) for share in SHARES}, seconds
        )
    for name in list(times)[1:]:
        print(f"| {hidden} | {name} | {ratio(times['torch'], times[name])} | {len(times['torch'])} |", flush=True)


def of_one_billion() -> LlamaForCausalLM:
    """Random, in the shape of Llama 3.2 1B (1.2 B weights)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def generate_table(rounds: int, neuron_block: int) -> None:
    """Greedy decoding, whole and with shares of neurons and heads; what 16 further tokens take beside the prompt and the first."""
    model = of_one_billion()
    layout = Layout.of(model, (0,), neuron_block)
    weights = sum(parameter.numel() for parameter in model.parameters())
    predictor = shadow(layout, {"tells": ("neurons", "heads"), "rank": rank_for(weights, layout, "shadow")})
    rows = torch.randint(0, 128256, (1, 16))

    def step(tokens: int) -> float:
        before = time.thread_time()
        model.generate(rows, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return time.thread_time() - before

    times: dict[str, list[float]] = {"dense": [], "75%": [], "50%": []}
    for turn in range(rounds + 1):
        for name, found in times.items():
            kept = float(name[:-1]) / 100 if name != "dense" else 1.0
            way = (
                gathered(model, predictor, Selection(keep_neurons=kept, keep_heads=kept)) if kept < 1 else nullcontext()
            )
            with way:
                taken = step(17) - step(1)
            found += [taken / 16] if turn else []
    for name, found in times.items():
        print(
            f"| generate, 1.2 B | {name} | {ratio(times['dense'], found)} | {sorted(found)[rounds // 2] * 1000:.0f} ms a token |"
        )
    print(f"predictor: {predictor.weight_count() / weights:.2%} of the weights, neurons in blocks of {neuron_block}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), type=lambda text: tuple(map(int, text.split("/"))), help="hidden/neurons, such as 2048/8192")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=15.0, help="for each kind of predictor")
    parser.add_argument("--neuron-blocks", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--large-pages", action="store_true", help="for all weights, those of torch included")
    parser.add_argument("--heads", type=int, nargs="+", help="hidden sizes: projections of heads instead")
    parser.add_argument("--generate", type=int, metavar="ROUNDS", help="a whole model instead")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"Instruction set {native.instruction_set()}, threads {arguments.threads}; {surroundings.versions()}")
    if arguments.heads or arguments.generate:
        with torch.inference_mode():
            for hidden in arguments.heads or ():
                heads_table(hidden, arguments.seconds)
            if arguments.generate:
                generate_table(arguments.generate, arguments.neuron_blocks[-1])
        return
    print("| hidden/neurons | way | x torch | torch ms a block | predictor | rounds |\n|---|---|---|---|---|---|")
    with torch.inference_mode():
        for hidden, neurons in arguments.shapes:
            table(hidden, neurons, arguments.seconds, arguments.large_pages, tuple(arguments.neuron_blocks))


if __name__ == "__main__":
    main()
