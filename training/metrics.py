"""What a run measures: `metrics.jsonl` and `evaluations.jsonl`, throughput, FLOPs and MFU."""

import dataclasses
import json
import math
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from training.errors import CheckpointError
from training.jsonfile import parse_json
from training.redaction import redact
from training.storage import disk_errors, remove_unfinished, replace_file


@dataclass(frozen=True)
class StepRecord:
    """A line of `metrics.jsonl`.

    Args:
        step: optimizer steps done, this one included.
        epoch: passes over the training tokens, as a fraction.
        loss: mean over the tokens of the global batch, in nats.
        grad_norm: global norm before clipping.
        lr: learning rate of this step.
        tokens: training tokens seen so far, over all processes.
        tokens_per_second: over all processes, in the moving window.
        mfu: share of the devices' peak, or None where the peak is unknown.
        skipped: steps that the loss scaler has skipped so far.
        world_size: processes.
        batch_sha: sha256 of the global batch's ids in sample order.
    """

    step: int
    epoch: float
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    tokens_per_second: float
    mfu: float | None
    skipped: int
    world_size: int
    batch_sha: str


@dataclass(frozen=True)
class EvaluationRecord:
    """A line of `evaluations.jsonl`.

    `validation_loss` is in nats per token, `accuracy` the share of tokens that the model held the most probable ones,
    `sample` generated text or None.
    """

    step: int
    tokens: int
    validation_loss: float
    perplexity: float
    bits_per_byte: float
    accuracy: float
    sample: str | None


class MetricsWriter:
    """Appends records to the two files of a run, each line whole and at once.

    Opening drops the lines of steps after `resume_step` and a line that a killed process left torn.

    Args:
        out: the run's folder.
        resume_step: steps done by the checkpoint that the run continues; 0 starts both files anew.

    Attributes:
        last_evaluated: step of the last evaluation that is kept, -1 for none.
        missing_steps: how many of the steps until `resume_step` have no line.

    Raises:
        CheckpointError: a line before the last is not a record, or a file can't be written.
        ResourceError: the disk is full.
    """

    def __init__(self, out: Path, resume_step: int) -> None:
        out.mkdir(parents=True, exist_ok=True)
        names = {StepRecord: "metrics.jsonl", EvaluationRecord: "evaluations.jsonl"}
        self._files = {kind: _RecordFile(out / name, resume_step) for kind, name in names.items()}
        self.last_evaluated = self._files[EvaluationRecord].last_step
        self.missing_steps = resume_step - self._files[StepRecord].records

    def write(self, record: StepRecord | EvaluationRecord) -> None:
        """Append a record to its file; numbers that are not finite become null, which keeps the line valid JSON."""
        self._files[type(record)].append(redact(dataclasses.asdict(record)))

    def close(self) -> None:
        """Close both files."""
        for file in self._files.values():
            file.close()


class _RecordFile:
    """A JSONL file that holds whole lines: one that does not fit on the disk is cut off again."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self._path = path
        with disk_errors(path):
            records = _rewind(path, resume_step)
            self._file = path.open("ab", buffering=0)
        self._end = self._file.seek(0, os.SEEK_END)
        self.last_step, self.records = records[-1]["step"] if records else -1, len(records)

    def append(self, record: dict[str, Any]) -> None:
        line = _line(record)
        with disk_errors(self._path):
            try:
                self._write(line)
            except OSError:
                self._file.truncate(self._end)
                raise
        self._end += len(line)

    def close(self) -> None:
        self._file.close()

    def _write(self, line: bytes) -> None:
        while line:
            line = line[self._file.write(line) :]


def _line(record: dict[str, Any]) -> bytes:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    return (json.dumps(finite, allow_nan=False) + "\n").encode()


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file of records with a `step`; a torn last line is left out.

    Raises:
        CheckpointError: names the line, before the last, that is not such a record.
    """
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
        raise CheckpointError(f"{path}: a link, folder or special file, expected a file of records")
    lines = path.read_bytes().splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line)
            if type(record["step"]) is not int or any(isinstance(value, dict | list) for value in record.values()):
                raise ValueError("expected a whole number as step, and no value inside another")
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise CheckpointError(f"{path}:{number}: expected a JSON object with a step: {error!r}") from error
        records.append(record)
    return records


def _rewind(path: Path, resume_step: int) -> list[dict[str, Any]]:
    """Replace a file, atomically, by its records up to a step, and return those."""
    remove_unfinished(path)
    records = [record for record in read_records(path) if record["step"] <= resume_step]
    kept = b"".join(map(_line, records))
    if path.exists() and path.read_bytes() != kept:
        replace_file(path, kept)
    return records


class ModelShape(Protocol):
    """The attributes of a model's configuration that its work depends on."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None
    head_dim: int | None
    vocab_size: int
    lrpe_layers: list[int]
    attention: str
    gate: bool
    max_position_embeddings: int


def flops_per_token(config: ModelShape) -> float:
    """Return the training FLOPs of one token: three forward passes, as the backward pass counts two.

    One forward pass, with C, I, V widths of model, GLU and vocabulary, L layers, H query and G key/value heads of
    width D, R layers with LRPE, which doubles the width of keys in the state, and U = 1 gate, or 0 without:

        2 · (L · (C·((1+U)·H + 2·G)·D + H·D·C + 3·C·I) + C·V)  weights of q and u, k and v, output, GLU, head
        + 4 · H · D · D · (L + R)                             state update and read-out, or with masked attention
        + 2 · H · D · T · (2 · L + R)                         scores and weighed values of rows of T tokens

    Looking up embeddings is free. The products inside a chunk are not counted: they depend on the chunk size of the
    implementation, not on the model. Neither is recomputation by gradient checkpointing.
    """
    hidden, (heads, groups, width) = config.hidden_size, _head_shape(config)
    attention = hidden * ((1 + config.gate) * heads + 2 * groups) * width + heads * width * hidden
    glu = 3 * hidden * config.intermediate_size
    weights = config.num_hidden_layers * (attention + glu) + hidden * config.vocab_size
    layers, doubled = config.num_hidden_layers, len(set(config.lrpe_layers))
    if config.attention == "masked":
        mixing = 2 * heads * width * config.max_position_embeddings * (2 * layers + doubled)
    else:
        mixing = 4 * heads * width * width * (layers + doubled)
    return 3.0 * (2 * weights + mixing)


def state_size(config: ModelShape) -> int:
    """Return how many numbers the state of one sequence holds: L layers of H heads of width D, R of them with LRPE.

        H · D · D · (L + R), or with masked attention the keys and values of T tokens
        T · D · (2 · G · (L - R) + (2 · H + G) · R)

    LRPE doubles the width of keys, and gives each query head its own.
    """
    heads, groups, width = _head_shape(config)
    layers, doubled = config.num_hidden_layers, len(set(config.lrpe_layers))
    if config.attention == "masked":
        channels = 2 * groups * (layers - doubled) + (2 * heads + groups) * doubled
        return config.max_position_embeddings * width * channels
    return heads * width * width * (layers + doubled)


def _head_shape(config: ModelShape) -> tuple[int, int, int]:
    """Query heads, key/value heads and their width."""
    heads = config.num_attention_heads
    return heads, config.num_key_value_heads or heads, config.head_dim or config.hidden_size // heads


# Nominal TFLOP/s without sparsity as (fp32 outside tensor cores, fp16, bf16); None: no such units. Tensor-core figures
# are those with float32 accumulation, as training uses. Vendor figures, not measured and not each looked up in its data
# sheet: `training.peak_tflops` overrides them. A pattern matches the whole name, so that parts of a GPU and laptop
# models match none.
_PEAKS: dict[str, tuple[float, float, float | None]] = {
    r"V100S-PCIE-\S+": (16.4, 130, None),
    r"V100-PCIE-\S+": (14.0, 112, None),
    r"V100-SXM\S+": (15.7, 125, None),
    r"T4": (8.1, 65, None),
    r"A10": (31.2, 125, 125),
    r"A10G": (35.0, 70, 70),
    r"A30": (10.3, 165, 165),
    r"A40": (37.4, 149.7, 149.7),
    r"A100[- ](SXM4-|PCIE-)?\d+GB( PCIe)?": (19.5, 312, 312),
    r"L4": (30.3, 121, 121),
    r"L40": (90.5, 181, 181),
    r"L40S": (91.6, 362, 362),
    r"H100 PCIe": (51.0, 756.5, 756.5),
    r"H100 NVL": (60.0, 835.5, 835.5),
    r"H100( \d+GB HBM\S*)?": (67.0, 989.5, 989.5),
    r"H200 NVL": (60.0, 835.5, 835.5),
    r"H200": (67.0, 989.5, 989.5),
    r"GH200 \d+GB": (67.0, 989.5, 989.5),
    r"B200": (75.0, 2250, 2250),
    r"GB200": (80.0, 2500, 2500),
    r"RTX A6000": (38.7, 154.8, 154.8),
    r"RTX 6000 Ada Generation": (91.1, 364.2, 364.2),
    r"RTX 2080 Ti": (13.4, 53.8, None),
    r"RTX 3090": (35.6, 71.2, 71.2),
    r"RTX 3090 Ti": (40.0, 80.0, 80.0),
    r"RTX 4080": (48.7, 97.5, 97.5),
    r"RTX 4090": (82.6, 165.2, 165.2),
    r"RTX 5090": (104.8, 209.5, 209.5),
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """Look up the dense peak of a GPU.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it.
        precision: "fp32" (TF32 off), "fp16" or "bf16".

    Returns:
        FLOP/s, or None for a GPU that is not in the table (a part of a GPU is not).

    Raises:
        ValueError: no such precision.
    """
    columns = ("fp32", "fp16", "bf16")
    if precision not in columns:
        raise ValueError(f"precision: expected one of {columns}, got {precision!r}")
    name = re.sub(r"^(NVIDIA |Tesla |GeForce |Quadro )*", "", device_name)
    for pattern, peaks in _PEAKS.items():
        if re.fullmatch(pattern, name):
            peak = peaks[columns.index(precision)]
            return None if peak is None else peak * 1e12
    return None


def mfu(tokens_per_second: float, flops: float, peak: float | None, devices: int) -> float | None:
    """Return the model FLOPs utilisation, a share of 1.

    Args:
        tokens_per_second: over all devices.
        flops: training FLOPs of a token.
        peak: FLOP/s of one device, or None where unknown.
        devices: how many.
    """
    return None if peak is None else tokens_per_second * flops / (peak * devices)


class Throughput:
    """Tokens per second and time left over the last steps, without the time spent inside `pause()`.

    The first step allocates and compiles, so it counts only until there is a second one.

    Args:
        window: steps that count.
        clock: seconds, monotonic.
    """

    def __init__(self, window: int = 50, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began = clock()
        self._steps: deque[tuple[int, float]] = deque(maxlen=window)
        self._first = True

    def update(self, tokens: int) -> float:
        """Count a step of so many tokens, which ends now; return tokens per second."""
        now = self._clock()
        if len(self._steps) == 1 and self._first:
            self._steps.clear()
            self._first = False
        self._steps.append((tokens, now - self._began))
        self._began = now
        return self.tokens_per_second

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out the time of the block: an evaluation, a save."""
        began = self._clock()
        try:
            yield
        finally:
            self._began += self._clock() - began

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second in the window; 0 before the first step."""
        return sum(tokens for tokens, _ in self._steps) / (self._seconds or math.inf)

    def seconds_left(self, steps: int) -> float:
        """Return the seconds that so many steps take at the window's pace; 0 before the first step."""
        return steps * self._seconds / max(len(self._steps), 1)

    @property
    def _seconds(self) -> float:
        return sum(seconds for _, seconds in self._steps)
