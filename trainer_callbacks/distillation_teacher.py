"""The teacher of a distillation: where it comes from, and how it is asked."""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hf_sparse import checkpoint, embedded
from hf_sparse.errors import ConfigError, HfSparseError, ModelError
from trainer_callbacks.distillation_loss import is_encoder_decoder

_PASS = "Pass the dense model or its path as Distillation(teacher=...)."
_CONSTRUCTOR = "Give the callback to the Trainer's constructor, callbacks=[..., Distillation()]: then it copies the dense model there."
# Arguments of the loss, of TRL and of PEFT; names with "label" in them are left out as well.
_NOT_FOR_TEACHERS = ("num_items_in_batch", "fused_lm_head", "adapter_names", "alora_offsets", "task_ids")
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------- where it comes from


def find(
    given: nn.Module | str | Path | None, student: nn.Module, step: int, dtype: torch.dtype | None
) -> tuple[nn.Module, str]:
    """The teacher for a student whose training begins at `step`, and what it is called; `dtype` None is the student's.

    Raises: ModelError where none is given and none can be told, or it cannot be loaded.
    """
    if isinstance(given, nn.Module):
        return given, called(given)
    if given is not None:
        return loaded(given, student, dtype), called(given)
    if checkpoint.report(student) is None and is_dense(student):
        if step:
            raise ModelError(
                f"training was resumed at step {step} with a dense model, which is no longer the teacher that it began with. {_CONSTRUCTOR} "
                f"{_PASS}"
            )
        made = copied(student, dtype)
        return made, called(made)
    base = base_of(student)
    made = loaded(base, student, dtype)
    if checkpoint.report(made) is not None or not is_dense(made):
        raise ModelError(
            f"the student's report names {base!r} as the model that was pruned, and that is sparse itself. {_PASS}"
        )
    return made, called(base)


def is_dense(model: nn.Module) -> bool:
    """Whether nothing speaks for zeros in the model's sites."""
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        return True  # another process has the weights
    try:
        return not checkpoint.is_sparse(model)
    except ModelError:  # no list of layers, so nothing that could have been pruned
        return True


def copied(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy of a model as it is now, on its device, without adapters, hooks and changed forwards.

    Raises: ModelError where the weights lie in shards, so that no process could copy them.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ModelError(
            f"{type(model).__name__} is already sharded over processes, so it cannot be copied as the teacher. {_CONSTRUCTOR} {_PASS}"
        )
    # Hooks and changed forwards (autocast's, TRL's) are bound to the model that is copied: the copy would run the student.
    memo: dict[int, Any] = {id(found): OrderedDict() for module in model.modules() for found in _hooks(module)}
    made = copy.deepcopy(model, memo)
    for module in made.modules():
        module.__dict__.pop("forward", None)
    if hasattr(made, "peft_config") and hasattr(made, "unload"):
        made = made.unload()  # type: ignore[operator]
    elif getattr(made, "_hf_peft_config_loaded", False):
        made.disable_adapters()  # type: ignore[operator]
    return made.to(dtype).requires_grad_(False)


def _hooks(module: nn.Module) -> Iterator[Any]:
    yield from (module.__dict__[name] for name in _HOOKS if name in module.__dict__)


def loaded(path: str | Path, student: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A saved model of the student's class, by path or Hub id.

    Raises: ModelError where it cannot be loaded, or its weights are those of another class.
    """
    student = checkpoint.unwrap(student)
    if not isinstance(student, PreTrainedModel):
        raise ModelError(
            f"a {type(student).__name__} has no from_pretrained to load its teacher {str(path)!r} with. {_PASS}"
        )
    # a model that FSDP shards in place has another class in front of its own
    kind: Any = next(
        kind for kind in type(student).__mro__ if "FSDPModule" not in {base.__name__ for base in kind.__mro__}
    )
    try:
        with torch.random.fork_rng(devices=[]):  # the training draws what it would draw without a teacher
            made, found = kind.from_pretrained(path, dtype=dtype or student.dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, HfSparseError) as error:
        raise ModelError(
            f"the teacher {str(path)!r} cannot be loaded as {kind.__name__}: {str(error).splitlines()[0]} {_PASS}"
        ) from error
    if found["missing_keys"]:
        raise ModelError(
            f"the teacher {str(path)!r} is no {kind.__name__}: it lacks weights such as {', '.join(sorted(found['missing_keys'])[:3])}. Load it "
            "with its own class, and pass that model as Distillation(teacher=...)."
        )
    return made.requires_grad_(False)


def base_of(student: nn.Module) -> str:
    """The path or Hub id of the dense model that a sparse student was made from, as its report tells it.

    Raises: ModelError where nothing tells it.
    """
    known = checkpoint.report(student)
    if known is None or not known.model:
        what = "carries no report" if known is None else "was pruned in memory, without a path"
        raise ModelError(f"the student is sparse and {what}, so its dense model is not known. {_PASS}")
    return known.model


def called(teacher: nn.Module | str | Path) -> str:
    """What a report calls a teacher: its Hub id, the last part of its path, or its class."""
    name = str(
        getattr(getattr(teacher, "config", None), "name_or_path", "") if isinstance(teacher, nn.Module) else teacher
    )
    if name == str(embedded.model_path()):
        return embedded.NAME
    if not name:
        return f"a {type(teacher).__name__} in memory"
    return Path(name).resolve().name if Path(name).exists() else name


# ---------------------------------------------------------------------------------------------------- asking it


class Teacher:
    """A model that is only asked, in evaluation mode and without gradients; `close` gives its modes back.

    Raises: ConfigError where it is the student itself, or shares parameters with it; ModelError where it takes other inputs or has
    no values.
    """

    def __init__(self, model: nn.Module, student: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
        own = {id(parameter) for parameter in student.parameters()}
        if model is student or any(id(parameter) in own for parameter in model.parameters()):
            raise ConfigError(
                "the teacher shares parameters with the student, so it would change with it; pass a model of its own: another "
                "from_pretrained, or copy.deepcopy(model) before it is pruned."
            )
        given, wanted = (getattr(one, "main_input_name", "input_ids") for one in (student, model))
        if given != wanted:
            raise ModelError(
                f"the teacher {type(model).__name__} reads {wanted!r}, the student {given!r}; they must share their inputs."
            )
        parameters = inspect.signature(model.forward).parameters
        self._names = set(parameters)
        self._takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self._modes = [(module, module.training) for module in model.modules()]
        self.student, self.device = student, device
        self.model = _placed(model, device).eval()
        # The Trainer's own is inside the student's forward, so what is called beside it needs one as well.
        self._autocast = nullcontext if dtype is None else partial(torch.autocast, device.type, dtype=dtype)

    def __call__(self, args: tuple[Any, ...], inputs: Mapping[str, Any]) -> Any:
        """The outputs on a training batch, whose labels and other arguments of the loss stay behind."""
        given = {name: value for name, value in inputs.items() if "label" not in name and name not in _NOT_FOR_TEACHERS}
        if is_encoder_decoder(self.model):
            given = {**self._decoder_inputs(inputs), **given}
        if "use_cache" in self._names:
            given["use_cache"] = False
        foreign = [name for name in given if name not in self._names and not self._takes_all]
        if foreign:
            raise ModelError(
                f"the teacher {type(self.model).__name__} does not take the student's inputs {', '.join(foreign)}; it must be a model that "
                "reads the same batches."
            )
        with torch.no_grad(), self._autocast():
            return self.model(*args, **given)

    def _decoder_inputs(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """What an encoder-decoder makes of its labels where it is given nothing else; the labels, if it has no function for it."""
        labels = inputs.get("labels")
        if labels is None or any(
            inputs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds")
        ):
            return {}
        shifted = getattr(self.student, "prepare_decoder_input_ids_from_labels", None)
        return {"labels": labels} if shifted is None else {"decoder_input_ids": shifted(labels=labels)}

    def close(self) -> None:
        for module, training in self._modes:
            module.training = training


def _placed(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on that device, and the same on all processes."""
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise ModelError("the teacher's weights are offloaded or on the meta device; load it without device_map.")
    if getattr(model, "hf_device_map", None) is None:
        model.to(device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in chain(model.parameters(), model.buffers()):
            torch.distributed.broadcast(tensor.data, 0)
    return model
