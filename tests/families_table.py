"""Tiny random models of many architectures, each with a small input."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
)

VOCABULARY = 64
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **SPECIAL,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}
ROUTED = {**GROUPED, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "num_experts": 4}
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 4,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "max_position_embeddings": 64, **SPECIAL,
    "decoder_start_token_id": 1, "forced_eos_token_id": 2,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, **SPECIAL, "decoder_start_token_id": 0,
}  # fmt: skip
LATENT = {
    **GROUPED, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 6, "n_routed_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
MAMBA: dict[str, Any] = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}

Inputs = dict[str, torch.Tensor]


def ids(length: int = 9) -> Inputs:
    return {"input_ids": torch.randint(3, VOCABULARY - 4, (2, length))}


def both() -> Inputs:
    return {**ids(), "decoder_input_ids": torch.randint(3, VOCABULARY - 4, (2, 5))}


def pixels(size: int = 16) -> Inputs:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def image_and_text(image_tokens: int, image_token: int = VOCABULARY - 1, size: int = 16) -> Inputs:
    tokens = ids()["input_ids"]
    marks = torch.full((2, image_tokens), image_token)
    return {"input_ids": torch.cat([tokens[:, :3], marks, tokens[:, 3:]], 1), **pixels(size)}


@dataclass(frozen=True)
class Family:
    """How to build one architecture's tiny model, and what its sites are."""

    model_type: str
    settings: dict[str, Any]
    make: Any = AutoModelForCausalLM
    inputs: Callable[[], Inputs] = ids
    attributes: dict[str, Any] = field(default_factory=dict)  # set on the config after it was made

    def build(self) -> tuple[nn.Module, Inputs]:
        """The model in evaluation mode and inputs for its forward, the same every time."""
        torch.manual_seed(0)
        config = AutoConfig.for_model(self.model_type, **self.settings)
        for name, value in self.attributes.items():
            setattr(config, name, value)
        model = self.make.from_config(config).eval()
        with torch.no_grad():  # some parameters start at or near zero, which would hide what they do
            for parameter in model.parameters():
                if parameter.ndim >= 2 and float(parameter.abs().mean()) < 1e-3:
                    parameter.normal_(std=0.1)
        return model, self.inputs()


def _llava_inputs() -> Inputs:
    return image_and_text(16)


# fmt: off
FAMILIES: dict[str, Family] = {
    # decoders with gate, up and down
    "llama": Family("llama", GROUPED),
    "qwen2": Family("qwen2", GROUPED),
    "qwen3": Family("qwen3", {**GROUPED, "head_dim": 6}),
    "mistral": Family("mistral", GROUPED),
    "gemma": Family("gemma", {**GROUPED, "head_dim": 8, "num_key_value_heads": 1}),
    "gemma2": Family("gemma2", {**GROUPED, "head_dim": 12}),
    "gemma3_text": Family("gemma3_text", {**GROUPED, "head_dim": 8}),
    "phi3": Family("phi3", GROUPED),
    "stablelm": Family("stablelm", GROUPED),
    "olmo2": Family("olmo2", GROUPED),
    "olmo3": Family("olmo3", GROUPED),
    "cohere": Family("cohere", GROUPED),
    "glm": Family("glm", {**GROUPED, "head_dim": 8}),
    "glm4": Family("glm4", {**GROUPED, "head_dim": 8}),
    "granite": Family("granite", GROUPED),
    "smollm3": Family("smollm3", GROUPED),
    "exaone4": Family("exaone4", GROUPED),
    "helium": Family("helium", {**GROUPED, "head_dim": 8}),
    "ministral3": Family("ministral3", {**GROUPED, "head_dim": 8}),
    "diffllama": Family("diffllama", GROUPED),
    # decoders with a plain feed-forward
    "phi": Family("phi", GROUPED),
    "gpt2": Family("gpt2", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **SPECIAL}),
    "gpt2_cross": Family(
        "gpt2",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "add_cross_attention": True, **SPECIAL},
        inputs=lambda: {**ids(), "encoder_hidden_states": torch.randn(2, 4, 32)},
    ),
    "gpt_neo": Family(
        "gpt_neo",
        {
            "vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64,
            "attention_types": [[["global", "local"], 1]], "window_size": 4, **SPECIAL,
        },
    ),
    "gpt_neox": Family("gpt_neox", TEXT),
    "gptj": Family("gptj", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64, **SPECIAL}),
    "codegen": Family(
        "codegen", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64, **SPECIAL}
    ),
    "bloom": Family("bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, **SPECIAL}),
    "opt": Family(
        "opt",
        {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    "falcon": Family("falcon", {**TEXT, "multi_query": False, "new_decoder_architecture": False, "parallel_attn": False}),
    "falcon_multi_query": Family("falcon", {**TEXT, "multi_query": True, "new_decoder_architecture": False}),
    "falcon_new": Family("falcon", {**TEXT, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "mpt": Family("mpt", {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 64}),
    "gpt_bigcode": Family(
        "gpt_bigcode", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **SPECIAL}
    ),
    "gpt_bigcode_heads": Family(
        "gpt_bigcode",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "multi_query": False, **SPECIAL},
    ),
    "starcoder2": Family("starcoder2", GROUPED),
    "nemotron": Family("nemotron", {**GROUPED, "head_dim": 8}),
    "persimmon": Family("persimmon", TEXT),
    "arcee": Family("arcee", GROUPED),
    "biogpt": Family("biogpt", TEXT),
    # experts
    "mixtral": Family("mixtral", {**GROUPED, "num_local_experts": 4}),
    "qwen2_moe": Family("qwen2_moe", {**ROUTED, "shared_expert_intermediate_size": 40}),
    "qwen3_moe": Family("qwen3_moe", {**ROUTED, "head_dim": 8, "mlp_only_layers": [0]}),
    "gpt_oss": Family("gpt_oss", {**GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24}),
    "deepseek_v2": Family("deepseek_v2", {**LATENT, "n_group": 1, "topk_group": 1}),
    "deepseek_v3": Family("deepseek_v3", {**LATENT, "n_group": 2, "topk_group": 1}),
    "llama4_text": Family(
        "llama4_text",
        {**GROUPED, "head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 40, "interleave_moe_layer_step": 2},
    ),
    "granitemoe": Family("granitemoe", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granitemoeshared": Family(
        "granitemoeshared", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 20}
    ),
    "dbrx": Family(
        "dbrx",
        {
            "vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}, **SPECIAL,
        },
    ),
    "jetmoe": Family(
        "jetmoe", {**TEXT, "num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "olmoe": Family("olmoe", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": Family("phimoe", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "glm4_moe": Family(
        "glm4_moe",
        {**ROUTED, "head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    ),
    "ernie4_5_moe": Family(
        "ernie4_5_moe", {**GROUPED, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 1}
    ),
    "switch_transformers": Family(
        "switch_transformers", {**T5, "num_decoder_layers": 2, "num_experts": 3, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}, AutoModelForSeq2SeqLM, both
    ),
    "aria_text": Family("aria_text", {**GROUPED, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}),
    "longcat_flash": Family(
        "longcat_flash",
        {
            **LATENT, "ffn_hidden_size": 40, "expert_ffn_hidden_size": 24, "num_layers": 2, "moe_topk": 2, "zero_expert_num": 1,
            "head_dim": 4,
        },
    ),
    "hunyuan_v1_moe": Family("hunyuan_v1_moe", {**GROUPED, "head_dim": 8, "num_experts": 4, "moe_topk": 2}),
    "lfm2_moe": Family(
        "lfm2_moe", {**ROUTED, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1}
    ),
    "nllb-moe": Family(
        "nllb-moe", {**BART, "num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2}, AutoModelForSeq2SeqLM, both
    ),
    "openai_privacy_filter": Family(
        "openai_privacy_filter", {**GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24}, AutoModel
    ),
    "inkling_text": Family("inkling_text", {**ROUTED, "head_dim": 8}),
    "minimax": Family(
        "minimax",
        {**GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["linear_attention", "full_attention"]},
    ),
    "qwen3_5_moe_text": Family(
        "qwen3_5_moe_text",
        {
            **ROUTED, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "shared_expert_intermediate_size": 20,
        },
    ),
    # attention beside state spaces, convolutions and linear attention
    "nemotron_h": Family(
        "nemotron_h",
        {
            **GROUPED, "head_dim": 8, "layers_block_type": ["mamba", "attention", "moe", "mlp"], "num_hidden_layers": 4,
            "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "n_routed_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 20, "n_group": 1, "topk_group": 1,
        },
    ),
    "bamba": Family(
        "bamba", {**GROUPED, **MAMBA, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
    ),
    "jamba": Family(
        "jamba",
        {
            **GROUPED, **MAMBA, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
            "num_experts": 4, "use_mamba_kernels": False, "mamba_dt_rank": 4,
        },
    ),
    "mamba": Family("mamba", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, **SPECIAL}),
    "mamba2": Family(
        "mamba2",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, **SPECIAL},
    ),
    "falcon_h1": Family(
        "falcon_h1",
        {**GROUPED, "head_dim": 8, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8},
    ),
    "granitemoehybrid": Family(
        "granitemoehybrid",
        {
            **GROUPED, **MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2,
            "shared_intermediate_size": 20, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1,
        },
    ),
    "zamba2": Family(
        "zamba2",
        {
            **GROUPED, "num_key_value_heads": 4, "num_hidden_layers": 4, "hybrid_layer_ids": [1, 3], "mamba_d_state": 8, "mamba_expand": 2,
            "n_mamba_heads": 4, "mamba_headdim": 16, "mamba_ngroups": 1, "adapter_rank": 4, "num_mem_blocks": 1, "use_mem_rope": True,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        },
    ),
    "qwen3_next": Family(
        "qwen3_next",
        {
            **ROUTED, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "shared_expert_intermediate_size": 20,
        },
    ),
    "lfm2": Family("lfm2", {**GROUPED, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "recurrent_gemma": Family(
        "recurrent_gemma",
        {**GROUPED, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8, "num_key_value_heads": 1, "head_dim": 8},
    ),
    "rwkv": Family("rwkv", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 64, **SPECIAL}),
    "zamba": Family(
        "zamba",
        {
            **GROUPED, "num_key_value_heads": 4, "num_hidden_layers": 6, "mamba_d_state": 8, "mamba_dt_rank": 4, "n_mamba_heads": 2,
            "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False,
        },
    ),
    "olmo_hybrid": Family(
        "olmo_hybrid",
        {
            **GROUPED, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 2,
            "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        },
    ),
    "gemma4_text": Family("gemma4_text", {**GROUPED, "head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 64}),
    # encoders
    "bert": Family("bert", TEXT, AutoModelForMaskedLM),
    "roberta": Family("roberta", TEXT, AutoModelForMaskedLM),
    "electra": Family("electra", {**TEXT, "embedding_size": 16}, AutoModelForMaskedLM),
    "distilbert": Family(
        "distilbert",
        {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
        AutoModelForMaskedLM,
    ),
    "albert": Family("albert", {**TEXT, "embedding_size": 16, "num_hidden_groups": 1}, AutoModelForMaskedLM),
    "deberta": Family("deberta", {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, AutoModelForMaskedLM),
    "deberta-v2": Family(
        "deberta-v2", {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 16}, AutoModelForMaskedLM
    ),
    "modernbert": Family("modernbert", {**TEXT, "cls_token_id": 1, "sep_token_id": 2}, AutoModelForMaskedLM),
    "gpt_neox_japanese": Family("gpt_neox_japanese", {**TEXT, "intermediate_multiple_size": 2}),
    "openai-gpt": Family("openai-gpt", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "mpnet": Family("mpnet", TEXT, AutoModelForMaskedLM),
    "esm": Family("esm", {**TEXT, "mask_token_id": 3}, AutoModelForMaskedLM),
    "nomic_bert": Family("nomic_bert", TEXT, AutoModelForMaskedLM),
    "eurobert": Family("eurobert", GROUPED, AutoModelForMaskedLM),
    "xlnet": Family("xlnet", {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, **SPECIAL}, AutoModel),
    "convbert": Family("convbert", {**TEXT, "embedding_size": 16, "head_ratio": 2, "num_groups": 2}, AutoModelForMaskedLM),
    # encoders with decoders
    "t5": Family("t5", T5, AutoModelForSeq2SeqLM, both),
    "t5_gated": Family("t5", {**T5, "feed_forward_proj": "gated-gelu"}, AutoModelForSeq2SeqLM, both),
    "bart": Family("bart", BART, AutoModelForSeq2SeqLM, both),
    "mbart": Family("mbart", BART, AutoModelForSeq2SeqLM, both),
    "marian": Family("marian", BART, AutoModelForSeq2SeqLM, both),
    "pegasus": Family("pegasus", BART, AutoModelForSeq2SeqLM, both),
    "whisper": Family(
        "whisper",
        {**BART, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16, "suppress_tokens": None, "begin_suppress_tokens": None},
        AutoModelForSpeechSeq2Seq,
        lambda: {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": ids(5)["input_ids"]},
    ),
    "mt5": Family("mt5", T5, AutoModelForSeq2SeqLM, both),
    "prophetnet": Family(
        "prophetnet",
        {
            "vocab_size": VOCABULARY, "hidden_size": 32, "encoder_ffn_dim": 48, "num_encoder_layers": 2, "num_encoder_attention_heads": 4,
            "decoder_ffn_dim": 48, "num_decoder_layers": 2, "num_decoder_attention_heads": 4, "max_position_embeddings": 64,
            **SPECIAL, "decoder_start_token_id": 1,
        },
        AutoModelForSeq2SeqLM,
        both,
    ),
    "t5gemma": Family(
        "t5gemma", {"encoder": {**GROUPED, "head_dim": 8}, "decoder": {**GROUPED, "head_dim": 8}, "vocab_size": VOCABULARY}, AutoModelForSeq2SeqLM, both
    ),
    "moonshine": Family(
        "moonshine",
        {
            "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2,
            "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4, "max_position_embeddings": 64, **SPECIAL,
            "decoder_start_token_id": 1,
        },
        AutoModelForSpeechSeq2Seq,
        lambda: {"input_values": torch.randn(2, 2000), "decoder_input_ids": ids(5)["input_ids"]},
    ),
    # sound and images
    "wav2vec2": Family(
        "wav2vec2",
        {
            **TEXT, "conv_dim": [16, 16], "conv_stride": [4, 4], "conv_kernel": [4, 4], "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
        },
        AutoModel,
        lambda: {"input_values": torch.randn(2, 400)},
    ),
    "wav2vec2-conformer": Family(
        "wav2vec2-conformer",
        {
            **TEXT, "conv_dim": [16, 16], "conv_stride": [4, 4], "conv_kernel": [4, 4], "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "conv_depthwise_kernel_size": 3,
        },
        AutoModel,
        lambda: {"input_values": torch.randn(2, 400)},
    ),
    "vit": Family("vit", VISION, AutoModel, pixels),
    "deit": Family("deit", VISION, AutoModel, pixels),
    "dinov2": Family("dinov2", {**VISION, "mlp_ratio": 2}, AutoModel, pixels),
    "dinov2_gated": Family("dinov2", {**VISION, "mlp_ratio": 2, "use_swiglu_ffn": True}, AutoModel, pixels),
    "dinov3_vit": Family("dinov3_vit", {**VISION, "use_gated_mlp": True}, AutoModel, pixels),
    "siglip_vision_model": Family("siglip_vision_model", VISION, AutoModel, pixels),
    "beit": Family("beit", {**VISION, "use_relative_position_bias": True}, AutoModel, pixels),
    "swin": Family(
        "swin",
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2},
        AutoModel,
        pixels,
    ),
    "sam_vision_model": Family(
        "sam_vision_model",
        {**VISION, "mlp_dim": 48, "window_size": 2, "global_attn_indexes": [1], "output_channels": 8, "mlp_ratio": 1.5, "num_pos_feats": 4},
        AutoModel,
        pixels,
    ),
    "segformer": Family(
        "segformer",
        {
            "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32], "patch_sizes": [3, 3], "strides": [2, 2],
            "num_attention_heads": [2, 4], "mlp_ratios": [2, 2],
        },
        AutoModel,
        pixels,
    ),
    "imagegpt": Family("imagegpt", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, AutoModel),
    "hiera": Family(
        "hiera",
        {
            "embed_dim": 8, "image_size": [16, 16], "patch_size": [3, 3], "patch_stride": [2, 2], "patch_padding": [1, 1], "depths": [1, 1],
            "num_heads": [1, 2], "masked_unit_size": [4, 4], "masked_unit_attention": [True, False], "query_stride": [2, 2], "num_query_pool": 1,
        },
        AutoModel,
        pixels,
    ),
    "internvl_vision": Family("internvl_vision", {**VISION, "image_size": [16, 16], "patch_size": [4, 4]}, AutoModel, pixels),
    "videomae": Family(
        "videomae", {**VISION, "num_frames": 2, "tubelet_size": 2}, AutoModel, lambda: {"pixel_values": torch.randn(2, 2, 3, 16, 16)}
    ),
    "timesformer": Family(
        "timesformer", {**VISION, "num_frames": 2}, AutoModel, lambda: {"pixel_values": torch.randn(2, 2, 3, 16, 16)}
    ),
    # images with text
    "clip": Family(
        "clip",
        {"text_config": {**TEXT, "projection_dim": 16}, "vision_config": {**VISION, "projection_dim": 16}, "projection_dim": 16},
        AutoModel,
        lambda: {**ids(), **pixels()},
    ),
    "siglip": Family("siglip", {"text_config": TEXT, "vision_config": VISION}, AutoModel, lambda: {**ids(), **pixels()}),
    "blip": Family(
        "blip",
        {
            "text_config": {**TEXT, "encoder_hidden_size": 32, "is_decoder": True, "sep_token_id": 2},
            "vision_config": VISION,
            "projection_dim": 16,
        },
        AutoModel,
        lambda: {**ids(), **pixels()},
    ),
    "llava": Family(
        "llava",
        {
            "text_config": {**GROUPED, "model_type": "llama"}, "vision_config": {**VISION, "model_type": "clip_vision_model"},
            "image_token_id": VOCABULARY - 1, "image_token_index": VOCABULARY - 1, "vision_feature_layer": -1,
        },
        AutoModelForImageTextToText,
        _llava_inputs,
    ),
    "paligemma": Family(
        "paligemma",
        {
            "text_config": {**GROUPED, "head_dim": 8, "model_type": "gemma"}, "vision_config": {**VISION, "projection_dim": 32, "model_type": "siglip_vision_model"},
            "image_token_index": VOCABULARY - 1, "image_token_id": VOCABULARY - 1, "projection_dim": 32, "hidden_size": 32,
        },
        AutoModelForImageTextToText,
        _llava_inputs,
    ),
    "gemma3": Family(
        "gemma3",
        {
            "text_config": {**GROUPED, "head_dim": 8}, "vision_config": {**VISION, "model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4, "image_token_id": VOCABULARY - 1, "image_token_index": VOCABULARY - 1,
        },
        AutoModelForImageTextToText,
        lambda: {**image_and_text(4), "token_type_ids": (image_and_text(4)["input_ids"] == VOCABULARY - 1).long()},
    ),
    "idefics3": Family(
        "idefics3",
        {
            "text_config": {**GROUPED, "model_type": "llama"}, "vision_config": VISION, "scale_factor": 2, "image_token_id": VOCABULARY - 1,
        },
        AutoModelForImageTextToText,
        lambda: {**(made := image_and_text(4)), "pixel_values": made["pixel_values"][:, None]},
    ),
    "qwen2_vl": Family(
        "qwen2_vl",
        {
            "text_config": {**GROUPED, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}},
            "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4, "in_channels": 3},
            "image_token_id": VOCABULARY - 1, "vision_start_token_id": VOCABULARY - 2, "video_token_id": VOCABULARY - 3,
        },
        AutoModelForImageTextToText,
        lambda: _qwen_vl_inputs(4 * 4 * 3 * 2),
    ),
    "qwen3_vl": Family(
        "qwen3_vl",
        {
            "text_config": {
                **GROUPED, "head_dim": 8, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
            },
            "vision_config": {
                "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4, "in_channels": 3,
                "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
            },
            "image_token_id": VOCABULARY - 1, "vision_start_token_id": VOCABULARY - 2, "video_token_id": VOCABULARY - 3,
        },
        AutoModelForImageTextToText,
        lambda: _qwen_vl_inputs(4 * 4 * 3 * 2),
    ),
}
# fmt: on


def _qwen_vl_inputs(patch_numbers: int) -> Inputs:
    """One image of four by four patches, which two by two become four tokens."""
    tokens = torch.randint(3, VOCABULARY - 4, (1, 8))
    marks = torch.full((1, 4), VOCABULARY - 1)
    start = torch.full((1, 1), VOCABULARY - 2)
    sequence = torch.cat([tokens[:, :3], start, marks, tokens[:, 3:]], 1)
    return {
        "input_ids": sequence,
        "pixel_values": torch.randn(16, patch_numbers),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (sequence == VOCABULARY - 1).int(),
    }


# What the sites of each family are called below a block, checked by hand: a module and then `end of name:role` for each of its
# sites, with - where the name table knows no role and # for any number.
ROLES: dict[str, str] = {
    (
        "llama qwen2 qwen3 mistral gemma gemma2 gemma3_text stablelm olmo2 olmo3 cohere granite smollm3 exaone4 "
        "helium ministral3 diffllama gemma4_text nomic_bert eurobert"
    ): """
    mlp                          down_proj:down gate_proj:gate up_proj:up
    self_attn                    k_proj:k o_proj:o q_proj:q v_proj:v
    """,
    "phi3": """
    mlp                          down_proj:down
    mlp.gate_up_proj             gate:gate up:up
    self_attn                    o_proj:o
    self_attn.qkv_proj           k:k q:q v:v
    """,
    "glm glm4": """
    mlp                          down_proj:down
    mlp.gate_up_proj             gate:gate up:up
    self_attn                    k_proj:k o_proj:o q_proj:q v_proj:v
    """,
    "phi": """
    mlp                          fc1:up fc2:down
    self_attn                    dense:o k_proj:k q_proj:q v_proj:v
    """,
    "gpt2 gpt_bigcode gpt_bigcode_heads openai-gpt imagegpt": """
    attn                         c_proj:o
    attn.c_attn                  k:k q:q v:v
    mlp                          c_fc:up c_proj:down
    """,
    "gpt2_cross": """
    attn                         c_proj:o
    attn.c_attn                  k:k q:q v:v
    crossattention               c_proj:o q_attn:q
    crossattention.c_attn        k:k v:v
    mlp                          c_fc:up c_proj:down
    """,
    "gpt_neo": """
    attn.attention               k_proj:k out_proj:o q_proj:q v_proj:v
    mlp                          c_fc:up c_proj:down
    """,
    "gpt_neox gpt_neox_japanese": """
    attention                    dense:o
    attention.query_key_value    k:k q:q v:v
    mlp                          dense_4h_to_h:down dense_h_to_4h:up
    """,
    "gptj": """
    attn                         k_proj:k out_proj:o q_proj:q v_proj:v
    mlp                          fc_in:up fc_out:down
    """,
    "codegen": """
    attn                         out_proj:o
    attn.qkv_proj                k:k q:q v:v
    mlp                          fc_in:up fc_out:down
    """,
    "bloom falcon falcon_multi_query falcon_new": """
    mlp                          dense_4h_to_h:down dense_h_to_4h:up
    self_attention               dense:o
    self_attention.query_key_value k:k q:q v:v
    """,
    "opt biogpt": """
    -                            fc1:up fc2:down
    self_attn                    k_proj:k out_proj:o q_proj:q v_proj:v
    """,
    "mpt": """
    attn                         out_proj:o
    attn.Wqkv                    k:k q:q v:v
    ffn                          down_proj:down up_proj:up
    """,
    "starcoder2": """
    mlp                          c_fc:up c_proj:down
    self_attn                    k_proj:k o_proj:o q_proj:q v_proj:v
    """,
    "nemotron arcee": """
    mlp                          down_proj:down up_proj:up
    self_attn                    k_proj:k o_proj:o q_proj:q v_proj:v
    """,
    "persimmon": """
    mlp                          dense_4h_to_h:down dense_h_to_4h:up
    self_attn                    dense:o
    self_attn.query_key_value    k:k q:q v:v
    """,
    "mixtral gpt_oss olmoe phimoe openai_privacy_filter": """
    mlp.experts.#                down_proj:down
    mlp.experts.#.gate_up_proj   gate:gate up:up
    self_attn                    k_proj:k o_proj:o q_proj:q v_proj:v
    """,
    "qwen2_moe": """
    mlp.experts.#                down_proj:down
    mlp.experts.#.gate_up_proj   gate:gate up:up
    mlp.shared_expert            down_proj:down gate_proj:gate up_proj:up
    self_attn                    k_proj:k o_proj:o q_proj:q v_proj:v
    """,
    "qwen3_moe": """
    mlp                          down_proj:down gate_proj:gate up_proj:up
    mlp.experts.#                down_proj:down
    mlp.experts.#.gate_up_proj   gate:gate up:up
    self_attn                    k_proj:k o_proj:o q_proj:q v_proj:v
    """,
    "deepseek_v2 deepseek_v3": """
    mlp                          down_proj:down gate_proj:gate up_proj:up
    mlp.experts.#                down_proj:down
    mlp.experts.#.gate_up_proj   gate:gate up:up
    mlp.shared_experts           down_proj:down gate_proj:gate up_proj:up
    self_attn                    kv_a_proj_with_mqa:- o_proj:o q_a_proj:- q_b_proj:q
    self_attn.kv_b_proj          k:k v:v
    """,
    "llama4_text": """
    feed_forward                 down_proj:down gate_proj:gate up_proj:up
    feed_forward.experts.#       down_proj:down
    feed_forward.experts.#.gate_up_proj gate:gate up:up
    feed_forward.shared_expert   down_proj:down gate_proj:gate up_proj:up
    self_attn                    k_proj:k o_proj:o q_proj:q v_proj:v
    """,
    "granitemoe": """
    block_sparse_moe.experts.#   down_proj:down
    block_sparse_moe.experts.#.gate_up_proj gate:gate up:up
    self_attn                    k_proj:k o_proj:o q_proj:q v_proj:v
    """,
    "granitemoeshared": """
    block_sparse_moe.experts.#   down_proj:down
    block_sparse_moe.experts.#.gate_up_proj gate:gate up:up
    self_attn                    k_proj:k o_proj:o q_proj:q v_proj:v
    shared_mlp                   output_linear:down
    shared_mlp.input_linear      gate:gate up:up
    """,
    "dbrx": """
    ffn.experts.mlp.#            v1:up w1:gate w2:down
    norm_attn_norm.attn          out_proj:o
    norm_attn_norm.attn.Wqkv     k:k q:q v:v
    """,
    "jetmoe": """
    mlp.input_linear.#.weight    gate:gate up:up
    mlp.output_linear.#          weight:down
    self_attention.experts.input_linear.# weight:q
    self_attention.experts.output_linear.# weight:o
    self_attention.kv_proj       k:k v:v
    """,
    "glm4_moe ernie4_5_moe": """
    mlp                          down_proj:down gate_proj:gate up_proj:up
    mlp.experts.#                down_proj:down
    mlp.experts.#.gate_up_proj   gate:gate up:up
    mlp.shared_experts           down_proj:down gate_proj:gate up_proj:up
    self_attn                    k_proj:k o_proj:o q_proj:q v_proj:v
    """,
    "switch_transformers": """
    layer.#.EncDecAttention      k:k o:o q:q v:v
    layer.#.SelfAttention        k:k o:o q:q v:v
    layer.#.mlp                  wi:up wo:down
    layer.#.mlp.experts.#        wi:up wo:down
    """,
    "aria_text": """
    mlp.experts.#                down_proj:down
    mlp.experts.#.gate_up_proj   gate:gate up:up
    mlp.shared_experts           down_proj:down gate_proj:gate up_proj:up
    self_attn                    k_proj:k o_proj:o q_proj:q v_proj:v
    """,
    "longcat_flash": """
    mlp.experts.#                down_proj:down
    mlp.experts.#.gate_up_proj   gate:gate up:up
    mlps.#                       down_proj:down gate_proj:gate up_proj:up
    self_attn.#                  kv_a_proj_with_mqa:- o_proj:o q_a_proj:- q_b_proj:q
    self_attn.#.kv_b_proj        k:k v:v
    """,
    "hunyuan_v1_moe": """
    mlp.experts.#                down_proj:down
    mlp.experts.#.gate_up_proj   gate:gate up:up
    mlp.shared_mlp               down_proj:down gate_proj:gate up_proj:up
    self_attn                    k_proj:k o_proj:o q_proj:q v_proj:v
    """,
    "lfm2_moe": """
    conv                         in_proj:- out_proj:-
    feed_forward                 w1:gate w2:down w3:up
    feed_forward.experts.#       down_proj:down
    feed_forward.experts.#.gate_up_proj gate:gate up:up
    self_attn                    k_proj:k out_proj:o q_proj:q v_proj:v
    """,
    "nllb-moe": """
    cross_attention              k_proj:k out_proj:o q_proj:q v_proj:v
    ffn                          fc1:up fc2:down
    ffn.experts.#                fc1:up fc2:down
    self_attn                    k_proj:k out_proj:o q_proj:q v_proj:v
    """,
    "inkling_text": """
    mlp.experts.#                down_proj:down
    mlp.experts.#.gate_up_proj   gate:gate up:up
    mlp.shared_experts.#         down_proj:down gate_proj:gate up_proj:up
    self_attn                    k_proj:k o_proj:o q_proj:q r_proj:- v_proj:v
    """,
    "minimax": """
    mlp.experts.#                down_proj:down
    mlp.experts.#.gate_up_proj   gate:gate up:up
    self_attn                    k_proj:k o_proj:o out_proj:o output_gate:- q_proj:q v_proj:v
    self_attn.qkv_proj           k:k q:q v:v
    """,
    "qwen3_5_moe_text": """
    linear_attn                  in_proj_a:- in_proj_b:- in_proj_qkv:- in_proj_z:- out_proj:-
    mlp.experts.#                down_proj:down
    mlp.experts.#.gate_up_proj   gate:gate up:up
    mlp.shared_expert            down_proj:down gate_proj:gate up_proj:up
    self_attn                    k_proj:k o_proj:o q_proj:q v_proj:v
    """,
    "nemotron_h": """
    mixer                        down_proj:down in_proj:- k_proj:k o_proj:o out_proj:- q_proj:q up_proj:up v_proj:v
    mixer.experts.#              down_proj:down up_proj:up
    mixer.shared_experts         down_proj:down up_proj:up
    """,
    "bamba falcon_h1": """
    feed_forward                 down_proj:down gate_proj:gate up_proj:up
    mamba                        in_proj:- out_proj:-
    self_attn                    k_proj:k o_proj:o q_proj:q v_proj:v
    """,
    "jamba": """
    feed_forward                 down_proj:down gate_proj:gate up_proj:up
    feed_forward.experts.#       down_proj:down
    feed_forward.experts.#.gate_up_proj gate:gate up:up
    mamba                        dt_proj:- in_proj:- out_proj:- x_proj:-
    self_attn                    k_proj:k o_proj:o q_proj:q v_proj:v
    """,
    "mamba": """
    mixer                        dt_proj:- in_proj:- out_proj:- x_proj:-
    """,
    "mamba2": """
    mixer                        in_proj:- out_proj:-
    """,
    "granitemoehybrid": """
    block_sparse_moe.experts.#   down_proj:down
    block_sparse_moe.experts.#.gate_up_proj gate:gate up:up
    mamba                        in_proj:- out_proj:-
    self_attn                    k_proj:k o_proj:o q_proj:q v_proj:v
    shared_mlp                   output_linear:down
    shared_mlp.input_linear      gate:gate up:up
    """,
    "zamba2": """
    -                            linear:-
    mamba                        in_proj:- out_proj:-
    mamba_decoder.mamba          in_proj:- out_proj:-
    shared_transformer.feed_forward down_proj:down
    shared_transformer.feed_forward.gate_up_proj gate:gate up:up
    shared_transformer.feed_forward.gate_up_proj_adapter_list.# #:-
    shared_transformer.self_attn k_proj:k o_proj:o q_proj:q v_proj:v
    """,
    "qwen3_next": """
    linear_attn                  in_proj_ba:- in_proj_qkvz:- out_proj:-
    mlp.experts.#                down_proj:down
    mlp.experts.#.gate_up_proj   gate:gate up:up
    mlp.shared_expert            down_proj:down gate_proj:gate up_proj:up
    self_attn                    k_proj:k o_proj:o q_proj:q v_proj:v
    """,
    "lfm2": """
    conv                         in_proj:- out_proj:-
    feed_forward                 w1:gate w2:down w3:up
    self_attn                    k_proj:k out_proj:o q_proj:q v_proj:v
    """,
    "recurrent_gemma": """
    mlp_block                    down_proj:down gate_proj:gate up_proj:up
    temporal_block               k_proj:k linear_out:- linear_x:- linear_y:- o_proj:o q_proj:q v_proj:v
    """,
    "rwkv": """
    attention                    key:k output:o receptance:- value:v
    feed_forward                 key:- receptance:- value:-
    """,
    "zamba": """
    -                            linear:-
    mamba                        in_proj:- out_proj:-
    mamba_decoder.mamba          in_proj:- out_proj:-
    shared_transf.feed_forward   down_proj:down gate_proj:gate up_proj:up
    shared_transf.self_attn      k_proj:k o_proj:o q_proj:q v_proj:v
    """,
    "olmo_hybrid": """
    linear_attn                  a_proj:- b_proj:- g_proj:- k_proj:k o_proj:o q_proj:q v_proj:v
    mlp                          down_proj:down gate_proj:gate up_proj:up
    self_attn                    k_proj:k o_proj:o q_proj:q v_proj:v
    """,
    "bert roberta electra esm": """
    attention.output             dense:o
    attention.self               key:k query:q value:v
    intermediate                 dense:up
    output                       dense:down
    """,
    "distilbert": """
    attention                    k_lin:k out_lin:o q_lin:q v_lin:v
    ffn                          lin1:up lin2:down
    """,
    "albert": """
    albert_layers.#              ffn:up ffn_output:down
    albert_layers.#.attention    dense:o key:k query:q value:v
    """,
    "deberta": """
    attention.output             dense:o
    attention.self               pos_proj:- pos_q_proj:-
    attention.self.in_proj       k:k q:q v:v
    intermediate                 dense:up
    output                       dense:down
    """,
    "deberta-v2": """
    attention.output             dense:o
    attention.self               key_proj:k pos_key_proj:- pos_query_proj:- query_proj:q value_proj:v
    intermediate                 dense:up
    output                       dense:down
    """,
    "modernbert": """
    attn                         Wo:o
    attn.Wqkv                    k:k q:q v:v
    mlp                          Wo:down
    mlp.Wi                       gate:gate up:up
    """,
    "mpnet": """
    attention.attn               k:k o:o q:q v:v
    intermediate                 dense:up
    output                       dense:down
    """,
    "xlnet": """
    ff                           layer_1:up layer_2:down
    """,
    "convbert": """
    attention.output             dense:o
    attention.self               conv_kernel_layer:- conv_out_layer:- key:k query:q value:v
    """,
    "t5": """
    layer.#.DenseReluDense       wi:up wo:down
    layer.#.EncDecAttention      k:k o:o q:q v:v
    layer.#.SelfAttention        k:k o:o q:q v:v
    """,
    "t5_gated mt5": """
    layer.#.DenseReluDense       wi_0:gate wi_1:up wo:down
    layer.#.EncDecAttention      k:k o:o q:q v:v
    layer.#.SelfAttention        k:k o:o q:q v:v
    """,
    "bart mbart marian pegasus whisper": """
    -                            fc1:up fc2:down
    encoder_attn                 k_proj:k out_proj:o q_proj:q v_proj:v
    self_attn                    k_proj:k out_proj:o q_proj:q v_proj:v
    """,
    "prophetnet": """
    cross_attn                   key_proj:k out_proj:o query_proj:q value_proj:v
    feed_forward                 intermediate:up output:down
    self_attn                    key_proj:k out_proj:o query_proj:q relative_pos_embeddings:- value_proj:v
    """,
    "t5gemma": """
    cross_attn                   k_proj:k o_proj:o q_proj:q v_proj:v
    mlp                          down_proj:down gate_proj:gate up_proj:up
    self_attn                    k_proj:k o_proj:o q_proj:q v_proj:v
    """,
    "moonshine": """
    encoder_attn                 k_proj:k o_proj:o q_proj:q v_proj:v
    mlp                          fc1:up fc2:down
    mlp.fc1                      gate:gate up:up
    self_attn                    k_proj:k o_proj:o q_proj:q v_proj:v
    """,
    "wav2vec2": """
    attention                    k_proj:k out_proj:o q_proj:q v_proj:v
    feed_forward                 intermediate_dense:up output_dense:down
    """,
    "wav2vec2-conformer": """
    ffn1                         intermediate_dense:up output_dense:down
    ffn2                         intermediate_dense:up output_dense:down
    self_attn                    linear_k:k linear_out:o linear_pos:- linear_q:q linear_v:v
    """,
    "vit deit dinov2 beit swin segformer": """
    attention                    k_proj:k o_proj:o q_proj:q v_proj:v
    mlp                          fc1:up fc2:down
    """,
    "dinov2_gated dinov3_vit": """
    attention                    k_proj:k o_proj:o q_proj:q v_proj:v
    mlp                          down_proj:down gate_proj:gate up_proj:up
    """,
    "siglip_vision_model clip siglip": """
    mlp                          fc1:up fc2:down
    self_attn                    k_proj:k out_proj:o q_proj:q v_proj:v
    """,
    "sam_vision_model": """
    attn                         proj:o
    attn.qkv                     k:k q:q v:v
    mlp                          lin1:up lin2:down
    """,
    "hiera": """
    layers.#                     proj:-
    layers.#.attn                proj:o
    layers.#.attn.qkv            k:k q:q v:v
    layers.#.mlp                 fc1:up fc2:down
    """,
    "internvl_vision": """
    attention                    k_proj:k projection_layer:o q_proj:q v_proj:v
    mlp                          fc1:up fc2:down
    """,
    "videomae": """
    attention.attention          key:k query:q value:v
    attention.output             dense:o
    intermediate                 dense:up
    output                       dense:down
    """,
    "timesformer": """
    -                            temporal_dense:-
    attention.attention.qkv      k:k q:q v:v
    attention.output             dense:o
    intermediate                 dense:up
    output                       dense:down
    temporal_attention.attention.qkv k:k q:q v:v
    temporal_attention.output    dense:o
    """,
    "blip": """
    attention.output             dense:o
    attention.self               key:k query:q value:v
    crossattention.output        dense:o
    crossattention.self          key:k query:q value:v
    intermediate                 dense:up
    mlp                          fc1:up fc2:down
    output                       dense:down
    self_attn                    projection:o
    self_attn.qkv                k:k q:q v:v
    """,
    "llava paligemma gemma3 idefics3": """
    mlp                          down_proj:down fc1:up fc2:down gate_proj:gate up_proj:up
    self_attn                    k_proj:k o_proj:o out_proj:o q_proj:q v_proj:v
    """,
    "qwen2_vl": """
    attn                         proj:o
    attn.qkv                     k:k q:q v:v
    mlp                          down_proj:down fc1:up fc2:down gate_proj:gate up_proj:up
    self_attn                    k_proj:k o_proj:o q_proj:q v_proj:v
    """,
    "qwen3_vl": """
    attn                         proj:o
    attn.qkv                     k:k q:q v:v
    mlp                          down_proj:down gate_proj:gate linear_fc1:up linear_fc2:down up_proj:up
    self_attn                    k_proj:k o_proj:o q_proj:q v_proj:v
    """,
}


def expected_roles(family: str) -> dict[str, str | None]:
    """Name of every site below its block, numbers as #, and its role."""
    text = next(text for names, text in ROLES.items() if family in names.split())
    found: dict[str, str | None] = {}
    for line in text.strip().splitlines():
        module, *leaves = line.split()
        for leaf in leaves:
            name, role = leaf.split(":")
            found[name if module == "-" else f"{module}.{name}"] = None if role == "-" else role
    return found
