"""Names to functions: one registry for each kind of exchangeable part."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from hf_sparse.errors import ConfigError, unknown

F = TypeVar("F", bound=Callable[..., object])


@dataclass(frozen=True)
class Entry(Generic[F]):
    """A registered function with what it declares about itself."""

    name: str
    function: F
    summary: str
    source: str  # paper and section, or "this project"
    needs: frozenset[str] = frozenset()  # statistics of the site's own input
    consumer_needs: frozenset[str] = frozenset()  # statistics of the input that the site's rows end up in
    options: dict[str, object] = field(default_factory=dict)  # option name -> default
    traits: dict[str, object] = field(default_factory=dict)  # anything else that one kind of part declares


class Registry(Generic[F]):
    """Looks parts up by name; an unknown name answers with the nearest known one."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry[F]] = {}

    def register(
        self,
        name: str,
        *,
        source: str = "this project",
        needs: tuple[str, ...] = (),
        consumer_needs: tuple[str, ...] = (),
        options: dict[str, object] | None = None,
        **traits: object,
    ) -> Callable[[F], F]:
        """Decorator: file a function under `name`; its docstring's first line becomes the summary."""

        def file(function: F) -> F:
            if name in self._entries:
                raise ConfigError(f"{self.kind} {name!r} is already registered; choose another name.")
            summary = next(iter((function.__doc__ or "").strip().splitlines()), "")
            self._entries[name] = Entry(
                name,
                function,
                summary,
                source,
                frozenset(needs),
                frozenset(consumer_needs),
                dict(options or {}),
                traits,
            )
            return function

        return file

    def __getitem__(self, name: str) -> Entry[F]:
        if not isinstance(name, str) or name not in self._entries:
            raise ConfigError(unknown(self.kind, name, self._entries))
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._entries

    def __iter__(self) -> Iterator[Entry[F]]:
        return iter(self._entries.values())

    def resolve_options(self, name: str, given: dict[str, object]) -> dict[str, object]:
        """The entry's options with the given ones on top; unknown keys are refused."""
        entry = self[name]
        for key in given:
            if key not in entry.options:
                raise ConfigError(unknown(f"option of {self.kind} {name!r}:", key, entry.options))
        return {**entry.options, **given}


METRICS: Registry[Callable[..., object]] = Registry("metric")
ALLOCATIONS: Registry[Callable[..., object]] = Registry("allocation")
UPDATES: Registry[Callable[..., object]] = Registry("update")
STATISTICS: Registry[Callable[..., object]] = Registry("statistic")
CRITERIA: Registry[Callable[..., object]] = Registry("criterion")
