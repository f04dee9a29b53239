"""Feed-forwards, projections and whole models that compute only what is chosen: `python tests/benchmarks/contextual.py`.

Random bfloat16 blocks in the shape of Llama, one token. A pass runs the feed-forwards of so many blocks that no cache holds their
weights; dense and gathered passes take turns in one process, each over weights of its own. One thread is measured by its own CPU
time, which leaves out what other processes take. Figures are ratios of medians, with the 10th and 90th percentile of single rounds.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from sparse_kernels import in_large_pages, measure, ratio
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hf_sparse import environment as surroundings
from hf_sparse import native, use_sparse_kernels_
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
MODELS: dict[str, dict[str, Any]] = {  # in the shape of Llama
    "100M": {"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12},
    "1B": {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4},
    "3.2-1B": {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
}  # fmt: skip


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


def of_size(name: str) -> LlamaForCausalLM:
    """Random weights, the same in all blocks, but in memory of their own."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**MODELS[name], head_dim=64)).eval().requires_grad_(False)
        rotary = LlamaRotaryEmbedding(model.config)
    finally:
        torch.set_default_dtype(before)
    torch.manual_seed(0)
    model.model.rotary_emb = rotary
    drawn: dict[torch.Size, torch.Tensor] = {}
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if parameter.shape not in drawn:
                numbers = torch.randn(parameter.shape, dtype=torch.bfloat16) * 0.02
                drawn[parameter.shape] = numbers if parameter.dim() > 1 else torch.ones_like(numbers)
            module._parameters[key] = torch.nn.Parameter(drawn[parameter.shape].clone(), requires_grad=False)
    model.tie_weights()
    return model


def make_sparse_(model: LlamaForCausalLM) -> None:
    """2:4 with places at random, on sparse kernels."""
    places = torch.tensor(list(itertools.permutations((1, 1, 0, 0)))).unique(dim=0).bfloat16()
    masks: dict[torch.Size, torch.Tensor] = {}
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            shape = module.weight.shape
            if shape not in masks:
                masks[shape] = places[torch.randint(len(places), (shape.numel() // 4,))].view(shape)
            module.weight.data.mul_(masks[shape])
    use_sparse_kernels_(model, choose="always")


class OwnTime:
    """CPU time of what a running predictor does itself: its network, and the choice."""

    def __init__(self, running: Gathered) -> None:
        self.seconds = 0.0
        for owner, name in ((running.predictor, "forward"), (running, "_choose")):
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            before = time.thread_time()
            found = function(*args)
            self.seconds += time.thread_time() - before
            return found

        return timed


def generate_table(name: str, rounds: int, neuron_block: int, shares: list[tuple[float, float]], sparse: bool) -> None:
    """Greedy decoding, whole and with shares of neurons and heads; what 16 further tokens take beside the prompt and the first."""
    model = of_size(name)
    weights = sum(parameter.numel() for parameter in model.parameters())
    if sparse:
        make_sparse_(model)
    layout = Layout.of(model, (0,), neuron_block)
    predictor = shadow(layout, {"tells": ("neurons", "heads"), "rank": rank_for(weights, layout, "shadow")})
    rows = torch.randint(0, model.config.vocab_size, (1, 16))

    def step(tokens: int) -> float:
        before = time.thread_time()
        model.generate(rows, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return time.thread_time() - before

    ways = [(1.0, 1.0), *shares]
    times: dict[tuple[float, float], list[float]] = {way: [] for way in ways}
    own: dict[tuple[float, float], list[float]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for neurons, heads in ways:
            with ExitStack() as stack:
                watch = None
                if (neurons, heads) != (1.0, 1.0):
                    selection = Selection(keep_neurons=neurons, keep_heads=heads)
                    watch = OwnTime(stack.enter_context(gathered(model, predictor, selection)))
                first, spent = step(1), watch.seconds if watch else 0.0
                taken = step(17) - first
                if turn:
                    times[neurons, heads].append(taken / 16)
                    own[neurons, heads].append((watch.seconds - spent) / 16 if watch else 0.0)
    print(f"{name}{', 2:4 on sparse kernels' if sparse else ''}: {weights} weights, predictor {predictor.weight_count() / weights:.2%} of them, neurons in blocks of {neuron_block}")  # fmt: skip
    print("| neurons, heads | x without | ms a token | predictor's own ms | of the step | of a step without |")
    whole = statistics.median(times[1.0, 1.0])
    for way, found in times.items():
        step_ms, own_ms = statistics.median(found) * 1000, statistics.median(own[way]) * 1000
        print(
            f"| {way[0]:.0%}, {way[1]:.0%} | {ratio(times[1.0, 1.0], found)} | {step_ms:.1f} | {own_ms:.2f} | {own_ms / step_ms:.1%} "
            f"| {own_ms / whole / 1000:.1%} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), type=lambda text: tuple(map(int, text.split("/"))), help="hidden/neurons, such as 2048/8192")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=15.0, help="for each kind of predictor")
    parser.add_argument("--neuron-blocks", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--large-pages", action="store_true", help="for all weights, those of torch included")
    parser.add_argument("--heads", type=int, nargs="+", help="hidden sizes: projections of heads instead")
    parser.add_argument(
        "--generate", type=int, metavar="ROUNDS", help="a whole model instead, and the predictor's own time"
    )
    parser.add_argument("--model", choices=MODELS, default="3.2-1B", help="of --generate")
    parser.add_argument("--sparse", action="store_true", help="--generate: 2:4 on sparse kernels, the comparison too")
    parser.add_argument("--kept", nargs="+", default=["0.75/0.75", "0.5/0.5"], help="--generate: neurons/heads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"Instruction set {native.instruction_set()}, threads {arguments.threads}; {surroundings.versions()}")
    if arguments.heads or arguments.generate:
        with torch.inference_mode():
            for hidden in arguments.heads or ():
                heads_table(hidden, arguments.seconds)
            if arguments.generate:
                shares = [tuple(map(float, text.split("/"))) for text in arguments.kept]
                block = arguments.neuron_blocks[-1]
                generate_table(arguments.model, arguments.generate, block, shares, arguments.sparse)
        return
    print("| hidden/neurons | way | x torch | torch ms a block | predictor | rounds |\n|---|---|---|---|---|---|")
    with torch.inference_mode():
        for hidden, neurons in arguments.shapes:
            table(hidden, neurons, arguments.seconds, arguments.large_pages, tuple(arguments.neuron_blocks))


if __name__ == "__main__":
    main()
