"""The form of a matrix of which single rows, or single columns, are read: zeros left out row after row."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hf_sparse.errors import KernelError
from hf_sparse.native import pack
from hf_sparse.native.gather import gather_dots, gather_sums
from hf_sparse.native.products import DTYPES, checked_input
from hf_sparse.native.rows import PackedRows, pack_rows
from hf_sparse.runtime.forms import PackedForm

FEW_TOKENS = 4  # whose products read the rows once for each of them; for more the matrix is made dense
_NOT_TRACED = (
    "A matrix whose rows predictors choose cannot be traced; trace the model with hf_sparse.predictors_disabled(model)."
)


@dataclass(frozen=True, eq=False)
class RowsForm:
    """Packed rows of a matrix (out, in), or of its transpose: then its columns are what can be read one by one."""

    rows: PackedRows
    transposed: bool
    expands_from: int | None = None  # of the packed form that it was made of, which is made of it again
    name = "packed"
    dtypes = DTYPES

    @classmethod
    def of(cls, form: PackedForm, transposed: bool) -> "RowsForm":
        """A dense matrix is in memory meanwhile."""
        matrix = form.unpack()
        return cls(pack_rows(matrix.t() if transposed else matrix), transposed, form.expands_from)

    def packed(self) -> PackedForm:
        """The way back."""
        return PackedForm(pack(self.unpack()), self.expands_from)

    def packed_again(self, matrix: torch.Tensor) -> "RowsForm":
        """The form of another bfloat16 matrix (out, in)."""
        return RowsForm(pack_rows(matrix.t() if self.transposed else matrix), self.transposed, self.expands_from)

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.rows.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    @property
    def device(self) -> torch.device:
        return self.rows.values.device

    def tensors(self) -> dict[str, torch.Tensor]:
        rows = self.rows
        return {"rows_masks": rows.masks, "rows_starts": rows.starts, "rows_values": rows.values}

    def unpack(self) -> torch.Tensor:
        matrix = self.rows.unpack()
        return matrix.t().contiguous() if self.transposed else matrix

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        x = checked_input(x, self.shape)
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) > FEW_TOKENS:
            dense = self.rows.unpack().to(x.dtype)
            return F.linear(x, dense.t() if self.transposed else dense, bias)
        every = torch.arange(self.rows.shape[0]).repeat(len(flat), 1)
        out = (gather_sums if self.transposed else gather_dots)(flat, self.rows, every, bias)
        return out.view(*x.shape[:-1], self.shape[0])

    def traced_product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        raise KernelError(_NOT_TRACED)

    def traced_unpack(self) -> torch.Tensor:
        raise KernelError(_NOT_TRACED)
