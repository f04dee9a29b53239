"""Unstructured: the lowest scores within each row, each column or the whole site are dropped."""

import torch

from hf_sparse.errors import ConfigError


def _lowest_dropped(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mask that drops the `counts[i]` lowest scores of row i; of equals the lower index is dropped first."""
    order = rows.argsort(dim=1, stable=True)
    kept_in_order = torch.arange(rows.shape[1], device=rows.device) >= counts[:, None]
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order, kept_in_order)


def unstructured_mask(scores: torch.Tensor, sparsity: float, axis: str, rounding: str) -> torch.Tensor:
    """Mask (out, in).

    `exact`: round(sparsity * size) weights go, by lines that differ by one at most; `truncate`: int(sparsity * length)
    in each line.
    """
    if axis == "output":
        return unstructured_mask(scores.T, sparsity, "input", rounding).T
    rows = scores.reshape(1, -1) if axis == "site" else scores
    number, length = rows.shape
    if rounding == "truncate":
        counts = torch.full((number,), int(length * sparsity))
    elif rounding == "exact":
        share, left_over = divmod(round(sparsity * scores.numel()), number)
        counts = torch.full((number,), share)
        counts[:left_over] += 1
    else:
        raise ConfigError(f"rounding {rounding!r} does not exist; allowed: 'exact', 'truncate'.")
    return _lowest_dropped(rows, counts.to(rows.device)).reshape(scores.shape)
