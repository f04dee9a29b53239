"""The model that is verified: its files, what they claim, and its weights."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_sparse import embedded
from hf_sparse.claim import Claim
from hf_sparse.families import Inventory, find_sites
from hf_sparse.remote import Folder, Repository
from hf_sparse.report import Report
from hf_sparse.sites import Site
from hf_sparse.verify.loading import Loaded

_EMBEDDED = "hf_sparse/embedded/model"  # where the model in the package lay on the machine that pruned it


def is_embedded(name: str) -> bool:
    """Whether a report names the model in the package, wherever that lay."""
    return name == embedded.NAME or name.replace("\\", "/").rstrip("/").endswith(_EMBEDDED)


@dataclass
class Options:
    """What was asked for, beside the model's name."""

    base: str | None = None
    texts: dict[str, str] = field(default_factory=dict)  # name of a text -> its path here
    token: str | bool | None = None
    cache_dir: str | None = None
    dtype: str | None = None
    trust_remote_code: bool = False
    tolerance: float = 1e-3


@dataclass
class Subject:
    """What the checks look at. `folder` holds the files, downloaded if the place is a repository."""

    place: Folder | Repository
    folder: Path
    claim: Claim | None
    report: Report | None
    card: str
    options: Options
    loaded: Loaded | None = None  # None: the weights cannot be loaded
    damaged: list[Path] = field(default_factory=list)  # files that did not arrive as the Hub has them

    @property
    def model(self) -> Any:
        return None if self.loaded is None else self.loaded.model

    @cached_property
    def inventory(self) -> Inventory:
        return find_sites(self.model)

    @cached_property
    def sites(self) -> dict[str, Site]:
        """All sites of the model by name."""
        return {site.name: site for site in self.inventory.all()}

    @property
    def trained(self) -> bool:
        """Whether a training has changed the kept weights since the pruning, so that more of them may be zero."""
        return self.report is not None and any(recovery.steps for recovery in self.report.recoveries)
