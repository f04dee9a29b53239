"""Tiny decoders of several families and traces of them, for the tests of predictors."""

from pathlib import Path
from typing import Any

import torch
import transformers
from models import VOCABULARY, llama, token_rows

from hf_sparse.predictors.layout import Layout
from hf_sparse.predictors.recording import record
from hf_sparse.predictors.traces import Traces

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "head_dim": 8,
}  # fmt: skip
OPT_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, "word_embed_proj_dim": 32, "pad_token_id": 0,
}  # fmt: skip
GPT2_SIZES = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48}

# family -> (class, its sizes, whether the feed-forward is gated)
FAMILIES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("Llama", SIZES, True),
    "mistral": ("Mistral", SIZES, True),
    "qwen2": ("Qwen2", SIZES, True),
    "qwen3": ("Qwen3", SIZES, True),
    "gemma": ("Gemma", SIZES, True),
    "gemma2": ("Gemma2", SIZES, True),
    "phi3": ("Phi3", SIZES, True),
    "opt": ("OPT", OPT_SIZES, False),
    "gpt2": ("GPT2", GPT2_SIZES, False),
}


def made(family: str) -> Any:
    name, sizes, _ = FAMILIES[family]
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}{head}")(getattr(transformers, f"{name}Config")(**sizes))
    return lively(model)


def lively(model: Any) -> Any:
    """Larger weights than a fresh model has, so that what is skipped shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3)
    return model.eval()


def small_llama() -> Any:
    return lively(llama(layers=3))


def traced(
    model: Any, folder: Path, rows: torch.Tensor | None = None, neuron_block: int = 1, **settings: Any
) -> Traces:
    layout = Layout.of(model, (0,), neuron_block)
    return record(model, token_rows(8, 16) if rows is None else rows, folder, layout=layout, **settings)
