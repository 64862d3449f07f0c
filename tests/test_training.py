"""Whole runs of `train.py` on a small corpus: results, resume to the bit, signals, exit codes."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from small_run import small_run

import train
from model import masks_transnormer, register_mask
from scripts import evaluate, generate
from training.config import load_config
from training.manifest import list_checkpoints, verify_checkpoint

ROOT = Path(__file__).parents[1]
METRICS = [
    "step",
    "epoch",
    "loss",
    "grad_norm",
    "lr",
    "tokens",
    "tokens_per_second",
    "mfu",
    "skipped",
    "world_size",
    "batch_sha",
]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    """A command line of a run that takes a second, over a corpus whose tokens are cached."""
    return small_run(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps devices and precision of a process in singletons."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def run(arguments: list[str], out: Path, *more: str) -> int:
    return train.main([*arguments, f"--out={out}", *more])


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def timeless(out: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in metrics(out)]


def exit_record(out: Path) -> dict:
    return json.loads((out / "exit.json").read_text())


def start(arguments: list[str], out: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "train.py", *arguments, f"--out={out}", *more]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(process: subprocess.Popen, out: Path, step: int) -> None:
    deadline = time.monotonic() + 90
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_bytes().splitlines()) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run makes no steps"
        time.sleep(0.01)


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step_{step:08d}" / "model" / "model.safetensors")


def test_a_run_from_config_to_checkpoint(arguments, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(arguments, out, "--training.steps=40", "--training.eval_every=20", "--tracking.tensorboard=true") == 0
    lines = metrics(out)
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert all(list(line) == METRICS for line in lines)
    assert abs(lines[0]["loss"] - 5.77) < 0.1  # ln 320
    assert lines[-1]["loss"] < 4.5
    assert lines[-1]["tokens"] == 40 * 4 * 64
    evaluations = [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in evaluations] == [20, 40]
    assert evaluations[-1]["validation_loss"] < 4.5
    assert 0 < evaluations[-1]["bits_per_byte"] < 8
    assert 0 < evaluations[-1]["accuracy"] < 1
    assert evaluations[-1]["sample"].startswith("def ")
    assert exit_record(out) == {"exit_code": 0, "reason": "done"}
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((out / "tensorboard").iterdir())
    (checkpoint,) = list_checkpoints(out)
    verify_checkpoint(checkpoint)
    assert {"README.md", "tokenizer.json", "tokenizer.model", "config.json", "modeling_transnormer.py"} <= {
        path.name for path in (checkpoint / "model").iterdir()
    }
    printed = capsys.readouterr().out
    assert str(checkpoint) in printed
    assert "completion of 'def '" in printed

    # the scripts open what the run has made
    assert generate.main([str(out), "--prompt", "def x", "--max-new-tokens", "3", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("def x")
    text = tmp_path / "text.txt"
    text.write_text("def x ( y ) : return z\n" * 20)
    assert evaluate.main([str(checkpoint), "--text", str(text), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["bytes"] == len(text.read_bytes())
    assert scores == pytest.approx(independent_scores(checkpoint / "model", text.read_text(), window=64), rel=1e-5)


def independent_scores(folder: Path, text: str, window: int) -> dict:
    """What `scripts.evaluate` reports, a window at a time by the library's own loss."""
    from math import exp, log

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    nll, correct = 0.0, 0
    for first in range(0, len(ids) - 1, window):
        piece = torch.tensor([ids[first : first + window + 1]])
        with torch.no_grad():
            output = model(piece, labels=piece)
        nll += output.loss.item() * (piece.numel() - 1)
        correct += int((output.logits[0, :-1].argmax(-1) == piece[0, 1:]).sum())
    tokens, num_bytes = len(ids) - 1, len(text.encode())
    loss = nll / tokens
    return {
        "loss": loss,
        "perplexity": exp(loss),
        "bits_per_byte": nll / log(2) / num_bytes,
        "accuracy": correct / tokens,
        "tokens": tokens,
        "bytes": num_bytes,
    }


def test_kill_and_resume_equal_the_uninterrupted_run_to_the_bit(arguments, tmp_path):
    options = ["--training.steps=20", "--checkpoint.every=8"]
    assert run(arguments, tmp_path / "whole", *options) == 0
    killed = start(arguments, tmp_path / "killed", *options)
    wait_for_step(killed, tmp_path / "killed", 8)
    while not list_checkpoints(tmp_path / "killed"):
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    done = list_checkpoints(tmp_path / "killed")[-1].name
    assert done in ("step_00000008", "step_00000016")
    AcceleratorState._reset_state(True)
    assert run(arguments, tmp_path / "killed", *options) == 0
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "whole")
    for file in ("model/model.safetensors", "optimizer.safetensors"):
        ours, theirs = (
            load_file(tmp_path / name / "checkpoints" / "step_00000020" / file) for name in ("killed", "whole")
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), file


def test_sigterm_saves_once_and_exits_143(arguments, tmp_path):
    process = start(arguments, tmp_path / "run", "--training.steps=100000")
    wait_for_step(process, tmp_path / "run", 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    assert verify_checkpoint(checkpoint).step == metrics(tmp_path / "run")[-1]["step"]
    assert exit_record(tmp_path / "run")["exit_code"] == 143


def test_micro_batches_do_not_change_the_update(arguments, tmp_path):
    for size in (4, 2, 1):
        assert run(arguments, tmp_path / str(size), f"--training.micro_batch_size={size}") == 0
        AcceleratorState._reset_state(True)
    for size in (2, 1):
        for ours, whole in zip(metrics(tmp_path / str(size)), metrics(tmp_path / "4"), strict=True):
            assert ours["batch_sha"] == whole["batch_sha"]
            assert ours["loss"] == pytest.approx(whole["loss"], abs=1e-5)
            assert ours["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


def test_two_processes_do_not_change_the_update(arguments, tmp_path):
    assert run(arguments, tmp_path / "one") == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, "train.py", *arguments, f"--out={tmp_path / 'two'}", "--training.micro_batch_size=1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    for ours, whole in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert ours["world_size"] == 2
        assert ours["batch_sha"] == whole["batch_sha"]
        assert ours["loss"] == pytest.approx(whole["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
    last = json.loads((tmp_path / "two" / "evaluations.jsonl").read_text().splitlines()[-1])
    alone = json.loads((tmp_path / "one" / "evaluations.jsonl").read_text().splitlines()[-1])
    assert last["validation_loss"] == pytest.approx(alone["validation_loss"], abs=1e-5)


@pytest.mark.parametrize(
    "option",
    [
        "--training.gradient_checkpointing=true",
        "--training.precision=bf16",
        "--data.document_boundaries=false",
        "--model.decay=learned",
        "--optim.schedule=wsd",
        "--model.num_key_value_heads=1",
        "--model.attention=masked",
    ],
)
def test_options_train(arguments, tmp_path, option):
    assert run(arguments, tmp_path / "run", option, "--training.steps=12") == 0
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.3


def test_a_learned_mask_trains(arguments, tmp_path):
    options = ["--model.attention=masked", "--model.mask=learned", "--training.gradient_checkpointing=true"]
    assert run(arguments, tmp_path / "run", *options, "--training.steps=12") == 0
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.3
    learned = [x for name, x in weights(tmp_path / "run", 12).items() if name.endswith("mask_weights")]
    assert len(learned) == 2
    assert all((x[:, 0] != 1).all() for x in learned)  # where the decay begins


@pytest.mark.usefixtures("mask_registry")
def test_a_module_that_registers_a_mask(arguments, tmp_path, capsys, monkeypatch):
    source = "from model import register_mask\nregister_mask('near', lambda batch, head, query, key: query - key < 8)\n"
    (tmp_path / "near_mask.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    options = ["--model.attention=masked", "--model.mask=near", "--training.steps=2"]
    assert run(arguments, tmp_path / "run", *options) == 2
    assert "register_mask adds names, called by a module that --import names" in capsys.readouterr().err
    assert run(arguments, tmp_path / "run", *options, "--import=other", "--import=near_mask") == 2
    assert f"--import: no module 'other' in {tmp_path}" in capsys.readouterr().err
    imported = ["--import", "near_mask"]
    assert run(arguments, tmp_path / "run", *options, *imported) == 0
    written = tmp_path / "run" / "config.yaml"
    assert written.read_text().startswith("# with --import near_mask\n")
    assert load_config([f"--config={written}"]).config == load_config([*arguments, *options]).config
    assert generate.main([str(tmp_path / "run"), "--prompt", "def", "--max-new-tokens", "3", *imported]) == 0
    del masks_transnormer._FUNCTIONS["near"]
    capsys.readouterr()
    assert generate.main([str(tmp_path / "run")]) == 4
    assert re.search(r"\nerror: .*got 'near'; register_mask adds names.*\n$", capsys.readouterr().err)
    del sys.modules["near_mask"]
    (tmp_path / "text.txt").write_text("def x ( y ) : return z\n" * 20)
    assert evaluate.main([str(tmp_path / "run"), "--text", str(tmp_path / "text.txt"), *imported]) == 0


@pytest.mark.usefixtures("mask_registry")
def test_a_mask_that_raises_is_named_by_the_record_of_the_end(arguments, tmp_path):
    register_mask("shapes", lambda batch, head, query, key: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        run(arguments, tmp_path / "run", "--model.attention=masked", "--model.mask=shapes")
    assert exit_record(tmp_path / "run")["exit_code"] == 1
    assert "zero; mask 'shapes': raised by its function of batch (" in exit_record(tmp_path / "run")["reason"]


@pytest.mark.parametrize("option", ["--training.gradient_checkpointing=true", "--training.compile=true"])
def test_options_that_keep_the_numbers(arguments, tmp_path, option):
    assert run(arguments, tmp_path / "plain", "--training.steps=3") == 0
    AcceleratorState._reset_state(True)
    assert run(arguments, tmp_path / "option", "--training.steps=3", option) == 0
    for ours, plain in zip(metrics(tmp_path / "option"), metrics(tmp_path / "plain"), strict=True):
        assert ours["loss"] == pytest.approx(plain["loss"], abs=1e-4)


def test_a_loss_that_is_not_finite_stops_before_the_update(arguments, tmp_path, capsys):
    options = ["--optim.lr=1e30", "--optim.min_lr=0", "--optim.warmup_steps=0", "--optim.grad_clip=0"]
    assert run(arguments, tmp_path / "run", *options, "--checkpoint.every=1") == 5
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1]
    assert re.match(r"step 2: .* is nan; no update was made", exit_record(tmp_path / "run")["reason"])
    assert "no update was made" in capsys.readouterr().err
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    assert verify_checkpoint(checkpoint).step == 1


@pytest.mark.parametrize(
    ("option", "code", "message"),
    [
        ("--training.stepz=3", 2, "--training.stepz: no such option; did you mean training.steps?"),
        (
            "--model.num_attention_heads=5",
            2,
            "model.head_dim: hidden_size 32 is not a multiple of num_attention_heads 5",
        ),
        ("--model.lrpe_layers=[7]", 2, "lrpe_layers: expected layers from 0 to 1, got [7]"),
        (
            "--model.mask=learned",
            2,
            "model.mask: expected attention 'masked' with 'learned', got attention 'lightning'",
        ),
        ("--training.micro_batch_size=3", 2, "training.micro_batch_size: expected a divisor of 4"),
        ("--training.precision=fp16", 2, "training.precision: expected fp32 or bf16 on a CPU, got fp16"),
        ("--tracking.wandb=online", 2, "no API key"),
        ("--data.paths=['none.jsonl']", 3, "none.jsonl"),
        ("--tokenizer.path=none", 3, "none/tokenizer.model"),
        ("--data.sequence_length=100000", 3, "expected at least 100001 train tokens"),
        ("--resume=none", 4, "--resume none: expected auto, never or the folder of a checkpoint; there is none"),
        ("--changed=optim.wd", 2, "--changed: no setting optim.wd is compared with the checkpoint's; it can be "),
        ("--model.intermediate_size=1000000000000", 7, "out of memory on cpu, 0 steps are done: "),
    ],
)
def test_what_can_not_work_is_refused_before_anything_is_written(
    arguments, tmp_path, capsys, monkeypatch, option, code, message
):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert run(arguments, tmp_path / "run", option) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_an_out_that_can_not_be_is_refused(arguments, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(arguments, tmp_path / "file" / "run") == 2
    assert f"{tmp_path / 'file'} is a file" in capsys.readouterr().err
    assert run(arguments, Path("/proc/none/run")) == 2
    assert "--out: /proc/none/run: /proc is not writable: " in capsys.readouterr().err


def test_a_second_run_into_the_same_folder_is_refused(arguments, tmp_path, capsys):
    first = start(arguments, tmp_path / "run", "--training.steps=100000")
    wait_for_step(first, tmp_path / "run", 1)
    assert run(arguments, tmp_path / "run", "--data.paths=['none.jsonl']") == 2  # before it looks for data
    assert "is in use by another run" in capsys.readouterr().err
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=30) == 143
    verify_checkpoint(list_checkpoints(tmp_path / "run")[-1])


def test_resume_is_refused_for_another_run_and_for_a_damaged_checkpoint(arguments, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(arguments, out, "--checkpoint.every=3") == 0
    for option, name in (
        ("--model.qk_norm=l2", "model.qk_norm"),
        ("--seed=3", "seed"),
        ("--training.batch_size=8", "training.batch_size"),
        ("--optim.lr=0.5", "optim.lr"),
        ("--optim.schedule=wsd", "optim.schedule"),
        ("--data.token_budget=5000", "data.fingerprint"),
        ("--tokenizer.vocab_size=330", "tokenizer.sha256"),
    ):
        AcceleratorState._reset_state(True)
        assert run(arguments, out, option, "--training.steps=9") == 4
        assert f"{name} was" in capsys.readouterr().err
    AcceleratorState._reset_state(True)
    assert run(arguments, out, "--changed=lr") == 2
    assert (
        "--changed: no setting lr is compared with the checkpoint's; did you mean optim.lr?" in capsys.readouterr().err
    )
    assert exit_record(out)["exit_code"] == 2  # not how the run ended before
    AcceleratorState._reset_state(True)
    resumed = [f"--resume={list_checkpoints(out)[0]}", "--optim.lr=0.5", "--changed=optim.lr"]
    assert run(arguments, tmp_path / "changed", *resumed) == 0
    AcceleratorState._reset_state(True)
    assert run(arguments, out, "--optim.lr=0.5", "--optim.beta1=0.8", "--changed", "optim.lr") == 4
    assert "optim.beta1 was 0.9, is 0.8" in capsys.readouterr().err
    AcceleratorState._reset_state(True)
    assert run(arguments, out, "--resume=never") == 2
    first, last = list_checkpoints(out)
    (last / "model" / "config.json").write_text("{}")
    AcceleratorState._reset_state(True)
    assert run(arguments, out, f"--resume={last}") == 4
    assert "config.json" in capsys.readouterr().err
    AcceleratorState._reset_state(True)
    assert run(arguments, out, "--training.steps=6") == 0  # auto: from the one before
    assert "not resumed from" in capsys.readouterr().err
    assert [line["step"] for line in metrics(out)] == list(range(1, 7))
    assert verify_checkpoint(last).step == 6
    AcceleratorState._reset_state(True)
    assert run(arguments, tmp_path / "other", f"--resume={first}", "--training.steps=5") == 0  # into another folder
    assert [line["step"] for line in metrics(tmp_path / "other")] == [4, 5]


def test_a_finished_run_has_nothing_to_do(arguments, tmp_path):
    assert run(arguments, tmp_path / "run") == 0
    before = weights(tmp_path / "run", 6)
    AcceleratorState._reset_state(True)
    assert run(arguments, tmp_path / "run") == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 7))
    assert all(torch.equal(before[key], value) for key, value in weights(tmp_path / "run", 6).items())


def test_what_goes_on_otherwise_is_said(arguments, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(arguments, out) == 0
    assert "missing" not in (said := capsys.readouterr().err)
    assert "training.steps was" not in said
    file = out / "metrics.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[2:]))
    AcceleratorState._reset_state(True)
    assert run(arguments, out, "--training.steps=8") == 0
    said = capsys.readouterr().err
    assert "training.steps was 6, is 8: the learning rate follows the schedule of 8" in said
    assert f"{file}: 2 of 6 steps are missing" in said
    assert [line["step"] for line in metrics(out)] == [3, 4, 5, 6, 7, 8]
    AcceleratorState._reset_state(True)
    assert run(arguments, tmp_path / "other", f"--resume={out}") == 4
    assert f"this is a run's, which has {list_checkpoints(out)[-1]}" in capsys.readouterr().err


def test_importing_train_does_nothing():
    code = "import sys, train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
