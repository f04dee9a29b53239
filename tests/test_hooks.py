"""from_pretrained(..., sparsity_config=...) prunes, saving keeps what is known, and nothing else changes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hub.client import Hub
from huggingface_hub import ModelCard
from models import bert, llama, mixtral, phi3, t5, text, token_rows, tokenizer
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    LlamaForCausalLM,
    PreTrainedModel,
    pipeline,
)

import hf_sparse
from hf_sparse import SparsityConfig, prune_
from hf_sparse.errors import CheckpointError, ConfigError, HfSparseError, HubError

ROOT = Path(__file__).parents[1]
ROWS = token_rows()
MAGNITUDE = {"metric": "magnitude"}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def equal(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


# ------------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize("form", ["object", "dict", "json", "yaml", "folder"])
def test_the_config_may_be_an_object_a_dict_or_a_file(form: str, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "prune.json").write_text('{"metric": "magnitude", "pattern": "1:4"}')
    (tmp_path / "prune.yaml").write_text('metric: magnitude\npattern: "1:4"\n')
    made = SparsityConfig(metric="magnitude", pattern="1:4")
    made.save_pretrained(tmp_path / "folder")
    given: Any = {
        "object": made,
        "dict": made.to_dict(),
        "json": tmp_path / "prune.json",
        "yaml": str(tmp_path / "prune.yaml"),
        "folder": tmp_path / "folder",
    }[form]
    model = AutoModelForCausalLM.from_pretrained(saved, sparsity_config=given)
    report = hf_sparse.report(model)
    assert report is not None
    assert report.sparsity == 0.75


@pytest.mark.parametrize("load", [AutoModelForCausalLM, AutoModel, LlamaForCausalLM])
def test_every_class_that_loads_prunes(load: Any, saved: Path) -> None:
    assert hf_sparse.report(load.from_pretrained(saved, sparsity_config=MAGNITUDE)).sparsity == 0.5


@pytest.mark.parametrize(
    ("make", "load"), [(bert, AutoModelForMaskedLM), (t5, AutoModelForSeq2SeqLM), (mixtral, AutoModelForCausalLM)]
)
def test_other_architectures(make: Any, load: Any, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    assert hf_sparse.is_sparse(load.from_pretrained(tmp_path, sparsity_config={"calibration": ROWS, "num_samples": 8}))


def test_a_pipeline_passes_the_config_on(saved: Path) -> None:
    made = pipeline("text-generation", str(saved), model_kwargs={"sparsity_config": MAGNITUDE})
    assert hf_sparse.is_sparse(made.model)


def test_output_loading_info_still_gives_a_pair(saved: Path) -> None:
    model, information = LlamaForCausalLM.from_pretrained(saved, sparsity_config=MAGNITUDE, output_loading_info=True)
    assert hf_sparse.is_sparse(model)
    assert not information["missing_keys"]


def test_text_is_tokenised_with_the_tokenizer_of_the_same_path(saved: Path) -> None:
    given = {"calibration": [text(300)], "num_samples": 4, "sequence_length": 16}
    assert (
        hf_sparse.report(AutoModelForCausalLM.from_pretrained(saved, sparsity_config=given)).calibration["samples"] == 4
    )


@pytest.mark.parametrize("as_dict", [True, False])
def test_a_generator_in_calibration_is_not_copied(as_dict: bool, saved: Path) -> None:
    rows = (row for row in ROWS)
    given: Any = {"metric": "wanda", "calibration": rows, "num_samples": 8}
    model = AutoModelForCausalLM.from_pretrained(saved, sparsity_config=given if as_dict else SparsityConfig(**given))
    assert hf_sparse.is_sparse(model)
    assert next(rows, None) is None


def test_nothing_changes_for_models_loaded_without_it(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert equal(model, llama())
    assert not hf_sparse.is_sparse(model)
    assert hf_sparse.report(model) is None
    model.save_pretrained(saved / "again")
    assert sorted(path.name for path in (saved / "again").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert "hf_sparse" not in (saved / "again" / "config.json").read_text()


def test_a_key_of_the_same_name_in_config_json_does_not_swallow_the_argument(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "sparsity_config": {}}))
    model = AutoModelForCausalLM.from_pretrained(saved, sparsity_config=MAGNITUDE)
    assert hf_sparse.report(model).sparsity == 0.5


def test_with_a_quantization_config_it_is_refused_before_loading(saved: Path) -> None:
    with pytest.raises(ConfigError, match="prune first"):
        AutoModelForCausalLM.from_pretrained(
            saved / "absent", sparsity_config=MAGNITUDE, quantization_config={"quant_method": "x"}
        )


@pytest.mark.parametrize("bad", [{"metric": "wnda"}, {"pattern": "5:4"}, {"metric": "wanda"}, 7, "absent.json"])
def test_a_bad_config_is_refused_before_loading(bad: Any, saved: Path) -> None:
    with pytest.raises(HfSparseError):
        AutoModelForCausalLM.from_pretrained(saved / "absent", sparsity_config=bad)


def test_threads_with_and_without_the_argument_do_not_disturb_each_other(saved: Path) -> None:
    # In a process of its own: loading in several threads at once is known to leave traces in Transformers itself.
    code = f"""
import threading, torch, hf_sparse
from transformers import LlamaForCausalLM
rows, found = torch.randint(3, 64, (8, 16)), {{}}
def load(number):
    given = {{"sparsity_config": {{"metric": "wanda", "calibration": rows, "num_samples": 8}}}} if number % 2 else {{}}
    found[number] = hf_sparse.is_sparse(LlamaForCausalLM.from_pretrained({str(saved)!r}, **given))
threads = [threading.Thread(target=load, args=(number,)) for number in range(6)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(found == {{number: bool(number % 2) for number in range(6)}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.strip() == "True", done.stderr


def test_remote_code(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\n\nclass OwnModel(LlamaForCausalLM):\n    pass\n"
    )
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnModel"}
    (saved / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True, sparsity_config=MAGNITUDE)
    assert type(model).__name__ == "OwnModel"
    assert hf_sparse.report(model).sparsity == 0.5


# ------------------------------------------------------------------------------------------------ in and out


def test_uninstall_restores_the_original_and_install_is_idempotent(saved: Path) -> None:
    code = f"""
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
before = [PreTrainedModel.__dict__["from_pretrained"], PreTrainedModel.__dict__["save_pretrained"], AutoModelForCausalLM.__dict__.get("from_pretrained")]
import hf_sparse
hf_sparse.install(); hf_sparse.install()
ours = PreTrainedModel.__dict__["from_pretrained"]
assert ours is not before[0]
hf_sparse.uninstall()
assert before == [PreTrainedModel.__dict__["from_pretrained"], PreTrainedModel.__dict__["save_pretrained"], AutoModelForCausalLM.__dict__.get("from_pretrained")]
for load in (AutoModelForCausalLM, LlamaForCausalLM):
    try:
        load.from_pretrained({str(saved)!r}, sparsity_config={{"metric": "magnitude"}})
    except TypeError:
        pass
    else:
        raise SystemExit("the stock error did not come back")
hf_sparse.install()
assert hf_sparse.is_sparse(AutoModelForCausalLM.from_pretrained({str(saved)!r}, sparsity_config={{"metric": "magnitude"}}))
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.strip() == "fine", done.stderr


def test_another_wrapper_on_top_survives_uninstall(saved: Path) -> None:
    ours = PreTrainedModel.__dict__["from_pretrained"]
    seen: list[str] = []

    def theirs(cls: type, *args: Any, **kwargs: Any) -> Any:
        seen.append("theirs")
        return ours.__func__(cls, *args, **kwargs)

    PreTrainedModel.from_pretrained = classmethod(theirs)
    try:
        hf_sparse.uninstall()
        assert not hf_sparse.is_sparse(LlamaForCausalLM.from_pretrained(saved))
        with pytest.raises(TypeError):
            LlamaForCausalLM.from_pretrained(saved, sparsity_config=MAGNITUDE)
        assert seen == ["theirs", "theirs"]
        hf_sparse.install()
        assert hf_sparse.is_sparse(LlamaForCausalLM.from_pretrained(saved, sparsity_config=MAGNITUDE))
    finally:
        PreTrainedModel.from_pretrained = ours
        hf_sparse.install()


# ------------------------------------------------------------------------------------------------ saving


@pytest.mark.parametrize("make", [llama, mixtral, phi3, bert, t5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_saved_models_reload_bit_equal(make: Any, dtype: torch.dtype, shard: str, tmp_path: Path) -> None:
    model = make().to(dtype)
    hf_sparse.prune_(model, {"metric": "magnitude", "pattern": "1:4"})
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    again = type(model).from_pretrained(tmp_path, dtype=dtype)
    assert equal(model, again)
    report = hf_sparse.report(again)
    assert report is not None
    assert report.to_dict() == hf_sparse.report(model).to_dict()
    assert again.config.hf_sparse["config"] == SparsityConfig(metric="magnitude", pattern="1:4").resolved().to_dict()
    assert again.config.hf_sparse["totals"]["sparsity"] == 0.75


def test_saved_models_load_without_hf_sparse(tmp_path: Path) -> None:
    model = llama()
    hf_sparse.prune_(model, MAGNITUDE)
    model.save_pretrained(tmp_path)
    torch.save({}, tmp_path / "unused")
    code = f"""
import sys
from transformers import AutoModelForCausalLM
model, information = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, output_loading_info=True)
assert "hf_sparse" not in sys.modules
assert not any(information[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), information
print(sum(int((value == 0).sum()) for value in model.state_dict().values()))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == str(hf_sparse.report(model).zeros), done.stderr


def test_the_claim_is_recounted_at_every_save(tmp_path: Path) -> None:
    model = llama()
    report = hf_sparse.prune_(model, MAGNITUDE)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(1.0)
    model.save_pretrained(tmp_path)
    lost = model.model.layers[0].mlp.up_proj.weight.numel() // 2
    claim = json.loads((tmp_path / "config.json").read_text())["hf_sparse"]
    assert claim["totals"]["zeros"] == report.zeros - lost
    assert "differ" in (tmp_path / "README.md").read_text() or str(report.zeros - lost) in (
        tmp_path / "README.md"
    ).read_text().replace(",", "")


def test_side_files_and_masks(tmp_path: Path) -> None:
    model = llama()
    hf_sparse.prune_(model, MAGNITUDE)
    model.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors", "hf_sparse_report.json", "README.md", "hf_sparse_report.png"} <= {
        path.name for path in tmp_path.iterdir()
    }
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    before, after = hf_sparse.masks(model), hf_sparse.masks(again)
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sum(int((~mask).sum()) for mask in before.values()) == hf_sparse.report(model).zeros


def test_a_persons_readme_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    model = llama()
    hf_sparse.prune_(model, MAGNITUDE)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("limit", ["5GB", "20KB"])
@pytest.mark.parametrize("fails_at", [1, 3])
def test_a_save_that_breaks_off_brings_the_old_model_back(
    limit: str, fails_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama(layers=1).save_pretrained(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    model = llama(layers=1)
    hf_sparse.prune_(model, MAGNITUDE)
    _full_disk(monkeypatch, fails_at if limit == "20KB" else 1)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(tmp_path, max_shard_size=limit)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert equal(again, llama(layers=1))
    assert not hf_sparse.is_sparse(again)
    assert set(before) <= {path.name for path in tmp_path.iterdir()}


def test_a_save_that_breaks_off_in_a_new_folder_leaves_nothing_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    hf_sparse.prune_(model, MAGNITUDE)
    _full_disk(monkeypatch, 2)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(tmp_path, max_shard_size="20KB")
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_killed_while_saving_over_an_old_model_nothing_loads_and_nothing_is_lost(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    code = f"""
import os, signal, sys, transformers.modeling_utils as m
sys.path.insert(0, "tests")
from models import llama
import hf_sparse
model = llama()
hf_sparse.prune_(model, {{"metric": "magnitude"}})
m.safe_save_file = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
model.save_pretrained({str(tmp_path)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (tmp_path / ".hf_sparse_old-model.safetensors").is_file()


def _full_disk(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    import transformers.modeling_utils as saving

    original, calls = saving.safe_save_file, []

    def full(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) >= at:
            raise OSError(28, "No space left on device")
        original(*args, **kwargs)

    monkeypatch.setattr(saving, "safe_save_file", full)


def test_saving_touches_no_other_files(tmp_path: Path) -> None:
    model = llama()
    hf_sparse.prune_(model, MAGNITUDE)
    model.save_pretrained(tmp_path)
    for name in ("model_ema.safetensors", "model-backup.safetensors", "models.safetensors"):
        (tmp_path / name).write_text("mine")
    model.save_pretrained(tmp_path, variant="fp16")
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    with pytest.raises(ValueError, match="bogus"):
        model.save_pretrained(tmp_path, max_shard_size="bogus")
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    assert {"model_ema.safetensors", "model-backup.safetensors", "models.safetensors"} <= {
        p.name for p in tmp_path.iterdir()
    }


def test_saving_an_adapter_beside_the_model_keeps_the_model(tmp_path: Path) -> None:
    from peft import LoraConfig

    model = llama()
    hf_sparse.prune_(model, MAGNITUDE)
    model.save_pretrained(tmp_path)
    adapted = AutoModelForCausalLM.from_pretrained(tmp_path)
    adapted.add_adapter(LoraConfig(target_modules=["q_proj"], r=2))
    adapted.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / name).unlink()
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_a_given_state_dict_is_what_is_counted(tmp_path: Path) -> None:
    model = llama()
    hf_sparse.prune_(model, MAGNITUDE)
    model.save_pretrained(tmp_path, state_dict=llama().state_dict())
    assert json.loads((tmp_path / "config.json").read_text())["hf_sparse"]["totals"]["zeros"] == 0


def test_a_model_made_from_the_config_of_a_sparse_one_is_not_sparse() -> None:
    model = llama()
    hf_sparse.prune_(model, MAGNITUDE)
    assert not hf_sparse.is_sparse(AutoModelForCausalLM.from_config(model.config))


def test_masks_without_the_report_are_those_of_the_targets(tmp_path: Path) -> None:
    model = llama()
    hf_sparse.prune_(model, {**MAGNITUDE, "targets": "mlp"})
    model.save_pretrained(tmp_path)
    (tmp_path / "hf_sparse_report.json").unlink()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert set(hf_sparse.masks(again)) == set(hf_sparse.masks(model))


@pytest.mark.parametrize("broken", ["{", "[]", '{"blocks": 3}'])
def test_a_damaged_report_gives_a_clear_error(broken: str, tmp_path: Path) -> None:
    model = llama()
    hf_sparse.prune_(model, MAGNITUDE)
    model.save_pretrained(tmp_path)
    (tmp_path / "hf_sparse_report.json").write_text(broken)
    with pytest.raises(CheckpointError):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    model = llama()
    hf_sparse.prune_(model, MAGNITUDE)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["hf_sparse"]["format"] = 99
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="format 99"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'bitmask'"):
        llama().save_pretrained("anywhere", sparse_format="bitmap")


# ---------------------------------------------------------------------------------------------------- pushing while saving


def test_what_is_saved_stays_when_its_push_fails(hub: Hub, tmp_path: Path) -> None:
    model = llama()
    prune_(model, SparsityConfig(pattern="2:4", metric="magnitude"))
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    hub.fault("POST", "/commit/", status=403, times=None)
    with pytest.raises(HubError, match="403"):
        model.save_pretrained(tmp_path, push_to_hub=True, repo_id="user/sparse")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".hf_sparse")]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight)
    assert set(hf_sparse.report(loaded).files) == {"config.json", "model.safetensors"}


def test_a_base_in_a_folder_is_no_repository_seen_from_elsewhere(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.edit("somebody/base", "README.md", "---\nlicense: mit\n---\n# A stranger's\n")
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained("somebody/base")
    model = AutoModelForCausalLM.from_pretrained("somebody/base", sparsity_config=MAGNITUDE)
    monkeypatch.chdir("/")
    model.push_to_hub("user/sparse")
    data = ModelCard(hub.files("user/sparse")["README.md"].decode()).data
    assert data.base_model is None
    assert data.license is None


def test_what_was_inherited_stays_while_the_base_is_out_of_reach(hub: Hub, tmp_path: Path) -> None:
    llama().push_to_hub("user/base")
    hub.edit("user/base", "README.md", "---\nlicense: mit\nlanguage: en\n---\n# Base\n")
    model = AutoModelForCausalLM.from_pretrained("user/base", sparsity_config=MAGNITUDE)
    model.push_to_hub("user/sparse")
    hub.fault("GET", "user/base", status=503, times=None)
    model.push_to_hub("user/sparse")
    data = ModelCard(hub.files("user/sparse")["README.md"].decode()).data
    assert (data.base_model, data.license, data.language) == ("user/base", "mit", "en")


def test_a_tag_of_the_model_that_a_person_took_away_stays_away(hub: Hub) -> None:
    model = llama()
    prune_(model, MAGNITUDE)
    model.add_model_tags(["mine", "ours"])
    model.push_to_hub("user/sparse")
    readme = hub.files("user/sparse")["README.md"].decode()
    assert {"mine", "ours", "hf_sparse"} <= set(ModelCard(readme).data.tags)
    hub.edit("user/sparse", "README.md", readme.replace("- mine\n", "", 1))
    reloaded = AutoModelForCausalLM.from_pretrained("user/sparse")
    reloaded.add_model_tags(["ours"])
    reloaded.push_to_hub("user/sparse")
    assert "mine" not in ModelCard(hub.files("user/sparse")["README.md"].decode()).data.tags


@pytest.mark.parametrize("make", [bert, llama])
def test_a_tokenizer_that_transformers_makes_up_is_none(make: Any, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    load = AutoModelForMaskedLM if make is bert else AutoModelForCausalLM
    with pytest.raises(HfSparseError, match="text needs a tokenizer"):
        load.from_pretrained(tmp_path, sparsity_config={"metric": "wanda", "calibration": ["the cat sat"] * 50})
