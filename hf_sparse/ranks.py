"""Many processes prune one model together: what they share, and how an error of one becomes the error of all.

Everything here does nothing in a single process, so that callers need not tell the two apart. The processes are those of the
default group of `torch.distributed`; what is exchanged goes through a gloo group on the CPU, whatever the group itself is made for.
Inside `together()` every process has to call the same functions in the same order.
"""

import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import distributed

from hf_sparse import errors
from hf_sparse.errors import ConfigError, HfSparseError, ModelError, ProcessLost
from hf_sparse.meeting import ARRIVED, FAILED, Meeting

TIMEOUT = "HF_SPARSE_RANKS_TIMEOUT"  # seconds of silence after which a process counts as lost
DEFAULT_TIMEOUT = 300.0
_KINDS = {kind.__name__: kind for kind in vars(errors).values() if isinstance(kind, type)}
_LONGEST = 200  # letters of what differs
T = TypeVar("T")


class _Local(threading.local):
    meeting: Meeting | None = None
    alone = False


_local = _Local()


class _Told(HfSparseError):
    """Raised where a process learns that another one has failed; `error` is what all of them raise."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


# ---------------------------------------------------------------------------------------------------- who takes part


def timeout() -> float:
    """Seconds of silence after which a process counts as lost; raises ConfigError for what is no such number."""
    given = os.environ.get(TIMEOUT, str(DEFAULT_TIMEOUT))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 1e6:
        raise ConfigError(f"{TIMEOUT}={given!r} is not allowed; give 1 to 1000000 seconds.")
    return seconds


def count() -> int:
    """How many processes prune together; 1 outside `together()`."""
    return _local.meeting.count if _local.meeting is not None else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return _local.meeting.rank if _local.meeting is not None else 0


def is_first() -> bool:
    """Whether this process is the one that writes, prints and shows progress."""
    return rank() == 0


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process prunes by itself, whatever group it belongs to: for a model that only it has."""
    before, _local.alone = _local.alone, True
    try:
        yield
    finally:
        _local.alone = before


@contextmanager
def together() -> Iterator[None]:
    """Inside, the processes of the initialised group work together; what one of them raises inside, all of them raise.

    May be nested: then the inner one ends an error's way where all processes can deal with it alike.

    Raises: ProcessLost where another process is gone, or silent for `timeout()` seconds.
    """
    if _local.meeting is not None:
        meet()
        with _one_error_for_all(_local.meeting):
            yield
        return
    many = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if not many or _local.alone:
        yield
        return
    _local.meeting = meeting = Meeting(timeout())
    orderly = False
    try:
        with _one_error_for_all(meeting):
            yield
            meet()
        orderly = True
    except Exception:
        orderly = meeting.lost is None  # all have been told
        raise
    finally:
        _local.meeting = None
        meeting.end(orderly)


@contextmanager
def _one_error_for_all(meeting: Meeting) -> Iterator[None]:
    try:
        yield
    except ProcessLost:
        raise
    except _Told as told:
        raise told.error from None
    except Exception as error:
        if meeting.lost is not None:
            raise
        with meeting.arrived(FAILED):
            common = _chosen(_gathered(_told_of(error)), error)
        if common is error:
            raise
        raise common from error


def _told_of(error: Exception) -> dict[str, Any]:
    memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return {
        "kind": "MemoryError" if memory else type(error).__name__, "message": str(error),
        "blocks": list(getattr(error, "blocks", ())),
    }  # fmt: skip


def _chosen(told: list[Any], own: Exception | None) -> BaseException:
    """The error of the first process that has one, as this process shall raise it."""
    number = next(number for number, error in enumerate(told) if error is not None)
    if number == rank() and own is not None:
        return own
    kind, message = told[number]["kind"], told[number]["message"]
    if kind == "MemoryError":
        return MemoryError(message or f"process {number} ran out of memory")
    if kind == "PruningInterrupted":
        return errors.PruningInterrupted(message, told[number]["blocks"])
    if issubclass(_KINDS.get(kind, Exception), HfSparseError):
        return _KINDS[kind](message)
    return RuntimeError(f"{kind} in process {number} of {count()}: {message}")


# ---------------------------------------------------------------------------------------------------- exchanges


@contextmanager
def _exchange() -> Iterator[Meeting]:
    """All processes are here and may exchange data; raises where one of them has failed meanwhile."""
    meeting = _local.meeting
    if meeting is None:
        raise ModelError("processes exchange data inside ranks.together() only.")
    with meeting.arrived(ARRIVED) as states:
        common = _chosen(_gathered(None), None) if FAILED in states else None
        if common is None:
            yield meeting
    if common is not None:
        raise _Told(common)


def _gathered(value: Any) -> list[Any]:
    """What every process gives, as JSON: nothing that arrives is ever run."""
    meeting = _local.meeting
    if meeting is None:
        return [value]
    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = torch.zeros(meeting.count, dtype=torch.int64)
    sizes[meeting.rank] = len(own)
    distributed.all_reduce(sizes, group=meeting.group)
    longest = int(sizes.max())
    parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(meeting.count)]
    distributed.all_gather(parts, torch.nn.functional.pad(own, (0, longest - len(own))), group=meeting.group)
    return [json.loads(part[:size].numpy().tobytes()) for part, size in zip(parts, sizes.tolist(), strict=True)]


def meet() -> None:
    """Wait until all processes are here; raises where one of them has failed meanwhile."""
    if _local.meeting is not None:
        with _exchange():
            pass


def gather(value: T) -> list[T]:
    """What each process gives, by rank; plain data, of which tuples arrive as lists."""
    if _local.meeting is None:
        return [value]
    with _exchange():
        found = _gathered(value)
    return found


def from_first(value: T) -> T:
    """What process 0 gives."""
    return value if _local.meeting is None else gather(value if is_first() else None)[0]  # type: ignore[return-value]


def agree(what: str, value: Any) -> None:
    """Raises ModelError on all processes where they do not have the same value of something."""
    found = gather(value)
    other = next((number for number, given in enumerate(found) if given != found[0]), None)
    if other is not None:
        pair = [found[0], found[other]]
        if all(isinstance(one, dict) for one in pair):
            pair = [
                {key: item for key, item in one.items() if item != pair[1 - at].get(key)} for at, one in enumerate(pair)
            ]
        raise ModelError(
            f"processes 0 and {other} of {count()} do not have the same {what} ({' and '.join(str(one)[:_LONGEST] for one in pair)}); "
            "give all of them the same model, configuration and data, on the same versions and kind of processor. A model that "
            "only one process has is pruned inside `with hf_sparse.ranks.alone():`."
        )


def sum_(*tensors: torch.Tensor) -> None:
    """Add up tensors over all processes, in place; every process ends with the same bits."""
    if _local.meeting is None:
        return
    with _exchange() as meeting:
        for tensor in tensors:
            here = tensor.detach().cpu().contiguous()
            distributed.all_reduce(here, group=meeting.group)
            if here is not tensor:
                tensor.detach().copy_(here)


def summed(*numbers: float) -> list[float]:
    """Numbers added up over all processes."""
    total = torch.tensor(numbers, dtype=torch.float64)
    sum_(total)
    return list(total.tolist())


def hand_out(tensors: Sequence[torch.Tensor], owners: Sequence[int]) -> list[torch.Tensor]:
    """Each tensor as its owner has it; shapes and dtypes are the same on all processes."""
    if _local.meeting is None:
        return list(tensors)
    found = []
    with _exchange() as meeting:
        for tensor, owner in zip(tensors, owners, strict=True):
            own = meeting.rank == owner
            here = tensor.detach().cpu().contiguous() if own else torch.empty(tensor.shape, dtype=tensor.dtype)
            distributed.broadcast(here.view(-1).view(torch.uint8), owner, group=meeting.group)
            found.append(tensor if own else here.to(tensor.device))
    return found


def owners(costs: Sequence[float]) -> list[int]:
    """The process that each piece of work falls to: the dearest first, each to the one with the least so far."""
    load, found = [0.0] * count(), [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
        found[piece] = load.index(min(load))
        load[found[piece]] += costs[piece]
    return found


def own(costs: Sequence[float]) -> list[int]:
    """The numbers of the pieces of work that fall to this process."""
    return [piece for piece, owner in enumerate(owners(costs)) if owner == rank()]
