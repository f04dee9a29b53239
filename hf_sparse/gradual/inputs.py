"""Measures what enters the sites while a model trains, in the forward passes of one optimizer step."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from hf_sparse.blocks import Block
from hf_sparse.errors import ModelError
from hf_sparse.families import Inventory
from hf_sparse.gradual.feeding import Feeding
from hf_sparse.gradual.padding import Padding
from hf_sparse.observe import Observer, Operand, eager_experts, operand_of
from hf_sparse.record import Identity, identity
from hf_sparse.sites import Site, parameter_of
from hf_sparse.statistics import Norm
from hf_sparse.stored import over_processes


class Measured(NamedTuple):
    """What the passes of one optimizer step showed, over all processes; padding is not counted."""

    norms: dict[Operand, torch.Tensor]  # L2 norm of each input feature, (in,), fp32
    tokens: dict[Operand, int]  # that reached the operand
    sequences: int
    batch_size: int  # sequences of the largest pass

    @property
    def finite(self) -> bool:
        return all(bool(torch.isfinite(norm).all()) for norm in self.norms.values())


class _Latest(NamedTuple):
    """The input that was read last; held, so that no other tensor takes its address while others may read it too."""

    same: Identity
    x: torch.Tensor
    norm: Norm


class TrainingInputs:
    """The norms of what enters the sites of some blocks between `listen_` and `collect_`; at other times nothing is hooked or held.

    `wanted` holds the sites by the index of their block. It takes eight bytes for each input feature of each of their weights. Experts
    make their products one by one meanwhile, as a grouped kernel would hide them. `feeding`, where given, gets to see the first call
    of each block.

    Raises, while the model runs: ModelError where a block's weights are in shards.
    """

    def __init__(
        self, model: nn.Module, inventory: Inventory, wanted: Mapping[int, Sequence[Site]], feeding: Feeding | None = None
    ) -> None:  # fmt: skip
        self._model, self._feeding = model, feeding
        self._wanted = {inventory.blocks[index]: _one_each(sites) for index, sites in wanted.items()}
        self._features = {operand_of(site): site.shape[1] for sites in wanted.values() for site in sites}
        self._in_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self._hooks = ExitStack()
        self._reset()

    def _reset(self) -> None:
        self._norms: dict[Operand, Norm] = {}
        self._padding: Padding | None = None  # inside a pass of the model
        self._running: Observer | None = None  # inside a block
        self._latest: _Latest | None = None
        self._passes: list[int] = []  # sequences of each

    def listen_(self) -> None:
        """Measure from now on."""
        self.stop_()
        # Until the end of the step, as the backward pass may have to run a block again just as it was run before.
        self._hooks.enter_context(eager_experts(self._model))
        handles = [
            self._model.register_forward_pre_hook(self._opened, with_kwargs=True),
            self._model.register_forward_hook(self._closed, always_call=True),
        ]
        for block, sites in self._wanted.items():
            handles.append(block.module.register_forward_pre_hook(partial(self._enter, block), with_kwargs=True))
            handles.append(block.module.register_forward_hook(self._leave, always_call=True))
            for module in _sorting(self._model, block, sites):
                handles.append(module.register_forward_pre_hook(self._remember, with_kwargs=True))
        for handle in handles:
            self._hooks.callback(handle.remove)

    def stop_(self) -> None:
        """Measure no longer, and forget what was measured."""
        self._leave()
        self._hooks.close()
        self._reset()

    def collect_(self) -> Measured:
        """What was measured since `listen_`; all processes have to call it.

        Raises: ModelError where no pass of the model was seen.
        """
        norms, passes = self._norms, self._passes
        self.stop_()
        if not passes:
            raise ModelError(
                f"no training pass of {type(self._model).__name__} was seen in this step, as something calls its parts and not the model "
                'itself; use metric="magnitude", which needs no activations.'
            )
        empty = {key: Norm(features) for key, features in self._features.items()}
        every = [norms.get(key, none) for key, none in empty.items()]
        counts = torch.tensor([*(norm.tokens for norm in every), sum(passes)], dtype=torch.float64)
        summed = over_processes(torch.cat([*(norm.squares.cpu() for norm in every), counts]))
        *squares, counts = summed.split([*self._features.values(), len(counts)])
        *tokens, sequences = map(int, counts.tolist())
        found = {key: square.sqrt().float() for key, square in zip(empty, squares, strict=True)}
        return Measured(found, dict(zip(empty, tokens, strict=True)), sequences, max(passes))

    # ------------------------------------------------------------------------------------------------ while the model runs

    def _opened(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():  # no evaluation, and not the second run of a checkpointed block
            self._padding = Padding(kwargs)
            given = next(
                (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.ndim), None
            )
            self._passes.append(0 if given is None else len(given))

    def _closed(self, *_: Any) -> None:
        self._leave()
        self._padding = None

    def _enter(self, block: Block, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._padding is None:
            return
        sites = self._wanted[block]
        for site in sites:
            if isinstance(parameter_of(self._model, site), DTensor):
                raise ModelError(
                    f"{site.name} is in shards while its block runs, so what enters it cannot be told; shard whole blocks, or use "
                    'metric="magnitude", which needs no activations.'
                )
        if self._feeding is not None:
            self._feeding.look(block, args, kwargs)
        self._padding.enter(self._in_decoder and "decoder" in block.stack.split("."), args, kwargs)
        self._running = Observer(self._model, sites, self._seen)
        self._running.__enter__()

    def _leave(self, *_: Any) -> None:
        self._latest = None
        running, self._running = self._running, None
        if running is not None:
            running.__exit__(None, None, None)

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._padding is not None:
            self._padding.remember(args, kwargs)

    @torch.no_grad()
    def _seen(self, operand: Operand, x: torch.Tensor, product: torch.Tensor) -> None:
        """The observer's callback; products that read the very same input (q, k and v; gate and up) share the work."""
        if operand not in self._features or self._padding is None:
            return
        same = identity(x)
        if self._latest is None or self._latest.same != same:
            rows = x.detach().reshape(-1, x.shape[-1])
            counted = self._padding.counted(x, _is_sorted(operand))
            rows = rows if counted is None else rows[counted.to(rows.device)]
            if _is_sorted(operand):  # rows of zeros are how batched experts are given tokens that are not theirs
                rows = rows[rows.any(1)]
            norm = Norm(rows.shape[1], rows.device)
            norm.add(rows)
            self._latest = _Latest(same, x, norm)
        norm = self._latest.norm
        if operand not in self._norms:
            self._norms[operand] = Norm(x.shape[-1], x.device)
        self._norms[operand].merge(norm)


def _one_each(sites: Sequence[Site]) -> list[Site]:
    """One site for each parameter."""
    return list({(site.module, site.parameter): site for site in sites}.values())


def _is_sorted(operand: Operand) -> bool:
    """Whether an operand gets a choice of the tokens, as experts do."""
    return operand.expert is not None or "expert" in operand.module.rpartition("shared_expert")[2]


def _sorting(model: nn.Module, block: Block, sites: Sequence[Site]) -> list[nn.Module]:
    """The modules of a block whose inputs are all tokens, in their order, before they are sorted to experts."""
    found: dict[str, nn.Module] = {}
    for site in sites:
        if not _is_sorted(operand_of(site)):
            continue
        path = site.module.split(".")
        depth = len(block.name.split("."))
        named = next((index for index, part in enumerate(path) if index >= depth and "expert" in part), None)
        for length in range(depth + 1, len(path) if named is None else named + 2):
            name = ".".join(path[:length])
            found[name] = model.get_submodule(name)
    return list(found.values())
