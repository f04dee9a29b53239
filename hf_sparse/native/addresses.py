"""Where the memory of tensors lies. Nothing else asks for addresses: a wrong one ends the process."""

import torch

from hf_sparse.errors import KernelError

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def address(tensor: torch.Tensor, size: int | None = None) -> int:
    """Of the first element, from which on so many bytes are read: by default those of a contiguous tensor.

    Raises: KernelError for a tensor whose elements do not lie in memory as its shape says: subclasses, tensors inside
        transformations of functions, other layouts and devices, and storage that was let go.
    """
    if type(tensor) in _PLAIN and tensor.is_cpu:
        try:
            start, storage = tensor.data_ptr(), tensor.untyped_storage()
            size = tensor.nbytes if size is None else size
        except RuntimeError:  # no storage: inside vmap, grad and jvp, and in other layouts
            raise _refusal(tensor) from None
        if not size or (start and start + size <= storage.data_ptr() + storage.nbytes()):
            return start
    raise _refusal(tensor)


def address_of_spaced(tensor: torch.Tensor) -> int:
    """The same for a tensor of any strides."""
    if type(tensor) not in _PLAIN or tensor.layout is not torch.strided:
        raise _refusal(tensor)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return address(tensor, (last + 1) * tensor.itemsize if tensor.numel() else 0)


def state(masks: torch.Tensor, offsets: torch.Tensor, values: torch.Tensor) -> tuple[int, int, int, int, int]:
    """Addresses, and how often masks and offsets were written to; while nothing of it changes, a check stays true."""
    return masks.data_ptr(), offsets.data_ptr(), values.data_ptr(), masks._version, offsets._version


def overlap(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two contiguous tensors share memory."""
    starts, ends = (address(first), address(second)), (first.nbytes, second.nbytes)
    return starts[0] < starts[1] + ends[1] and starts[1] < starts[0] + ends[0]


def _refusal(tensor: torch.Tensor) -> KernelError:
    kind = f"a {type(tensor).__name__}, {tensor.layout} on {tensor.device}, with shape {tuple(tensor.shape)}"
    return KernelError(
        f"The sparse kernels read plain tensors that lie in the CPU's memory; given is {kind}, which does not, or not any more."
    )
