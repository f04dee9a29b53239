"""What training gives back of what pruning took: `python tests/benchmarks/recovery.py MODEL [--rows NAME ...] [--json FILE]`.

MODEL is `embedded` or a folder of development data (`models/stories260k`, `text/stories`; see CONTRIBUTING.md). A model is pruned 2:4 in
all block matrices, then trained by the Trainer with the callbacks of this package, and measured on text that is in neither. Training
text: of the embedded model the library's sources outside calibration and evaluation, of the other its calibration rows and text that the
dense model wrote. Each figure is the log-perplexity above the dense model's relative to what plain Wanda loses, the dense model being the
one before any training; rows named "dense" train the dense model on as many tokens, to tell recovery from plain extra training. One
thread; times are CPU seconds of training alone.
"""

import argparse
import json
import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

import hf_sparse
from hf_sparse import SparsityConfig, embedded, environment, prune_
from hf_sparse.data import read_samples
from hf_sparse.evaluate import evaluate
from trainer_callbacks import Distillation, KeepMasks

STARTS: dict[str, dict[str, Any]] = {"best": {"permute": True}, "wanda": {"metric": "wanda"}}
LENGTH = 256
SAMPLED = 3072  # rows that the dense model writes


@dataclass(frozen=True)
class Row:
    """One training: from which start, by what, for how many steps."""

    start: str  # best, wanda or dense
    method: str  # distillation, cross-entropy, masked LoRA with distillation
    minutes: int  # what it took about, on the machine that the steps were chosen on
    steps: int
    rate: float

    @property
    def name(self) -> str:
        return f"{self.start}, {self.method}, {self.minutes} min, rate {self.rate:g}"


class Development:
    """The small model of the development data."""

    def __init__(self, folder: Path) -> None:
        self.path, self.folder = folder / "models" / "stories260k", folder / "text" / "stories"

    def rows(self, name: str) -> torch.Tensor:
        return torch.from_numpy(numpy.load(self.folder / f"{name}.npy")).long()

    def calibration(self) -> torch.Tensor:
        return self.rows("calib")[:64]

    def training(self) -> torch.Tensor:
        return torch.cat([self.calibration(), sampled(dense(self), SAMPLED, LENGTH)])

    def perplexity(self, model: Any, choosing: bool = False) -> float:
        return evaluate(model, self.rows("dev" if choosing else "eval"), window=256).value


class Embedded:
    """The model in the package with the standard library's text."""

    def __init__(self) -> None:
        self.path = embedded.model_path()
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)

    def samples(self, split: str, number: int, length: int, seed: int = 0) -> torch.Tensor:
        found = read_samples(
            split, tokenizer=lambda: self.tokenizer, num_samples=number, sequence_length=length, seed=seed
        )
        return torch.cat([row["input_ids"] for row in found.rows])

    def calibration(self) -> torch.Tensor:
        return self.samples("stdlib:calibration", 64, 512)

    def training(self) -> torch.Tensor:
        return self.samples("stdlib:training", 8192, LENGTH)

    def perplexity(self, model: Any, choosing: bool = False) -> float:
        found = read_samples(
            "stdlib:evaluation", tokenizer=lambda: self.tokenizer, num_samples=1, sequence_length=512, all_rows=True
        )
        windows = torch.cat([row["input_ids"] for row in found.rows])
        return evaluate(model, windows[64:96] if choosing else windows[:64], window=512).value


def dense(data: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(data.path, dtype=torch.float32)


@torch.no_grad()
def sampled(model: Any, number: int, length: int) -> torch.Tensor:
    """Text of the model's own at temperature 1."""
    set_seed(0)
    begin = torch.full((512, 1), model.config.bos_token_id)
    settings = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_length": length,
        "max_length": length,
        "pad_token_id": 0,
    }
    return torch.cat(
        [model.generate(begin, attention_mask=torch.ones_like(begin), **settings) for _ in range(number // 512)]
    )


def pruned(data: Any, start: str) -> Any:
    model = dense(data)
    if start != "dense":
        rows = data.calibration()
        prune_(
            model,
            SparsityConfig(
                **STARTS[start], pattern="2:4", calibration=rows, num_samples=len(rows), sequence_length=rows.shape[1]
            ),
        )
    return model


def train(data: Any, model: Any, rows: torch.Tensor, row: Row, batch: int, seed: int) -> tuple[Any, float]:
    """The trained model and the CPU seconds of the training."""
    set_seed(seed)  # the first values of a LoRA
    lora = "LoRA" in row.method
    callbacks: list[Any] = [Distillation(dense(data))] if "distillation" in row.method else []
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        hf_sparse.mask_lora_(model)
    elif row.start != "dense":
        callbacks.append(KeepMasks())
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=row.steps, per_device_train_batch_size=batch, learning_rate=row.rate, lr_scheduler_type="cosine", warmup_steps=0.05,
            weight_decay=0.0, adam_beta2=0.99, use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=seed,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=[{"input_ids": ids, "labels": ids} for ids in rows], callbacks=callbacks
        )
        begin = time.process_time()
        trainer.train()
        seconds = time.process_time() - begin
    return (hf_sparse.merge_and_unload(model) if lora else model), seconds


def lost(before: dict[str, torch.Tensor], model: Any) -> int:
    """Weights that were zero and are not any more."""
    return sum(int((now & ~before[name]).sum()) for name, now in hf_sparse.masks(model).items())


KD, CE, LORA = "distillation", "cross-entropy", "masked LoRA with distillation"


def plan(steps: dict[str, int], rate: dict[str, float]) -> list[Row]:
    """The rows of a table; `steps` are those of about one minute."""
    rows = [
        Row(start, method, minutes, minutes * steps[method], rate[method])
        for start in ("best", "wanda")
        for method, budgets in {KD: (2, 5, 10), CE: (2,), LORA: (2,)}.items()
        for minutes in budgets
    ]
    # Plain extra training, at the rate of recovery and at a fifth of it, which suits a model that has less to learn.
    extra = [
        Row("dense", CE, minutes, minutes * steps[KD], rate[CE] / part) for minutes, part in ((2, 1), (2, 5), (5, 5))
    ]
    return rows + extra


# Rates were chosen on the texts to choose by (--choose), with two minutes from the best start.
PLANS = {
    "Development": plan({KD: 250, CE: 340, LORA: 230}, {KD: 5e-3, CE: 4e-3, LORA: 1e-2}),
    "Embedded": plan({KD: 65, CE: 85, LORA: 55}, {KD: 1e-3, CE: 1e-3, LORA: 3e-3}),
}


def measured(
    data: Any, row: Row, rows: torch.Tensor, given: argparse.Namespace, base: float, wanda: float
) -> dict[str, Any]:
    """One training and its figures; `base` and `wanda` are the log-perplexities that count as 0 and 1."""

    def ratio(model: Any) -> float:
        return (math.log(data.perplexity(model, given.choose)) - base) / (wanda - base)

    model = pruned(data, row.start)
    masks, start = hf_sparse.masks(model), ratio(model)
    model, seconds = train(data, model, rows, row, given.batch, given.seed)
    end = ratio(model)
    return {
        "start": start, "ratio": end, "perplexity": math.exp(base + end * (wanda - base)), "steps": row.steps, "rate": row.rate,
        "tokens": row.steps * given.batch * rows.shape[1], "CPU seconds": seconds,
        "zeros lost": lost(masks, model) if row.start != "dense" else 0,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument(
        "--rows", nargs="+", default=None, metavar="WORD", help="only rows whose names hold one of the words"
    )
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--rate", type=float, default=None)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--choose", action="store_true", help="measure on the text to choose by, not on that of the figures"
    )
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    data = Embedded() if arguments.model == embedded.NAME else Development(Path(arguments.model))
    base, wanda = (math.log(data.perplexity(pruned(data, start), arguments.choose)) for start in ("dense", "wanda"))
    begin = time.process_time()
    rows = data.training()
    print(
        f"training text: {len(rows)} rows of {rows.shape[1]} tokens, {time.process_time() - begin:.1f} CPU s to make; dense {math.exp(base):.4f}, wanda {math.exp(wanda):.4f}",
        flush=True,
    )
    found = []
    for row in PLANS[type(data).__name__]:
        if arguments.rows and not any(word in row.name for word in arguments.rows):
            continue
        row = replace(row, steps=arguments.steps or row.steps, rate=arguments.rate or row.rate)
        found.append({"name": row.name, **measured(data, row, rows, arguments, base, wanda)})
        print(
            ", ".join(
                f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}"
                for key, value in found[-1].items()
            ),
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": found, "versions": environment.versions()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
