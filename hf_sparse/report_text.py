"""A report as text for people."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from hf_sparse.text import one_line

if TYPE_CHECKING:
    from hf_sparse.report import Report

_LONGEST_LINE = 2000


def percent(value: float | None) -> str:
    """A share for people to read."""
    return "not measured" if value is None else f"{100 * value:.2f} %"


def recipe_words(config: Mapping[str, Any]) -> str:
    """Pattern, metric and updates of a configuration: "2:4 wanda + dense_stream + admm"."""
    updates = config.get("update", "none")
    named = [str(name) for name in updates] if isinstance(updates, list | tuple) else [str(updates)]
    return " + ".join([f"{config['pattern']} {config['metric']}", *(name for name in named if name != "none")])


def _counted(values: Iterable[str]) -> str:
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return ", ".join(f"{value} ({count})" if len(counts) > 1 else value for value, count in counts.items())


def _tensor_cores(report: "Report") -> str:
    """Which blocks keep a pattern that hardware runs, where blocks have patterns of their own."""
    sites = sum(site.fits_tensor_cores for site in report.sites)
    whole = [block.name for block in report.pruned_blocks if all(site.fits_tensor_cores for site in block.sites)]
    blocks = f"; all sites of {', '.join(whole)}" if whole else "; no block as a whole"
    return f"a pattern of 2:4 sparse tensor cores (at most 2 of 4 along the input axis): {sites} of {len(report.sites)} sites{blocks}"


def lines(report: "Report") -> Iterable[str]:
    """A summary, a line for each block, the calibration, the trainings and the notes."""
    patterns = _counted(site.pattern for site in report.sites) or report.config["pattern"]
    yield (
        f"{one_line(report.model_class)}: {one_line(recipe_words({**report.config, 'pattern': patterns}))}, "
        f"{len(report.sites)} sites in {len(report.pruned_blocks)} blocks, "
        f"{percent(report.sparsity)} zeros in the sites, {percent(report.block_sparsity)} in all block weights"
    )
    yield from _block_lines(report)
    if report.calibration:
        data = {name: one_line(value) for name, value in report.calibration.items()}
        yield (
            f"calibrated on {data['source']}: {data['samples']} samples, {data['tokens']} tokens, batches of {data['batch_size']}, "
            f"fingerprint {data['fingerprint']}"
        )
    peak = report.peak_memory_bytes
    memory = "" if peak is None else f", peak memory of the process {peak / 2**20:.0f} MiB"
    shared = f" in {report.processes} processes" if report.processes > 1 else ""
    yield f"{report.seconds:.1f} s{shared}{memory}"
    yield from map(str, report.recoveries)
    yield from (f"note: {one_line(note, _LONGEST_LINE)}" for note in report.notes)


def _block_lines(report: "Report") -> Iterable[str]:
    width = max([len(one_line(block.name)) for block in report.pruned_blocks], default=5)
    mixed = len({site.pattern for site in report.sites}) > 1
    last = "pattern, axis, metric" if mixed else "axis, metric"
    yield f"{'block':<{width}}  {'sites':>5}  {'sparsity':>9}  {'output error':>12}  {'seconds':>8}  {last}"
    for block in report.pruned_blocks:
        how = f"{_counted(site.axis for site in block.sites)}; {_counted(site.metric for site in block.sites)}"
        how = f"{_counted(site.pattern for site in block.sites)}; {how}" if mixed else how
        error = "not measured" if block.output_error is None else f"{block.output_error:.4f}"
        counted = f"{len(block.sites):>5}  {percent(block.sparsity):>9}"
        yield f"{one_line(block.name):<{width}}  {counted}  {error:>12}  {block.seconds:>8.2f}  {one_line(how)}"
    if mixed and report.config["pattern"] != "unstructured":
        yield one_line(_tensor_cores(report), _LONGEST_LINE)
