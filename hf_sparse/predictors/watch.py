"""Runs a model densely and gives a criterion's scores for every token, block by block, gradients included where it needs them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from hf_sparse.calibrate import forward
from hf_sparse.data import Sample
from hf_sparse.errors import ModelError
from hf_sparse.predictors.criteria import Scores, Seen, sees_labels
from hf_sparse.predictors.units import BlockUnits, BlockWeights, module_of
from hf_sparse.registry import Entry
from hf_sparse.sites import Site, stored_rows

NO_LABEL = -100
Done = Callable[[int, Scores], None]  # index of the block, its scores with one row for each token


class Scorer:
    """A criterion on the blocks of one model; the weights it needs are read once."""

    def __init__(self, model: nn.Module, units: Sequence[BlockUnits], criterion: Entry[Any]) -> None:
        self.model, self.units, self.criterion = model, list(units), criterion
        self._weights = {block.index: BlockWeights(model, block) for block in self.units}

    def __call__(self, values: Sample, done: Done) -> None:
        """One pass of the model over a batch; `done` gets each block's scores as soon as they are known."""
        watch = _Watch(self)
        with ExitStack() as stack:
            for block in self.units:
                stack.enter_context(watch.hooked(block, done))
            if not sees_labels(self.criterion):
                with torch.no_grad():
                    forward(self.model, {name: value for name, value in values.items() if name != "labels"})()
                return
            with torch.enable_grad():
                watch.gradients(_summed_loss(self.model, values))
        with torch.no_grad():
            for block in self.units:
                self.score(block, watch.fields.pop(block.index), done)

    def score(self, block: BlockUnits, fields: dict[str, torch.Tensor], done: Done) -> None:
        """The criterion on what was recorded of a block."""
        missing = {need for need in self.criterion.needs if need not in fields} - (
            {"gate_gradient"} if not block.gate else set()
        )
        if missing:
            raise ModelError(
                f"{block.name} ran without calling the modules that show {', '.join(sorted(missing))}; "
                "predictors need models that call their projections as modules."
            )
        seen = Seen(self._weights[block.index], **{name: value.detach().float() for name, value in fields.items()})
        done(block.index, self.criterion.function(seen))


class _Watch:
    """What the hooks of one pass have recorded."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer, self._needs = scorer, scorer.criterion.needs
        self.fields: dict[int, dict[str, torch.Tensor]] = {block.index: {} for block in scorer.units}
        self._probes: list[tuple[BlockUnits, dict[str, Site | None], torch.Tensor]] = []

    @contextmanager
    def hooked(self, block: BlockUnits, done: Done) -> Iterator[None]:
        """Hooks on one block's modules for the length of a pass."""
        model, scorer = self._scorer.model, self._scorer
        handles = [
            module_of(model, block.down).register_forward_pre_hook(self._input(block, "activation", ())),
            module_of(model, block.o).register_forward_pre_hook(
                self._input(block, "heads", (block.heads, block.head_size))
            ),
            module_of(model, block.up).register_forward_pre_hook(self._input(block, "input", ())),
        ]
        outputs = {id(module_of(model, site)): module_of(model, site) for site in (block.up, block.gate) if site}
        handles += [module.register_forward_hook(self._output(block, module)) for module in outputs.values()]
        if not sees_labels(scorer.criterion):

            def finish(*_: Any) -> None:
                scorer.score(block, self.fields[block.index], done)
                self.fields[block.index] = {}

            handles.append(model.get_submodule(block.name).register_forward_hook(finish))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _input(self, block: BlockUnits, name: str, shape: tuple[int, ...]) -> Callable[..., Any]:
        def look(_: nn.Module, args: tuple[Any, ...]) -> Any:
            flat = args[0].reshape(-1, *(shape or args[0].shape[-1:]))
            if name in self._needs:
                self.fields[block.index][name] = flat
            if f"{name}_gradient" not in self._needs:
                return None
            probe = torch.zeros_like(flat, requires_grad=True)
            self._probes.append((block, {f"{name}_gradient": None}, probe))
            return ((flat + probe).view(args[0].shape), *args[1:])

        return look

    def _output(self, block: BlockUnits, module: nn.Module) -> Callable[..., Any]:
        model = self._scorer.model
        sites = {"up_gradient": block.up, "gate_gradient": block.gate}
        here = {
            name: site
            for name, site in sites.items()
            if site and name in self._needs and module_of(model, site) is module
        }

        def look(_: nn.Module, args: tuple[Any, ...], product: torch.Tensor) -> Any:
            before = block.before_activation
            if "pre_activation" in self._needs and module_of(model, before) is module:
                self.fields[block.index]["pre_activation"] = rows_of(product, before)
            if not here:
                return None
            probe = torch.zeros_like(product, requires_grad=True)
            self._probes.append((block, dict(here), probe))
            return product + probe

        return look

    def gradients(self, loss: torch.Tensor) -> None:
        """Adds the loss's gradients at the probes to the recorded fields."""
        found = torch.autograd.grad(loss, [probe for _, _, probe in self._probes])
        for (block, names, _), gradient in zip(self._probes, found):
            for name, site in names.items():
                self.fields[block.index][name] = gradient if site is None else rows_of(gradient, site)
        self._probes.clear()


def rows_of(product: torch.Tensor, site: Site) -> torch.Tensor:
    """A site's channels of its module's output, one row for each token."""
    flat = product.reshape(-1, product.shape[-1])
    return flat if site.rows is None else flat[:, stored_rows(site).to(flat.device)]


def next_labels(values: Sample) -> torch.Tensor:
    """For every position the token that is predicted there, or -100; the last position predicts nothing."""
    labels = values.get("labels", values["input_ids"]).long()
    if "attention_mask" in values:
        labels = labels.masked_fill(values["attention_mask"] == 0, NO_LABEL)
    return nn.functional.pad(labels[:, 1:], (0, 1), value=NO_LABEL)


def _summed_loss(model: nn.Module, values: Sample) -> torch.Tensor:
    logits = forward(model, {name: value for name, value in values.items() if name != "labels"})().logits  # type: ignore[attr-defined]
    labels = next_labels(values).to(logits.device)
    return nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL, reduction="sum"
    )
