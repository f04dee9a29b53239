"""The published implementations' masks and perplexities on a small real model are reproduced."""

import json
import math
from pathlib import Path

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_sparse import SparsityConfig, prune_

MAX_FLIPPED = 1e-4  # share of mask bits that a tie or rounding may flip
CASES = {
    "magnitude_2_4_all": {"metric": "magnitude"},
    "wanda_2_4_all": {"metric": "wanda"},
    "wanda_unstructured50_all": {"metric": "wanda", "pattern": "unstructured", "sparsity": 0.5},
    "dass_2_4_mlp": {"metric": "dass", "targets": "mlp"},
}


def perplexity(model: torch.nn.Module, rows: torch.Tensor) -> float:
    with torch.no_grad():
        losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in rows.split(32)]
    return math.exp(sum(losses) / len(rows))


def rows(test_data: Path, name: str) -> torch.Tensor:
    return torch.from_numpy(numpy.load(test_data / "reference" / f"{name}_ids.npy")).long()


@pytest.mark.parametrize("case", CASES)
def test_masks_and_perplexity_of_the_published_code(case: str, test_data: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(test_data / "models" / "stories260k")
    prune_(model, SparsityConfig(calibration=rows(test_data, "calib"), num_samples=64, batch_size=1, **CASES[case]))
    dropped = numpy.load(test_data / "reference" / f"{case}.npz")
    weights = model.state_dict()
    flipped = sum(int(((weights[name] == 0).numpy() != dropped[name]).sum()) for name in dropped.files)
    assert flipped <= MAX_FLIPPED * sum(dropped[name].size for name in dropped.files)
    published = json.loads((test_data / "reference" / "results.json").read_text())[case]["ppl"]
    assert perplexity(model, rows(test_data, "eval")) == pytest.approx(published, rel=0.005)


def test_masks_do_not_depend_on_the_batch_size(test_data: Path) -> None:
    kept = []
    for size in (1, 16):
        model = AutoModelForCausalLM.from_pretrained(test_data / "models" / "stories260k")
        prune_(
            model, SparsityConfig(metric="wanda", calibration=rows(test_data, "calib"), num_samples=64, batch_size=size)
        )
        kept.append({name: weight != 0 for name, weight in model.state_dict().items()})
    differing = sum(int((kept[0][name] != kept[1][name]).sum()) for name in kept[0])
    assert differing <= MAX_FLIPPED * sum(mask.numel() for mask in kept[0].values())
