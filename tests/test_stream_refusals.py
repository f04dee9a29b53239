"""What `prune_checkpoint` refuses, before any work, with nothing left behind; and the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import llama, text, token_rows, tokenizer
from safetensors.torch import load_file, save_file

from hf_sparse import PredictorConfig, SparsityConfig, prune_, stream
from hf_sparse.cli import main
from hf_sparse.errors import CalibrationError, CheckpointError, ConfigError, HfSparseError, ModelError
from hf_sparse.streaming.journal import Journal

ROWS = token_rows()
DATA = {"calibration": ROWS, "num_samples": len(ROWS), "update": "none"}

pytestmark = pytest.mark.usefixtures("no_pictures", "no_syncs")


def refused(tmp_path: Path, kind: type[HfSparseError], message: str, config: Any = DATA, **options: Any) -> None:
    with pytest.raises(kind, match=message):
        stream.prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", config, **options)
    assert [path.name for path in tmp_path.iterdir() if path.name != "dense"] == []


def test_bad_arguments(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "dense")
    refused(tmp_path, ConfigError, "sparse_format 'zip' does not exist", sparse_format="zip")
    refused(tmp_path, ConfigError, "hidden_memory is 'much'", hidden_memory="much")
    refused(tmp_path, CalibrationError, "needs calibration", {"metric": "dass"})
    refused(
        tmp_path,
        ConfigError,
        "predictors are trained on a whole model",
        SparsityConfig(**DATA, predictor=PredictorConfig()),
    )


def test_bad_sources(tmp_path: Path) -> None:
    refused(tmp_path, CheckpointError, "no folder here")
    model = llama()
    (tmp_path / "dense").mkdir()
    model.config.save_pretrained(tmp_path / "dense")
    torch.save(model.state_dict(), tmp_path / "dense" / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        stream.prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", DATA)
    model.save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    whole = load_file(file)
    lacking = {name: value for name, value in whole.items() if "1.mlp.up" not in name}
    save_file(lacking, file, {"format": "pt"})
    refused(tmp_path, CheckpointError, "no weights for model.layers.1.mlp.up_proj.weight")
    save_file({**whole, "model.layers.1.mlp.up_proj.weight": torch.zeros(3, 3)}, file, {"format": "pt"})
    refused(tmp_path, CheckpointError, "does not fit its config.json: model.layers.1.mlp.up_proj.weight")
    save_file({**whole, "model.layers.1.mlp.up_proj.weight": torch.full((48, 32), torch.nan)}, file, {"format": "pt"})
    refused(tmp_path, ModelError, "NaN or infinite weights")
    file.write_bytes(file.read_bytes()[:-5])
    refused(tmp_path, CheckpointError, "no safetensors file that can be read")


def test_quantized_weights(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "dense")
    values = json.loads((tmp_path / "dense" / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    (tmp_path / "dense" / "config.json").write_text(json.dumps(values))
    refused(tmp_path, ModelError, "is quantized")


def test_no_room_on_the_disk(tmp_path: Path) -> None:
    import resource

    llama().save_pretrained(tmp_path / "dense")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        refused(tmp_path, CheckpointError, "needs .* bytes on the disk")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


BEGIN = {
    "notes": [],
    "batch_size": 2,
    "orders": {"a": [1, 0]},
    "places": {"a": ["b"]},
    "aside": {"": "outside.safetensors"},
}
BLOCK = {
    "index": 0,
    "name": "a",
    "stack": "",
    "zeros": 1,
    "size": 2,
    "all_matrices": 2,
    "output_error": float("nan"),
    "seconds": 0.5,
}


@pytest.mark.parametrize(
    ("kind", "values", "wrong"),
    [
        ("measured", {"values": {"0": float("inf")}, "notes": []}, [{"values": {"a": 1}}, {"values": {"0": "1"}}, {"notes": 1}]),
        ("begin", BEGIN, [{"orders": {"a": [1, 1]}}, {"orders": [0]}, {"batch_size": 0}, {"aside": {"a": "/etc/a.safetensors"}},
                          {"aside": {"a": "../a.safetensors"}}, {"aside": {"a": 1}}, {"places": {"a": "b"}}]),
        ("block", {"report": {**BLOCK, "sites": []}, "notes": []}, [{"report": BLOCK | {"sites": [1]}}, {"report": 1}, {"report": {}},
                                                                    {"report": {**BLOCK, "sites": [], "zeros": "1"}}]),
        ("score", {"shares": "a", "score": 1.0}, [{"score": None}, {"shares": 1}]),
        ("complete", {"report": "0" * 64}, [{"report": "0"}, {"report": 1}, {"seconds": "1"}]),
    ],
)  # fmt: skip
def test_damaged_entries(kind: str, values: dict[str, Any], wrong: list[dict[str, Any]], tmp_path: Path) -> None:
    file = tmp_path / "journal"
    start = json.dumps({"kind": "start"})
    for other in ({}, *wrong, *({name: ...} for name in values)):
        entry = {name: value for name, value in {"kind": kind, **values, **other}.items() if value is not ...}
        file.write_text(f"{start}\n{json.dumps(entry)}\n")
        if not other:
            Journal(file).close()
            continue
        with pytest.raises(CheckpointError, match=rf"of the kind {kind} does not hold.* \(--restart\)"):
            Journal(file)


def test_a_damaged_journal(tmp_path: Path) -> None:
    for content, why in (
        (b"[]\n", "nothing that is known"),
        (b'{"kind": []}\n', "nothing that is known"),
        (b"{\n", "no JSON"),
        (b'{"kind":"complete","report":"%s"}\n' % (b"0" * 64), "does not tell what was begun"),
    ):
        (tmp_path / "journal").write_bytes(content)
        with pytest.raises(CheckpointError, match=why):
            Journal(tmp_path / "journal")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "text.txt").write_text(text(400))
    words = ["prune", str(tmp_path / "dense"), str(tmp_path / "sparse"), "--pattern", "2:4", "--calibration", str(tmp_path / "text.txt"),
             "--update", "none", "--num-samples", "4", "--sequence-length", "16"]  # fmt: skip
    assert main([*words, "--stream", "--evaluate", str(tmp_path / "text.txt"), "--allow-same-text"]) == 1
    assert "--evaluate needs the whole model" in capsys.readouterr().err
    assert main([*words, "--restart"]) == 1
    assert "belong to --stream" in capsys.readouterr().err
    assert main([*words, "--stream", "--json", "--sparse-format", "bitmask", "--hidden-memory", "1MB"]) == 0
    told = json.loads(capsys.readouterr().out)
    words[2] = str(tmp_path / "memory")
    assert main([*words, "--sparse-format", "bitmask"]) == 0
    one, two = (type(model).from_pretrained(tmp_path / name).state_dict() for name in ("sparse", "memory"))
    assert all(torch.equal(one[name], two[name]) for name in two)
    names = {path.name for path in (tmp_path / "sparse").iterdir() if "safetensors" not in path.name}
    assert names == {path.name for path in (tmp_path / "memory").iterdir() if "safetensors" not in path.name}
    assert told["report"]["calibration"]["samples"] == 4
    card = (tmp_path / "sparse" / "README.md").read_text()
    assert "hf_sparse" in card


def test_earlier_prunings_are_carried_over(tmp_path: Path) -> None:
    model = llama()
    prune_(model, {**DATA, "targets": "mlp", "permute": True})
    model.save_pretrained(tmp_path / "dense")
    config = {**DATA, "targets": "attention", "permute": True}
    found = stream.prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", config)
    again = type(model).from_pretrained(tmp_path / "dense")
    wanted = prune_(again, config)
    assert found.notes == wanted.notes
    assert found.permutations == wanted.permutations
    assert found.zeros == wanted.zeros


# ---------------------------------------------------------------------------------------------------- where it writes


def listed(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_places_that_cannot_be(tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    llama().save_pretrained(dense)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "link").symlink_to(dense)
    before = listed(tmp_path)
    for source, place, why in (
        (dense, dense, "never written to"),
        (dense, dense / "inner", "never written to"),
        (dense, tmp_path / "link" / "inner", "never written to"),
        (tmp_path / "link", dense / "inner", "never written to"),
        (dense, tmp_path / "file" / "x", "cannot be made in"),
        (dense, tmp_path / "nowhere" / "x", "cannot be made in"),
        (dense, Path("/"), "would be lost"),
        (tmp_path / "nope", tmp_path / "y" / "x", "no folder here"),
    ):
        with pytest.raises(CheckpointError, match=why):
            stream.prune_checkpoint(source, place, DATA, overwrite=True)
        assert listed(tmp_path) == before


def test_what_it_reads_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama().save_pretrained(tmp_path / "dense")
    sparse = tmp_path / "sparse"
    sparse.mkdir()
    for name, content in {"config.json": "{}", "text.txt": text(40), "fields.json": '{"metric": "magnitude"}'}.items():
        (sparse / name).write_text(content)
    for config in ({**DATA, "calibration": str(sparse / "text.txt")}, sparse / "fields.json"):
        with pytest.raises(CheckpointError, match="would be lost"):
            stream.prune_checkpoint(tmp_path / "dense", sparse, config, overwrite=True)
    words = ["prune", str(tmp_path / "dense"), str(sparse), "--stream", "--overwrite"]
    assert main([*words, "--config", str(sparse / "fields.json")]) == 1
    assert "would be lost" in capsys.readouterr().err
    assert listed(tmp_path) == ["dense", *(f"dense/{name}" for name in listed(tmp_path / "dense")), "sparse",
                                "sparse/config.json", "sparse/fields.json", "sparse/text.txt"]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- what it reads


def test_a_model_with_predictors(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "hf_sparse_predictors.safetensors").write_bytes(b"")
    refused(tmp_path, ConfigError, "carries predictors")
    (tmp_path / "dense" / "hf_sparse_predictors.safetensors").unlink()
    values = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(json.dumps({**values, "hf_sparse_predictors": {"kind": "shadow"}}))
    refused(tmp_path, ConfigError, "carries predictors")


def test_weights_in_folders_of_their_own(tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    llama().save_pretrained(dense)
    names = sorted(whole := load_file(dense / "model.safetensors"))
    (dense / "model.safetensors").unlink()
    places = {name: "ab"[number % 2] + "/w.safetensors" for number, name in enumerate(names)}
    for place in set(places.values()):
        (dense / place).parent.mkdir()
        save_file({name: whole[name] for name in names if places[name] == place}, dense / place, {"format": "pt"})
    (dense / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    refused(tmp_path, CheckpointError, "w.safetensors', which is not beside config.json")


def test_a_config_that_is_nested_too_deeply(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text("[" * 100000)
    refused(tmp_path, CheckpointError, "not valid JSON")
    words = ["prune", str(tmp_path / "dense"), str(tmp_path / "sparse"), "--stream", "--metric", "magnitude"]
    assert main([*words, "--update", "none"]) == 1
    assert "not valid JSON" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "size"), [("4000000000", 4 * 10**9), ("0", 0), ("4GB", 4 * 10**9), (7, 7)])
def test_sizes(given: int | str, size: int) -> None:
    assert stream.hidden_bytes(given) == size
