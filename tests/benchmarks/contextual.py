"""Feed-forwards that compute only the chosen neurons against the same ones whole: `python tests/benchmarks/contextual.py`.

Random bfloat16 blocks in the shape of Llama, one token. A pass runs the feed-forwards of so many blocks that no cache holds their
weights; dense and gathered passes take turns in one process, each over weights of its own. One thread is measured by its own CPU
time, which leaves out what other processes take. Figures are ratios of medians, with the 10th and 90th percentile of single rounds.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import ExitStack

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
from hf_sparse.predictors.select import Selection
from hf_sparse.predictors.traces import Statistics

SHAPES = ((768, 2048), (2048, 8192), (4096, 11008))  # (hidden, neurons)
SHARES = (0.75, 0.5, 0.25)
BYTES = 600 << 20  # of feed-forwards in one pass
Task = Callable[[int], object]


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


def predictor_of(kind: type[Predictor], model: LlamaForCausalLM, neuron_block: int) -> Predictor:
    """Random weights; `shadow` has the rank that it has by default."""
    layout = Layout.of(model, (), neuron_block)
    ones = Statistics([torch.ones(size) for size in layout.groups], [torch.ones(size) for size in layout.heads], [])
    if kind is GateFirst:
        return GateFirst(layout, "magnitude", ones, {"tells": ()}, [torch.ones(size) for size in layout.neurons]).eval()
    weights = sum(parameter.numel() for parameter in model.model.layers.parameters())
    rank = rank_for(weights, layout, "shadow", ("neurons",))
    return Shadow(layout, "magnitude", ones, {"tells": ("neurons",), "rank": rank}).eval().requires_grad_(False)


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
        with ExitStack() as stack:
            running = stack.enter_context(gathered(cut, predictor, Selection(keep_neurons=0.5)))
            running._on = running._gathers = True
            tasks: dict[str, Task] = {"torch": dense.dense}
            for share in SHARES:
                if kind is Shadow and size == neuron_blocks[0]:
                    tasks[f"given {share:.0%}"] = passes.given(running, share)
                tasks[f"{predictor.kind} {share:.0%}"] = passes.predicted(running, share)
            times = measure(tasks, seconds)
        share_of = predictor.weight_count() / sum(parameter.numel() for parameter in whole.model.layers.parameters())
        milliseconds = sorted(times["torch"])[len(times["torch"]) // 2] * 1000 / blocks
        for name in list(tasks)[1:]:
            note = f"{predictor.kind}, neurons in blocks of {size}, {share_of:.2%} of the weights"
            print(f"| {hidden}/{neurons} | {name} | {ratio(times['torch'], times[name])} | {milliseconds:.2f} | {note} | {len(times['torch'])} |", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), type=lambda text: tuple(map(int, text.split("/"))), help="hidden/neurons, such as 2048/8192")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=15.0, help="for each kind of predictor")
    parser.add_argument("--neuron-blocks", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--large-pages", action="store_true", help="for all weights, those of torch included")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"Instruction set {native.instruction_set()}, threads {arguments.threads}; {surroundings.versions()}")
    start = time.perf_counter()
    print("| hidden/neurons | way | x torch | torch ms a block | predictor | rounds |\n|---|---|---|---|---|---|")
    with torch.inference_mode():
        for hidden, neurons in arguments.shapes:
            table(hidden, neurons, arguments.seconds, arguments.large_pages, tuple(arguments.neuron_blocks))
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
