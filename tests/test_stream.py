"""`prune_checkpoint` gives what loading, `prune_` and saving give, bit for bit, and goes on where it broke off."""

import errno
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hub.client import Hub
from models import bert, gpt2, llama, mixtral, phi3, t5, text, token_rows, tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import prune_, spill, stream
from hf_sparse.errors import CheckpointError, PruningInterrupted
from hf_sparse.registry import ALLOCATIONS, METRICS, UPDATES
from hf_sparse.report import Report
from hf_sparse.storage import open_tensors
from hf_sparse.streaming.files import Outputs
from hf_sparse.streaming.work import work_folder, working

ROWS = token_rows()
DATA = {"calibration": ROWS, "num_samples": len(ROWS), "update": "none"}
HALF = {**DATA, "pattern": "unstructured", "sparsity": 0.5}
DENSE_STREAM = {**DATA, "update": ["dense_stream", "admm"]}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama, "tied": partial(llama, tie_word_embeddings=True), "mixtral": mixtral, "phi3": phi3, "gpt2": gpt2, "bert": bert, "t5": t5,
}  # fmt: skip
SLOW = pytest.mark.slow

pytestmark = pytest.mark.usefixtures("no_pictures", "no_syncs")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with open_tensors(sorted(folder.glob("*.safetensors"))) as stored:
        return {name: tensor[...] for name, tensor in stored.items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if one[key].dtype != other[key].dtype or not torch.equal(one[key], other[key])] == []


def told(report: Report) -> dict[str, Any]:
    """A report without what no two runs have in common."""
    values = report.to_dict()
    for name in ("seconds", "peak_memory_bytes", "files"):
        del values[name]
    for block in values["blocks"]:
        del block["seconds"]
    values["notes"] = [note for note in values["notes"] if "times the cost of one pruning" not in note]
    return values


def saved(folder: Path, name: str = "llama", size: str = "20KB") -> Any:
    model = MODELS[name]()
    model.save_pretrained(folder, max_shard_size=size)
    return model


def in_memory(source: Path, destination: Path, config: Any, kind: Any, **options: Any) -> Report:
    model = kind.from_pretrained(source, **options)
    report = prune_(model, config)
    model.save_pretrained(destination)
    return report


def unfinished(source: Path, destination: Path, config: Any, after: int, **options: Any) -> None:
    """A run that the disk ends when so many tensors are written."""
    left, write = [after], Outputs.write

    def full(self: Outputs, name: str, tensor: torch.Tensor) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, name, tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Outputs, "write", full)
        with pytest.raises((OSError, PruningInterrupted), match="No space left"):
            stream.prune_checkpoint(source, destination, config, **options)
    assert not destination.exists()


# ---------------------------------------------------------------------------------------------------- the same as in memory

CASES = [
    ("llama", DATA), ("mixtral", DATA), ("gpt2", {**DATA, "metric": "wanda"}), ("llama", {"metric": "magnitude", "update": "none"}),
    ("llama", DENSE_STREAM), ("tied", {**DATA, "permute": True}),
    pytest.param("llama", {**HALF, "metric": "ria", "allocation": "owl"}, marks=SLOW),
    pytest.param("llama", {**DATA, "device": "cpu"}, marks=SLOW),
    *(pytest.param(name, {**config, "metric": metric}, marks=SLOW) for metric in (entry.name for entry in METRICS) for config in (DATA, HALF) for name in MODELS
      if (metric, name) != ("dass", "gpt2")),
    *(pytest.param(name, {**DATA, "update": update}, marks=SLOW) for update in (entry.name for entry in UPDATES) for name in ("llama", "mixtral", "t5")
      if not UPDATES[update].traits.get("second_stream")),
    *(pytest.param("llama", {**HALF, "allocation": allocation}, marks=SLOW) for allocation in (entry.name for entry in ALLOCATIONS)),
    *(pytest.param(name, {**DATA, "permute": True, "metric": metric}, marks=SLOW) for name in MODELS for metric in ("dass", "magnitude")),
    pytest.param("mixtral", {**DENSE_STREAM, "permute": True}, marks=SLOW),
    pytest.param("llama", {**DENSE_STREAM, "update": ["dense_stream", "admm", "reconstruct"], "options": {"reconstruct": {"steps": 4}}}, marks=SLOW),
    pytest.param("llama", {**HALF, "allocation": "atp", "options": {"atp": {"selector": "alignment"}}}, marks=SLOW),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*calibration tokens cannot determine")
@pytest.mark.parametrize(("name", "config"), CASES)
def test_equal_to_the_way_in_memory(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    kind = type(saved(tmp_path / "dense", name))
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "dense").iterdir()}
    found = hf_sparse.prune_checkpoint(tmp_path / "dense", tmp_path / "streamed", config)
    wanted = in_memory(tmp_path / "dense", tmp_path / "memory", config, kind)
    assert_same(tensors(tmp_path / "streamed"), tensors(tmp_path / "memory"))
    assert told(found) == told(wanted)
    assert told(Report.load(tmp_path / "streamed")) == told(Report.load(tmp_path / "memory"))
    for file in (
        "config.json",
        *(["generation_config.json"] if (tmp_path / "memory" / "generation_config.json").exists() else []),
    ):
        assert json.loads((tmp_path / "streamed" / file).read_text()) == json.loads(
            (tmp_path / "memory" / file).read_text()
        )
    assert {
        path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "dense").iterdir()
    } == before
    shards = {path.name for path in (tmp_path / "dense").glob("*.safetensors*")}
    assert {path.name for path in (tmp_path / "streamed").glob("*.safetensors*")} == shards
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "memory", "streamed"]


def test_what_is_not_pruned_is_copied_byte_for_byte(tmp_path: Path) -> None:
    """Names that the model does not know, and number formats that it is not loaded in, are none of our business."""
    saved(tmp_path / "dense", size="5GB")
    file = tmp_path / "dense" / "model.safetensors"
    values = load_file(file)
    values = {
        name: value.double() if "norm" in name or "0.mlp.up" in name else value.bfloat16()
        for name, value in values.items()
    }
    save_file({**values, "foreign": torch.arange(5)}, file, {"format": "pt", "by": "hand"})
    stream.prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", {**DATA, "targets": "mlp"}, dtype="auto")
    old, new = file.read_bytes(), (tmp_path / "sparse" / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(old[:8], "little")
    assert (new[:length], len(new)) == (old[:length], len(old))
    found = load_file(tmp_path / "sparse" / "model.safetensors")
    for name, value in found.items():
        assert value.dtype == values.get(name, torch.arange(5)).dtype
        assert torch.equal(value, values.get(name, torch.arange(5))) != ("mlp" in name)
    assert (found["model.layers.0.mlp.up_proj.weight"] == 0).float().mean() == 0.5


def test_another_number_format(tmp_path: Path) -> None:
    kind = type(saved(tmp_path / "dense", "mixtral"))
    stream.prune_checkpoint(tmp_path / "dense", tmp_path / "streamed", DATA, dtype="bfloat16")
    in_memory(tmp_path / "dense", tmp_path / "memory", DATA, kind, dtype="bfloat16")
    assert_same(tensors(tmp_path / "streamed"), tensors(tmp_path / "memory"))
    assert kind.from_pretrained(tmp_path / "streamed").dtype == torch.bfloat16


@pytest.mark.parametrize("name", [pytest.param("llama", marks=SLOW), "mixtral"])
def test_compressed_weights_in_and_out(name: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "dense", name)
    prune_(model, {"metric": "magnitude", "update": "none", "pattern": "unstructured", "sparsity": 0.3})
    model.save_pretrained(tmp_path / "small", sparse_format="bitmask", max_shard_size="20KB")
    wanted = type(model).from_pretrained(tmp_path / "small")
    prune_(wanted, DATA)
    for format in ("dense", "bitmask"):
        stream.prune_checkpoint(tmp_path / "small", tmp_path / f"new {format}", DATA, sparse_format=format)
        found = type(model).from_pretrained(tmp_path / f"new {format}").state_dict()
        assert_same(found, dict(wanted.state_dict()))
    assert (tmp_path / "new dense" / "model.safetensors.index.json").is_file()


def test_hidden_states_in_files_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "_SMALLEST", 1)
    kind = type(saved(tmp_path / "dense"))
    config = {**DENSE_STREAM, "batch_size": 2}
    stream.prune_checkpoint(tmp_path / "dense", tmp_path / "streamed", config, hidden_memory=0)
    in_memory(tmp_path / "dense", tmp_path / "memory", config, kind)
    assert_same(tensors(tmp_path / "streamed"), tensors(tmp_path / "memory"))


def test_hidden_states_up_to_the_limit_stay_in_memory(tmp_path: Path) -> None:
    kept = spill.Spill(tmp_path, 4 * 2**20)
    tensor = torch.randn(4, 3, 2**16).transpose(0, 1)  # 3 MiB
    for _ in range(2):
        kept.turn()
        assert kept.kept({"hidden": tensor[:2]})["hidden"].data_ptr() == tensor.data_ptr()
        moved = kept.kept((tensor, "word"))
        assert torch.equal(moved[0], tensor)
        assert moved[0].stride() == tensor.stride()
    assert kept.bytes_in_files == 2 * tensor.nbytes
    assert list(tmp_path.iterdir()) == []


def test_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    model = llama()
    model.push_to_hub("user/dense")
    tokenizer().push_to_hub("user/dense")
    config = {"update": "none", "calibration": [text(60)] * 4, "num_samples": 4, "sequence_length": 16}
    found = stream.prune_checkpoint("user/dense", tmp_path / "sparse", config)
    assert found.model == "user/dense"
    wanted = AutoModelForCausalLM.from_pretrained("user/dense", sparsity_config=config)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").state_dict(), dict(wanted.state_dict()))
    assert (tmp_path / "sparse" / "tokenizer.json").is_file()


# ---------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    ("config", "after"), [(DATA, 9), (DENSE_STREAM, 12), ({**DATA, "permute": True}, 9), ({**HALF, "metric": "wanda", "allocation": "owl"}, 9)]
)  # fmt: skip
def test_goes_on_after_a_full_disk(config: dict[str, Any], after: int, tmp_path: Path, capsys: Any) -> None:
    saved(tmp_path / "dense")
    wanted = stream.prune_checkpoint(tmp_path / "dense", tmp_path / "whole", config)
    unfinished(tmp_path / "dense", tmp_path / "sparse", config, after)
    journal = work_folder(tmp_path / "sparse") / "journal.jsonl"
    assert sum(json.loads(line)["kind"] == "block" for line in journal.read_text().splitlines()) == 1
    with journal.open("a") as file:  # what a crash leaves of a line
        file.write('{"kind":"block","rep')
    found = stream.prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", config)
    assert_same(tensors(tmp_path / "sparse"), tensors(tmp_path / "whole"))
    assert told(found) == told(wanted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "sparse", "whole"]


def test_other_settings_are_noticed(tmp_path: Path) -> None:
    saved(tmp_path / "dense")
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    unfinished(dense, sparse, DATA, 9)
    others: list[tuple[Any, dict[str, Any], str]] = [
        ({**DATA, "pattern": "4:8"}, {}, "config: pattern was '2:4', now it is '4:8'"),
        (DATA, {"dtype": "bfloat16"}, "dtype was None, now it is 'bfloat16'"),
        (DATA, {"sparse_format": "bitmask"}, "sparse_format was 'dense', now it is 'bitmask'"),
        ({**DATA, "calibration": token_rows(seed=1)}, {}, "calibration was '"),
    ]
    for config, options, message in others:
        with pytest.raises(CheckpointError, match=message) as error:
            stream.prune_checkpoint(dense, sparse, config, **options)
        assert "restart" in str(error.value)
    shard = next(dense.glob("*-00002-*.safetensors"))
    os.utime(shard, ns=(0, 0))
    with pytest.raises(CheckpointError, match=f"files: {shard.name} was"):
        stream.prune_checkpoint(dense, sparse, DATA)
    stream.prune_checkpoint(dense, sparse, {**DATA, "pattern": "4:8"}, restart=True)
    assert Report.load(sparse).config["pattern"] == "4:8"


def test_dense_weights_that_are_gone_are_noticed(tmp_path: Path) -> None:
    saved(tmp_path / "dense")
    config = {**DATA, "permute": True}
    unfinished(tmp_path / "dense", tmp_path / "sparse", config, 9)
    next((work_folder(tmp_path / "sparse") / "aside").glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"is not there.*--restart"):
        stream.prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", config)


def test_one_run_at_a_time(tmp_path: Path) -> None:
    saved(tmp_path / "dense")
    with working(tmp_path / "sparse", False), pytest.raises(CheckpointError, match="another run is writing"):
        stream.prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", DATA)
    stream.prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", DATA)


def test_an_old_result_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    saved(tmp_path / "dense")
    stream.prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", DATA)
    with pytest.raises(CheckpointError, match="not empty"):
        stream.prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", HALF)
    stream.prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", HALF, overwrite=True)
    assert Report.load(tmp_path / "sparse").config["pattern"] == "unstructured"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "sparse"]
