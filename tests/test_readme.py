"""Every snippet of the README runs as it stands there, in one folder, from top to bottom."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hub.client import Hub

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(python|bash)\n(.*?)```", README, re.DOTALL)
SETS_UP = ("make demo", "make test")  # what runs this very test


def test_the_readme_has_the_two_commands_and_snippets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{command.removeprefix('make ')}:", makefile, re.MULTILINE) for command in SETS_UP)
    assert sum(kind == "python" for kind, _ in BLOCKS) >= 4


@pytest.mark.slow
def test_every_snippet_runs(hub: Hub, tmp_path: Path) -> None:
    environment = {**os.environ, **hub.settings(), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    environment["HF_SPARSE_CACHE"] = str(tmp_path / "timings")
    for kind, code in BLOCKS:
        if any(command in code for command in SETS_UP):
            continue
        if kind == "python":
            commands = [[sys.executable, "-c", code]]
        else:
            lines = code.replace("\\\n", " ").strip().splitlines()
            commands = [[sys.executable, "-m", "hf_sparse", *shlex.split(line, comments=True)[1:]] for line in lines]
        for command in commands:
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{code}\n{done.stderr[-2000:]}"
    assert (tmp_path / "sparse-model" / "README.md").is_file()
    assert (tmp_path / "pruned" / "hf_sparse_report.json").is_file()
    assert (tmp_path / "depth.png").is_file()
    assert {"README.md", "model.safetensors", "tokenizer.json"} <= hub.files("user/sparse-model").keys()


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_lead_to_files(link: str) -> None:
    assert link.startswith("https://") or (ROOT / link).exists()
