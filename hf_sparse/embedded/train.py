"""Train the embedded model from scratch: `python -m hf_sparse.embedded.train DESTINATION`.

A byte-level BPE tokenizer and a small Llama (grouped heads, SwiGLU, tied embeddings) are trained on the `training` split of
the standard library's sources. The other splits are never read, but for the evaluation loss that is printed at the end.
"""

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path

import torch
from huggingface_hub import ModelCardData
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, __version__

from hf_sparse import stdlib_text

VOCABULARY, WINDOW, TOKENS_A_STEP = 2048, 512, 8192
# Digits stay single, runs of blanks stay together: indentation is half of what there is to learn in source code.
WORDS = Regex(r"\r?\n[ ]*|[ ]{2,}(?=[ ])|[ ]?[A-Za-z_]+|[0-9]|[ ]?[^\sA-Za-z0-9_]+|\s+")


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<|file|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|file|>", eos_token="<|file|>", model_max_length=WINDOW
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one row of token ids, each file behind the file mark."""
    mark = tokenizer.bos_token_id
    rows = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return torch.tensor([token for row in rows for token in (mark, *row.ids)], dtype=torch.int32)


def build(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=192, intermediate_size=512, num_hidden_layers=8, num_attention_heads=6,
            num_key_value_heads=2, head_dim=32, max_position_embeddings=WINDOW, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=0, rms_norm_eps=1e-6, initializer_range=0.04,
        )
    )  # fmt: skip


def evaluate(model: LlamaForCausalLM, tokens: torch.Tensor, rows: int = 128) -> float:
    model.eval()
    windows = tokens[: rows * WINDOW].view(-1, WINDOW).long()
    with torch.inference_mode():
        losses = [model(input_ids=batch, labels=batch).loss.item() for batch in windows.split(16)]
    model.train()
    return sum(losses) / len(losses)


def write_card(folder: Path) -> None:
    """Write the model's card from the facts that training left beside it."""
    facts = json.loads((folder / "training.json").read_text())
    data = ModelCardData(
        license="apache-2.0", library_name="transformers", pipeline_tag="text-generation", language="code"
    )
    text = f"""---
{data}
---

# A small model of Python source code

A Llama of {facts["parameters"]:,} parameters (8 blocks, hidden size 192, SwiGLU of 512, 6 heads over 2 key-value heads, tied
embeddings, a byte-level BPE of {VOCABULARY} tokens, windows of up to {WINDOW} tokens). It is here so that pruning can be tried and tested
on a real, trained model without a download. It writes text that looks like Python; it is not useful for writing programs.

Trained from scratch on the sources of the standard library of Python {facts["python"]} ({facts["training_tokens"]:,} tokens; split `training`,
fingerprint `{facts["fingerprints"]["training"]}`): {facts["tokens_seen"]:,} tokens seen in {facts["steps"]:,} steps, {facts["minutes"]:g} minutes on one CPU core, seed
{facts["seed"]}. Held-out perplexity {facts["held_out_perplexity"]:.3f} on the first 128 windows of the split `evaluation` (fingerprint
`{facts["fingerprints"]["evaluation"]}`), whose files were never trained on; bfloat16 weights, evaluated in float32.

Made with torch {facts["torch"]} and transformers {facts["transformers"]} by

```bash
{facts["command"]}
```

The schedule follows the clock, so another machine gives another model of the same kind.
"""
    (folder / "README.md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--minutes", type=float, default=60, help="wall-clock time to train for")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    texts = stdlib_text.texts("training")
    tokenizer = train_tokenizer(texts)
    tokens = encode(tokenizer, texts)
    heldout = encode(tokenizer, stdlib_text.texts("evaluation"))
    model = build(arguments.seed)
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if all(parameter is not matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=arguments.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=arguments.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    compiled = torch.compile(model)
    print(f"{model.num_parameters():,} parameters, {len(tokens):,} training tokens", flush=True)

    generator = torch.Generator().manual_seed(arguments.seed)
    start, step, running = time.monotonic(), 0, 0.0
    while (done := (time.monotonic() - start) / (60 * arguments.minutes)) < 1:
        # The schedule follows the clock, not a step count: warm up for 2 % of the time, hold, then fall to 0 over the last 40 %.
        rate = arguments.lr * min(1.0, (done + 1e-3) / 0.02, max(0.0, 1 - done) / 0.4)
        # Attention over short windows is cheaper; the last fifth of the time teaches the positions behind them.
        window = WINDOW // 2 if done < 0.8 else WINDOW
        offsets = torch.randint(len(tokens) - window, (TOKENS_A_STEP // window,), generator=generator)
        batch = torch.stack([tokens[offset : offset + window] for offset in offsets.tolist()]).long()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = compiled(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, running = step + 1, running + loss.item()
        if step % 100 == 0:
            print(
                f"{step} {100 * done:.0f}% loss {running / 100:.4f} held out {evaluate(model, heldout):.4f}", flush=True
            )
            running = 0.0

    model = model.to(torch.bfloat16)
    model.generation_config.update(do_sample=False, max_new_tokens=64)
    model.save_pretrained(arguments.destination)
    tokenizer.save_pretrained(arguments.destination)
    loss = evaluate(model.float(), heldout)
    facts = {
        "parameters": model.num_parameters(), "training_tokens": len(tokens), "steps": step,
        "tokens_seen": step * TOKENS_A_STEP, "minutes": arguments.minutes, "seed": arguments.seed,
        "learning_rate": arguments.lr, "held_out_loss": loss, "held_out_perplexity": math.exp(loss),
        "fingerprints": {split: stdlib_text.fingerprint(split) for split in ("training", "evaluation")},
        "python": platform.python_version(), "torch": torch.__version__, "transformers": __version__,
        "command": " ".join(["python -m hf_sparse.embedded.train DESTINATION", *sys.argv[2:]]),
    }  # fmt: skip
    (arguments.destination / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    write_card(arguments.destination)
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
