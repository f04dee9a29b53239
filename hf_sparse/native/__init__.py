"""Products with sparse weights on the CPU: one packed layout for every pattern, and kernels for several instruction sets."""

from hf_sparse.native.binary import available, instruction_set, instruction_sets, why_not
from hf_sparse.native.packed import Arranged, Packed, arrange, pack, pack_stored
from hf_sparse.native.products import dense_matmul, matmul, matmul_selected
from hf_sparse.native.stored import gather_bits, spread_bits

__all__ = [
    "available", "why_not", "instruction_set", "instruction_sets", "Packed", "pack", "pack_stored", "matmul",
    "matmul_selected", "Arranged", "arrange", "dense_matmul", "spread_bits", "gather_bits",
]  # fmt: skip
