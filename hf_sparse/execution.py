"""Lets a model in memory run on sparse kernels where they are faster, and back."""

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from hf_sparse import checkpoint, native
from hf_sparse.errors import ConfigError, ModelError, unknown
from hf_sparse.families import find_sites
from hf_sparse.runtime import PackedForm, hold_, release_, semi_structured, sparse_modules, why_not_module
from hf_sparse.runtime.choices import GAIN, Choices
from hf_sparse.runtime.modules import CLASSES, SparseModule, moved_dtype
from hf_sparse.runtime.table import KernelRow, KernelTable
from hf_sparse.sites import Site, count_zeros

CHOICES = ("measured", "always", "never")
TOKENS = (1, 16, 512)


def use_sparse_kernels_(
    model: nn.Module, *, choose: str = "measured", tokens: Sequence[int] = TOKENS, round_weights: bool = False
) -> KernelTable:
    """Let a pruned model compute with its zeros left out, matrix by matrix; returns what runs sparse, and why the rest does not.

    `choose` is "measured" (a matrix is packed where it is faster than dense, on this machine, for at least one of the `tokens`,
    the numbers of tokens in one pass that matter: 1 for decoding, many for a prompt), "always" or "never". On a CPU, weights are
    packed in bfloat16. Float32 weights are packed only where that loses nothing, or with `round_weights=True`, which rounds them for
    good. On a GPU, 2:4 matrices use torch's semi-structured kernels. What is packed can be run, compiled, copied and saved, as plain
    weights with zeros, but not trained; `use_dense_kernels_` is the way back. On a model that already runs sparse, only what is still
    dense is looked at.

    Raises: ConfigError for an unknown choice or impossible numbers of tokens; ModelError for quantized models, or sharded ones.
    """
    if choose not in CHOICES:
        raise ConfigError(unknown("choose", choose, CHOICES))
    counts = _counts(tokens)
    model = checkpoint.unwrap(model)
    _check(model)
    choices, rows = Choices(), []
    inventory = find_sites(model)
    try:
        for path, sites in _matrices(inventory.all()).items():
            rows.append(_decide(model, path, sites, choose, counts, round_weights, choices))
    finally:
        choices.save()
        _guard(model)
    return KernelTable(tuple(rows), inventory.left_out)


def use_dense_kernels_(model: nn.Module) -> nn.Module:
    """Gives a model its dense weights back, matrix by matrix, bit for bit as they were when they were packed; returns the model.

    The parameters are new objects: make optimizers afterwards.
    """
    inner = checkpoint.unwrap(model)
    for _, module in list(sparse_modules(inner)):
        release_(module)
    inner.__dict__.pop("_apply", None)
    return model


def _counts(tokens: Sequence[int]) -> tuple[int, ...]:
    counts = tuple(tokens)
    if not counts or not all(isinstance(count, int) and not isinstance(count, bool) and count > 0 for count in counts):
        raise ConfigError(
            f"tokens must be one or more numbers of at least 1, such as (1, 16, 512); given is {tokens!r}."
        )
    return counts


def _check(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    if getattr(model, "is_quantized", False) or getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            "the model is quantized, and sparse kernels multiply plain bfloat16 weights; load it without quantization."
        )
    for name, parameter in model.named_parameters():
        if type(parameter.data).__name__ == "DTensor":
            raise ModelError(f"{name} is sharded over processes; sparse kernels run whole models in one process.")


def _matrices(sites: Sequence[Site]) -> dict[tuple[str, str], list[Site]]:
    """The stored parameters, each with the sites inside."""
    found: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        found.setdefault((site.module, site.parameter), []).append(site)
    return found


def _decide(
    model: nn.Module,
    path: tuple[str, str],
    sites: list[Site],
    choose: str,
    tokens: tuple[int, ...],
    rounds: bool,
    choices: Choices,
) -> KernelRow:
    """Decides about one matrix, and packs it where that is the decision."""
    module = model.get_submodule(path[0])
    names = tuple(site.name for site in sites)
    if isinstance(module, SparseModule):
        nbytes = module._form.shape[0] * module._form.shape[1] * module._dtype.itemsize
        return KernelRow(
            module=path[0], sites=names, shape=module._form.shape, sparsity=None, form=module._form.name, reason="as before",
            dense_bytes=nbytes, bytes=module._form.nbytes,
        )  # fmt: skip
    weight = getattr(module, path[1]).detach()
    zeros = None if weight.device.type == "meta" else count_zeros(weight) / max(1, weight.numel())
    row: dict[str, Any] = {
        "module": path[0], "sites": names, "shape": tuple(_matrix(module, weight).shape), "sparsity": zeros, "dense_bytes": weight.nbytes,
    }  # fmt: skip
    reason = _why_dense(model, module, weight, zeros, choose, rounds)
    if reason:
        return KernelRow(**row, form="dense", reason=reason, bytes=weight.nbytes)
    if weight.device.type == "cuda":
        return _on_gpu(module, weight, row, choose, tokens)
    return _on_cpu(module, weight, row, choose, tokens, choices)


def _why_dense(
    model: nn.Module, module: nn.Module, weight: torch.Tensor, zeros: float | None, choose: str, rounds: bool
) -> str:
    if weight.ndim != 2:
        return "it holds all experts of a block, which the kernels do not take in this version"
    if zeros is None:
        return "its weights are offloaded; load the model into memory"
    reason = why_not_module(module) or _why_shared(model, module)
    if reason:
        return reason
    if zeros == 0:
        return "it holds no zeros"
    if choose == "never":
        return "choose is 'never'"
    if weight.device.type == "cuda":
        return semi_structured.why_not(_matrix(module, weight))
    if choose == "measured" and not native.available():
        return native.why_not()  # torch's own way is slower for certain, so nothing needs measuring
    return _why_not_on_cpu(weight, rounds)


def _why_shared(model: nn.Module, module: nn.Module) -> str:
    weight = module._parameters["weight"]
    others = (
        name
        for name, other in model.named_modules()
        if other is not module and other._parameters.get("weight") is weight
    )
    name = next(others, None)
    return f"it is the same tensor as the weight of {name}" if name is not None else ""


def _matrix(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A stored weight as (out, in)."""
    return weight.T if type(module) in CLASSES and CLASSES[type(module)].transposed else weight


def _why_not_on_cpu(weight: torch.Tensor, rounds: bool) -> str:
    if weight.device.type != "cpu":
        return f"there are no sparse kernels for {weight.device.type}"
    if weight.dtype == torch.bfloat16:
        return ""
    if weight.dtype != torch.float32:
        name = str(weight.dtype).removeprefix("torch.")
        return f"its weights are {name}, the kernels multiply bfloat16; load the model with dtype=torch.bfloat16"
    if rounds or torch.equal(weight.bfloat16().float(), weight):
        return ""
    return (
        "its weights are float32 and packing would round them to bfloat16; load the model with dtype=torch.bfloat16, or allow "
        "it with round_weights=True"
    )


def _on_cpu(
    module: nn.Module, weight: torch.Tensor, row: dict[str, Any], choose: str, tokens: tuple[int, ...], choices: Choices
) -> KernelRow:
    matrix = _matrix(module, weight)
    speedups = {} if choose == "always" else choices.speedups(matrix, row["sparsity"], tokens)
    if choose == "measured" and max(speedups.values()) < GAIN:
        return KernelRow(**row, form="dense", reason=_measured(speedups), bytes=weight.nbytes, speedups=speedups)
    form = PackedForm(native.pack(matrix.bfloat16()))
    hold_(module, form)
    reason = _measured(speedups) if speedups else "choose is 'always'"
    return KernelRow(**row, form=form.name, reason=reason, bytes=form.nbytes, speedups=speedups)


def _on_gpu(
    module: nn.Module, weight: torch.Tensor, row: dict[str, Any], choose: str, tokens: tuple[int, ...]
) -> KernelRow:
    matrix = _matrix(module, weight)
    form = semi_structured.form_of(matrix)
    speedups = {} if choose == "always" else semi_structured.speedups(matrix, form, tokens)
    if choose == "measured" and max(speedups.values()) < GAIN:
        return KernelRow(**row, form="dense", reason=_measured(speedups), bytes=weight.nbytes, speedups=speedups)
    hold_(module, form)
    reason = _measured(speedups) if speedups else "choose is 'always'"
    return KernelRow(**row, form=form.name, reason=reason, bytes=form.nbytes, speedups=speedups)


def _measured(speedups: dict[int, float]) -> str:
    shown = ", ".join(f"{speedup:.2f}x for {count}" for count, speedup in speedups.items())
    return f"measured against dense: {shown} token{'s' if list(speedups)[-1] > 1 else ''}"


def _guard(model: nn.Module) -> None:
    """Lets a move that some matrices refuse fail before it has moved the others."""
    if any(True for _ in sparse_modules(model)) and "_apply" not in model.__dict__:
        model._apply = types.MethodType(_checked_apply, model)  # type: ignore[method-assign]


def _checked_apply(model: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    for _, module in sparse_modules(model):
        moved_dtype(module, fn)
    return type(model)._apply(model, fn, recurse)
