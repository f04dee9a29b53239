"""How the products of a block hang together: which share an input, in which order they come, and which end in its output."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from hf_sparse.forwards import Call, main_tensor
from hf_sparse.observe import Observer, Operand
from hf_sparse.sites import Site

_ROUNDING = 1e-3  # relative; noise that enters the output as it is comes back this exactly


@dataclass
class Wiring:
    """What one short dense run of a block showed; experts are left out, as their tokens differ from run to run."""

    inputs: list[list[Operand]] = field(
        default_factory=list
    )  # operands that share an input, in order of their products
    enters: dict[Operand, torch.Tensor] = field(default_factory=dict)  # operand -> factor of each channel in the output

    def group_of(self, operand: Operand) -> list[Operand]:
        return next((group for group in self.inputs if operand in group), [operand])


def find_wiring(model: nn.Module, sites: Sequence[Site], call: Call, device: str | None) -> Wiring:
    """Run a call of a dense block a few times and look; the block's weights stay as they are."""
    found = Wiring()
    shapes: dict[Operand, torch.Size] = {}
    held: list[tuple[torch.Tensor, int, list[Operand]]] = []

    stream = main_tensor((call.args, call.kwargs))

    def look(operand: Operand, x: torch.Tensor, product: torch.Tensor) -> None:
        if operand in shapes or _is_routed(operand, x, stream):
            return
        shapes[operand] = product.shape
        for other, version, group in held:
            same = other.data_ptr() == x.data_ptr() and other.shape == x.shape and other.stride() == x.stride()
            if same and version == x._version:
                group.append(operand)
                return
        held.append((x, x._version, [operand]))

    with Observer(model, sites, look):
        call(device)
    found.inputs = [group for *_, group in held]
    if stream is not None:
        candidates = [operand for operand, shape in shapes.items() if shape.numel() == stream.numel()]
        found.enters = _entering(model, sites, candidates, stream, lambda: main_tensor(call(device)))
    return found


def _is_routed(operand: Operand, x: torch.Tensor, stream: torch.Tensor | None) -> bool:
    """Whether a product is an expert's, which gets a choice of the tokens in a row of their own."""
    if operand.expert is not None or "expert" in operand.module.rpartition("shared_expert")[2]:
        return True
    return stream is not None and x.ndim == 2 and x.shape[0] * stream.shape[-1] != stream.numel()


def _entering(
    model: nn.Module,
    sites: Sequence[Site],
    candidates: Sequence[Operand],
    stream: torch.Tensor,
    run: Callable[[], torch.Tensor | None],
) -> dict[Operand, torch.Tensor]:
    """The products that are added to the block's input to make its output, each with a factor per channel.

    Proven by numbers: with every product replaced by zeros the output must be the input; with noise in the place of some, the
    output must be the input plus the noise times the factors.
    """
    generator = torch.Generator().manual_seed(0)
    noise = {operand: torch.randn(stream.shape, generator=generator).to(stream) for operand in candidates}

    def change(chosen: Sequence[Operand]) -> torch.Tensor | None:
        def replace(operand: Operand, x: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
            return noise[operand].view(product.shape).clone() if operand in chosen else torch.zeros_like(product)

        with Observer(model, sites, replace):
            output = run()
        return None if output is None or output.shape != stream.shape else (output - stream).float()

    unchanged = change(())
    if unchanged is None or float(unchanged.abs().max()) > _ROUNDING * float(stream.abs().max()):
        return {}
    factors = {}
    for operand in candidates:
        difference, given = change((operand,)), noise[operand].float()
        if difference is None or not bool(difference.any()):
            continue
        flat, given = difference.flatten(0, -2), given.flatten(0, -2)
        factor = (flat * given).sum(0) / given.square().sum(0)
        if float((flat - factor * given).norm()) <= _ROUNDING * float(flat.norm()) and bool((factor != 0).all()):
            factors[operand] = factor
    together = change(tuple(factors))
    expected = sum((factors[operand] * noise[operand].float() for operand in factors), torch.zeros(()).to(stream))
    if together is None or float((together - expected).norm()) > 3 * _ROUNDING * float(together.norm()):
        return {}
    return factors
