"""What to prune and how."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import hf_sparse.allocations
import hf_sparse.metrics
import hf_sparse.updates  # noqa: F401  (importing the three packages fills the registries)
from hf_sparse.config.allocation import check_allocation, plain_allocation
from hf_sparse.config.options import check_option
from hf_sparse.config.predictor import PredictorConfig
from hf_sparse.config.serialise import Serialisable, known_version, mapping, whole
from hf_sparse.errors import CalibrationError, ConfigError, unknown
from hf_sparse.patterns import AXES, Pattern
from hf_sparse.registry import ALLOCATIONS, METRICS, UPDATES
from hf_sparse.text import without_secrets

# What reached the lowest perplexity for its time, on both models and all calibration draws of docs/quality.md.
_BEST_METRIC, _BEST_UPDATES = "wanda", ("dense_stream", "admm")
_OPTION_GROUPS = {"unstructured": {"rounding": "exact"}}


@dataclass(frozen=True, kw_only=True)
class SparsityConfig(Serialisable):
    """How to prune a model. Fields are checked when the object is made; ConfigError says what is allowed."""

    pattern: str = "2:4"  # "unstructured" or "N:M": N of every M consecutive weights are kept
    # share dropped; needed for "unstructured", follows from N:M with a uniform allocation, else the average over all weights;
    # a list or mapping as allocation gives it by itself
    sparsity: float | None = None
    axis: str = "auto"  # where weights compete: "input", "output", "site"; "auto": as the metric was published
    metric: str = "auto"  # "auto": the best recipe measured so far, wanda with dense_stream and admm as updates
    # a name; or one sparsity for each block with targeted sites, in the model's order; or a mapping from globs over site names,
    # of which the longest that matches a site decides. 0 leaves dense. With N:M every block or site gets an N of its own.
    allocation: str | tuple[float, ...] | Mapping[str, float] = "uniform"
    # new values for the kept weights; several are applied in order; "auto": as the named metric was published, which is none for most
    update: str | tuple[str, ...] = "auto"
    permute: bool = False  # reorder channels so that N:M groups lose less
    targets: str | tuple[str, ...] = "all"  # "all", "mlp", "attention" or globs over site names
    exclude: tuple[str, ...] = ()  # globs over site names
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # {"dass": {"exponent": 0.5}}
    # texts, chats, token tensors, dicts, a DataLoader, a Dataset, a .txt/.jsonl/.npy path or a Hub dataset id
    calibration: Any = field(default=None, compare=False)
    num_samples: int = 128
    sequence_length: int = 2048  # longest sample in tokens; texts are cut into windows of this length
    batch_size: int | str = "auto"  # sequences; "auto": as many as a fixed budget of tokens holds
    seed: int = 0
    device: str | None = None  # compute there, one block at a time; None: where the weights are
    predictor: PredictorConfig | None = None
    version: int = 1

    def __post_init__(self) -> None:
        pattern = Pattern.parse(self.pattern)
        self._fill_in()
        METRICS[self.metric]
        object.__setattr__(self, "allocation", plain_allocation(self.allocation))
        check_allocation(self.allocation, self.sparsity, pattern)
        self._normalise()
        self._check_updates()
        if self.axis not in (*AXES, "auto"):
            raise ConfigError(unknown("axis", self.axis, (*AXES, "auto")))
        if self.axis == "site" and pattern.group is not None:
            raise ConfigError(f'axis="site" has no groups for pattern {self.pattern!r}; give "input" or "output".')
        if not isinstance(self.permute, bool):
            raise ConfigError(f"permute={self.permute!r} is not allowed; give True or False.")
        if self.permute and pattern.group is None:
            raise ConfigError(
                'permute=True reorders channels for the groups of N:M; pattern="unstructured" has none, leave it False.'
            )
        if self.predictor is not None and not isinstance(self.predictor, PredictorConfig):
            raise ConfigError(f"predictor={self.predictor!r} is not allowed; give a PredictorConfig, or None.")
        whole("num_samples", self.num_samples, 1)
        whole("sequence_length", self.sequence_length, 1)
        whole("seed", self.seed, 0)
        if self.batch_size != "auto":
            whole("batch_size", self.batch_size, 1, ' or "auto"')
        self._check_device()
        self._check_options()
        known_version(type(self).__name__, self.version)

    def _fill_in(self) -> None:
        """Put names in the place of "auto", so that a saved configuration never changes its meaning."""
        if self.update == "auto" or self.update in (["auto"], ("auto",)):
            own = [entry.name for entry in UPDATES if entry.traits.get("own_metric") == self.metric]
            object.__setattr__(self, "update", _BEST_UPDATES if self.metric == "auto" else own or "none")
        if self.metric == "auto":
            object.__setattr__(self, "metric", _BEST_METRIC)

    def _check_updates(self) -> None:
        """What changes the targets comes first, what trains whole blocks last, and none stands alone."""
        traits = [UPDATES[name].traits for name in self.update]
        for number, name in enumerate(self.update):
            alone = name == "none" and len(self.update) > 1
            late = number > 0 and traits[number].get("sets_target")
            early = number < len(self.update) - 1 and traits[number].get("runs_blocks")
            if alone or late or early or name in self.update[:number]:
                place = "alone" if alone else "first" if late else "last" if early else "only once"
                raise ConfigError(f"update={list(self.update)!r} is not allowed: {name!r} must stand {place}.")
        if not self.update:
            raise ConfigError('update=() is not allowed; give "none" for no update.')

    def _normalise(self) -> None:
        if isinstance(self.targets, str) and self.targets not in ("all", "mlp", "attention"):
            if not set("*?[.") & set(self.targets):
                raise ConfigError(
                    unknown("targets", self.targets, ("all", "mlp", "attention")) + " Or give globs over site names."
                )
            object.__setattr__(self, "targets", (self.targets,))
        for name in ("targets", "exclude", "update"):
            value = getattr(self, name)
            if name == "targets" and isinstance(value, str):
                continue
            value = (value,) if isinstance(value, str) else value
            if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
                raise ConfigError(f"{name}={value!r} is not allowed; give a list of names.")
            object.__setattr__(self, name, tuple(value))
        if isinstance(self.predictor, Mapping):
            object.__setattr__(self, "predictor", PredictorConfig.from_dict(self.predictor))

    def _check_device(self) -> None:
        if self.device is None:
            return
        try:
            device = torch.device(self.device)
        except (RuntimeError, TypeError) as error:
            raise ConfigError(
                f'device={self.device!r} is not allowed; give a name such as "cpu" or "cuda:0".'
            ) from error
        object.__setattr__(self, "device", str(device))

    def _check_options(self) -> None:
        allowed = {*_OPTION_GROUPS, *(entry.name for registry in (METRICS, ALLOCATIONS, UPDATES) for entry in registry)}
        for group, given in mapping("options", self.options).items():
            if group not in allowed:
                raise ConfigError(unknown("options for", group, allowed))
            if not isinstance(given, Mapping):
                raise ConfigError(
                    f"options[{group!r}]={given!r} is not allowed; give a mapping of option names to values."
                )
            self.options_of(group)
        object.__setattr__(self, "options", {group: dict(given) for group, given in self.options.items()})
        if self.options_of("unstructured")["rounding"] not in ("exact", "truncate"):
            raise ConfigError(
                unknown(
                    "option unstructured.rounding:", self.options_of("unstructured")["rounding"], ("exact", "truncate")
                )
            )
        for entry in (*METRICS, *ALLOCATIONS, *UPDATES):
            for key, value in self.options_of(entry.name).items():
                check_option(entry, key, value)

    def options_of(self, name: str) -> dict[str, Any]:
        """The options of one metric, allocation, update or pattern with the defaults filled in."""
        given = dict(self.options.get(name, {}))
        if name in _OPTION_GROUPS:
            for key in given:
                if key not in _OPTION_GROUPS[name]:
                    raise ConfigError(unknown(f"option of {name!r}:", key, _OPTION_GROUPS[name]))
            return {**_OPTION_GROUPS[name], **given}
        for registry in (METRICS, ALLOCATIONS, UPDATES):
            if name in registry:
                return registry.resolve_options(name, given)
        raise ConfigError(unknown("options for", name, ()))

    def check_calibration(self) -> None:
        """Raises CalibrationError where metric, allocation or an update looks at activations and no data are named."""
        if self.calibration is not None:
            return
        if self.predictor is not None:
            raise CalibrationError(
                "predictors are trained on text and need calibration=... (texts, token ids, a data set or a path)."
            )
        parts = [("metric", METRICS[self.metric]), *(("update", UPDATES[name]) for name in self.update)]
        if isinstance(self.allocation, str):
            parts.append(("allocation", ALLOCATIONS[self.allocation]))
        simplest = {"metric": "magnitude", "update": "none", "allocation": "uniform"}
        for kind, entry in parts:
            searched = kind == "allocation" and self.searches
            if entry.needs or entry.consumer_needs or entry.traits.get("runs_blocks") or searched:
                way_out = f'{kind}="{simplest[kind]}"'
                raise CalibrationError(
                    f"{kind} {entry.name!r} looks at activations and needs calibration=... (texts, token ids, a data set "
                    f"or a path); or use {way_out}, which needs none."
                )

    @property
    def searches(self) -> bool:
        """Whether the allocation is searched for on calibration samples that are held out."""
        if not isinstance(self.allocation, str) or "held_out" not in ALLOCATIONS[self.allocation].options:
            return False
        return self.options_of(self.allocation).get("step") is None

    def resolved(self) -> "SparsityConfig":
        """The same with the options in use and the sparsity filled in, so that other defaults never change its meaning."""
        used = (self.metric, self.allocation, *self.update, *_OPTION_GROUPS)
        filled = {name: self.options_of(name) for name in used if isinstance(name, str)}
        options = {name: given for name, given in {**self.options, **filled}.items() if given}
        sparsity = self.target if isinstance(self.allocation, str) else self.sparsity
        return dataclasses.replace(self, options=options, sparsity=sparsity)

    @property
    def target(self) -> float:
        """The share of weights to drop, from the pattern where sparsity is not given; a list or mapping needs the sites' sizes."""
        given = isinstance(self.allocation, str) and self.sparsity is None
        share = Pattern.parse(self.pattern).sparsity if given else self.sparsity
        if share is None:
            raise ConfigError("the sparsity follows from the allocation and the sizes of the sites.")
        return share

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain data; calibration data in memory become None, their fingerprint is in the report.

        Tokens and passwords in the name of the calibration data are taken out, as this is what files and cards show.
        """
        values = super().to_dict()
        named = isinstance(self.calibration, str | Path)
        listed = {
            name: getattr(self, name) if isinstance(getattr(self, name), str) else list(getattr(self, name))
            for name in ("targets", "exclude", "update")
        }
        listed["update"] = self.update[0] if len(self.update) == 1 else list(self.update)
        given = self.allocation
        listed["allocation"] = (
            list(given) if isinstance(given, tuple) else dict(given) if isinstance(given, Mapping) else given
        )
        return {
            **values,
            **listed,
            "calibration": without_secrets(str(self.calibration)) if named else None,
            "options": {name: dict(given) for name, given in self.options.items()},
            "predictor": self.predictor.to_dict() if self.predictor else None,
        }

    @classmethod
    def of(cls, value: "SparsityConfig | Mapping[str, Any] | str | Path") -> "SparsityConfig":
        """An object as it is, a dict, or the path of a JSON or YAML file."""
        if isinstance(value, SparsityConfig):
            return value
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        if isinstance(value, str | Path):
            return cls.from_pretrained(value)
        raise ConfigError(
            f"a sparsity configuration cannot be a {type(value).__name__}; give a SparsityConfig, a dict or a path."
        )

    def __repr__(self) -> str:
        fields = (f"{item.name}={getattr(self, item.name)!r}" for item in dataclasses.fields(self))
        return without_secrets(f"{type(self).__name__}({', '.join(fields)})")

    def __deepcopy__(self, memo: dict[int, Any]) -> "SparsityConfig":
        # Auto classes deep-copy their keyword arguments; generators cannot be copied and data sets must not be.
        return self
