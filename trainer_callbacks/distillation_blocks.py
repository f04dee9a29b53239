"""The outputs of a student's blocks in one forward pass, compared with its teacher's as the teacher reaches its own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_sparse.blocks import Block, find_blocks
from hf_sparse.errors import ModelError
from hf_sparse.forwards import main_tensor

Measure = Callable[[Block, torch.Tensor, torch.Tensor], torch.Tensor]


class BlockOutputs:
    """Hooks on the blocks of two models; the student's outputs of a pass are kept until the teacher has passed them.

    Raises: ModelError where the models have not the same number of blocks. While a pass is recorded: where checkpointing runs a
    block without gradients; while it is compared: where a block's two outputs differ in shape.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        self._student = student
        self._kept: dict[int, list[torch.Tensor]] = {}  # of each block, in the order of its calls
        self._terms: list[torch.Tensor] = []
        self._recording = False
        self._measure: Measure | None = None
        own, other = find_blocks(student), find_blocks(teacher)
        if len(own) != len(other):
            raise ModelError(
                f"the student has {len(own)} blocks, the teacher {len(other)}: their outputs cannot be compared; leave block_weight at 0."
            )
        self._handles = [block.module.register_forward_hook(partial(self._keep, block)) for block in own]
        self._handles += [block.module.register_forward_hook(partial(self._compare, block)) for block in other]

    def record(self) -> None:
        """Keep what the student's blocks return, until `compared`."""
        self._kept, self._terms, self._recording = {}, [], True

    @contextmanager
    def compared(self, measure: Measure) -> Iterator[None]:
        """Inside, each block of the teacher is compared by `measure(block, student's output, teacher's output)`."""
        self._recording, self._measure = False, measure  # what gradient checkpointing runs again is not recorded again
        try:
            yield
        finally:
            self._measure, self._kept = None, {}

    def mean(self) -> torch.Tensor:
        """Of the blocks that both models reached.

        Raises: ModelError where they reached none.
        """
        if not self._terms:
            raise ModelError(
                f"no block of {type(self._student).__name__} was reached by both models; leave block_weight at 0."
            )
        return torch.stack(self._terms).mean()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _keep(self, block: Block, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tensor = main_tensor(output)
        if not self._recording or tensor is None:
            return
        if torch.is_grad_enabled():
            self._kept.setdefault(block.index, []).append(tensor)
        elif any(getattr(part, "gradient_checkpointing", False) for part in self._student.modules()):
            raise ModelError(
                f"gradient checkpointing runs {block.name} without gradients, so its output cannot be compared with the teacher's; set "
                'gradient_checkpointing_kwargs={"use_reentrant": False}, or leave block_weight at 0.'
            )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _compare(self, block: Block, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tensor, kept = main_tensor(output), self._kept.get(block.index)
        if self._measure is None or tensor is None or not kept:
            return
        own = kept.pop(0)
        if own.shape != tensor.shape:
            raise ModelError(
                f"{block.name} gives outputs of shape {tuple(own.shape)} in the student and {tuple(tensor.shape)} in the teacher; leave "
                "block_weight at 0."
            )
        with torch.enable_grad():
            self._terms.append(self._measure(block, own, tensor.to(own.device)))
