"""Prunes a checkpoint from disk to disk: one block at a time is in memory, and a run that was killed goes on where it was."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.serialization._base import parse_size_to_int

from hf_sparse import environment, ranks
from hf_sparse.config import SparsityConfig
from hf_sparse.contextual import CONFIG_KEY
from hf_sparse.convert import convert, files_beside
from hf_sparse.destination import check_apart, check_destination, check_place, put_in_place
from hf_sparse.errors import CheckpointError, ConfigError, PruningInterrupted, unknown
from hf_sparse.forwards import hidden_states_in
from hf_sparse.hashes import sha256_of
from hf_sparse.hub import is_weights
from hf_sparse.prune import prune_sharing_
from hf_sparse.remote import CARD, CONFIG, PREDICTORS, Folder, open_place, read_config
from hf_sparse.report import FILE_NAME as REPORT_FILE
from hf_sparse.report import PICTURE_FILE, Report
from hf_sparse.room import check_disk
from hf_sparse.side_files import describe
from hf_sparse.spill import HIDDEN_MEMORY, Spill
from hf_sparse.storage import FORMATS
from hf_sparse.streaming.files import Outputs
from hf_sparse.streaming.opening import open_model
from hf_sparse.streaming.output import output_headers, write_index
from hf_sparse.streaming.session import Session, files_told
from hf_sparse.streaming.weights import Weights
from hf_sparse.streaming.work import FORMAT, Work, check_same, working
from hf_sparse.text import one_line, shown
from hf_sparse.verify.loading import auto_class

_SHARD_SIZE = "1GB"  # of compressed weights: one shard is in memory
_OURS = (CARD, REPORT_FILE, PICTURE_FILE)  # written anew


def prune_checkpoint(
    source: str | Path,
    destination: str | Path,
    config: SparsityConfig | Mapping[str, Any] | str | Path,
    tokenizer: Any = None,
    *,
    overwrite: bool = False,
    restart: bool = False,
    sparse_format: str | None = None,
    hidden_memory: int | str = HIDDEN_MEMORY,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
) -> Report:
    """Prune a checkpoint that need not fit in memory, and write it; returns the report.

    The result is that of `from_pretrained`, `prune_` and `save_pretrained`, bit for bit, under the keys and in the files of the
    source; tensors that are not pruned are copied byte for byte. One block is in memory at a time. The same call after a
    run that was interrupted, whatever by, goes on behind the last block that was finished.

    Args:
        source: folder of a model in safetensors, plain or compressed, or a repository on the Hub. It is never written to.
        destination: folder that appears when it is complete. Until then the work stands in a hidden folder beside it.
        config: as `prune_` takes it.
        tokenizer: as `prune_` takes it; without one, the one beside the model. It is saved with the model.
        overwrite: replace a destination that is not empty.
        restart: forget what an interrupted run has done.
        sparse_format: "bitmask" compresses the result.
        hidden_memory: bytes, or a size such as "4GB", that hidden states may take in memory; beyond it they are in files.
        dtype: load in, and write, another number format. Without it, as `from_pretrained` does, and files keep theirs.
        revision, token, cache_dir, trust_remote_code: as `from_pretrained` takes them.

    Where a group of processes is initialised, all of them call this and share the work, as with `prune_`; the first one writes, and
    the destination has to be on a disk that all of them see.

    Raises: ConfigError, ModelError, CalibrationError and CheckpointError before anything is pruned, also where an interrupted run
        was begun with other settings or another run is under way; PruningInterrupted where pruning fails later.
    """
    with ranks.together():
        sources: list[str | Path] = [source, *([config] if isinstance(config, str | Path) else [])]
        config = SparsityConfig.of(config)
        config.check_calibration()
        if isinstance(config.calibration, str | Path):
            sources.append(config.calibration)
        _check(config, sparse_format)
        limit = hidden_bytes(hidden_memory)
        destination = Path(destination)
        options: dict[str, Any] = {
            name: value
            for name, value in {"revision": revision, "token": token, "cache_dir": cache_dir}.items()
            if value is not None
        }
        if ranks.is_first():
            check_place(destination, sources)
        folder = _folder(str(source), options)
        check_apart(destination, folder)
        if trust_remote_code:
            options["trust_remote_code"] = True
        with working(destination, restart) as work:
            try:
                if work.writes and not _is_result(destination, work):
                    check_destination(destination, overwrite, sources)
                _prune(folder, str(source), work, config, tokenizer, options, dtype, sparse_format, limit)
            except BaseException:
                if not any(map(work.journal.last, ("begin", "measured", "complete"))):  # nothing to go on from
                    work.remove()
                raise
            if work.writes and not _is_result(destination, work):
                check_destination(destination, overwrite, sources)  # somebody may have filled it meanwhile
                _put_in_place(destination, work)
            ranks.meet()
            report = Report.load(destination)
            work.remove()
            return report


def _is_result(folder: Path, work: Work) -> bool:
    """Whether a folder holds what this run has completed."""
    complete, file = work.journal.last("complete"), folder / REPORT_FILE
    return complete is not None and file.is_file() and sha256_of(file) == complete["report"]


def _put_in_place(destination: Path, work: Work) -> None:
    fresh = next((folder for folder in (work.compressed, work.model) if _is_result(folder, work)), None)
    if fresh is None:
        raise work.journal.damaged("it tells of a complete result, which is not there")
    put_in_place(fresh, destination.absolute(), work.old)


def _check(config: SparsityConfig, sparse_format: str | None) -> None:
    if sparse_format is not None and sparse_format not in FORMATS:
        raise ConfigError(unknown("sparse_format", sparse_format, FORMATS))
    if config.predictor is not None:
        raise ConfigError(
            "predictors are trained on a whole model in memory; prune without predictor=, then hf-sparse predictor train."
        )


def hidden_bytes(given: int | str) -> int:
    """What hidden states may take in memory; raises ConfigError for what is no size."""
    try:
        size = given if isinstance(given, int) else int(given) if given.isdecimal() else parse_size_to_int(given)
    except ValueError:
        size = -1
    if size < 0:
        raise ConfigError(f"hidden_memory is {shown(given)}; give bytes, or a size such as '4GB'.")
    return size


def _folder(source: str, options: Mapping[str, Any]) -> Path:
    """The folder with the model; of a repository, what is needed of it is downloaded."""
    place = open_place(source, **options)
    if CONFIG_KEY in read_config(place) or PREDICTORS in place.files:
        raise ConfigError("the model carries predictors, which would not fit it any more; prune it in memory.")
    if "adapter_config.json" in place.files:
        raise CheckpointError(f"{one_line(source)!r} holds an adapter; merge it, save the model, and prune that.")
    if isinstance(place, Folder):
        return place.path
    beside, _ = files_beside(place.files)
    return place.download([*beside, *(name for name in place.files if is_weights(name) or name == CONFIG)])


def _prune(
    folder: Path, source: str, work: Work, config: SparsityConfig, tokenizer: Any, options: Mapping[str, Any],
    dtype: Any, sparse_format: str | None, limit: int,
) -> None:  # fmt: skip
    dtype = None if dtype == "auto" else dtype
    model, weights = _open(folder, config, dtype, options)
    try:
        model.config.name_or_path = source
        _begin(folder, source, work, weights, config, dtype, sparse_format)
        session = Session(weights, work, tokenizer, options)
        if work.journal.last("complete") is not None:  # by an attempt that could not put it in its place
            if config.calibration is not None:
                session.samples(model, config)
            return
        work.model.mkdir(exist_ok=True)
        headers = output_headers(model, weights, dtype is not None)
        if sparse_format is not None:  # a compressed copy stands beside the plain one, and is no larger
            size = sum(header.file_size for header in headers.values())
            check_disk(work.path, size, "the compressed result", "Give a destination on another disk.")
        weights.write_to(Outputs(work.model, headers))
        spill = Spill(work.path, limit)
        try:
            with hidden_states_in(spill), _embeddings_in(spill, model):
                report = prune_sharing_(model, config, session)
        except PruningInterrupted as error:
            raise PruningInterrupted(
                f"pruning stopped after {len(error.blocks)} blocks ({one_line(error.__cause__ or error, 300)}); the same command goes on "
                "from the last one that was finished.",
                error.blocks,
            ) from error
        report.seconds += session.earlier
        if not work.writes:
            return
        weights.complete()
        work.keep_only(headers)
        write_index(folder, work.model, weights, dtype is not None)
        _write_beside(folder, work.model, model, tokenizer)
        if sparse_format == "bitmask":
            convert(work.model, work.compressed, "bitmask", _SHARD_SIZE)
        session.complete(work.model if sparse_format != "bitmask" else work.compressed)
    finally:
        weights.close()


@contextmanager
def _embeddings_in(spill: Spill, model: Any) -> Iterator[None]:
    """All samples wait before the first block at once, so what they are there follows the same limit."""
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embeddings = None
    if embeddings is None:
        yield
        return
    handle = embeddings.register_forward_hook(lambda module, given, output: spill.kept(output))
    try:
        yield
    finally:
        handle.remove()


def _open(folder: Path, config: SparsityConfig, dtype: Any, options: Mapping[str, Any]) -> tuple[Any, Weights]:
    """The model without the weights of its blocks; its head is needed in memory where channels may change places."""
    from transformers import AutoConfig

    code = {"trust_remote_code": True} if options.get("trust_remote_code") else {}
    try:
        model_config = AutoConfig.from_pretrained(folder, **code)
    except ValueError as error:
        raise ConfigError(
            f"{one_line(folder, 200)!r} is not a model that Transformers can load: {one_line(str(error).splitlines()[0], 200)}"
        ) from error
    kind = auto_class(model_config)
    model, weights = open_model(
        lambda: kind.from_pretrained(folder, config=model_config, dtype=dtype or "auto", use_safetensors=True, **code),
        keep_head=config.permute,
    )
    strange = next((path for path in weights.inputs.paths if path.parent != folder), None)
    if strange is not None:
        weights.close()
        raise CheckpointError(
            f"the index names {one_line(strange, 200)!r}, which is not beside config.json; save the model again."
        )
    return model, weights


def _begin(
    folder: Path, source: str, work: Work, weights: Weights, config: SparsityConfig, dtype: Any, sparse_format: str | None
) -> None:  # fmt: skip
    """Write down what is begun, or see that it is what was begun before."""
    versions = environment.versions()
    now = ranks.from_first({
        "format": FORMAT, "source": source, "config": config.resolved().to_dict(), "dtype": None if dtype is None else str(dtype),
        "sparse_format": sparse_format or "dense", "files": files_told([folder / CONFIG, *weights.inputs.paths], weights),
        "versions": {name: versions[name] for name in ("hf_sparse", "torch", "transformers") if name in versions},
    })  # fmt: skip
    known = work.journal.last("start")
    if known is not None:
        check_same(known, now, work.destination)
        return
    work.empty_but_journal()
    work.journal.add("start", now)


def _write_beside(folder: Path, destination: Path, model: Any, tokenizer: Any) -> None:
    """All that stands beside the weights; config.json, by which the model would be found, comes late."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    copied, _ = files_beside(names)
    for name in copied:
        if name not in _OURS:
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, destination / name)
    if tokenizer is not None:
        tokenizer.save_pretrained(destination)
    if model.can_generate() and not (destination / "generation_config.json").exists():
        model.generation_config.save_pretrained(destination)
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(destination)
    describe(model, destination)
