"""Set-up that has to happen before anything heavy is imported, and the fixtures that all tests share."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported; no test may depend on a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked data loaders would warn
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("MPLBACKEND", "agg")

import hypothesis
import pytest
import torch
import transformers
from hub.client import Hub, pointed_at, serving

torch.set_num_threads(1)  # the models are tiny: more threads cost time, and figures would depend on the machine
transformers.utils.logging.disable_progress_bar()

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder with the small real model, its text and the reference masks; tests that need it are skipped without it."""
    given = os.environ.get("HF_SPARSE_TEST_DATA")
    if given:
        if not Path(given).is_dir():
            pytest.fail(f"HF_SPARSE_TEST_DATA is {given!r}, which is no folder; correct it or unset it.")
        return Path(given)
    for folder in (ROOT.parent / "shared", ROOT / "shared"):
        if (folder / "models").is_dir():
            return folder
    pytest.skip("no test data: set HF_SPARSE_TEST_DATA to its folder, or put it into `shared` beside the checkout")


@pytest.fixture(scope="module")
def little_garbage() -> Iterator[None]:
    """A Trainer collects garbage over all imported modules whenever it trains; they are none."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The card of a checkpoint has a picture, which takes longer than the training."""
    monkeypatch.setattr("hf_sparse.side_files.find_spec", lambda name: None)


@pytest.fixture
def no_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that others write to as well takes its time, and nobody pulls the plug of a test."""
    monkeypatch.setattr("os.fsync", lambda handle: None)


@pytest.fixture(scope="session")
def hub_server() -> Iterator[str]:
    """The endpoint of a Hub on this machine, see tests/hub."""
    with serving() as endpoint:
        yield endpoint


@pytest.fixture
def hub(hub_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub that this process and its children use, logged in as "user", with a cache of the test's own."""
    view = Hub(hub_server, tmp_path / "huggingface")
    view.reset()
    for name, value in view.settings().items():
        monkeypatch.setenv(name, value)
    with pointed_at(view.endpoint, view.home, view.sleeps):
        yield view
    unknown = view.requests_unknown()
    assert not unknown, f"tests/hub does not speak: {unknown}"
