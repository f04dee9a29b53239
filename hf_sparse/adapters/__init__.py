"""Adapters of PEFT on sparse models: masked LoRA, SHiRA inside the support, merges that keep every zero."""

from hf_sparse.adapters.mask import mask_lora_
from hf_sparse.adapters.merge import merge_and_unload
from hf_sparse.adapters.shira import sparse_shira_config

__all__ = ["mask_lora_", "merge_and_unload", "sparse_shira_config"]
