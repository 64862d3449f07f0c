"""Metrics files through resumes, FLOPs and MFU by hand, throughput, trackers without network or secrets."""

import contextlib
import http.server
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from model_cases import random_ids, tiny_model

from training.config import TrackingConfig
from training.errors import CheckpointError, ConfigError
from training.metrics import (
    EvaluationRecord,
    MetricsWriter,
    StepRecord,
    Throughput,
    flops_per_token,
    mfu,
    peak_flops,
    read_records,
    state_size,
)
from training.redaction import REDACTED, redact, redact_arguments
from training.trackers import check_trackers, open_trackers

ROOT = Path(__file__).parents[1]
RECORD = StepRecord(
    step=1,
    epoch=0.1,
    loss=0.1 + 0.2,
    grad_norm=1.5,
    lr=1e-3,
    tokens=64,
    tokens_per_second=10.0,
    mfu=None,
    skipped=0,
    world_size=1,
    batch_sha="ab",
)
EVALUATION = EvaluationRecord(
    step=1,
    tokens=64,
    validation_loss=3.0,
    perplexity=math.exp(3),
    bits_per_byte=1.2,
    accuracy=0.4,
    sample="def f():\n\tπ = '\u2028'",
)


def write_steps(out: Path, first: int, last: int, resume_step: int = 0) -> None:
    writer = MetricsWriter(out, resume_step)
    for step in range(first, last + 1):
        writer.write(replace(RECORD, step=step))
        writer.write(replace(EVALUATION, step=step))
    writer.close()


def logged_steps(out: Path, name: str = "metrics.jsonl") -> list[int]:
    return [json.loads(line)["step"] for line in (out / name).read_text().splitlines()]


def test_lines_hold_exactly_the_documented_keys(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 1)
    line = (tmp_path / "metrics.jsonl").read_text()
    keys = "step epoch loss grad_norm lr tokens tokens_per_second mfu skipped world_size batch_sha"
    assert list(json.loads(line)) == keys.split()
    assert json.loads(line) == asdict(RECORD)
    evaluation = json.loads((tmp_path / "evaluations.jsonl").read_text())
    keys = "step tokens validation_loss perplexity bits_per_byte accuracy sample"
    assert list(evaluation) == keys.split()
    assert evaluation == asdict(EVALUATION)


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0)
    writer.write(RECORD)
    assert logged_steps(tmp_path) == [1]
    writer.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_become_null(tmp_path: Path, value: float) -> None:
    writer = MetricsWriter(tmp_path, 0)
    writer.write(replace(RECORD, loss=value, grad_norm=value))
    writer.close()
    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert (record["loss"], record["grad_norm"]) == (None, None)


def test_resuming_drops_later_steps_and_keeps_earlier_bytes(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 9)
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    write_steps(tmp_path, 7, 8, resume_step=6)
    assert logged_steps(tmp_path) == logged_steps(tmp_path, "evaluations.jsonl") == list(range(1, 9))
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines()[:6] == before[:6]
    write_steps(tmp_path, 1, 2, resume_step=0)
    assert logged_steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("cut", [1, 2, 30, 120])
def test_a_torn_last_line_is_dropped_or_completed(tmp_path: Path, cut: int) -> None:
    write_steps(tmp_path, 1, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    whole = 3 if cut == 1 else 2  # only the newline is missing
    write_steps(tmp_path, whole + 1, 4, resume_step=3)
    assert logged_steps(tmp_path) == [1, 2, 3, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evaluations.jsonl", "metrics.jsonl"]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 3)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "[]", lines[2]]))
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2"):
        MetricsWriter(tmp_path, 3)


def test_reading_a_file_that_is_being_written_leaves_the_torn_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_records(tmp_path / "metrics.jsonl") == [{"step": 1}]
    assert read_records(tmp_path / "none.jsonl") == []


def shape(**changes: object) -> SimpleNamespace:
    values = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": None,
        "head_dim": None,
        "vocab_size": 100,
        "lrpe_layers": [],
        "attention": "lightning",
        "gate": True,
        "max_position_embeddings": 50,
    }
    return SimpleNamespace(**{**values, **changes})


def test_flops_are_those_counted_by_hand() -> None:
    # q, k, v, u and output 8 x 8 each; GLU three of 8 x 12; head 8 x 100; state 2 heads of 4 x 4, written and read.
    forward = 2 * (3 * (5 * 64 + 3 * 96) + 800) + 3 * (2 * 2 * 16 + 2 * 2 * 16)
    assert flops_per_token(shape()) == 3 * forward
    one_key_head = forward - 2 * 3 * 2 * 32
    assert flops_per_token(shape(num_key_value_heads=1)) == 3 * one_key_head
    assert flops_per_token(shape(gate=False)) == 3 * (forward - 2 * 3 * 64)
    assert flops_per_token(shape(gate=False, num_key_value_heads=1)) == 3 * (one_key_head - 2 * 3 * 64)
    assert flops_per_token(shape(lrpe_layers=[0, 2])) == 3 * (forward + 2 * 128)
    assert flops_per_token(shape(head_dim=4, num_key_value_heads=2)) == 3 * forward
    # In place of the state 50 scores and 50 weighed values a head, of width 4.
    masked = 2 * (3 * (5 * 64 + 3 * 96) + 800) + 3 * 2 * (2 * 4 * 50 + 2 * 4 * 50)
    assert flops_per_token(shape(attention="masked")) == 3 * masked
    assert flops_per_token(shape(attention="masked", lrpe_layers=[1])) == 3 * (masked + 2 * 2 * 4 * 50)


@pytest.mark.parametrize("gate", [True, False])
def test_flops_count_every_weight_twice_and_the_mixing(gate: bool) -> None:
    model = tiny_model(num_key_value_heads=2, lrpe_layers=[], gate=gate)
    weights = sum(x.numel() for x in model.parameters()) - model.model.embed_tokens.weight.numel()
    assert flops_per_token(model.config) == 3 * (2 * weights + 2 * 4 * 4 * 8 * 8)


@pytest.mark.parametrize("attention", ["lightning", "masked"])
@pytest.mark.parametrize("shape_of", [{}, {"num_key_value_heads": 2, "lrpe_layers": [1, 1], "head_dim": 6}], ids=str)
def test_the_state_is_as_large_as_a_cache(attention: str, shape_of: dict[str, Any]) -> None:
    model = tiny_model(attention=attention, num_hidden_layers=3, max_position_embeddings=7, **shape_of)
    layers = model(random_ids(2, 7), use_cache=True).past_key_values.layers
    held = sum(getattr(layer, name).numel() for layer in layers for name in layer.tensors)
    assert state_size(model.config) == held / 2  # of two sequences


def test_flops_of_a_large_model_are_near_six_times_its_weights() -> None:
    model = shape(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=8, vocab_size=64_000
    )
    weights = 24 * (5 * 1024**2 + 3 * 1024 * 2816) + 1024 * 64_000
    assert 1.0 < flops_per_token(model) / (6 * weights) < 1.05


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H100 NVL", "fp16", 835.5),
        ("NVIDIA H200", "bf16", 989.5),
        ("NVIDIA H200", "fp32", 67),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA A100-PCIE-40GB", "fp16", 312),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40", "bf16", 181),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA A40", "bf16", 149.7),
        ("Tesla T4", "fp16", 65),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-PCIE-32GB", "fp32", 14),
        ("NVIDIA GeForce RTX 3090", "bf16", 71.2),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
    ],
)
def test_peaks_of_common_gpus(name: str, precision: str, tera: float) -> None:
    assert peak_flops(name, precision) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
    "name", ["NVIDIA A100-SXM4-80GB MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100X", "cpu", "L400"]
)
def test_unknown_gpus_have_no_peak(name: str) -> None:
    assert peak_flops(name, "bf16") is None
    assert mfu(1000.0, 1e9, peak_flops(name, "bf16"), 1) is None


def test_missing_units_and_wrong_precisions() -> None:
    assert peak_flops("Tesla T4", "bf16") is None
    with pytest.raises(ValueError, match=r"precision: expected one of .*'fp8'"):
        peak_flops("NVIDIA H200", "fp8")


def test_mfu_is_a_share_of_all_devices() -> None:
    assert mfu(1e6, 2e9, 1e15, 4) == pytest.approx(0.5)


def test_throughput_leaves_out_pauses_and_the_first_step() -> None:
    now = 0.0
    meter = Throughput(window=3, clock=lambda: now)
    assert (meter.tokens_per_second, meter.seconds_left(10)) == (0.0, 0.0)
    now += 50  # compilation
    assert meter.update(100) == 2.0
    now += 2
    assert meter.update(100) == 50.0
    with meter.pause():
        now += 1000
    now += 2
    assert meter.update(100) == 50.0
    assert meter.seconds_left(10) == 20.0
    for _ in range(3):
        now += 4
        meter.update(100)
    assert meter.tokens_per_second == 25.0


def test_a_pause_counts_even_if_its_block_fails() -> None:
    now = 0.0
    meter = Throughput(clock=lambda: now)
    with contextlib.suppress(OSError), meter.pause():
        now += 10
        raise OSError
    now += 1
    assert meter.update(5) == 5.0


@pytest.fixture
def no_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without credentials; the folder is its home."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    return home


@pytest.mark.parametrize(("config", "key"), [({"wandb": "auto"}, "wandb"), ({"tensorboard": True}, "tensorboard")])
def test_a_tracker_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict, key: str
) -> None:
    (tmp_path / key).mkdir()  # a folder of old runs is no package
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, key, raising=False)
    with pytest.raises(ConfigError, match=rf"tracking\.{key} is .* not installed: pip install -e '\.\[{key}\]'"):
        open_trackers(TrackingConfig(**config), tmp_path / "run", {}, None)
    assert not (tmp_path / "run").exists()


def test_online_without_a_key_is_a_config_error(no_keys: Path) -> None:
    with pytest.raises(ConfigError, match="'online', but there is no API key"):
        check_trackers(TrackingConfig(wandb="online"))
    check_trackers(TrackingConfig(wandb="auto", tensorboard=True))
    (no_keys / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password " + "a" * 40 + "\n")
    (no_keys / ".netrc").chmod(0o600)
    check_trackers(TrackingConfig(wandb="online"))


def test_no_trackers_cost_nothing(tmp_path: Path) -> None:
    trackers = open_trackers(TrackingConfig(), tmp_path / "run", {}, None)
    trackers.log(1, {"loss": 1.0})
    trackers.log_text(1, "sample", "text")
    trackers.close()
    assert trackers.run_id is None
    assert not (tmp_path / "run").exists()


SECRET = "hf_" + "s3cr3t" * 5
TRACKED_RUN = """
import sys
from pathlib import Path
from training.config import TrackingConfig
from training.trackers import open_trackers

secret = sys.argv[2]
config = {"hub": {"token": secret, "url": f"https://user:{secret[3:]}@host/x"}, "data": {"token_budget": 987654321}}
tracking = TrackingConfig(wandb="auto", wandb_group=f"slow variant {secret}", tensorboard=True)
trackers = open_trackers(tracking, Path(sys.argv[3]), config, sys.argv[4], 2)
trackers.log(3, {"loss": 2.5, "mfu": None, "grad_norm": float("nan")})
trackers.log_text(3, "sample", "def f(<x>):\\n    pass")
trackers.close()
print(trackers.run_id, sys.argv[2] == secret)
"""


def run_tracked(out: Path, home: Path, run_id: str, **variables: str) -> tuple[str, str]:
    script = home / "tracked.py"
    script.write_text(TRACKED_RUN)
    arguments = [sys.executable, str(script), "--token", SECRET, str(out), run_id]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(
        arguments, env=environment, cwd=home, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1], done.stderr


def test_auto_without_a_key_stays_offline_and_keeps_secrets_out(tmp_path: Path, no_keys: Path) -> None:
    out = tmp_path / "run"
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        # Whatever goes out, to wandb's server or any other, would come here.
        proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "WANDB_BASE_URL"), address)
        began = time.monotonic()
        last_line, _ = run_tracked(out, no_keys, "0123abcd", **proxies)
        assert time.monotonic() - began < 15
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert last_line == "0123abcd True"
    (folder,) = (out / "wandb").glob("offline-run-*-0123abcd")
    (record,) = folder.glob("*.wandb")
    assert b"987654321" in record.read_bytes()
    assert f"slow variant {REDACTED}".encode() in record.read_bytes()
    for path in out.rglob("*"):
        assert not path.is_file() or SECRET[3:].encode() not in path.read_bytes(), path
    check_tensorboard(out / "tensorboard")


def check_tensorboard(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 2.5)]
    assert "mfu" not in events.Tags()["scalars"]


class Refusing(http.server.BaseHTTPRequestHandler):
    """A server that answers 401 to everything."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.send_error(401)

    def log_message(self, *_: object) -> None:
        """Stay silent."""


def test_auto_falls_back_to_offline_and_says_so(tmp_path: Path, no_keys: Path) -> None:
    """A refusal comes at once; a server that can't be reached takes the same road after 30 s."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        last_line, errors = run_tracked(
            tmp_path / "run", no_keys, "0123abcd", WANDB_API_KEY="a" * 40, WANDB_BASE_URL=address
        )
        server.shutdown()
    assert last_line == "0123abcd True"
    assert "could not start online, this run is logged offline" in errors
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*-0123abcd"))


@pytest.mark.parametrize(
    "key",
    [
        "token",
        "hf_token",
        "wandb.api_key",
        "apiKey",
        "WANDB_API_KEY",
        "accessToken",
        "client_secret",
        "password",
        "auth-token",
    ],
)
def test_telling_keys_are_redacted(key: str) -> None:
    assert redact({"a": [{key: "x"}]}) == {"a": [{key: REDACTED}]}
    assert redact_arguments([f"--{key}=x", f"--{key}", "x", "x"]) == [f"--{key}={REDACTED}", f"--{key}", REDACTED, "x"]


@pytest.mark.parametrize(
    "key", ["token_budget", "tokens", "eval_tokens", "sample_tokens", "tokenizer", "monkey", "keep"]
)
def test_sizes_are_no_secrets(key: str) -> None:
    assert redact({key: 5}) == {key: 5}
    assert redact({key: "text"}) == {key: "text"}
    assert redact_arguments([f"--data.{key}", "5", f"--data.{key}=5"]) == [f"--data.{key}", "5", f"--data.{key}=5"]


@pytest.mark.parametrize(
    ("value", "cleaned"),
    [
        ("hf_abcdefghij", REDACTED),
        ("key is sk-proj-abc123", f"key is {REDACTED}"),
        ("ghp_abcdef123456", REDACTED),
        ("https://user:pass@host/data", f"https://{REDACTED}@host/data"),
        ("https://host/data@v1", "https://host/data@v1"),
        ("disk-usage", "disk-usage"),
        ("0b1e2f" * 7, "0b1e2f" * 7),
        (None, None),
        (True, True),
        (3e-4, 3e-4),
    ],
)
def test_values_that_look_like_keys_are_redacted(value: object, cleaned: object) -> None:
    assert redact({"anything": value}) == {"anything": cleaned}
    if isinstance(value, str):
        assert redact_arguments(["--x", value]) == ["--x", cleaned]
