"""Modules import only from floors below their own, nothing imports in circles, and nothing unsafe gets in."""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("hf_sparse", "trainer_callbacks", "model_cards")
LINES_AT_MOST = 300

# A module stands on the floor of its longest prefix here. Names without a package are modules of hf_sparse.
FLOORS = {
    7: "cli __main__",
    6: "forecast hooks save_hook bench trainer_hook compare search stream trainer_callbacks",
    5: "prune prune_report division gradual search trials shared lockstep streams blockwise measure apply reconstruct execution quantizer convert contextual permute hub side_files publish saved harness verify evaluate predictors streaming model_cards.predictors",
    4: "shapes early recipes comparison plot_comparison calibrate wiring snapshot record checkpoint kept adapters peft_hook embedded model_cards remote downloads arrival",
    3: "cost room families metrics normal_equations allocations patterns updates storage runtime native "
    "groups blocks stored replace forwards in_step offload spill destination observe statistics report report_text recovery speed plot config plan allot claim",
    2: "sites registry data stdlib_text hashes meeting ranks",
    1: "warning_handler errors environment memory after_import wraps text schema",
}
FLOOR = {
    name if name.partition(".")[0] in PACKAGES else f"hf_sparse.{name}": floor
    for floor, names in FLOORS.items()
    for name in names.split()
}
TOP = "hf_sparse"  # hf_sparse/__init__.py stands on all floors and under none
MAY_REACH_UP_IN_FUNCTIONS = ("hf_sparse.hub", "hf_sparse.cli")
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
UNSAFE_BUILTINS = {"eval", "exec", "__import__"}


class Import(NamedTuple):
    name: str  # what is imported: a module, or a module's attribute
    line: int
    top_level: bool  # runs when the module is imported


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, for every module of the packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(tree: ast.AST, package: str, top_level: bool = True) -> Iterator[Import]:
    """Every import under a node, names made absolute; those for type checkers only do not run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, top_level) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            start = [".".join(parents[: len(parents) - node.level + 1])] if node.level else []
            source = ".".join(start + ([node.module] if node.module else []))
            yield from (Import(f"{source}.{alias.name}", node.lineno, top_level) for alias in node.names)
        else:
            runs = not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not is_type_checking(
                node
            )
            yield from imports(node, package, top_level and runs)


def resolve(name: str, known: dict[str, Path] | set[str]) -> str | None:
    """The module that an imported name is or lies in; None for other people's."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


def edges(
    module: str, source: str, is_package: bool, known: dict[str, Path] | set[str]
) -> Iterator[tuple[str, Import]]:
    """The modules that a module imports; one in another package brings in that package's `__init__` as well."""
    package = module if is_package else module.rpartition(".")[0]
    for found in imports(ast.parse(source), package):
        target = resolve(found.name, known)
        if target is None or target == module:
            continue
        yield target, found
        parent = target.rpartition(".")[0]
        while parent and parent != TOP and not within(module, parent):
            yield parent, found
            parent = parent.rpartition(".")[0]


def edges_of(module: str) -> list[tuple[str, Import]]:
    path = modules()[module]
    return list(edges(module, path.read_text(encoding="utf-8"), path.name == "__init__.py", modules()))


def floor_of(module: str) -> int | None:
    return max(((len(name), floor) for name, floor in FLOOR.items() if within(module, name)), default=(0, None))[1]


def upward(module: str, found: list[tuple[str, Import]]) -> list[str]:
    """The imports of a module that reach a floor above, or hf_sparse/__init__.py."""
    own, wrong = floor_of(module), []
    for target, imported in found:
        where = f"{module}, line {imported.line}"
        if target == TOP:
            wrong.append(f"{where}: {imported.name} would come from the top; import it from the module that defines it")
            continue
        floor = floor_of(target)
        lazy = not imported.top_level and any(within(module, name) for name in MAY_REACH_UP_IN_FUNCTIONS)
        if own is not None and floor is not None and floor > own and not lazy:
            wrong.append(f"{where}: floor {own} imports {target} from floor {floor}")
    return wrong


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of imports, first module again at the end; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def unsafe(tree: ast.Module, is_package: bool) -> Iterator[str]:
    """What must not stand in the packages: asserts, and everything that runs what a file or a string says."""
    tables = literal_tables(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            yield f"line {node.lineno}: assert vanishes under -O; raise an error of hf_sparse.errors"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for name in names:
                if name.partition(".")[0] in UNSAFE_MODULES:
                    yield f"line {node.lineno}: {name} runs code out of files; use safetensors or JSON"
            if (
                isinstance(node, ast.ImportFrom)
                and node.module == "torch"
                and any(a.name == "load" for a in node.names)
            ):
                yield f"line {node.lineno}: torch.load unpickles; use safetensors"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in UNSAFE_BUILTINS:
                yield f"line {node.lineno}: {called}()"
            elif called == "torch.load":
                yield f"line {node.lineno}: torch.load unpickles; use safetensors"
            elif called.rpartition(".")[2] == "import_module" and not (is_package and is_fixed(node, tables)):
                yield f"line {node.lineno}: import_module by string; a package may so import its own modules, or by a fixed table"
            if any(word.arg == "allow_pickle" and ast.unparse(word.value) != "False" for word in node.keywords):
                yield f"line {node.lineno}: allow_pickle"


def literal_tables(tree: ast.Module) -> set[str]:
    """Names of the module's dicts that hold nothing but strings written out."""
    assigned = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)]
    literal = [node for node in assigned if all(isinstance(value, ast.Constant) for value in node.value.values)]  # type: ignore[attr-defined]
    return {target.id for node in literal for target in node.targets if isinstance(target, ast.Name)}


def is_fixed(call: ast.Call, tables: set[str]) -> bool:
    """Whether an import is `f"{__name__}.{module.name}"`, what pkgutil found in the package's folder, or `TABLE[name]`."""
    first = call.args[0] if call.args else None
    if isinstance(first, ast.Subscript):
        return ast.unparse(first.value) in tables
    return isinstance(first, ast.JoinedStr) and ast.unparse(first).strip("f'\"").startswith("{__name__}.{")


@pytest.mark.parametrize("module", sorted(set(modules()) - {TOP}))
def test_imports_only_from_floors_below(module: str) -> None:
    assert floor_of(module) is not None, (
        f"{module} stands on no floor: add its name to FLOORS in tests/test_layers.py, as low as its imports allow"
    )
    assert upward(module, edges_of(module)) == []


def test_no_circles() -> None:
    graph = {module: {target for target, found in edges_of(module) if found.top_level} for module in modules()}
    found = circle(graph)
    assert not found, " imports ".join(found)


@pytest.mark.parametrize("module", sorted(modules()))
def test_nothing_unsafe(module: str) -> None:
    path = modules()[module]
    assert list(unsafe(ast.parse(path.read_text(encoding="utf-8")), path.name == "__init__.py")) == []


@pytest.mark.parametrize("module", sorted(modules()))
def test_files_stay_short(module: str) -> None:
    lines = len(modules()[module].read_text(encoding="utf-8").splitlines())
    assert lines <= LINES_AT_MOST, f"{module} has {lines} lines, {LINES_AT_MOST} are allowed: a file holds one idea"


# The checks themselves: each must see what it is there for.

KNOWN = {"hf_sparse", "hf_sparse.errors", "hf_sparse.prune", "hf_sparse.hub", "hf_sparse.metrics", "hf_sparse.metrics.ria",
         "trainer_callbacks"}  # fmt: skip


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("hf_sparse.metrics.ria", "from hf_sparse.errors import ConfigError", 0),
        ("hf_sparse.metrics.ria", "from hf_sparse import errors", 0),
        ("hf_sparse.metrics.ria", "from ..errors import ConfigError", 0),
        ("hf_sparse.metrics.ria", "from hf_sparse.prune import prune_", 1),
        ("hf_sparse.metrics.ria", "from ..prune import prune_", 1),
        ("hf_sparse.metrics.ria", "def f():\n    import hf_sparse.prune", 1),
        ("hf_sparse.metrics.ria", "if TYPE_CHECKING:\n    import hf_sparse.prune", 1),
        ("hf_sparse.metrics.ria", "from hf_sparse import SparsityConfig", 1),
        ("hf_sparse.metrics.ria", "import hf_sparse", 1),
        ("hf_sparse.errors", "from hf_sparse.metrics.ria import ria", 2),  # the module and its package
        ("hf_sparse.hub", "import trainer_callbacks", 1),
        ("hf_sparse.hub", "def f():\n    import trainer_callbacks", 0),
    ],
)
def test_sees_what_reaches_up(module: str, source: str, wrong: int) -> None:
    assert len(upward(module, list(edges(module, source, False, KNOWN)))) == wrong


def test_sees_circles() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})[0] in "abc"
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize(
    "source",
    [
        "assert x",
        "import pickle",
        "from pickle import load",
        "torch.load(path)",
        "from torch import load",
        "eval(text)",
        "exec(text)",
        "__import__(name)",
        "import_module(name)",
        "importlib.import_module(name)",
        "importlib.import_module(given[name])",
        "numpy.load(path, allow_pickle=True)",
    ],
)
def test_sees_what_is_unsafe(source: str) -> None:
    assert len(list(unsafe(ast.parse(source), is_package=True))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import_module(f'{__name__}.{_module.name}')",
        "LAZY = {'Card': 'model_cards'}\ndef f(name): return import_module(LAZY[name])",
        "numpy.load(path, allow_pickle=False)",
        "json.loads(text)",
    ],
)
def test_lets_pass_what_is_safe(source: str) -> None:
    assert list(unsafe(ast.parse(source), is_package=True)) == []
