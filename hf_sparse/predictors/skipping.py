"""The modules of one block that compute chosen rows only: which they are, and what of them cannot be left out."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_sparse.errors import ModelError
from hf_sparse.native.gather import DTYPES
from hf_sparse.native.layout import STRIPE_ROWS
from hf_sparse.predictors.rows import fill_stripes
from hf_sparse.predictors.units import BlockUnits, module_of
from hf_sparse.runtime.forms import PackedForm
from hf_sparse.runtime.modules import SparseLinear
from hf_sparse.sites import Site, stored_rows

Forward = Callable[[torch.Tensor], torch.Tensor]
_OTHERWISE = "hf_sparse.predictors.masked runs it exactly, without saving time."


class Feed:
    """Gate, up and down of one block: one or two modules that give neurons, and one that takes them."""

    def __init__(self, model: nn.Module, block: BlockUnits) -> None:
        self.block = block
        self.down = linear(model, block.down)
        sites = [site for site in (block.gate, block.up) if site is not None]
        self.gate = linear(model, sites[0])
        self.starts: dict[
            nn.Linear, list[int]
        ] = {}  # module -> first row of each of its sites, in their order in memory
        self.first_row_of_gate = _first_row(sites[0], block)
        for site in sites:
            self.starts.setdefault(linear(model, site), []).append(_first_row(site, block))
        for module, starts in self.starts.items():
            starts.sort()
            if module.out_features != len(starts) * block.neurons:
                raise ModelError(_whole(block, "gate and up", "they share their matrix with something else"))
        if _normed(model, [*self.starts, self.down], block.neurons):
            raise ModelError(_whole(block, "neurons", "a norm over all of them lies between"))

    def fills_stripes(self, module: nn.Linear, neuron_block: int) -> bool:
        """Whether blocks of so many neurons are whole stripes of a packed matrix."""
        sizes = (neuron_block, self.block.neurons, *self.starts[module])
        return all(size % STRIPE_ROWS == 0 for size in sizes)

    @property
    def fused(self) -> bool:
        return len(self.starts[self.gate]) > 1


class Heads:
    """The query and output projections of one block. Without a query projection that can be cut, only the outputs are."""

    def __init__(self, model: nn.Module, block: BlockUnits, sites: list[Site]) -> None:
        self.block = block
        self.o = linear(model, block.o)
        found = [site for site in sites if site.role == "q" and site.shape[0] == block.heads * block.head_size]
        self.q = linear(model, found[0]) if len(found) == 1 else None
        if self.q is None or _normed(model, [linear(model, site) for site in sites if site.role in ("q", "k", "v", "o")], found[0].shape[0]):  # fmt: skip
            self.q = None
            return
        self.q_rows = stored_rows(found[0])  # row of the module's weight of every channel
        others = torch.ones(self.q.out_features, dtype=torch.bool)
        others[self.q_rows] = False
        self.others = others.nonzero().view(1, -1)  # keys and values that lie in the same matrix: always computed
        runs = self.q_rows.view(block.heads, -1)
        self.fills_stripes = all(fill_stripes(rows) for rows in (*runs, self.others[0]))


def linear(model: nn.Module, site: Site) -> nn.Linear:
    """The Linear module of a site, plain or on sparse kernels; raises ModelError for any other, and for weights that are not read by rows."""
    module = module_of(model, site)
    plain = type(module) in (nn.Linear, SparseLinear) and "forward" not in module.__dict__
    if not isinstance(module, nn.Linear) or not plain:
        kind = type(module).__name__
        raise ModelError(
            f"{site.name} runs in {'a wrapped ' if kind == 'Linear' else ''}{kind}; chosen rows are read from plain torch.nn.Linear modules "
            f"only, dense or packed. Merge adapters; {_OTHERWISE}"
        )
    if isinstance(module, SparseLinear):
        if isinstance(module._form, PackedForm):
            return module
        raise ModelError(
            f"{site.name} is held as {module._form.name}, of which single rows cannot be read. hf_sparse.use_dense_kernels_(model) gives "
            f"the dense weights back; {_OTHERWISE}"
        )
    weight = module.weight
    if weight.dtype not in DTYPES or weight.device.type != "cpu" or not weight.is_contiguous():
        raise ModelError(
            f"{site.name} is {weight.dtype} on {weight.device}{'' if weight.is_contiguous() else ', not contiguous'}; chosen rows are "
            f"read from bfloat16 or float32 on the CPU. {_OTHERWISE[0].upper()}{_OTHERWISE[1:]}"
        )
    return module


def _first_row(site: Site, block: BlockUnits) -> int:
    rows = stored_rows(site)
    first = int(rows[0])
    if not torch.equal(rows, torch.arange(first, first + len(rows))):
        raise ModelError(_whole(block, "gate and up", "their rows are interleaved"))
    return first


def _whole(block: BlockUnits, what: str, why: str) -> str:
    return f"the {what} of {block.name} can only be computed whole: {why}. {_OTHERWISE[0].upper()}{_OTHERWISE[1:]}"


def _normed(model: nn.Module, modules: list[nn.Linear], width: int) -> bool:
    """Whether a module beside these has one weight for each of `width` channels, as norms have."""
    names = {module: name for name, module in model.named_modules() if module in modules}
    owner = _common([name.split(".")[:-1] for name in names.values()])
    inside = {id(parameter) for module in modules for parameter in module.parameters()}
    parameters: Iterator[Any] = model.get_submodule(owner).parameters()
    return any(parameter.shape == (width,) for parameter in parameters if id(parameter) not in inside)


def _common(paths: list[list[str]]) -> str:
    length = 0
    while all(len(path) > length and path[length] == paths[0][length] for path in paths):
        length += 1
    return ".".join(paths[0][:length])


def replace_forward(module: nn.Module, forward: Forward) -> Callable[[], None]:
    """Let a module do something else. Calling what is returned undoes it."""
    module.forward = torch.compiler.disable(forward)  # the choices of a token are not known when a graph is made
    return partial(object.__delattr__, module, "forward")
