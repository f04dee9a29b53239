"""Under `accelerate launch`, with two real processes: masks hold, processes agree, and it is what one process does."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import merge_fsdp_weights
from models import mixtral, phi3
from processes import trainings
from processes.trainings import BATCH, SAVED_AT, STEPS, Result
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import hf_sparse
from trainer_callbacks.keep_masks import KeepMasks

pytestmark = pytest.mark.slow  # each launch imports everything twice

ROOT = Path(__file__).parents[1]
LONGEST = 240  # seconds for one launch
PLAIN = (
    "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0",
)  # fmt: skip
SEVERAL = ("--multi_gpu",)  # accelerate's word for several processes on one machine; its --cpu starts them by MPI only
FSDP = (
    "--use_fsdp", "--fsdp_version=2", "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP", "--fsdp_state_dict_type=FULL_STATE_DICT",
)  # fmt: skip
PRINTED = 12_000  # characters at the end of what a script printed, shown where it failed

SPARSE: dict[str, Callable[[], nn.Module]] = {
    "llama": trainings.sparse,
    "uneven": trainings.uneven,
    "phi3": lambda: trainings.sparse(phi3),
    "mixtral": lambda: trainings.sparse(mixtral),
}


# ------------------------------------------------------------------------------------------------ launches


class Launch(NamedTuple):
    folder: Path
    printed: str

    def told(self, phase: str) -> tuple[Result, Result]:
        """What the two processes found in a phase of the script."""
        if not (self.folder / f"{phase}-1.json").exists():
            pytest.fail(f"the launched script did not get through {phase!r}:\n{self.printed[-PRINTED:]}")
        return trainings.told(self.folder, phase, 0), trainings.told(self.folder, phase, 1)


def launch(script: str, folder: Path, *flags: str) -> Launch:
    """Run a script of tests/processes in two processes."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, *PLAIN]
    command += [str(ROOT / "tests" / "processes" / script), str(folder)]
    with (folder / "printed").open("w") as file:
        started = subprocess.Popen(
            command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            started.wait(timeout=LONGEST)
        except subprocess.TimeoutExpired:
            file.write(f"\nnot done after {LONGEST} s")
        finally:
            end(started)
    return Launch(folder, (folder / "printed").read_text(errors="replace"))


def end(started: subprocess.Popen[bytes]) -> None:
    """Nothing that a launcher started outlives it."""
    if started.poll() is None:
        for process in [*psutil.Process(started.pid).children(recursive=True), started]:
            process.kill()
        started.wait()


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    folder = tmp_path_factory.mktemp("ddp")
    for name in ("uneven", "phi3", "mixtral"):
        SPARSE[name]().save_pretrained(folder / f"sparse-{name}")
    return launch("ddp.py", folder, *SEVERAL)


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return launch("fsdp.py", tmp_path_factory.mktemp("fsdp"), *FSDP)


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    if find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    return launch("zero.py", tmp_path_factory.mktemp("zero"), *SEVERAL)


@pytest.fixture
def launched(request: pytest.FixtureRequest) -> Callable[[str, str], tuple[Result, Result]]:
    return lambda script, phase: request.getfixturevalue(script).told(phase)


# ------------------------------------------------------------------------------------------------ one process


@pytest.fixture(scope="module", autouse=True)
def accelerate_forgets() -> Iterator[None]:
    """It keeps for the whole process how it was first called, and these trainings call it for a CPU."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def loop(folder: Path) -> Result:
    AcceleratorState._reset_state(reset_partial_state=True)
    return trainings.loop(folder, Accelerator(cpu=True))


def keeping(name: str) -> Callable[[Path], Result]:
    return lambda folder: trainings.train(folder, SPARSE[name](), [KeepMasks()], save_strategy="steps")


ALONE: dict[str, Callable[[Path], Result]] = {
    **{name: keeping(name) for name in SPARSE},
    "sparsify_magnitude": lambda folder: trainings.sparsify(folder, trainings.SPARSE),
    "sparsify_default": lambda folder: trainings.sparsify(folder, trainings.DEFAULT),
    "sparsify_stream": lambda folder: trainings.sparsify(folder, trainings.WANDA, trainings.Stream()),
    "distillation": trainings.distillation,
    "gradual": trainings.gradual,
    "gradual_phi3": lambda folder: trainings.gradual(folder, phi3),
    "loop": loop,
    "steps": lambda folder: trainings.steps(SPARSE["mixtral"](), trainings.rows(padded=False)),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Result, Path]]:
    """The same training in this process, and its folder; each is run once."""
    known: dict[str, tuple[Result, Path]] = {}

    def run(name: str) -> tuple[Result, Path]:
        if name not in known:
            folder = tmp_path_factory.mktemp("alone")
            known[name] = (ALONE[name](folder), folder)
        return known[name]

    return run


# ------------------------------------------------------------------------------------------------ what holds in all of them

# Script, its phase, the training in one process that it has to equal.
CASES = [
    ("ddp", "keep_masks", "llama"),
    ("ddp", "sparsify_magnitude", "sparsify_magnitude"),
    ("ddp", "sparsify_default", "sparsify_default"),
    ("ddp", "sparsify_stream", "sparsify_stream"),
    ("ddp", "distillation", "distillation"),
    ("ddp", "gradual", "gradual"),
    ("ddp", "loop", "loop"),
    ("ddp", "at_load_uneven", "uneven"),
    ("ddp", "at_load_phi3", "phi3"),
    ("ddp", "at_load_mixtral", "mixtral"),
    ("ddp", "tensor_parallel", "steps"),
    ("fsdp", "full", "uneven"),
    ("fsdp", "sharded", "llama"),
    ("fsdp", "phi3", "phi3"),
    ("fsdp", "mixtral", "mixtral"),
    ("fsdp", "large", "phi3"),
    ("fsdp", "distillation", "distillation"),
    ("fsdp", "gradual", "gradual_phi3"),
    ("fsdp", "loop", "loop"),
    ("zero", "stage_1", "llama"),
    ("zero", "stage_2", "llama"),
    ("zero", "mixed", "llama"),
]
MIXED = {"large", "mixed"}  # bfloat16 beside single precision
IN_SHARDS = {"at_load_uneven", "at_load_phi3", "at_load_mixtral"}
FIGURES = ("loss", "eval_loss", "sparsity", "distillation_loss", "task_loss", "block_loss", "share")
Launched = Callable[[str, str], tuple[Result, Result]]
Alone = Callable[[str], tuple[Result, Path]]


def matrices(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: one for name, one in weights.items() if "layers." in name and one.ndim > 1}


def zeros_in(weights: dict[str, torch.Tensor]) -> int:
    return sum(int((one == 0).sum()) for one in matrices(weights).values())


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert set(one) == set(other)
    assert [name for name, tensor in one.items() if not torch.equal(tensor, other[name])] == []


@pytest.mark.parametrize(("script", "phase"), [case[:2] for case in CASES])
def test_zeros_hold_in_every_step_on_each_process(script: str, phase: str, launched: Launched) -> None:
    both = launched(script, phase)
    assert [one["lost"] for one in both] == [[0] * STEPS] * 2


@pytest.mark.parametrize(("script", "phase"), [case[:2] for case in CASES])
def test_processes_end_with_the_same_bits(script: str, phase: str, launched: Launched) -> None:
    one, other = launched(script, phase)
    assert_same_bits(one["weights"], other["weights"])


@pytest.mark.parametrize(("script", "phase", "single"), CASES)
def test_figures_are_those_of_one_process(
    script: str, phase: str, single: str, launched: Launched, alone: Alone
) -> None:
    many, one = launched(script, phase)[0], alone(single)[0]
    rounding = 3e-2 if phase in MIXED else 1e-5
    for name in FIGURES:
        torch.testing.assert_close({name: many.get(name, [])}, {name: one.get(name, [])}, rtol=0, atol=rounding)
    assert len(many["loss"]) == STEPS


@pytest.mark.parametrize(("script", "phase", "single"), CASES)
def test_weights_are_those_of_one_process(
    script: str, phase: str, single: str, launched: Launched, alone: Alone
) -> None:
    many, one = launched(script, phase)[0]["weights"], alone(single)[0]["weights"]
    assert set(many) == set(one)
    if phase not in MIXED:
        # Steps move a weight by up to 2.5e-2. Adam divides by gradients, so where they are small rounding grows.
        torch.testing.assert_close(many, one, rtol=0, atol=1e-3)
    differ = sum(int(((many[name] == 0) != (one[name] == 0)).sum()) for name in matrices(one))
    assert differ <= (1e-3 * zeros_in(one) if "gradual" in single else 0)  # scores that tie but for rounding


@pytest.mark.parametrize(
    ("script", "phase", "way"),
    [("ddp", "keep_masks", "MULTI_CPU"), ("ddp", "loop", "MULTI_CPU"), ("fsdp", "full", "FSDP"), ("fsdp", "sharded", "FSDP"),
     ("fsdp", "large", "FSDP"), ("fsdp", "loop", "FSDP"), ("zero", "stage_1", "DEEPSPEED"), ("zero", "stage_2", "DEEPSPEED")],
)  # fmt: skip
def test_accelerate_did_what_was_asked(script: str, phase: str, way: str, launched: Launched) -> None:
    """It falls back to DDP without a word."""
    assert [one["distributed"] for one in launched(script, phase)] == [way, way]


@pytest.mark.parametrize(
    ("script", "phase", "kind"),
    [("ddp", "keep_masks", "Tensor"), *(("ddp", name, "DTensor") for name in sorted(IN_SHARDS)), ("fsdp", "full", "DTensor"),
     ("fsdp", "sharded", "DTensor"), ("fsdp", "large", "DTensor"), ("fsdp", "gradual", "DTensor")],
)  # fmt: skip
def test_each_process_keeps_its_own_part(script: str, phase: str, kind: str, launched: Launched) -> None:
    one, other = launched(script, phase)
    assert one["kinds"] == other["kinds"] == [kind]
    if phase != "gradual":  # which begins without zeros
        zeros = zeros_in(one["weights"])
        assert (one["zeros"] + other["zeros"] if kind == "DTensor" else one["zeros"]) == zeros
        assert 0 < other["zeros"] <= zeros


# ------------------------------------------------------------------------------------------------ checkpoints

CHECKPOINTS = [
    ("ddp", "keep_masks", "llama"),
    ("ddp", "at_load_uneven", "uneven"),
    ("ddp", "at_load_mixtral", "mixtral"),
    ("fsdp", "full", "uneven"),
    ("zero", "stage_1", "llama"),
    ("zero", "mixed", "llama"),
]
ENDS = [("fsdp", "phi3", "phi3"), ("fsdp", "mixtral", "mixtral"), ("fsdp", "large", "phi3")]


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    ("script", "phase", "name", "saved"),
    [(*case, saved) for case in CHECKPOINTS for saved in (f"checkpoint-{SAVED_AT}", f"checkpoint-{STEPS}", "final")]
    + [(*case, "final") for case in ENDS],
)
def test_what_is_saved_has_all_zeros_and_says_so(
    script: str, phase: str, name: str, saved: str, launched: Launched, request: pytest.FixtureRequest
) -> None:
    launched(script, phase)
    model = loaded(request.getfixturevalue(script).folder / phase / saved)
    before = SPARSE[name]()
    zeros = {key: one == 0 for key, one in matrices(dict(before.named_parameters())).items()}
    live = dict(model.named_parameters())
    assert [key for key, mask in zeros.items() if live[key][mask].count_nonzero()] == []
    claim = model.config.hf_sparse
    if "totals" in claim or phase not in IN_SHARDS:  # there one process saves, and may not know what it does not hold
        assert claim["totals"]["zeros"] == hf_sparse.report(before).zeros


@pytest.mark.parametrize(
    ("script", "phase", "saved"),
    [(script, phase, saved) for script, phase, _ in CHECKPOINTS for saved in (f"checkpoint-{STEPS}", "final")]
    + [(script, phase, "final") for script, phase, _ in ENDS],
)
def test_last_checkpoint_holds_the_weights_of_the_end(
    script: str, phase: str, saved: str, launched: Launched, request: pytest.FixtureRequest
) -> None:
    weights = launched(script, phase)[0]["weights"]
    model = loaded(request.getfixturevalue(script).folder / phase / saved)
    assert_same_bits({name: one.detach() for name, one in model.named_parameters()}, weights)


@pytest.mark.parametrize(("script", "phase", "name"), CHECKPOINTS)
def test_report_counts_all_processes(
    script: str, phase: str, name: str, launched: Launched, alone: Alone, request: pytest.FixtureRequest
) -> None:
    launched(script, phase)
    folder = request.getfixturevalue(script).folder / phase
    tokens = []
    for place, step in ((f"checkpoint-{SAVED_AT}", SAVED_AT), (f"checkpoint-{STEPS}", STEPS), ("final", STEPS)):
        (many,) = hf_sparse.report(loaded(folder / place)).recoveries
        (one,) = hf_sparse.report(loaded(alone(name)[1] / place)).recoveries
        assert (many.steps, many.sequences, many.batch_size, many.processes) == (step, step * BATCH, BATCH, 2)
        assert (many.zeros_before, many.zeros_after, many.size, many.zeros_lost) == (
            one.zeros_before,
            one.zeros_after,
            one.size,
            0,
        )
        tokens.append((many.tokens, one.tokens))
    assert all(many == one for many, one in tokens)
    assert tokens[-1][0] == sum(int(row["attention_mask"].sum()) for row in trainings.rows())


def test_shards_merge_into_a_model_with_all_zeros(fsdp: Launch, tmp_path: Path) -> None:
    """Of a training with sharded state dicts the Trainer saves shards only; `accelerate merge-weights` makes one file of them."""
    weights = fsdp.told("sharded")[0]["weights"]
    merge_fsdp_weights(str(fsdp.folder / "sharded" / f"checkpoint-{STEPS}" / "pytorch_model_fsdp_0"), str(tmp_path))
    assert_same_bits(load_file(tmp_path / "model.safetensors"), weights)
    assert zeros_in(weights) == hf_sparse.report(SPARSE["llama"]()).zeros


# ------------------------------------------------------------------------------------------------ resumption


@pytest.mark.parametrize(
    ("script", "phase", "resumed"),
    [("ddp", "keep_masks", "resumed"), ("ddp", "sparsify_default", "sparsify_resumed"), ("ddp", "gradual", "gradual_resumed"),
     ("fsdp", "full", "full_resumed"), ("fsdp", "sharded", "sharded_resumed"), ("fsdp", "gradual", "gradual_resumed"),
     ("zero", "stage_1", "stage_1_resumed"), ("zero", "stage_2", "stage_2_resumed")],
)  # fmt: skip
def test_a_resumed_training_ends_where_the_other_did(script: str, phase: str, resumed: str, launched: Launched) -> None:
    for straight, stopped in zip(launched(script, phase), launched(script, resumed)):
        if phase != "gradual":  # whose masks still move
            assert stopped["lost"] == [0] * (STEPS - SAVED_AT)
        assert_same_bits(stopped["weights"], straight["weights"])


@pytest.mark.parametrize(
    ("script", "phase"),
    [("ddp", "resumed"), ("ddp", "sparsify_resumed"), ("fsdp", "full_resumed"), ("zero", "stage_2_resumed")],
)
def test_the_account_goes_on(script: str, phase: str, launched: Launched, request: pytest.FixtureRequest) -> None:
    launched(script, phase)
    (entry,) = hf_sparse.report(loaded(request.getfixturevalue(script).folder / phase / "final")).recoveries
    assert entry.steps == STEPS
    assert entry.tokens == sum(int(row["attention_mask"].sum()) for row in trainings.rows())


# ------------------------------------------------------------------------------------------------ callback by callback


@pytest.mark.parametrize(("script", "phase"), [("ddp", "gradual"), ("fsdp", "gradual")])
def test_gradual_pruning_meets_its_target(script: str, phase: str, launched: Launched) -> None:
    one = launched(script, phase)[0]
    for name, weight in matrices(one["weights"]).items():
        assert ((weight.unflatten(1, (-1, 4)) == 0).sum(-1) == 2).all(), name
    assert one["sparsity"][0] < one["sparsity"][1] < one["sparsity"][-1] == 0.5


def test_sparsify_calibrates_on_what_one_process_would(ddp: Launch, alone: Alone) -> None:
    """Process 0 reads the samples for all: of a stream each process would see other rows."""
    ddp.told("sparsify_stream")
    many, one = loaded(ddp.folder / "sparsify_stream" / "final"), loaded(alone("sparsify_stream")[1] / "final")
    left, right = hf_sparse.report(many).calibration, hf_sparse.report(one).calibration
    assert left.pop("batch_size") * 2 == left["samples"]  # each process has a batch
    right.pop("batch_size")
    assert left == right
    assert left["samples"] == STEPS * BATCH


@pytest.mark.parametrize(
    ("script", "phase", "words"),
    [("fsdp", "dense", ("in shards", "before the Trainer is made", "KeepMasks")), ("fsdp", "flat", ("first version of FSDP", "fsdp_version")),
     ("zero", "dense", ("DeepSpeed", "before the Trainer is made", "KeepMasks")), ("zero", "stage_3", ("stage 3", "stage 1 or 2"))],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused_by_all_processes(
    script: str, phase: str, words: tuple[str, ...], launched: Launched
) -> None:
    one, other = launched(script, phase)
    assert (one["error"], one["message"]) == (other["error"], other["message"])
    assert one["error"] == "ModelError"
    assert [word for word in words if word not in one["message"]] == []


@pytest.mark.parametrize("phase", ["stage_1", "stage_2"])
def test_zero_to_fp32_finds_the_zeros(phase: str, zero: Launch) -> None:
    weights = zero.told(f"{phase}_converted")[0]["weights"]
    assert_same_bits(weights, zero.told(phase)[0]["weights"])
