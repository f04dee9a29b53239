"""What a card says about speed: a Markdown table of what was measured, and on what machine; nothing where nothing was."""

from collections.abc import Sequence

from hf_sparse.speed import Speed, read_speeds
from model_cards.escape import plain
from model_cards.facts import cut


def tables(values: Sequence[object]) -> list[tuple[str, list[str]]]:
    """For each machine its description and the rows of a table; raises CheckpointError for speeds that are none."""
    by_machine: dict[str, list[Speed]] = {}
    for speed in read_speeds(values):
        by_machine.setdefault(speed.machine, []).append(speed)
    return [
        (plain(machine), cut([_row(speed) for speed in _ordered(speeds)])) for machine, speeds in by_machine.items()
    ]


def _ordered(speeds: Sequence[Speed]) -> list[Speed]:
    return sorted(speeds, key=lambda speed: not speed.whole_model)  # the whole model first


def _row(speed: Speed) -> str:
    spread = f"{speed.milliseconds:,.3f} ({speed.low:,.3f} to {speed.high:,.3f})"
    return f"| {plain(speed.work)} | {speed.tokens:,} | {plain(speed.way)} | {spread} | {speed.rounds:,} | {speed.speedup:.2f} |"
