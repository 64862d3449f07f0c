"""Runs on one process and many, by DDP, FSDP2 and ZeRO: one batch, one gradient, one checkpoint format."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fault_runs import ROOT, Template, lines
from safetensors.torch import load_file

from model import TransnormerConfig, TransnormerForCausalLM
from training.batches import BatchOrder, collate
from training.config import load_config
from training.data import prepare
from training.manifest import list_checkpoints, verify_checkpoint

pytestmark = pytest.mark.faults
STRATEGIES = ["ddp", "fsdp2", "zero2", "zero3"]


@pytest.fixture(scope="module")
def fault_arguments(fault_arguments: list[str]) -> list[str]:
    """With a third group of parameters: decays that are learned at a rate of their own."""
    return [*fault_arguments, "--model.decay=learned", "--optim.learned_decay_lr_scale=5"]


@pytest.fixture(scope="module")
def whole(template: Template, fault_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one process with one micro-batch a step."""
    out = tmp_path_factory.mktemp("whole") / "run"
    workers = template.start([*fault_arguments, f"--out={out}", "--training.micro_batch_size=8"], out.with_name("log"))
    assert workers.wait() == [0], workers.said()
    return out


def check_same_losses(out: Path, whole: Path, ranks: int | None = None) -> None:
    ours, theirs = lines(out / "metrics.jsonl"), lines(whole / "metrics.jsonl")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert (one["batch_sha"], one["lr"], one["tokens"]) == (other["batch_sha"], other["lr"], other["tokens"])
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
        assert ranks is None or one["world_size"] == ranks
    ours, theirs = lines(out / "evaluations.jsonl"), lines(whole / "evaluations.jsonl")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one["validation_loss"] == pytest.approx(other["validation_loss"], abs=1e-5)


def tensors(folder: Path, stem: str) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob(f"{stem}*.safetensors") for name, tensor in load_file(file).items()}


def check_same_tensors(out: Path, whole: Path, step: int) -> None:
    """Check weights and moments against those of a run on one process, which may lie in other files."""
    ours, theirs = (folder / "checkpoints" / f"step_{step:08d}" for folder in (out, whole))
    for place in ("model/model", "optimizer"):
        mine, other = (tensors((folder / place).parent, Path(place).name) for folder in (ours, theirs))
        assert mine.keys() == other.keys()
        for name in mine:
            assert torch.allclose(mine[name], other[name], rtol=1e-4, atol=2e-5), name


@pytest.mark.parametrize(
    ("strategy", "micro"),
    [
        *((name, 1) for name in STRATEGIES),
        ("fsdp2", 4),
        *(pytest.param(name, 4, marks=pytest.mark.long) for name in ("ddp", "zero2", "zero3")),
    ],
)
def test_two_processes_make_the_same_updates(
    template: Template, fault_arguments: list[str], whole: Path, tmp_path: Path, strategy: str, micro: int
) -> None:
    out = tmp_path / "run"
    options = [f"--training.strategy={strategy}", f"--training.micro_batch_size={micro}", f"--out={out}"]
    workers = template.start([*fault_arguments, *options], tmp_path / "log", ranks=2)
    assert workers.wait() == [0, 0], workers.said()
    check_same_losses(out, whole, ranks=2)
    check_same_tensors(out, whole, step=8)
    assert f"2 x cpu by {strategy}" in workers.said()


def test_ragged_labels_make_the_same_update(template: Template, fault_arguments: list[str], tmp_path: Path) -> None:
    """Every row counts by its labels, however rows are dealt out; some rows of each batch have none."""

    def run(ranks: int, micro: int) -> Path:
        out = tmp_path / f"{ranks}-{micro}"
        options = ["--training.batch_size=16", f"--training.micro_batch_size={micro}", "--import=tests.ragged"]
        workers = template.start([*fault_arguments, *options, f"--out={out}"], tmp_path / "log", ranks=ranks)
        assert workers.wait() == [0] * ranks, workers.said()
        return out

    whole = run(1, 16)
    for ranks, micro in ((1, 4), (1, 1), (2, 4), (4, 4), (4, 1)):
        out = run(ranks, micro)
        check_same_losses(out, whole, ranks)
        check_same_tensors(out, whole, step=8)
    assert lines(whole / "metrics.jsonl")[0]["loss"] == pytest.approx(first_loss(whole, fault_arguments), abs=1e-5)


def first_loss(out: Path, arguments: list[str]) -> float:
    """The loss of the first batch by the initial model, from sums over rows one at a time."""
    config = load_config([*arguments, "--training.batch_size=16"]).config
    data = prepare(config)
    length = config.data.sequence_length
    rows = BatchOrder(data.train.num_rows(length), 16, config.seed).rows(0)
    torch.manual_seed(config.seed)
    model = TransnormerForCausalLM(TransnormerConfig.from_pretrained(list_checkpoints(out)[-1] / "model")).eval()
    nll, count, without = 0.0, 0, 0
    for row in rows:
        batch = collate(data.train, rows[rows == row], length, boundaries=True)
        labels = batch["shift_labels"][0]
        labels[: length if row % 8 == 0 else row * 7 % length] = -100
        with torch.no_grad():
            logits = model(batch["input_ids"], cu_seq_lens_q=batch["cu_seq_lens_q"]).logits[0]
        nll += torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100).item()
        count += int((labels >= 0).sum())
        without += int((labels < 0).all())
    assert without >= 1
    return nll / count


@pytest.mark.parametrize(
    "strategy", ["fsdp2", "zero3", *(pytest.param(name, marks=pytest.mark.long) for name in ("ddp", "zero2"))]
)
def test_all_compute_in_the_same_precision(
    template: Template, fault_arguments: list[str], whole: Path, tmp_path: Path, strategy: str
) -> None:
    """The first loss has seen no gradient, whose sums round otherwise in parts."""
    losses = []
    for ranks, name in ((1, "ddp"), (2, strategy)):
        out = tmp_path / str(ranks)
        options = [f"--training.strategy={name}", "--training.precision=bf16", "--training.steps=1", f"--out={out}"]
        workers = template.start([*fault_arguments, *options], tmp_path / "log", ranks=ranks)
        assert workers.wait() == [0] * ranks, workers.said()
        losses.append(lines(out / "metrics.jsonl")[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert losses[0] != pytest.approx(lines(whole / "metrics.jsonl")[0]["loss"], abs=4e-6)


@pytest.mark.parametrize(
    "strategy", ["fsdp2", *(pytest.param(name, marks=pytest.mark.long) for name in ("ddp", "zero2", "zero3"))]
)
def test_the_launch_files_work(fault_arguments: list[str], tmp_path: Path, strategy: str) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file=configs/accelerate/{strategy}.yaml"]
    run = ["--num_processes=2", "train.py", *fault_arguments, "--training.steps=2", f"--out={tmp_path / 'run'}"]
    result = subprocess.run([*launch, *run], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert f"2 x cpu by {strategy}" in result.stderr


def test_four_processes_make_the_same_updates(
    template: Template, fault_arguments: list[str], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    workers = template.start([*fault_arguments, f"--out={out}"], tmp_path / "log", ranks=4)
    assert workers.wait() == [0] * 4, workers.said()
    check_same_losses(out, whole, ranks=4)


def test_a_run_goes_from_one_strategy_to_the_next(
    template: Template, fault_arguments: list[str], whole: Path, tmp_path: Path
) -> None:
    """The first takes three steps, each other one, and leaves the run to the next; files are of several sizes."""
    out = tmp_path / "run"
    stages = [(1, "ddp", 10**9), (2, "ddp", 40_000), (2, "fsdp2", 10_000), (2, "zero2", 10**9)]
    stages = [*stages, (2, "zero3", 40_000), (1, "ddp", 10_000)]
    for last, (ranks, strategy, size) in enumerate(stages, start=3):
        options = [f"--training.strategy={strategy}", f"--checkpoint.max_file_bytes={size}", f"--out={out}"]
        argv = [*fault_arguments, *options, "--import=tests.halted", "--training.micro_batch_size=2"]
        workers = template.start(argv, tmp_path / "log", ranks=ranks, HALT_AFTER=str(last if last < 8 else 0))
        assert workers.wait() == [143 if last < 8 else 0] * ranks, workers.said()
        folder = list_checkpoints(out)[-1]
        assert verify_checkpoint(folder).step == last
        files = list(folder.glob("model/*.safetensors"))
        assert (len(files) == 1) == (size == 10**9), files
    check_same_losses(out, whole)
    check_same_tensors(out, whole, step=8)
    assert {line["world_size"] for line in lines(out / "metrics.jsonl")} == {1, 2}


def test_a_sharded_checkpoint_opens_with_transformers(
    template: Template, fault_arguments: list[str], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    options = ["--training.strategy=fsdp2", "--checkpoint.max_file_bytes=10000", f"--out={out}"]
    workers = template.start([*fault_arguments, *options], tmp_path / "log", ranks=2)
    assert workers.wait() == [0, 0], workers.said()
    folder = list_checkpoints(out)[-1] / "model"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(folder.glob("*.safetensors"))) > 3
    opened = TransnormerForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(opened[name], tensor) for name, tensor in tensors(folder, "model").items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--training.batch_size=9"], "training.batch_size: expected a multiple of the 2 processes, got 9"),
        (["--training.micro_batch_size=3"], "training.micro_batch_size: expected a divisor of 4"),
        (
            ["--training.strategy=zero2", "--training.skip_nonfinite=1"],
            "training.skip_nonfinite: expected 0, got 1: zero2",
        ),
    ],
)
def test_what_can_not_work_is_refused_by_all(
    template: Template, fault_arguments: list[str], tmp_path: Path, options: list[str], message: str
) -> None:
    workers = template.start([*fault_arguments, *options, f"--out={tmp_path / 'run'}"], tmp_path / "log", ranks=2)
    assert workers.wait() == [2, 2], workers.said()
    assert message in workers.said()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("what", "code", "message"),
    [
        ("optim.lr", 2, "rank 1: optim.lr is 0.5, that of rank 0 is 0.01"),
        ("data", 3, f"rank 1: data.fingerprint is '{'0' * 64}', that of rank 0 is "),
        ("out", 2, "rank 1: --out: expected "),
    ],
)
def test_machines_that_differ_are_refused(
    template: Template, fault_arguments: list[str], tmp_path: Path, what: str, code: int, message: str
) -> None:
    argv = [*fault_arguments, "--import=tests.differing", f"--out={tmp_path / 'run'}"]
    workers = template.start(argv, tmp_path / "log", ranks=2, DIFFERING=what)
    assert workers.wait() == [code, code], workers.said()
    assert message in workers.said()
    assert (tmp_path / "run").exists() == (what == "out")  # the folder itself has to be looked at
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("variables", "strategy"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "fsdp2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero3"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, None),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, None),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, None),
    ],
)
def test_what_accelerate_was_launched_with_counts(
    template: Template, fault_arguments: list[str], tmp_path: Path, variables: dict[str, str], strategy: str | None
) -> None:
    argv = [*fault_arguments, "--training.steps=2", f"--out={tmp_path / 'run'}"]
    workers = template.start(argv, tmp_path / "log", ranks=2, **variables)
    if strategy is None:
        assert workers.wait() == [2, 2], workers.said()
        assert "error: accelerate: " in workers.said()
    else:
        assert workers.wait() == [0, 0], workers.said()
        assert f"2 x cpu by {strategy}" in workers.said()
