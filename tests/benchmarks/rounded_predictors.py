"""What rounding a predictor's weights to bfloat16 costs in quality: `python tests/benchmarks/rounded_predictors.py`.

stories260k in float32; a `shadow` predictor of one seed, run as it was trained, and with the weights that it has in bfloat16 models.
"""

import argparse
import copy
import tempfile

import torch
from predictors import Stories
from transformers import AutoModelForCausalLM

from hf_sparse.predictors.evaluate import evaluate_predictors
from hf_sparse.predictors.layout import Layout
from hf_sparse.predictors.networks import LowRank, Predictor
from hf_sparse.predictors.recording import record
from hf_sparse.predictors.running import Rounded
from hf_sparse.predictors.select import Selection
from hf_sparse.predictors.train import Training, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = Stories()
    model = AutoModelForCausalLM.from_pretrained(data.path, dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as folder:
        traces = record(model, data.rows("calib", 128), folder, layout=Layout.of(model, (0,), 1))
        trained = train(model, traces, "shadow", Training(seed=given.seed), rank=data.rank)
    rounded = with_rounded_networks(trained)
    shares = [Selection(keep_neurons=share, keep_heads=share) for share in (0.75, 0.5)]
    texts = data.rows("eval", given.windows)
    predictors = {"float32": [trained], "bfloat16": [rounded]}
    table = evaluate_predictors(model, predictors, texts, shares, window=256, with_agreement=False)
    for name in predictors:
        rises = [
            table.rise(table.find(name=name, keep_neurons=s.keep_neurons, keep_heads=s.keep_heads)) for s in shares
        ]
        print(name, " ".join(f"{share.keep_neurons:.0%}: {rise:.4f}" for share, rise in zip(shares, rises)))


def with_rounded_networks(predictor: Predictor) -> Predictor:
    """The same predictor with rounded networks, which bfloat16 models get by themselves."""
    rounded = copy.copy(predictor)
    rounded._modules = {
        name: Rounded(one) if isinstance(one, LowRank) else one for name, one in predictor._modules.items()
    }
    return rounded


if __name__ == "__main__":
    main()
