"""One way to look at a model's files wherever they are: a folder, the embedded model, or a repository on the Hub."""

from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from hf_sparse import embedded
from hf_sparse.checkpoint import CONFIG_KEY
from hf_sparse.claim import Claim
from hf_sparse.errors import CheckpointError
from hf_sparse.remote import compressed
from hf_sparse.remote.files import File
from hf_sparse.remote.headers import LENGTH_BYTES, Tensor, header_length, parse_header
from hf_sparse.remote.hub import Repository, forget, hub_hash
from hf_sparse.report import FILE_NAME as REPORT_FILE
from hf_sparse.report import Report
from hf_sparse.schema import read_json
from hf_sparse.text import one_line

__all__ = ["File", "Folder", "Place", "Repository", "Tensor", "forget", "hub_hash", "is_repository", "open_place", "read_card", "read_claim",
           "read_config", "read_report", "tensors", "weight_files"]  # fmt: skip

PREDICTORS = "hf_sparse_predictors.safetensors"  # no weights of the model
CONFIG, CARD = "config.json", "README.md"
LARGEST_CONFIG, LARGEST_CARD = 16 * 2**20, 4 * 2**20
LARGEST_REPORT = 256 * 2**20
_MOST_HEADERS = 2**28  # bytes, over all files
_FIRST = 2**16  # bytes: the header of most files is shorter
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


class Place(Protocol):
    """Where a model lies. Nothing of its weights is read here but what headers say."""

    name: str

    @property
    def commit(self) -> str | None:
        """The commit that is looked at; None for a folder."""

    @property
    def files(self) -> dict[str, File]:
        """The files at the root by name."""

    def local(self, name: str) -> Path:
        """The path of one of the files, downloaded if need be."""

    def head(self, name: str, size: int) -> bytes:
        """The first `size` bytes of one of the files, or all of a smaller one."""


class Folder:
    """A model in a folder."""

    commit: str | None = None

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path

    @cached_property
    def files(self) -> dict[str, File]:
        """The files in the folder by name."""
        return {
            path.name: File(path.name, path.stat().st_size) for path in sorted(self.path.iterdir()) if path.is_file()
        }

    def local(self, name: str) -> Path:
        return self.path / name

    def head(self, name: str, size: int) -> bytes:
        with (self.path / name).open("rb") as file:
            return file.read(size)


def is_repository(name: str) -> bool:
    """Whether a name can be that of a repository on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name != embedded.NAME


def open_place(
    name: str, *, revision: str | None = None, token: str | bool | None = None, cache_dir: str | None = None
) -> Folder | Repository:
    """Where a model lies: `embedded`, a folder, else a repository on the Hub at what `revision` means now.

    Raises: CheckpointError where nothing of that name can be; HubError where the Hub does not show it.
    """
    if name == embedded.NAME:
        return Folder(name, embedded.model_path())
    path = Path(name)
    if name and path.is_dir():
        return Folder(name, path)
    if path.is_file():
        raise CheckpointError(
            f"{one_line(name)!r} is a file; give the folder of a model, or a repository as user/name."
        )
    if not is_repository(name):
        raise CheckpointError(f"{one_line(name)!r} is no folder here, and no repository on the Hub can have that name.")
    return Repository(name, revision=revision, token=token, cache_dir=cache_dir)


# ---------------------------------------------------------------------------------------------------- small files


def _fetch(place: Place, name: str, most: int) -> Path:
    """A file whose size was looked at before anything of it is read."""
    file = place.files.get(name)
    if file is None:
        what = "is no model folder" if isinstance(place, Folder) else "is no model"
        revision = getattr(place, "revision", None)
        where = f" at revision {one_line(revision, 120)!r}" if revision else ""
        raise CheckpointError(f"{one_line(place.name)!r}{where} {what}: it has no {name}.")
    if file.size > most:
        raise CheckpointError(f"{name} of {one_line(place.name)!r} has {file.size} bytes; at most {most} are read.")
    return place.local(name)


def read_config(place: Place) -> dict[str, Any]:
    """config.json; raises CheckpointError where there is none, or it is no JSON object."""
    values = read_json(_fetch(place, CONFIG, LARGEST_CONFIG), LARGEST_CONFIG, "a model's config")
    if not isinstance(values, dict):
        raise CheckpointError(f"{CONFIG} of {one_line(place.name)!r} is no JSON object.")
    return values


def read_claim(place: Place) -> Claim | None:
    """What config.json claims about sparsity, None where it claims nothing; raises CheckpointError for a damaged claim."""
    config = read_config(place)
    return Claim.parse(config[CONFIG_KEY]) if CONFIG_KEY in config else None


def read_report(place: Place) -> Report | None:
    """The report, None where there is none; raises CheckpointError for a damaged one."""
    return Report.load(_fetch(place, REPORT_FILE, LARGEST_REPORT)) if REPORT_FILE in place.files else None


def read_card(place: Place) -> str:
    """README.md, empty where there is none; raises CheckpointError where it is not UTF-8 text."""
    if CARD not in place.files:
        return ""
    try:
        return _fetch(place, CARD, LARGEST_CARD).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{CARD} of {one_line(place.name)!r} is not UTF-8 text ({error.reason}).") from error


# ---------------------------------------------------------------------------------------------------- weights


def weight_files(place: Place) -> list[str]:
    """The safetensors files; raises CheckpointError where there are none. Pickles are never read."""
    names = sorted(name for name in place.files if name.endswith(".safetensors") and name != PREDICTORS)
    if names:
        return names
    pickles = sorted(name for name in place.files if name.endswith(_PICKLES))
    if pickles:
        raise CheckpointError(
            f"{one_line(place.name)!r} holds no .safetensors files, only {one_line(pickles[0], 120)}: not read, because pickle can run "
            "code. Save the model as safetensors."
        )
    raise CheckpointError(f"{one_line(place.name)!r} holds no .safetensors files.")


def tensors(place: Place) -> dict[str, Tensor]:
    """Every tensor by name, as the headers of the safetensors files tell; a compressed one stands under its plain name.

    Raises: CheckpointError for a header that is none or cannot be true, a tensor that two files hold, and parts of a compressed
        one that do not belong together.
    """
    found: dict[str, Tensor] = {}
    left = _MOST_HEADERS
    for name in weight_files(place):
        size = place.files[name].size
        start = place.head(name, min(size, _FIRST))
        length = header_length(start, size, name)
        left -= length
        if left < 0:
            raise CheckpointError(f"the headers of {one_line(place.name)!r} have more than {_MOST_HEADERS} bytes.")
        if len(start) < LENGTH_BYTES + length:
            start = place.head(name, LENGTH_BYTES + length)
        for tensor, told in parse_header(start[LENGTH_BYTES : LENGTH_BYTES + length], size, name).items():
            if tensor in found:
                raise CheckpointError(f"{one_line(tensor, 120)!r} is in {found[tensor].file} and in {told.file}.")
            found[tensor] = told
    return compressed.joined(place, found)
