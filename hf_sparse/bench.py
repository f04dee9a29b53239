"""Measures what sparse kernels gain on this machine: for each shape of a model's matrices, and for the whole model."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from hf_sparse import checkpoint, environment, native
from hf_sparse.contextual import predictors_paused
from hf_sparse.errors import ConfigError, ModelError
from hf_sparse.execution import is_transposed, use_sparse_kernels_
from hf_sparse.runtime import ArrangedForm, Form, PackedForm, StackedForm, hold_, refuse_sparse
from hf_sparse.runtime.choices import processor
from hf_sparse.runtime.copies import in_modules, works
from hf_sparse.runtime.sources import InMemory, sample
from hf_sparse.runtime.table import KernelRow, KernelTable
from hf_sparse.runtime.timing import FEWEST, Times, clock_name, interleaved, read_bandwidth

DENSE, CONTROL, SPARSE = "dense (torch)", "dense (own kernel)", "sparse"
TOKENS = (1, 4, 16, 64, 512)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One way of doing one piece of work."""

    work: str  # "2048 x 8192, 50 % zeros" or "generate"
    tokens: int
    way: str
    milliseconds: float  # median
    low: float  # a tenth of the rounds was below
    high: float  # a tenth of the rounds was above
    rounds: int
    speedup: float  # over torch's dense product
    bytes: int | None = None  # of weights that were read
    bandwidth_share: float | None = None  # bytes per second over what reading alone reaches


@dataclass(frozen=True, kw_only=True)
class Bench:
    """All that was measured, and on what."""

    model: str
    machine: dict[str, Any]
    bandwidth: float  # bytes per second
    kernels: tuple[Measured, ...]
    end_to_end: tuple[Measured, ...]
    table: KernelTable

    def to_dict(self) -> dict[str, Any]:
        rows = {name: [asdict(row) for row in getattr(self, name)] for name in ("kernels", "end_to_end")}
        return {
            "model": self.model, "machine": self.machine, "bandwidth": self.bandwidth, **rows, "table": self.table.to_dict(),
        }  # fmt: skip

    def markdown(self) -> str:
        head = [
            f"{self.model}: {', '.join(f'{name} {value}' for name, value in self.machine.items())}. "
            f"Reading memory: {self.bandwidth / 1e9:.1f} GB/s.",
            "",
        ]
        return "\n".join(
            [*head, *_markdown("one matrix", self.kernels), "", *_markdown("whole model", self.end_to_end)]
        )


def _markdown(title: str, rows: Sequence[Measured]) -> Iterator[str]:
    yield f"| {title} | tokens | way | ms (10 % to 90 %) | over torch | MB read | of bandwidth |"
    yield "|---|---:|---|---:|---:|---:|---:|"
    for row in rows:
        read = "" if row.bytes is None else f"{row.bytes / 1e6:.1f}"
        share = "" if row.bandwidth_share is None else f"{100 * row.bandwidth_share:.0f} %"
        spread = f"{row.milliseconds:.3f} ({row.low:.3f} to {row.high:.3f})"
        yield f"| {row.work} | {row.tokens} | {row.way} | {spread} | {row.speedup:.2f} | {read} | {share} |"


def bench(
    model: Any, *, name: str = "", tokens: Sequence[int] = TOKENS, prompt: int = 16, new_tokens: int = 32,
    prefill: int = 512, seconds: float = 0.5, rounds: int = 5,
) -> Bench:  # fmt: skip
    """Measure a pruned model, which is left as it is: its matrices, generating `new_tokens`, and reading `prefill` tokens.

    `seconds` is spent on each matrix and number of tokens, `rounds` runs of the whole model, at least 5, are timed. Predictors that the
    model carries are off meanwhile.

    Raises: ModelError where no matrix can run sparse, with the reasons, or all do already.
    """
    inner = checkpoint.unwrap(model)
    with predictors_paused(inner, "be measured"):
        return _bench(inner, name, tokens, prompt, new_tokens, prefill, seconds, rounds)


def _bench(
    inner: Any, name: str, tokens: Sequence[int], prompt: int, new_tokens: int, prefill: int, seconds: float, rounds: int
) -> Bench:  # fmt: skip
    refuse_sparse(inner, "be compared with what it was")
    _check_room(inner, prompt + new_tokens)
    sparse = shared_copy(inner)
    table = use_sparse_kernels_(sparse, choose="always")
    if not table.sparse:
        reasons = "; ".join(sorted({row.reason for row in table.rows if row.reason} | set(table.left_out.values())))
        raise ModelError(f"no matrix of the model can run sparse, so there is nothing to measure: {reasons}")
    bandwidth = read_bandwidth()
    kernels = [row for case in _cases(inner, table) for row in _kernels(case, tokens, seconds, bandwidth)]
    control = {CONTROL: control_of(inner, table)} if native.available() else {}
    whole = _whole({DENSE: shared_copy(inner), **control, SPARSE: sparse}, prompt, new_tokens, prefill, rounds)
    return Bench(
        model=name or type(inner).__name__, machine=machine(), bandwidth=bandwidth, kernels=tuple(kernels),
        end_to_end=tuple(whole), table=table,
    )  # fmt: skip


def _check_room(model: nn.Module, needed: int) -> None:
    room = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if room is not None and needed > room and _generates(model):
        raise ConfigError(
            f"the model has {room} positions; prompt and new tokens together are {needed}. Ask for fewer."
        )


def _generates(model: Any) -> bool:
    return bool(getattr(model, "can_generate", lambda: False)()) and not model.config.is_encoder_decoder


def machine() -> dict[str, Any]:
    versions = environment.versions()
    return {
        "processor": processor(), "kernels": native.instruction_set(), "threads": torch.get_num_threads(), "time": clock_name(),
        **{name: versions[name] for name in ("python", "torch", "transformers", "hf_sparse")},
    }  # fmt: skip


def shared_copy(model: nn.Module) -> Any:
    """A model of its own modules, but of the same tensors, so that what is not packed takes no memory again."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval()


def control_of(model: nn.Module, table: KernelTable) -> Any:
    """The model on the kernels' own dense product, wherever the sparse one runs sparse."""
    control = shared_copy(model)
    for row in table.sparse:
        module = control.get_submodule(row.module)
        matrix = _source(model, row).matrix().bfloat16()
        hold_(
            module,
            _arranged(matrix) if matrix.dim() == 2 else StackedForm(tuple(map(_arranged, matrix))),
            row.parameter,
        )
    return control


def _arranged(matrix: torch.Tensor) -> ArrangedForm:
    return ArrangedForm(native.arrange(matrix))


def _source(model: nn.Module, row: KernelRow) -> InMemory:
    module = model.get_submodule(row.module)
    return InMemory(getattr(module, row.parameter).detach(), is_transposed(module))


@dataclass(frozen=True)
class Case:
    """One matrix of each shape and sparsity, with what it is called."""

    title: str
    matrix: torch.Tensor  # (out, in)
    transposed: bool
    bias: bool


def _cases(model: nn.Module, table: KernelTable) -> Iterator[Case]:
    seen = set()
    for row in table.sparse:
        title = f"{row.shape[-2]} x {row.shape[-1]}, {100 * (row.sparsity or 0):.0f} % zeros"
        if title not in seen:
            seen.add(title)
            module, source = model.get_submodule(row.module), _source(model, row)
            yield Case(title, sample(source), source.transposed, getattr(module, "bias", None) is not None)


def _kernels(case: Case, tokens: Sequence[int], seconds: float, bandwidth: float) -> Iterator[Measured]:
    rounded = case.matrix.bfloat16()
    forms: dict[str, Callable[[], Form | None]] = {DENSE: lambda: None}
    if native.available():
        forms[CONTROL] = lambda: ArrangedForm(native.arrange(rounded))
    forms[SPARSE] = lambda: PackedForm(native.pack(rounded))
    modules = in_modules(case.matrix, forms, transposed=case.transposed, bias=case.bias)
    sizes = {DENSE: case.matrix.nbytes, CONTROL: rounded.nbytes, SPARSE: native.pack(rounded).nbytes}
    for number in tokens:
        times = interleaved(works(modules, case.matrix, number), seconds)
        for way, found in times.items():
            share = sizes[way] / found.median / bandwidth
            yield _row(case.title, number, way, found, times[DENSE], bytes=sizes[way], bandwidth_share=share)


def _row(work: str, tokens: int, way: str, times: Times, dense: Times, per: int = 1, **more: Any) -> Measured:
    low, middle, high = (1e3 * times.share(part) / per for part in (0.1, 0.5, 0.9))
    return Measured(
        work=work, tokens=tokens, way=way, milliseconds=middle, low=low, high=high, rounds=len(times.seconds),
        speedup=dense.median / times.median, **more,
    )  # fmt: skip


def _whole(ways: dict[str, Any], prompt: int, new_tokens: int, prefill: int, rounds: int) -> Iterator[Measured]:
    """Milliseconds a token for generating (with its prompt), and for reading a prompt and saying one token."""
    model = ways[DENSE]
    if not _generates(model):
        return
    room = getattr(model.config, "max_position_embeddings", None) or prefill + 1
    works = [("generate", prompt, new_tokens), ("prefill", min(prefill, room - 1), 1)]
    for work, given, wanted in works:
        rows = (torch.arange(given, device="cpu") % model.config.vocab_size)[None]
        runs: dict[str, Any] = {way: [_generation(one, rows, wanted)] for way, one in ways.items()}
        times = interleaved(runs, 0.0, least=max(rounds, FEWEST))
        for way, found in times.items():
            per, tokens = (new_tokens, 1) if work == "generate" else (1, given)
            yield _row(
                f"{work}, ms {'a token' if work == 'generate' else 'in all'}", tokens, way, found, times[DENSE], per
            )


def _generation(model: Any, rows: torch.Tensor, wanted: int) -> Callable[[], object]:
    mask = torch.ones_like(rows)
    return lambda: model.generate(
        rows, attention_mask=mask, max_new_tokens=wanted, min_new_tokens=wanted, do_sample=False, pad_token_id=0
    )
