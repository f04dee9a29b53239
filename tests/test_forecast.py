"""Dry runs: what they tell, what they refuse, and that they leave nothing behind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hub.client import Hub
from models import llama, text, token_rows, tokenizer

import hf_sparse
from hf_sparse import SparsityConfig, early, room
from hf_sparse.cli import main
from hf_sparse.cost import Rates
from hf_sparse.errors import CheckpointError, ConfigError
from hf_sparse.forecast import calibration, forecast
from hf_sparse.registry import UPDATES
from hf_sparse.room import Room

ROWS = token_rows(8, 16)
NAMES = ["load, scan, survey", "forward passes", "statistics", "scores and masks", "updates", "write"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder.parent / "calibration.txt").write_text(text(600))
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates that need no measuring."""
    ones = Rates(**dict.fromkeys(Rates().__dict__, 1e-9))
    monkeypatch.setattr("hf_sparse.forecast.calibrate", lambda *_: calibration.Machine(ones, {}, 0.0))


def config(**changes: Any) -> SparsityConfig:
    return SparsityConfig(
        **{"pattern": "2:4", "metric": "wanda", "calibration": ROWS, "num_samples": 8, "sequence_length": 16, **changes}
    )


def listed(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def test_measures_this_machine_and_writes_nothing(saved: Path, tmp_path: Path) -> None:
    before = listed(saved.parent), listed(tmp_path)
    told = forecast(saved, config(metric="sparsegpt"), tmp_path / "pruned")
    assert (listed(saved.parent), listed(tmp_path)) == before
    assert [phase.name for phase in told.phases] == NAMES
    assert told.seconds is not None
    assert all(phase.seconds is not None for phase in told.phases)
    assert told.parameters == llama().num_parameters()
    assert told.tokens == ROWS.numel()
    assert set(told.solvers) == {"sparsegpt"}
    assert all(
        getattr(told.rates, name) > 0
        for name in ("product", "attention", "wide", "exact", "moved", "weighed", "written")
    )
    assert told.disk["destination and work folder"] == 4 * told.parameters


@pytest.mark.usefixtures("quick")
def test_command_line(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["prune", str(saved), str(tmp_path / "pruned"), "--dry-run", "--pattern", "2:4", "--metric", "dass", "--calibration",
             str(saved.parent / "calibration.txt"), "--num-samples", "4", "--sequence-length", "16"]  # fmt: skip
    assert main(words) == 0
    plain = capsys.readouterr().out
    assert all(name in plain for name in NAMES)
    assert main([*words, "--stream", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["stream"] is True
    assert [phase["name"] for phase in told["phases"]] == NAMES
    for phase in told["phases"]:
        assert set(phase) == {"name", "seconds", "memory", "mapped", "disk", "note"}
    assert {"model", "destination", "ranks", "blocks", "parameters", "weights_pruned", "tokens", "process", "memory", "mapped", "disk",
            "memory_left", "disk_left", "problems", "seconds", "measuring", "rates", "solvers", "threads"} <= set(told)  # fmt: skip
    assert told["problems"] == []
    for more, part in ((["--evaluate", "x.txt"], "leave that out"), (["--hidden-memory", "1GB"], "belong to --stream")):
        assert main([*words, *more]) == 1
        assert part in capsys.readouterr().err
    assert not (tmp_path / "pruned").exists()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("changes", "name", "part"),
    [
        ({"allocation": "owl"}, "dense pass for allocation owl", ""),
        ({"allocation": "atp"}, "search", "at most 11 trials"),
        ({"allocation": "search"}, "search", "at most 41 trials"),  # two blocks: 11 + 6 * (2 * 2 + 1)
        ({"permute": True}, "permutation", "depends on the weights"),
        ({"update": ("admm",)}, "updates", "iterations"),
    ],
)
def test_what_comes_before_has_phases(saved: Path, changes: dict[str, Any], name: str, part: str) -> None:
    found = {phase.name: phase for phase in forecast(saved, config(**changes)).phases}
    assert part in found[name].note
    assert (found[name].seconds is None) == (name == "permutation")


@pytest.mark.usefixtures("quick")
def test_says_what_is_not_foretold(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = forecast(saved, config(permute=True))
    assert told.seconds is None
    assert "not foretold" in str(told)
    monkeypatch.delitem(UPDATES["admm"].traits, "cost")
    found = {phase.name: phase for phase in forecast(saved, config(update="admm")).phases}
    assert found["updates"].seconds is None
    assert "tells no cost" in found["updates"].note
    assert found["forward passes"].seconds is not None
    elsewhere = forecast(saved, config(device="cuda:0")).phases[1]
    assert elsewhere.seconds is None
    assert "cuda:0" in elsewhere.note


@pytest.mark.usefixtures("quick")
def test_without_data_there_are_no_passes(saved: Path) -> None:
    told = forecast(saved, config(metric="magnitude", calibration=None), stream=True)
    assert [phase.name for phase in told.phases] == ["load, scan, survey", "scores and masks", "write"]
    assert told.tokens == 0


@pytest.mark.usefixtures("quick")
def test_processes_share_the_work(saved: Path) -> None:
    one, two = (forecast(saved, config(metric="sparsegpt"), ranks=ranks) for ranks in (1, 2))
    times = [{phase.name: phase.seconds or 0.0 for phase in told.phases} for told in (one, two)]
    assert times[1]["forward passes"] < times[0]["forward passes"]
    assert times[1]["updates"] < times[0]["updates"]
    with pytest.raises(ConfigError, match="ranks is 0"):
        forecast(saved, config(), ranks=0)


@pytest.mark.usefixtures("quick")
def test_hidden_states_go_into_files_when_they_must(saved: Path) -> None:
    hidden = 2 * ROWS.numel() * 32 * 4
    assert forecast(saved, config(), stream=True).disk["hidden states"] == 0
    told = forecast(saved, config(), stream=True, hidden_memory=1000)
    # one batch: what goes in, what comes out dense and pruned, and what goes on
    assert told.disk["hidden states"] == told.mapped == 2 * hidden
    assert told.memory == forecast(saved, config(), stream=True).memory - hidden
    part = forecast(saved, config(batch_size=2), stream=True, hidden_memory=hidden // 2)
    assert part.disk["hidden states"] == 2 * (2 + 1) * hidden // 8


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("changes", "kept", "disk"),
    [({}, 1.0, 1.0), ({"sparse_format": "bitmask"}, 1.0, 1.7), ({"dtype": "bfloat16"}, 0.5, 0.5)],
)
def test_disk(saved: Path, tmp_path: Path, changes: dict[str, Any], kept: float, disk: float) -> None:
    told = forecast(saved, config(), tmp_path / "pruned", stream=True, **changes)
    size = told.parameters * 4
    assert told.disk["destination and work folder"] / size == pytest.approx(disk, abs=0.1)
    assert told.phases[0].mapped == 0


@pytest.mark.usefixtures("quick")
def test_a_repository_is_looked_at_and_its_weights_are_not_fetched(saved: Path, hub: Hub, tmp_path: Path) -> None:
    for path in sorted(saved.iterdir()):
        hub.edit("user/dense", path.name, path.read_bytes())
    told, local = forecast("user/dense", config(), tmp_path / "pruned"), forecast(saved, config(), tmp_path / "pruned")
    size = (saved / "model.safetensors").stat().st_size
    assert told.disk["download"] == told.phases[0].disk == size
    assert (told.phases[0].name, told.phases[0].seconds) == ("download", None)
    assert (told.parameters, told.memory, told.phases[1:]) == (local.parameters, local.memory, local.phases)
    assert not list(hub.cache.rglob("*.safetensors"))


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.usefixtures("quick")
def test_refuses_what_memory_cannot_hold(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "memory_left", lambda: Room(1000, "a limit"))
    with pytest.raises(
        ConfigError, match=r"pruning needs .* of memory, and 1 kB are left \(a limit\).*missing\. Use --stream"
    ):
        forecast(saved, config(), tmp_path / "pruned")
    with pytest.raises(ConfigError, match="smaller num_samples"):
        forecast(saved, config(), stream=True)
    told = forecast(saved, config(), refuse=False)
    assert "cannot fit" in str(told)
    assert json.loads(json.dumps(told.to_dict()))["problems"][0].startswith("pruning needs")


@pytest.mark.usefixtures("quick")
def test_refuses_what_the_disk_cannot_hold(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "disk_left", lambda folder: Room(1000, "a disk"))
    with pytest.raises(
        CheckpointError,
        match=r"pruning needs .* on the disk, and 1 kB are left in a disk; .* missing. Give a destination",
    ):
        forecast(saved, config(), tmp_path / "pruned")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("source", "changes", "part"),
    [
        ("nowhere", {}, "is no folder here"),
        (None, {"calibration": None}, "needs calibration"),
        (None, {"targets": "*.nothing"}, "matches no site"),
    ],
)
def test_refuses_what_a_run_would(
    saved: Path, source: str | None, changes: dict[str, Any], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(hf_sparse.HfSparseError, match=part):
        forecast("./nowhere/at/all" if source else saved, config(**changes))


def test_runs_check_before_they_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(room, "memory_left", lambda: Room(1000, "a limit"))
    with pytest.raises(ConfigError, match=r"calibrating on 128 tokens needs 33\.9 kB of memory.*smaller num_samples"):
        hf_sparse.prune_(model, config())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    monkeypatch.setattr(early, "check_memory", lambda *_: None)
    hf_sparse.prune_(model, config())


def test_streamed_runs_check_the_disk(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "disk_left", lambda folder: Room(1000, "a disk"))
    with pytest.raises(CheckpointError, match="keeping hidden states in files needs"):
        hf_sparse.prune_checkpoint(saved, tmp_path / "pruned", config(), hidden_memory=0)
    with pytest.raises(CheckpointError, match="the compressed result needs"):
        hf_sparse.prune_checkpoint(saved, tmp_path / "pruned", config(), sparse_format="bitmask")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- room


def test_limits_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "meminfo": "MemTotal: 100 kB\nMemAvailable: 50 kB\nSwapFree: 2 kB\n", "status": "VmSize: 10 kB\nVmData: 5 kB\nRssAnon: 3 kB\n",
        "cgroup": "0::/a/b\n", "groups/a/memory.max": "40960\n", "groups/a/memory.current": "30720\n",
        "groups/a/memory.stat": "inactive_file 1024\n", "groups/a/b/memory.max": "max\n", "groups/a/b/memory.current": "1\n",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    for name, value in {"_SYSTEM": "meminfo", "_STATUS": "status", "_GROUP_OF": "cgroup", "_GROUPS": "groups"}.items():
        monkeypatch.setattr(room, name, tmp_path / value)
    monkeypatch.setattr(room.resource, "getrlimit", lambda kind: (room.resource.RLIM_INFINITY,) * 2)
    assert room.memory_left() == Room(40960 - 30720 + 1024, "the control group's limit, as of a container")
    (tmp_path / "groups/a/memory.max").write_text("max\n")
    assert room.memory_left() == Room(52 * 1024, "memory and swap of the machine")
    monkeypatch.setattr(room.resource, "getrlimit", lambda kind: (20 * 1024,) * 2)
    found = room.memory_left()
    assert found is not None
    assert found.bytes == 10 * 1024
    assert "address space" in found.limit
    assert room.process_memory() == 3 * 1024


def test_room_on_the_disk(tmp_path: Path) -> None:
    assert room.existing(tmp_path / "a" / "b") == tmp_path
    assert room.disk_left(tmp_path / "a").bytes > 0
    assert room.shown(1.5e9) == "1.5 GB"
