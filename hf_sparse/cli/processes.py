"""A command that a launcher has started in many processes: the group of them, and who speaks for all."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from hf_sparse.errors import ProcessLost

SHARED = ("prune",)  # the commands that many processes share


def launched() -> int:
    """How many processes a launcher (torchrun, accelerate) has started; 1 without one."""
    given = os.environ.get("WORLD_SIZE", "1")
    return int(given) if given.isdecimal() and "RANK" in os.environ and "MASTER_ADDR" in os.environ else 1


def speaks(command: str, error: Exception | None = None) -> bool:
    """Whether this process prints: the first one does; where one is lost it may be that one, so then each that is left does."""
    return not _is_shared(command) or os.environ.get("RANK") == "0" or _lost(error)


def _is_shared(command: str) -> bool:
    return command in SHARED and launched() > 1


def _lost(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, ProcessLost):
        error = error.__cause__
    return error is not None


@contextmanager
def group(command: str) -> Iterator[None]:
    """The group of the launched processes while a command runs; when it ends, the others wait until the first has spoken.

    Raises: ProcessLost where not all of them come.
    """
    if not _is_shared(command):
        yield
        return
    from torch import distributed
    from transformers.utils import logging

    from hf_sparse import ranks

    if not speaks(command):
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        warnings.simplefilter("ignore")
    _take_own_accelerator()
    seconds = ranks.timeout()
    try:
        distributed.init_process_group("gloo", timeout=timedelta(seconds=seconds))
    except (RuntimeError, ValueError) as error:
        raise ProcessLost(
            f"not all of the {launched()} processes came together in {seconds:g} s: {str(error).splitlines()[0]}; start all of them again."
        ) from error
    try:
        yield
    finally:
        with suppress(RuntimeError):
            distributed.barrier()
        distributed.destroy_process_group()


def _take_own_accelerator() -> None:
    """Let `--device cuda` be another device for each process of a machine."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
