"""Compressed checkpoints: non-zeros and one bit per weight, under the names of the plain checkpoint."""

from hf_sparse.storage.bitmask import Parts, compress, decompress
from hf_sparse.storage.names import (
    FORMATS,
    QUANT_METHOD,
    is_compressed,
    is_compressed_weights,
    quantization_config,
)
from hf_sparse.storage.reader import StoredTensor, open_tensors, plain_tensors
from hf_sparse.storage.state import compressed_state

__all__ = [
    "FORMATS",
    "QUANT_METHOD",
    "Parts",
    "StoredTensor",
    "compress",
    "compressed_state",
    "decompress",
    "is_compressed",
    "is_compressed_weights",
    "open_tensors",
    "plain_tensors",
    "quantization_config",
]
