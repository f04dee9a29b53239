"""The weights of a model that lie on disk, and are in memory block by block."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from hf_sparse.blocks import find_blocks, set_source
from hf_sparse.errors import CheckpointError, ModelError
from hf_sparse.replace import sync
from hf_sparse.streaming.conversion import Conversion
from hf_sparse.streaming.files import Inputs, Outputs

OUTSIDE = ""  # the name of what belongs to no block
Loader = Callable[[Mapping[str, Any]], None]  # puts tensors of the checkpoint into the model, by Transformers' own code


@dataclass(eq=False)
class Group:
    """Parameters that are in memory together: those of one block, or of the head."""

    name: str
    keys: list[str] = field(default_factory=list)  # of the checkpoint
    slots: list[tuple[str, nn.Module, str, nn.Parameter]] = field(
        default_factory=list
    )  # (full name, owner, own name, on meta)
    depth: int = 0  # how many want it in memory now

    def state(self) -> dict[str, torch.Tensor]:
        """The present values by the model's names."""
        return {full: getattr(owner, name).detach() for full, owner, name, _ in self.slots}


def _slots(model: nn.Module, path: str) -> list[tuple[str, nn.Module, str, nn.Parameter]]:
    module = model.get_submodule(path)
    found, seen = [], set()
    for child_path, child in module.named_modules():
        for name, parameter in child.named_parameters(recurse=False):
            if id(parameter) in seen:
                raise ModelError(
                    f"{path}.{child_path}.{name} is the same tensor as another parameter of its block, which cannot be streamed; prune "
                    "the model in memory."
                )
            seen.add(id(parameter))
            found.append((".".join(filter(None, (path, child_path, name))), child, name, parameter))
    return found


class Weights:
    """Where the weights of a model come from while it is pruned from disk to disk, and where they go.

    A block is read from the source; once permuted, from a file of its own (`keep_in`); once pruned, from the output.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, conversion: Conversion, load: Loader, keep_head: bool) -> None:
        self.model, self.inputs, self.conversion, self._load = model, inputs, conversion, load
        self.groups: dict[str, Group] = {}
        self._outputs: Outputs | None = None
        self.written: set[str] = set()  # groups whose pruned weights are in the output
        self.aside: dict[str, Path] = {}  # groups whose channels were reordered -> file with the dense weights
        self.keep_in: Path | None = None  # where weights go that are written back before the first block is pruned
        names = [block.name for block in find_blocks(model)]
        head = None if keep_head else _own_head(model)
        for name in [*names, *([head] if head else [])]:
            self.groups[name] = Group(name, slots=_slots(model, name))
        owner = {full: group for group in self.groups.values() for full, *_ in group.slots}
        self._refuse_shared(owner)
        self.outside = Group(OUTSIDE)
        for key, target in conversion.target.items():
            owner.get(target, self.outside).keys.append(key)
        for group in self.groups.values():
            conversion.check(group.name, group.keys, {full: meta for full, _, _, meta in group.slots})

    def _refuse_shared(self, owner: Mapping[str, Group]) -> None:
        ties = getattr(self.model, "all_tied_weights_keys", None) or {}
        for one, other in ties.items():
            if one in owner or other in owner:
                raise ModelError(
                    f"{one} is the same tensor as {other}, and one of them is in a block, which cannot be streamed; prune the model in memory."
                )

    def install(self) -> None:
        """Let the blocks of the model take their weights from here, and let every other call load what it needs."""
        set_source(self.model, lambda name: BlockSource(self, self.groups[name]))
        for group in self.groups.values():
            module = self.model.get_submodule(group.name)
            own: Callable[..., Any] = module.forward
            module.forward = _loading(self, group, own)

    @property
    def outputs(self) -> Outputs:
        """The files that are written."""
        if self._outputs is None:
            raise ModelError("the weights of this model are only read; nothing says where changed ones go.")
        return self._outputs

    def write_to(self, outputs: Outputs) -> None:
        """From now on `write_back` writes there."""
        self._outputs = outputs

    # ------------------------------------------------------------------------------------------------ in and out of memory

    def bring_in(self, group: Group, as_found: bool = False) -> None:
        """Put a group's values into the model; raises CheckpointError where the checkpoint lacks some."""
        group.depth += 1
        if group.depth > 1:
            return
        try:
            if group.name in self.aside and (as_found or group.name not in self.written):
                self._put(group, self.aside[group.name])
                return
            pruned = group.name in self.written and not as_found
            stored: Any = self.outputs if pruned else self.inputs.tensors
            self._load({key: stored[key] for key in group.keys})
            for full, owner, name, _ in group.slots:
                if getattr(owner, name).device.type == "meta":
                    raise CheckpointError(f"the checkpoint has no weights for {full}, so the model cannot be streamed.")
        except BaseException:
            self.send_out(group)
            raise

    def _put(self, group: Group, file: Path) -> None:
        inputs = Inputs([file])
        try:
            for full, owner, name, meta in group.slots:
                value = inputs.tensors[full][...]
                setattr(owner, name, nn.Parameter(value, requires_grad=meta.requires_grad))
        finally:
            inputs.close()

    def send_out(self, group: Group) -> None:
        """Let a group's values go when nobody wants them any more."""
        group.depth -= 1
        if not group.depth:
            for _, owner, name, meta in group.slots:
                setattr(owner, name, meta)

    @contextmanager
    def held(self, group: Group) -> Iterator[None]:
        self.bring_in(group)
        try:
            yield
        finally:
            self.send_out(group)

    # ------------------------------------------------------------------------------------------------ what is kept

    def write_back(self, group: Group) -> None:
        """Keep the present values: in the output, or aside while channels are reordered and nothing is pruned."""
        if self.keep_in is not None:
            self._keep(self.keep_in, group.name, group.state())
            return
        self._store(group.keys, group.state())
        self.written.add(group.name)

    def keep_outside(self, folder: Path) -> None:
        """Keep what belongs to no block aside."""
        self._keep(folder, OUTSIDE, self._outside_state())

    def _keep(self, folder: Path, name: str, state: Mapping[str, torch.Tensor]) -> None:
        file = folder / f"{name or 'outside'}.safetensors"
        fresh = file.with_suffix(".partial")
        save_file({full: tensor.contiguous().clone() for full, tensor in state.items()}, fresh)
        sync(fresh)
        os.replace(fresh, file)
        self.aside[name] = file

    def take_aside(self, files: Mapping[str, Path]) -> None:
        """Go on with weights that an interrupted run kept aside."""
        self.aside = dict(files)
        if OUTSIDE in self.aside:
            inputs = Inputs([self.aside[OUTSIDE]])
            try:
                with torch.no_grad():
                    for full, tensor in self._outside_state().items():
                        tensor.copy_(inputs.tensors[full][...])
            finally:
                inputs.close()

    def _outside_state(self) -> dict[str, torch.Tensor]:
        inside = {full for group in self.groups.values() for full, *_ in group.slots}
        state: dict[str, torch.Tensor] = self.model.state_dict()
        return {full: tensor for full, tensor in state.items() if full not in inside}

    def _store(self, keys: Iterable[str], state: Mapping[str, torch.Tensor]) -> None:
        """Write tensors into the output: as they are in the source, byte for byte, where their values have not changed."""
        made = self.conversion.reversed(list(keys), state)
        for key in keys:
            stored = self.inputs.tensors[key]
            new = made.pop(key, None)
            if new is None or _equal(stored[...].to(new.dtype), new):
                self.outputs.copy(key, stored)
            else:
                self.outputs.write(key, new)

    def complete(self) -> None:
        """Write everything that is not in the output yet."""
        for group in self.groups.values():
            if group.name in self.written:
                continue
            if group.name in self.aside:
                with self.held(group):
                    self._store(group.keys, group.state())
            else:
                self._copy(group.keys)
        if OUTSIDE in self.aside:
            self._store(self.outside.keys, self._outside_state())
        else:
            self._copy(self.outside.keys)
        self.outputs.sync()

    def _copy(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.outputs.copy(key, self.inputs.tensors[key])

    def close(self) -> None:
        self.inputs.close()
        if self._outputs is not None:
            self._outputs.close()


class BlockSource:
    """One block's weights, as `hf_sparse.blocks` asks for them."""

    elsewhere = True

    def __init__(self, weights: Weights, group: Group) -> None:
        self._weights, self._group = weights, group

    def bring_in(self, module: nn.Module, as_found: bool) -> bool:
        self._weights.bring_in(self._group, as_found)
        return True

    def send_out(self) -> None:
        if self._group.depth:
            self._weights.send_out(self._group)

    def write_back(self) -> None:
        self._weights.write_back(self._group)

    def revert(self) -> bool:
        self._weights.written.discard(self._group.name)
        return True


def _loading(weights: Weights, group: Group, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that has its weights, also where nobody has brought them in."""

    def loading(*args: Any, **kwargs: Any) -> Any:
        with weights.held(group):
            return forward(*args, **kwargs)

    return loading


def _own_head(model: nn.Module) -> str | None:
    """The name of an output layer that is tied to nothing: calibration seldom needs it, and it is large."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    name = next((name for name, module in model.named_modules() if module is head and head is not None), None)
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    if name is None or any(full.startswith(f"{name}.") for full in (*ties, *ties.values())):
        return None
    return name


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one number format are the same, bit for bit."""
    if one.shape != other.shape:
        return False
    first, second = (tensor.cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second)
