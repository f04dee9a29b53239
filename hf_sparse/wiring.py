"""How the products of a block hang together: which share an input, in which order they come, and which end in its output."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from hf_sparse.forwards import Call, main_tensor, run_again
from hf_sparse.observe import Observer, Operand
from hf_sparse.record import Identity, identity
from hf_sparse.sites import Site

_ROUNDING = 1e-3  # relative; noise that enters the output as it is comes back this exactly
_LOUDNESS = 8.0  # of the noise, over the stream
_UNACCOUNTED = 0.1  # of what a block adds; half precision rounds the sum with the stream, which may be much larger


@dataclass
class Wiring:
    """What one short dense run of a block showed; experts are left out, as their tokens differ from run to run."""

    inputs: list[list[Operand]] = field(
        default_factory=list
    )  # operands that share an input, in order of their products
    enters: dict[Operand, torch.Tensor] = field(
        default_factory=dict
    )  # operand -> factor of each channel in the output, fp32


def find_wiring(model: nn.Module, sites: Sequence[Site], call: Call, device: str | None) -> Wiring:
    """Run a call of a dense block a few times and look; the block's weights stay as they are."""
    found = Wiring()
    products: dict[Operand, torch.Tensor] = {}
    groups: dict[Identity, list[Operand]] = {}
    held: list[torch.Tensor] = []  # so that no other tensor takes an input's address
    stream = main_tensor((call.args, call.kwargs))
    routed = False

    def look(operand: Operand, x: torch.Tensor, product: torch.Tensor) -> None:
        nonlocal routed
        if _is_routed(operand, x, stream):
            routed = True
            return
        if operand in products:
            return
        products[operand] = product.detach().clone()
        groups.setdefault(identity(x), []).append(operand)
        held.append(x)

    with Observer(model, sites, look):
        output = main_tensor(run_again(call, device))
    found.inputs = list(groups.values())
    if stream is None or output is None or output.shape != stream.shape:
        return found
    candidates = {operand: product for operand, product in products.items() if _like(product, stream)}
    found.enters = _entering(model, sites, list(candidates), stream, lambda: main_tensor(call(device)))
    if not routed and not _accounted(found.enters, candidates, output - stream):
        found.enters = {}
    return found


def _like(product: torch.Tensor, stream: torch.Tensor) -> bool:
    """Whether a product has the stream's tokens in the stream's order; some models put them all in one row for their MLPs."""
    return product.shape == stream.shape or (product.ndim == 2 and product.shape == stream.flatten(0, -2).shape)


def _accounted(enters: dict[Operand, torch.Tensor], products: dict[Operand, torch.Tensor], added: torch.Tensor) -> bool:
    """Whether the products that enter are all that the block adds: a gate that is open in a probe may be half shut in truth."""
    rest = added.float()
    for operand, factor in enters.items():
        rest = rest - (factor * products[operand].to(rest.device).float().view(rest.shape))
    return float(rest.norm()) <= _UNACCOUNTED * float(added.float().norm())


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
    # Noise much larger than the stream, channel by channel: then little of it is lost when half precision rounds the sum.
    size = _LOUDNESS * stream.float().flatten(0, -2).square().mean(0).sqrt().clamp_min(1e-3)
    noise = {
        operand: (torch.randn(stream.shape, generator=generator).to(stream.device) * size).to(stream.dtype)
        for operand in candidates
    }
    allowed = max(_ROUNDING, 2 * torch.finfo(stream.dtype).eps)

    def change(chosen: Sequence[Operand]) -> torch.Tensor | None:
        def replace(operand: Operand, x: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
            if operand not in chosen:
                return torch.zeros_like(product)
            return noise[operand].to(product, copy=True).view(product.shape)

        with Observer(model, sites, replace):
            output = run()
        return None if output is None or output.shape != stream.shape else (output - stream).float()

    unchanged = change(())
    if unchanged is None or float(unchanged.abs().max()) > allowed * float(stream.abs().max()):
        return {}
    factors = {}
    for operand in candidates:
        difference, given = change((operand,)), noise[operand].float()
        if difference is None or not bool(difference.any()):
            continue
        flat, given = (difference / size).flatten(0, -2), (given / size).flatten(0, -2)
        factor = (flat * given).sum(0) / given.square().sum(0)
        if float((flat - factor * given).norm()) <= allowed * float(flat.norm()) and bool((factor != 0).all()):
            factors[operand] = factor
    together = change(tuple(factors))
    expected = sum(
        (factors[operand] * noise[operand].float() for operand in factors), torch.zeros((), device=stream.device)
    )
    if together is None or float(((together - expected) / size).norm()) > 3 * allowed * float((together / size).norm()):
        return {}
    return factors
