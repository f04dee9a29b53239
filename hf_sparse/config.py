"""What to prune and how: frozen dataclasses that go to JSON and back."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml

import hf_sparse.allocations
import hf_sparse.metrics
import hf_sparse.updates  # noqa: F401  (importing the three packages fills the registries)
from hf_sparse.errors import CalibrationError, ConfigError, unknown
from hf_sparse.patterns import AXES, Pattern
from hf_sparse.registry import ALLOCATIONS, METRICS, UPDATES

FILE_NAME = "sparsity_config.json"
_OPTION_GROUPS = {"unstructured": {"rounding": "exact"}}


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r} is not allowed; give a whole number of at least {least}.")


def _share(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not 0 < value < 1:
        raise ConfigError(f"{name}={value!r} is not allowed; give a share above 0 and below 1, such as 0.5.")


class _Serialisable:
    """JSON both ways for a frozen dataclass; unknown keys are refused."""

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain data."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from plain data; raises ConfigError for an unknown key or a newer format version."""
        known = {item.name for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for key in values:
            if key not in known:
                raise ConfigError(unknown(f"key of {cls.__name__}", key, known))
        return cls(**values)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `sparsity_config.json` into a folder, made if absent."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / FILE_NAME).write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n")

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Self:
        """Read a JSON or YAML file, or `sparsity_config.json` in a folder."""
        file = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
        try:
            text = file.read_text()
            values = yaml.safe_load(text) if file.suffix in {".yaml", ".yml"} else json.loads(text)
        except OSError as error:
            raise ConfigError(f"cannot read the configuration {str(file)!r}: {error.strerror}.") from error
        except (ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"{str(file)!r} is not valid JSON or YAML: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(
                f"{str(file)!r} holds {type(values).__name__}; a mapping of field names to values is needed."
            )
        return cls.from_dict(values)


@dataclass(frozen=True, kw_only=True)
class PredictorConfig(_Serialisable):
    """Contextual sparsity: which heads and neurons a predictor skips for the token at hand."""

    kind: str = "shadow"  # "shadow" | "dejavu" | "gate_first" | "static" | "oracle"
    criterion: str = "plainact"  # importance of a head or neuron that the predictor learns
    keep_neurons: float = 0.5  # share of neurons computed
    keep_heads: float = 1.0  # share of heads computed
    neuron_block: int = 16  # neurons are chosen in blocks of 1, 16 or 32
    selection: str = "block"  # "block": the share holds in every block; "global": over all blocks
    dense_blocks: tuple[int, ...] = (0,)  # blocks that skip nothing
    refresh_every: int = 1  # tokens between two choices
    options: Mapping[str, Any] = field(default_factory=dict)
    version: int = 1

    def __post_init__(self) -> None:
        kinds = ("shadow", "dejavu", "gate_first", "static", "oracle")
        if self.kind not in kinds:
            raise ConfigError(unknown("predictor kind", self.kind, kinds))
        if self.selection not in ("block", "global"):
            raise ConfigError(unknown("selection", self.selection, ("block", "global")))
        for name in ("keep_neurons", "keep_heads"):
            if getattr(self, name) != 1:
                _share(name, getattr(self, name))
        if self.neuron_block not in (1, 16, 32):
            raise ConfigError(f"neuron_block={self.neuron_block!r} is not allowed; give 1, 16 or 32.")
        _whole("refresh_every", self.refresh_every, 1)
        _version(self)
        object.__setattr__(self, "dense_blocks", tuple(self.dense_blocks))

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "dense_blocks": list(self.dense_blocks), "options": dict(self.options)}


@dataclass(frozen=True, kw_only=True)
class SparsityConfig(_Serialisable):
    """How to prune a model. Fields are checked when the object is made; ConfigError says what is allowed."""

    pattern: str = "2:4"  # "unstructured" or "N:M": N of every M consecutive weights are kept
    sparsity: float | None = None  # share dropped; needed for "unstructured", follows from N:M otherwise
    axis: str = "auto"  # where weights compete: "input", "output", "site"; "auto": as the metric was published
    metric: str = "dass"
    allocation: str | tuple[float, ...] | Mapping[str, float] = "uniform"  # one sparsity per block
    update: str | tuple[str, ...] = "none"  # new values for the kept weights; several are applied in order
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
        METRICS[self.metric]
        self._check_allocation(pattern)
        self._normalise()
        for name in self.update:
            UPDATES[name]
        if self.axis not in (*AXES, "auto"):
            raise ConfigError(unknown("axis", self.axis, (*AXES, "auto")))
        if self.axis == "site" and pattern.group is not None:
            raise ConfigError(f'axis="site" has no groups for pattern {self.pattern!r}; give "input" or "output".')
        if self.permute:
            raise ConfigError("permute=True is not available in this version; leave it False.")
        if self.predictor is not None:
            raise ConfigError("contextual predictors are not available in this version; leave predictor=None.")
        _whole("num_samples", self.num_samples, 1)
        _whole("sequence_length", self.sequence_length, 1)
        _whole("seed", self.seed, 0)
        if self.batch_size != "auto":
            _whole("batch_size", self.batch_size, 1)
        self._check_options()
        _version(self)

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

    def _check_allocation(self, pattern: Pattern) -> None:
        if not isinstance(self.allocation, str):
            raise ConfigError(
                "an allocation given as a list or mapping is not available in this version; give 'uniform'."
            )
        ALLOCATIONS[self.allocation]
        if self.sparsity is None:
            if pattern.sparsity is None:
                raise ConfigError('pattern="unstructured" needs sparsity, the share to drop, such as sparsity=0.5.')
            return
        _share("sparsity", self.sparsity)
        if (
            pattern.sparsity is not None
            and self.allocation == "uniform"
            and not math.isclose(self.sparsity, pattern.sparsity)
        ):
            raise ConfigError(
                f"sparsity={self.sparsity} contradicts pattern={self.pattern!r}, which drops {pattern.sparsity:g} of every "
                "group; leave sparsity out, or choose another pattern."
            )

    def _check_options(self) -> None:
        allowed = {*_OPTION_GROUPS, *(entry.name for registry in (METRICS, ALLOCATIONS, UPDATES) for entry in registry)}
        for group, given in self.options.items():
            if group not in allowed:
                raise ConfigError(unknown("options for", group, allowed))
            if not isinstance(given, Mapping):
                raise ConfigError(
                    f"options[{group!r}]={given!r} is not allowed; give a mapping of option names to values."
                )
            self.options_of(group)
        if self.options_of("unstructured")["rounding"] not in ("exact", "truncate"):
            raise ConfigError(
                unknown(
                    "option unstructured.rounding:", self.options_of("unstructured")["rounding"], ("exact", "truncate")
                )
            )
        for entry in METRICS:
            for key, value in self.options_of(entry.name).items():
                if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                    raise ConfigError(f"option {entry.name}.{key}={value!r} is not allowed; give a finite number.")

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
        """Raises CalibrationError where the metric looks at activations and no data are named."""
        entry = METRICS[self.metric]
        if self.calibration is None and (entry.needs or entry.consumer_needs):
            raise CalibrationError(
                f"metric {entry.name!r} looks at activations and needs calibration=... (texts, token ids, a data set or "
                'a path); or use metric="magnitude", which needs none.'
            )

    @property
    def target(self) -> float:
        """The share of weights to drop, from the pattern where sparsity is not given."""
        share = self.sparsity if self.sparsity is not None else Pattern.parse(self.pattern).sparsity
        if share is None:
            raise ConfigError('pattern="unstructured" needs sparsity.')
        return share

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain data; calibration data in memory become None, their fingerprint is in the report."""
        values = super().to_dict()
        named = isinstance(self.calibration, str | Path)
        listed = {
            name: getattr(self, name) if isinstance(getattr(self, name), str) else list(getattr(self, name))
            for name in ("targets", "exclude", "update")
        }
        listed["update"] = self.update[0] if len(self.update) == 1 else list(self.update)
        return {
            **values,
            **listed,
            "calibration": str(self.calibration) if named else None,
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

    def __deepcopy__(self, memo: dict[int, Any]) -> "SparsityConfig":
        # Auto classes deep-copy their keyword arguments; generators cannot be copied and data sets must not be.
        return self


def _version(config: SparsityConfig | PredictorConfig) -> None:
    if config.version != 1:
        raise ConfigError(
            f"{type(config).__name__} version {config.version!r} is not known to this hf_sparse, which reads version 1; upgrade hf_sparse."
        )
