"""Compares the files with the hashes that the card, the report and the Hub state."""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from hf_sparse.hashes import model_files, sha256_of
from hf_sparse.remote import hub_hash
from hf_sparse.verify.rows import DIFFERS, Row, compared, skipped
from hf_sparse.verify.subject import Subject

CHECK = "files"
# What a repository is downloaded for: never pickles, never code, never adapters.
_WEIGHTS = re.compile(r".+\.safetensors(\.index(\.[\w-]+)?\.json)?")
_OTHERS = re.compile(r".+\.(json|jinja|model|txt)|README\.md")
_CODE = re.compile(r".+\.py")
_DAMAGED = "the download is damaged; it has been removed from the cache, so verify again"
_NEVER = ("adapter_config.json", "adapter_model.safetensors")


def wanted(names: Mapping[str, object], with_code: bool) -> list[str]:
    """The files of a repository that are needed to verify its model."""
    shapes = (_WEIGHTS, _OTHERS, *([_CODE] if with_code else []))
    return [name for name in names if name not in _NEVER and any(shape.fullmatch(name) for shape in shapes)]


def check(subject: Subject) -> Iterator[Row]:
    """A row for each hash that is stated somewhere, and for each file of the model that the card does not name."""
    from model_cards.files import file_hashes

    stated = {"card": file_hashes(subject.card), "report": subject.report.files if subject.report else {}}
    sha256 = cache(sha256_of)
    for where, hashes in stated.items():
        if not hashes:
            yield skipped(CHECK, f"SHA-256 in the {where}", f"the {where} states no hashes")
        for name, claimed in hashes.items():
            yield compared(CHECK, f"{name} ({where})", claimed, _hash(subject.folder, name, sha256))
        for path in model_files(subject.folder) if hashes else ():
            if path.name not in hashes and path.name not in _NEVER:
                yield Row(CHECK, path.name, DIFFERS, None, sha256(path), f"the {where} does not name the file")
    yield from _of_hub(subject)


def _hash(folder: Path, name: str, sha256: object) -> str | None:
    path = folder / name
    inside = path.parent == folder and path.is_file()
    return sha256(path) if inside and callable(sha256) else None


def _of_hub(subject: Subject) -> Iterator[Row]:
    """What was downloaded, against what the Hub has: SHA-256 of large files, git's hash of the others."""
    if subject.place.commit is None:
        yield skipped(CHECK, "hashes of the Hub", "the model is in a folder")
    for name, file in subject.place.files.items():
        path = subject.folder / name
        if file.hash is not None and path.is_file():
            kind = "Hub, SHA-256" if file.sha256 else "Hub, git"
            row = compared(CHECK, f"{name} ({kind})", file.hash, hub_hash(path, file), _DAMAGED)
            if row.status == DIFFERS:
                subject.damaged.append(path)
            yield row
