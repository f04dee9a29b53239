"""The installed distribution works from any folder, with all three packages, their data and the command."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # each starts a Python of its own

PACKAGES = ("hf_sparse", "trainer_callbacks", "model_cards")


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    try:
        importlib.metadata.distribution("hf-sparse")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("hf-sparse runs from the tree and is not installed: `pip install -e .`, or `make test`")


def run_outside(folder: Path, *command: str) -> str:
    """What a command prints that runs in a folder of its own and cannot see the checkout through its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_packages_import_outside_the_checkout(tmp_path: Path) -> None:
    code = "".join(f"import {name}; print({name}.__name__)\n" for name in PACKAGES)
    assert run_outside(tmp_path, sys.executable, "-c", code).split() == list(PACKAGES)


def test_typing_markers_and_data_are_found(tmp_path: Path) -> None:
    files = [("hf_sparse", "py.typed"), ("trainer_callbacks", "py.typed"), ("model_cards", "py.typed")]
    code = f"from importlib.resources import files\nfor package, name in {files}: print(files(package).joinpath(name).is_file())"
    assert run_outside(tmp_path, sys.executable, "-c", code).split() == ["True"] * len(files)


def test_parts_register_themselves_outside_the_checkout(tmp_path: Path) -> None:
    code = "import hf_sparse.metrics\nfrom hf_sparse.registry import METRICS\nprint('wanda' in METRICS)"
    assert run_outside(tmp_path, sys.executable, "-c", code).split() == ["True"]


def test_runs_as_a_module(tmp_path: Path) -> None:
    assert "prune" in run_outside(tmp_path, sys.executable, "-m", "hf_sparse", "--help")


def test_console_script(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("hf-sparse")
    assert "prune" in run_outside(tmp_path, str(script), "--help")


def test_importing_leaves_the_extras_alone(tmp_path: Path) -> None:
    code = "import sys, hf_sparse\nprint([m for m in ('matplotlib', 'pytest', 'hypothesis') if m in sys.modules])"
    assert run_outside(tmp_path, sys.executable, "-c", code).strip() == "[]"
