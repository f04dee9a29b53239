"""Lets a model in memory run on sparse kernels where they are faster, and back."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hf_sparse import checkpoint, native
from hf_sparse.contextual import predictors_paused
from hf_sparse.errors import ConfigError, ModelError, unknown
from hf_sparse.families import find_sites
from hf_sparse.runtime import Form, hold_, release_, semi_structured, sparse_modules, why_not_module
from hf_sparse.runtime.choices import GAIN, Choices, expands_from
from hf_sparse.runtime.guards import guard_, unguard_
from hf_sparse.runtime.modules import CLASSES, SparseModule
from hf_sparse.runtime.sources import InCheckpoint, InMemory, Source, dense_bytes, matrix_shape
from hf_sparse.runtime.table import KernelRow, KernelTable
from hf_sparse.sites import Site
from hf_sparse.storage.names import forget_format

Memory = tuple[str, int]  # device and address

CHOICES = ("measured", "always", "never")
TOKENS = (1, 16, 512)
NARROWEST = 16  # inputs: what is packed is padded to 32


def use_sparse_kernels_(
    model: nn.Module, *, choose: str = "measured", tokens: Sequence[int] = TOKENS, round_weights: bool = False
) -> KernelTable:
    """Let a pruned model compute with its zeros left out, matrix by matrix; returns what runs sparse, and why the rest does not.

    `choose` is "measured" (a matrix is packed where it is faster than dense, on this machine, for at least one of the `tokens`,
    the numbers of tokens in one pass that matter: 1 for decoding, many for a prompt), "always" or "never". On a CPU, weights are
    packed in bfloat16. Float32 weights are packed only where that loses nothing, or with `round_weights=True`, which rounds them for
    good. On a GPU, 2:4 matrices use torch's semi-structured kernels. What is packed can be run, compiled, copied and saved, as plain
    weights with zeros, but not trained; `use_dense_kernels_` is the way back. On a model that already runs sparse, only what is still
    dense is looked at. Predictors that the model carries stay on, and then leave out work of the packed matrices.

    Raises: ConfigError for an unknown choice or impossible numbers of tokens; ModelError for quantized models, sharded ones, and
        inside a `with` of `gathered`.
    """
    model = checkpoint.unwrap(model)
    wanted = _wanted(choose, tokens, round_weights, model)
    _check(model)
    with predictors_paused(model, "get sparse kernels"):
        return _held(model, wanted, round_weights)


def _held(model: nn.Module, wanted: "_Wanted", round_weights: bool) -> KernelTable:
    choices, rows = Choices(), []
    inventory = find_sites(model)
    try:
        for path, sites in _matrices(inventory.all()).items():
            row, form = _decide(model, path, sites, None, wanted, choices)
            rows.append(row)
            if form is not None:
                hold_(model.get_submodule(path[0]), form, path[1], rounds=round_weights)
    finally:
        choices.save()
        guard_(model)
    return KernelTable(tuple(rows), inventory.left_out)


def check_kernel_options(
    choose: str = "measured", tokens: Sequence[int] = TOKENS, round_weights: bool = False, **strange: Any
) -> None:
    """Refuse, before a model is loaded, what `use_sparse_kernels_` would refuse afterwards; raises ConfigError."""
    if strange:
        raise ConfigError(unknown("argument", next(iter(strange)), ("choose", "tokens", "round_weights")))
    _wanted(choose, tokens, round_weights)


def sparse_forms(
    model: nn.Module,
    stored: Mapping[str, Any],
    *,
    choose: str = "measured",
    tokens: Sequence[int] = TOKENS,
    round_weights: bool = False,
) -> dict[str, Form]:
    """The forms of those parameters that a compressed checkpoint holds and that are to run sparse; the model has no weights yet.

    `stored` are the `StoredTensor`s under the names that they have in the model; the rest is as with `use_sparse_kernels_`.
    """
    wanted, choices = _wanted(choose, tokens, round_weights, model), Choices()
    forms: dict[str, Form] = {}
    try:
        for path, sites in _matrices(find_sites(model).all()).items():
            name, module = ".".join(path), model.get_submodule(path[0])
            if name in stored:
                source = InCheckpoint(stored[name], getattr(module, path[1]).dtype, is_transposed(module))
                _, form = _decide(model, path, sites, source, wanted, choices)
                forms |= {} if form is None else {name: form}
    finally:
        choices.save()
    return forms


def hold_forms_(model: nn.Module, forms: Mapping[str, Form], *, round_weights: bool = False, **options: Any) -> None:
    """Gives a model that was loaded what `sparse_forms` returned for the same options."""
    for name, form in forms.items():
        path, _, parameter = name.rpartition(".")
        hold_(model.get_submodule(path), form, parameter, rounds=round_weights)
    guard_(model)


def use_dense_kernels_(model: nn.Module) -> nn.Module:
    """Gives a model its dense weights back, matrix by matrix, bit for bit as they were when they were packed; returns the model.

    The parameters are new objects: make optimizers afterwards.
    """
    inner = checkpoint.unwrap(model)
    with predictors_paused(inner, "get dense kernels"):
        unguard_(inner)
        for _, module in list(sparse_modules(inner)):
            release_(module)
    return model


@dataclass(frozen=True)
class _Wanted:
    """The arguments of `use_sparse_kernels_`, checked."""

    choose: str
    tokens: tuple[int, ...]
    round_weights: bool
    shared: Mapping[Memory, list[str]]  # of the model


def _wanted(choose: str, tokens: Sequence[int], round_weights: bool, model: nn.Module | None = None) -> _Wanted:
    if choose not in CHOICES:
        raise ConfigError(unknown("choose", choose, CHOICES))
    counts = tuple(tokens)
    if not counts or not all(isinstance(count, int) and not isinstance(count, bool) and count > 0 for count in counts):
        raise ConfigError(
            f"tokens must be one or more numbers of at least 1, such as (1, 16, 512); given is {tokens!r}."
        )
    return _Wanted(choose, counts, round_weights, {} if model is None else _shared(model))


def _check(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    forget_format(config)
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
    model: nn.Module, path: tuple[str, str], sites: list[Site], stored: Source | None, wanted: _Wanted, choices: Choices
) -> tuple[KernelRow, Form | None]:
    """What is decided about one matrix, and the form that it gets; None of it leaves the matrix as it is."""
    module = model.get_submodule(path[0])
    names = tuple(site.name for site in sites)
    if isinstance(module, SparseModule) and path[1] in module._held:
        held = module._held[path[1]]
        return KernelRow(
            module=path[0], sites=names, shape=held.shape, sparsity=None, form=held.name, reason="as before",
            dense_bytes=torch.Size(held.shape).numel() * module._dtype.itemsize, bytes=held.nbytes, parameter=path[1],
        ), None  # fmt: skip
    source: Source = stored or InMemory(getattr(module, path[1]).detach(), is_transposed(module))
    size = dense_bytes(source)
    row = KernelRow(
        module=path[0], sites=names, shape=matrix_shape(source), sparsity=source.zeros, form="dense", reason="",
        dense_bytes=size, bytes=size, parameter=path[1],
    )  # fmt: skip
    reason = _why_dense(module, path, source, wanted)
    if reason:
        return replace(row, reason=reason), None
    form: Form | None = semi_structured.form_of(source.matrix()) if source.device.type == "cuda" else None
    expands, bias = None, getattr(module, "bias", None) is not None
    if wanted.choose == "measured":
        speedups, expands = _speedups(source, form, wanted.tokens, choices, bias)
        row = replace(row, reason=_measured(speedups, expands), speedups=speedups)
        if max(speedups.values()) < GAIN:
            return row, None
    else:
        row = replace(row, reason="choose is 'always'")
    form = form or source.packed(expands)
    return replace(row, form=form.name, bytes=form.nbytes), form


def is_transposed(module: nn.Module) -> bool:
    """Whether a module keeps its weights as (in, out)."""
    return bool(getattr(module, "is_transposed", False)) or (
        type(module) in CLASSES and CLASSES[type(module)].transposed
    )


def _speedups(
    source: Source, form: Form | None, tokens: tuple[int, ...], choices: Choices, bias: bool
) -> tuple[dict[int, float], int | None]:
    """What was measured, and from how many tokens on a packed matrix is to be expanded."""
    if isinstance(form, semi_structured.SemiStructuredForm):
        return semi_structured.speedups(source.matrix(), form, tokens), None
    found = choices.speedups(source, tokens, bias)
    expands = expands_from(found)
    chosen = {
        count: speedup.kernels if expands is None or count < expands else speedup.expanded
        for count, speedup in found.items()
    }
    return chosen, expands


def _why_dense(module: nn.Module, path: tuple[str, str], source: Source, wanted: _Wanted) -> str:
    if source.zeros is None:
        return "its weights are offloaded; load the model into memory"
    reason = why_not_module(module, path[1]) or _why_shared(wanted.shared, path, module._parameters[path[1]])  # type: ignore[arg-type]
    if reason:
        return reason
    if source.zeros == 0:
        return "it holds no zeros"
    if matrix_shape(source)[-1] < NARROWEST:
        return f"it has less than {NARROWEST} inputs"
    if wanted.choose == "never":
        return "choose is 'never'"
    if source.device.type == "cuda":
        return semi_structured.why_not(source.matrix()) if len(source.shape) == 2 else "it holds all experts of a block"
    if wanted.choose == "measured" and not native.available():
        return native.why_not()  # torch's own way is slower for certain, so nothing needs measuring
    return _why_not_on_cpu(source, wanted.round_weights)


def _memory(parameter: torch.Tensor) -> Memory:
    """What two parameters have in common that are tied; those on the meta device have no memory to compare."""
    if parameter.device.type == "meta":
        return "meta", id(parameter)
    return str(parameter.device), parameter.untyped_storage().data_ptr()


def _shared(model: nn.Module) -> dict[Memory, list[str]]:
    """The names of a model's parameters by their memory, where several lie in one."""
    found: dict[Memory, list[str]] = defaultdict(list)
    for path, owner in model.named_modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                found[_memory(parameter)].append(f"{path}.{name}".removeprefix("."))
    return {memory: names for memory, names in found.items() if len(names) > 1}


def _why_shared(shared: Mapping[Memory, list[str]], path: tuple[str, str], weight: torch.Tensor) -> str:
    """Letting a tensor go that is another one as well would save nothing, and undo the tie."""
    own = ".".join(path).removeprefix(".")
    name = next((name for name in shared.get(_memory(weight), ()) if name != own), None)
    return f"it is the same tensor as {name}" if name is not None else ""


def _why_not_on_cpu(source: Source, rounds: bool) -> str:
    if source.device.type != "cpu":
        return f"there are no sparse kernels for {source.device.type}"
    if source.dtype == torch.bfloat16:
        return ""
    if source.dtype != torch.float32:
        name = str(source.dtype).removeprefix("torch.")
        return f"its weights are {name}, the kernels multiply bfloat16; load the model with dtype=torch.bfloat16"
    if rounds or source.is_bfloat16():
        return ""
    return (
        "its weights are float32 and packing would round them to bfloat16; load the model with dtype=torch.bfloat16, or allow "
        "it with round_weights=True"
    )


def _measured(speedups: dict[int, float], expands: int | None) -> str:
    shown = ", ".join(f"{speedup:.2f}x for {count}" for count, speedup in speedups.items())
    text = f"measured against dense: {shown} token{'s' if list(speedups)[-1] > 1 else ''}"
    if max(speedups.values()) < GAIN:
        return text  # it stays dense, and nothing is slower
    slower = [str(count) for count, speedup in speedups.items() if speedup < 1 / GAIN]
    text += f"; made dense for each product from {expands} tokens on" if expands is not None else ""
    return f"{text}; slower than dense for {' and '.join(slower)} tokens" if slower else text
