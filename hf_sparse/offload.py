"""Weights that accelerate keeps elsewhere: brought in for a block's turn, and written back to where they came from."""

from collections.abc import Iterator

from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset, offload_weight, set_module_tensor_to_device
from torch import nn

from hf_sparse.errors import ModelError

# What was brought in: each module with the hook that offloads it.
Brought = list[tuple[nn.Module, AlignDevicesHook]]


def _offloading_hooks(module: nn.Module) -> Iterator[tuple[str, nn.Module, AlignDevicesHook]]:
    for name, child in module.named_modules():
        hook = getattr(child, "_hf_hook", None)
        for part in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
            if isinstance(part, AlignDevicesHook) and part.offload and part.weights_map is not None:
                yield name, child, part


def _parameters(child: nn.Module) -> list[str]:
    return [name for name, _ in child.named_parameters(recurse=False)]


def bring_in(module: nn.Module, brought: Brought) -> None:
    """Put offloaded parameters on their execution device and keep them there; `brought` gets what `send_out` needs."""
    for _, child, hook in list(_offloading_hooks(module)):
        brought.append((child, hook))
        for name in _parameters(child):
            set_module_tensor_to_device(child, name, hook.execution_device, value=hook.weights_map[name])
        hook.offload = False


def send_out(brought: Brought) -> None:
    """Undo `bring_in`; what was not written back before is lost, as accelerate does after each forward."""
    for child, hook in brought:
        hook.offload = True
        for name in _parameters(child):
            set_module_tensor_to_device(child, name, "meta")


def write_back(brought: Brought) -> None:
    """Store the present values where the hook reads them: the dict for the CPU, a file of the offload folder for the disk.

    Raises: ModelError where the place is unknown, so that nothing is lost unnoticed.
    """
    for child, hook in brought:
        for name in _parameters(child):
            value = getattr(child, name).detach()
            weights, key = hook.weights_map, name
            while isinstance(weights, PrefixedDataset):
                weights, key = weights.dataset, weights.prefix + key
            if isinstance(weights, OffloadedWeightsLoader):
                if key in weights.state_dict:
                    weights.state_dict[key] = value.cpu().clone()
                elif weights.save_folder is not None:
                    offload_weight(value.cpu(), key, str(weights.save_folder), weights.index)
                else:
                    raise ModelError(
                        f"{key} is offloaded without a folder to write to; load the model with offload_folder=..."
                    )
            elif isinstance(weights, dict):
                weights[key] = value.to(weights[key].device, copy=True)
            else:
                raise ModelError(
                    f"{key} is offloaded to a {type(weights).__name__}, which cannot be written; load the model without offloading."
                )


class Offloaded:
    """The source of a block's weights where accelerate may keep some of them; what is in memory stays as it is."""

    elsewhere = False

    def __init__(self) -> None:
        self._brought: Brought = []

    def bring_in(self, module: nn.Module, as_found: bool) -> bool:
        bring_in(module, self._brought)
        return bool(self._brought)

    def send_out(self) -> None:
        brought, self._brought = self._brought, []
        send_out(brought)

    def write_back(self) -> None:
        write_back(self._brought)

    def revert(self) -> bool:
        return False
