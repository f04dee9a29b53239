"""How many tokens a second a model generates with predictors and without, and what of that time the predictors themselves take."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from hf_sparse.errors import ConfigError
from hf_sparse.predictors.gathered import Gathered, gathered
from hf_sparse.predictors.networks import Predictor
from hf_sparse.predictors.select import Selection
from hf_sparse.runtime.timing import clock

DENSE = "dense"
_PROMPT = 16  # tokens


@dataclass(frozen=True)
class Decoding:
    """Of one way of generating: medians over rounds that took turns with the other ways."""

    tokens_per_second: float
    share_of_time: float | None  # of the predictors' own work, choosing included; None without any


def decoding_speeds(
    model: Any, ways: Mapping[str, tuple[Predictor, Selection]], *, refresh_every: int = 1, new_tokens: int = 32, rounds: int = 5
) -> dict[str, Decoding]:  # fmt: skip
    """Greedy decoding of one sequence, dense and in every way given; the prompt and the first token are not counted.

    With one thread its CPU time is taken, which other processes do not lengthen.

    Raises: ConfigError where the model has too few positions, ModelError for models of which nothing can be left out.
    """
    check_room(model, new_tokens)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in (DENSE, *ways)}
    for turn in range(rounds + 1):  # the first warms up
        for name, taken in found.items():
            with _switched(model, ways.get(name), refresh_every) as running:
                one = _round(model, running, new_tokens)
            taken += [one] if turn else []
    return {
        name: Decoding(
            new_tokens / statistics.median(seconds for seconds, _ in taken),
            None if name == DENSE else statistics.median(own / seconds for seconds, own in taken),
        )
        for name, taken in found.items()
    }


def check_room(model: Any, new_tokens: int) -> None:
    """Raises ConfigError where the model has too few positions to generate so many tokens."""
    room = getattr(model.config, "max_position_embeddings", None)
    if room is not None and _PROMPT + new_tokens + 1 > room:
        raise ConfigError(
            f"the model has {room} positions; {_PROMPT} of a prompt and {new_tokens + 1} more do not fit."
        )


def _switched(model: Any, way: tuple[Predictor, Selection] | None, every: int) -> Any:
    return nullcontext() if way is None else gathered(model, *way, refresh_every=every)


def _round(model: Any, running: Gathered | None, new_tokens: int) -> tuple[float, float]:
    """Seconds for further tokens, and those of the predictors among them."""
    now, own = clock(), [0.0]
    with nullcontext() if running is None else _watched(running, now, own):
        first, before = _seconds(model, 1, now), own[0]
        return _seconds(model, new_tokens + 1, now) - first, own[0] - before


def _seconds(model: Any, new_tokens: int, now: Callable[[], float]) -> float:
    rows = (torch.arange(_PROMPT, device=model.device) % model.config.vocab_size)[None]
    start = now()
    model.generate(
        rows, attention_mask=torch.ones_like(rows), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    return now() - start


@contextmanager
def _watched(running: Gathered, now: Callable[[], float], own: list[float]) -> Iterator[None]:
    """Inside, `own` counts the seconds of scoring and choosing."""
    inside = [False]  # one part may call another

    def timed(work: Callable[..., Any]) -> Callable[..., Any]:
        def timing(*args: Any, **kwargs: Any) -> Any:
            if inside[0]:
                return work(*args, **kwargs)
            inside[0], start = True, now()
            try:
                return work(*args, **kwargs)
            finally:
                inside[0] = False
                own[0] += now() - start

        return timing

    parts: Sequence[tuple[object, str]] = [(running.predictor, "forward"), *((running, name) for name in running.PARTS)]
    for place, name in parts:
        object.__setattr__(place, name, timed(getattr(place, name)))
    try:
        yield
    finally:
        for place, name in parts:
            object.__delattr__(place, name)
