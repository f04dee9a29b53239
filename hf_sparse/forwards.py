"""Runs a model on many batches at once, block by block, with the model's own code between the blocks.

Each batch's forward pass runs in a greenlet that pauses whenever the model calls one of its blocks. The driver collects the
arguments of all batches, may call the block as often as it likes, and resumes each pass with the output that it chooses. So the
arguments of a block are exactly the model's, none is named here, and whatever stands between blocks (position biases handed on,
features added, an encoder's output) happens as the model's authors wrote it.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import greenlet
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from hf_sparse import ranks
from hf_sparse.blocks import Block
from hf_sparse.errors import ModelError
from hf_sparse.spill import Spill


@dataclass(frozen=True)
class Modes:
    """Settings of the thread that a model's code may change around its blocks, so each pass has its own while it is paused."""

    gradients: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def present(cls) -> "Modes":
        kinds = ("cpu", "cuda")
        casts = tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)
        return cls(torch.is_grad_enabled(), casts)

    def apply(self) -> None:
        torch.set_grad_enabled(self.gradients)
        for kind, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)


_spill: ContextVar[Spill | None] = ContextVar("hf_sparse_spill", default=None)


@contextmanager
def hidden_states_in(spill: Spill) -> Iterator[None]:
    """Inside, the hidden states between the blocks live where `spill` puts them."""
    token = _spill.set(spill)
    try:
        yield
    finally:
        _spill.reset(token)


def spilling() -> Spill | None:
    """Where the hidden states of the present run live; None: in memory."""
    return _spill.get()


def put_aside(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that stays as it is, whatever is done to the tensor: in memory, or in a file where hidden states go there."""
    spill = _spill.get()
    return tensor.clone() if spill is None else spill.in_file(tensor)


@dataclass
class Call:
    """One batch waiting at one block."""

    batch: int  # index of the batch
    block: Block
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    run: Callable[..., Any]  # the block's own forward
    modes: Modes
    output: Any = None
    keep: Spill | None = None  # where outputs live

    def __call__(self, device: str | torch.device | None = None) -> Any:
        """Run the block on this call's arguments; with `device` they go there, and the output comes back."""
        before = Modes.present()
        self.modes.apply()
        try:
            output = self._made(device)
            return output if self.keep is None else self.keep.kept(output)
        finally:
            before.apply()

    def _made(self, device: str | torch.device | None) -> Any:
        if device is None:
            return self.run(*self.args, **self.kwargs)
        home = next((tensor.device for tensor in self.tensors()), None)
        args, kwargs = moved((self.args, self.kwargs), device)
        return moved(self.run(*args, **kwargs), home)

    def tensors(self) -> list[torch.Tensor]:
        """The tensors among the arguments."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, torch.Tensor)]


def run_again(call: Call, device: str | torch.device | None) -> Any:
    """Run a call that will be run again; raises ModelError where the block writes into its own input."""
    versions = [tensor._version for tensor in call.tensors()]
    output = call(device)
    if versions != [tensor._version for tensor in call.tensors()]:
        raise ModelError(
            f"{call.block.name} writes into its own input, so it cannot be run twice on it; this model cannot be calibrated. "
            'metric="magnitude" without calibration prunes it.'
        )
    return output


@contextmanager
def full_precision() -> Iterator[None]:
    """No autocast inside: what is worked out for weights must not be rounded because a model is run in half precision."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def moved(tree: Any, device: str | torch.device | None) -> Any:
    """The same structure with its tensors on `device`."""
    if device is None:
        return tree
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, tree)


def main_tensor(output: Any) -> torch.Tensor | None:
    """The hidden states among what a block returned: its first floating-point tensor."""
    return next(
        (leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()), None
    )


def norm(tensor: torch.Tensor) -> float:
    """L2 norm, added up in at least single precision."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)))


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give one module another forward; an instance's own (accelerate's hooks set one) comes back afterwards."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.forward = own


@contextmanager
def watched(
    blocks: Sequence[Block], call: Callable[[Block, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
) -> Iterator[None]:
    """Inside, every block's forward goes through `call(block, its own forward, args, kwargs)`."""
    with ExitStack() as stack:
        for block in blocks:
            own = block.module.forward

            def forward(*args: Any, _block: Block = block, _own: Callable[..., Any] = own, **kwargs: Any) -> Any:
                return call(_block, _own, args, kwargs)

            stack.enter_context(_replaced(block.module, forward))
        yield


def walk(
    blocks: Sequence[Block], passes: Sequence[Callable[[], Any]], order: Sequence[int] = ()
) -> Generator[list[Call], None, None]:
    """Yield the calls waiting at one block, for one block after the other; each call's `output` must be set before going on.

    `passes` run the model on one batch each. `order` holds block indices in the order of their turns, so that passes that
    skip some blocks wait for those that do not; blocks it does not name follow as they are met. Closing the generator ends
    the passes where they are, so the head need not run.
    """
    workers: dict[greenlet, int] = {}
    base, keep = Modes.present(), _spill.get()

    def pause(block: Block, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        worker = greenlet.getcurrent()
        if worker not in workers:  # another thread uses the model meanwhile
            return run(*args, **kwargs)
        call = Call(workers[worker], block, args, kwargs, run, Modes.present(), keep=keep)
        base.apply()
        try:
            driver.switch(call)
        finally:
            call.modes.apply()
        output, call.output = call.output, None
        return output

    with watched(blocks, pause):
        driver = greenlet.getcurrent()
        rank = {index: position for position, index in enumerate(order)}
        waiting: list[tuple[greenlet, Call]] = []

        def advance(worker: greenlet) -> None:
            call = worker.switch()
            if isinstance(call, Call) and not worker.dead:
                rank.setdefault(call.block.index, len(rank))
                waiting.append((worker, call))

        try:
            for number, run in enumerate(passes):
                worker = greenlet(run)
                workers[worker] = number
                advance(worker)
            while waiting:
                front = min((call.block.index for _, call in waiting), key=rank.__getitem__)
                here = [pair for pair in waiting if pair[1].block.index == front]
                waiting[:] = [pair for pair in waiting if pair[1].block.index != front]
                if keep is not None:
                    keep.turn()
                yield [call for _, call in here]
                while here:
                    worker, _ = here.pop(0)  # the driver must not keep a call's input alive beside its output
                    advance(worker)
        finally:
            for worker in reversed(workers):
                if not worker.dead:
                    worker.throw()
            base.apply()


class OutputError:
    """||sparse - dense|| / ||dense|| of hidden states, added up over calls."""

    def __init__(self) -> None:
        self._difference = self._total = 0.0

    def add(self, dense: torch.Tensor | None, sparse: torch.Tensor | None) -> None:
        # A block without hidden states among its outputs has no error to tell.
        if dense is not None and sparse is not None and dense.shape == sparse.shape:
            self._difference += norm(sparse - dense) ** 2
            self._total += norm(dense) ** 2

    def value(self) -> float | None:
        """Over the calls of all processes."""
        difference, total = ranks.summed(self._difference, self._total)
        return (difference / total) ** 0.5 if total else None
