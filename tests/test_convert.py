"""`hf-sparse convert`: the same tensors in the other format, shard by shard, with everything that stands beside them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hub.client import Hub
from models import gpt2, llama, mixtral, phi3, tokenizer
from safetensors.torch import load_file, save_file

from hf_sparse import SparsityConfig, prune_
from hf_sparse.cli import main
from hf_sparse.convert import convert
from hf_sparse.errors import CheckpointError, ConfigError
from hf_sparse.storage import open_tensors
from hf_sparse.storage.names import INDEX, WEIGHTS
from hf_sparse.verify import DIFFERS, verify

MODELS: dict[str, Any] = {"llama": llama, "phi3": phi3, "gpt2": gpt2, "mixtral": mixtral}


def saved(folder: Path, name: str = "llama", **given: Any) -> Any:
    model = MODELS[name]()
    prune_(model, SparsityConfig(pattern="2:4", metric="magnitude"))
    model.save_pretrained(folder, **given)
    tokenizer().save_pretrained(folder)
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with open_tensors(sorted(folder.glob("*.safetensors"))) as stored:
        return {name: tensor[...] for name, tensor in stored.items()}


def same(first: Path, second: Path) -> bool:
    one, two = tensors(first), tensors(second)
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def made(destination: Path) -> Path:
    destination.mkdir()
    return destination


@pytest.mark.parametrize("size", ["5GB", "6KB"])
@pytest.mark.parametrize("source_size", ["5GB", "6KB"])
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name: str, source_size: str, size: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "plain", name, max_shard_size=source_size)
    there = convert(tmp_path / "plain", made(tmp_path / "small"), max_shard_size=size)
    assert there.format == "bitmask"
    assert 0 < there.compressed < there.tensors
    assert there.bytes < there.bytes_before
    assert same(tmp_path / "plain", tmp_path / "small")
    back = convert(tmp_path / "small", made(tmp_path / "back"), max_shard_size=size)
    assert (back.format, back.compressed, back.bytes_before) == ("dense", 0, there.bytes)
    assert same(tmp_path / "plain", tmp_path / "back")
    for folder in ("small", "back"):
        loaded = type(model).from_pretrained(tmp_path / folder)
        assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_the_same_files_as_a_compressed_save(tmp_path: Path) -> None:
    model = saved(tmp_path / "plain")
    model.save_pretrained(tmp_path / "saved", sparse_format="bitmask")
    convert(tmp_path / "plain", made(tmp_path / "made"))
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("saved", "made"))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("saved", "made")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize("format", ["bitmask", "dense"])
def test_all_else_goes_along_and_the_report_tells_of_the_new_files(format: str, tmp_path: Path) -> None:
    source = "bitmask" if format == "dense" else "dense"
    saved(tmp_path / "source", sparse_format=source)
    (tmp_path / "source" / "notes.txt").write_text("mine")
    (tmp_path / "source" / "training_args.bin").write_bytes(b"a pickle")
    (tmp_path / "source" / "_code.py").write_text("mine = 1")
    (tmp_path / "source" / "vocab.bin").write_bytes(b"words")
    (tmp_path / "elsewhere").write_text("linked")
    (tmp_path / "source" / "linked.txt").symlink_to(tmp_path / "elsewhere")
    done = convert(tmp_path / "source", made(tmp_path / "made"), format)
    names = {path.name for path in (tmp_path / "made").iterdir()}
    beside = {"tokenizer.json", "notes.txt", "generation_config.json", "README.md", "hf_sparse_report.json"}
    assert beside | {"_code.py", "vocab.bin", "linked.txt"} <= names
    assert done.left_out == ("training_args.bin",)
    assert "training_args.bin" not in names
    assert [row for row in verify(tmp_path / "made").rows if row.status == DIFFERS] == []
    needed = "so hf_sparse is needed to load the model" in (tmp_path / "made" / "README.md").read_text()
    assert needed == (format == "bitmask")


def test_shards_are_no_larger_than_asked_for(tmp_path: Path) -> None:
    saved(tmp_path / "plain")
    done = convert(tmp_path / "plain", made(tmp_path / "small"), max_shard_size=6000)
    assert len(done.files) > 1
    index = json.loads((tmp_path / "small" / INDEX).read_text())
    assert set(index["weight_map"].values()) == set(done.files)
    for name in done.files:
        held = load_file(tmp_path / "small" / name)
        assert (
            sum(tensor.nbytes for tensor in held.values()) <= 6000 or len({key.rpartition("_")[0] for key in held}) == 1
        )


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "the same format": ({"format": "dense"}, ConfigError, "in the format 'dense' already"),
    "no format": ({"format": "bitmap"}, ConfigError, "Did you mean 'bitmask'"),
    "no size": ({"max_shard_size": "large"}, ConfigError, "'large'"),
    "no shards": ({"max_shard_size": 0}, ConfigError, "give bytes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arguments_are_refused(case: str, tmp_path: Path) -> None:
    given, kind, message = REFUSED[case]
    saved(tmp_path / "plain")
    with pytest.raises(kind, match=message):
        convert(tmp_path / "plain", made(tmp_path / "small"), **given)
    assert list((tmp_path / "small").iterdir()) == []


def edited(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: llama().save_pretrained(folder), "nothing to compress"),
        (lambda folder: (folder / "config.json").unlink(), r"no config\.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"no \.safetensors"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter"),
        (lambda folder: edited(folder, quantization_config={"quant_method": "gptq"}), "quantized"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), "cannot be read"),
        (
            lambda folder: save_file({"a_shape": torch.zeros(100, 100)}, folder / "model.safetensors"),
            "ends like a part",
        ),
    ],
)
def test_models_that_cannot_be_converted_are_refused_and_nothing_is_left(
    prepare: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "plain")
    prepare(tmp_path / "plain")
    with pytest.raises((CheckpointError, ConfigError), match=message):
        convert(tmp_path / "plain", made(tmp_path / "small"))
    assert main(["convert", str(tmp_path / "plain"), str(tmp_path / "new")]) == 1
    assert not (tmp_path / "new").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"plain", "small"}


# ---------------------------------------------------------------------------------------------------- the command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "plain")
    assert main(["convert", str(tmp_path / "plain"), str(tmp_path / "small"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["format"], told["files"]) == ("bitmask", [WEIGHTS])
    assert main(["convert", str(tmp_path / "small"), str(tmp_path / "small")]) == 1
    assert "not empty" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "small"), str(tmp_path / "back"), "--to", "dense"]) == 0
    assert "0 of" in capsys.readouterr().out
    assert same(tmp_path / "plain", tmp_path / "back")


def test_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    saved(tmp_path / "plain").push_to_hub("user/plain")
    assert main(["convert", "user/plain", str(tmp_path / "small")]) == 0
    assert same(tmp_path / "plain", tmp_path / "small")


@pytest.mark.parametrize("shards", ["5GB", "6KB"])
def test_what_is_compressed_can_be_looked_into(shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "plain")
    convert(tmp_path / "plain", made(tmp_path / "small"), max_shard_size=shards)
    found = []
    for folder in ("plain", "small"):
        assert main(["inspect", str(tmp_path / folder), "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    for name, told in found[0]["tensors"].items():
        other = found[1]["tensors"][name]
        assert (told["shape"], told["zeros"]) == (other["shape"], other["zeros"])
    assert any(told["compressed"] for told in found[1]["tensors"].values())


def test_a_compressed_repository_is_looked_into_without_its_weights(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved(tmp_path / "plain")
    model.push_to_hub("user/small", sparse_format="bitmask")
    assert main(["inspect", "user/small", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    with open_tensors([tmp_path / "plain" / "model.safetensors"]) as stored:
        assert {name: slice.get_shape() for name, slice in stored.items()} == {
            name: tensor["shape"] for name, tensor in told["tensors"].items()
        }
    kept = {name: tensor["kept"] for name, tensor in told["tensors"].items() if "kept" in tensor}
    assert kept
    assert all(count == int((tensors(tmp_path / "plain")[name] != 0).sum()) for name, count in kept.items())
    assert 200 not in {seen.status for seen in hub.requests(r"GET .*safetensors|GET .*/lfs")}  # parts of the file only
