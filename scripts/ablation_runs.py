"""The runs of an ablation: each an ordinary `train.py`, some at once, skipped where done, gone on with where begun."""

import ctypes
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scripts.ablation_report import Result
from scripts.ablation_variants import HEAD_KEYS, Variant
from training.config import Config, config_values, load_config
from training.errors import CheckpointError, ConfigError, RunError
from training.metrics import read_records
from training.outcome import Interrupted, StopSignal
from training.redaction import redact
from training.storage import disk_errors, replace_file

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.5
_TAIL_BYTES = 4096  # more than a line of metrics
_FREE = ("data.num_proc", "data.cache_dir", "training.cpu_threads", "training.peer_timeout", "training.peak_tflops")


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        variant: what is trained.
        seed: of weights and order.
        config: the whole configuration, seed and steps included.
        out: the run's folder.
        log: file of what it prints.
        command: that trains it.
        files: what the command reads, by path; written before it starts.
    """

    variant: Variant
    seed: int
    config: Config
    out: Path
    log: Path
    command: list[str]
    files: dict[Path, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.variant.name} seed {self.seed}"

    @property
    def tokens(self) -> int:
        """Tokens that the run trains on."""
        config = self.config
        return config.training.steps * config.training.batch_size * config.data.sequence_length

    @property
    def shell_command(self) -> str:
        """The command as one types it."""
        return shlex.join(["python", *self.command[1:]])

    def is_done(self) -> bool:
        """Whether the run has ended well, with these settings.

        Raises:
            ConfigError: the folder holds a run of other settings.
        """
        if not (self.out / "config.yaml").exists():
            return False
        _refuse_other(self.out, self.config)
        return _ending(self.out)[0] == 0 and self.last_record().get("step") == self.config.training.steps

    def last_record(self) -> dict[str, Any]:
        """The last whole line of `metrics.jsonl`; {} before there is one."""
        try:
            with (self.out / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
                lines = file.read().splitlines(keepends=True)
        except OSError:
            return {}
        for line in reversed(lines):
            if line.endswith(b"\n"):
                try:
                    record = json.loads(line)
                except ValueError:
                    return {}
                return record if isinstance(record, dict) else {}
        return {}


def refuse_other_base(out: Path, results: Sequence[Result], base: Config) -> None:
    """Refuse to add to runs of an ablation that had another base.

    Args:
        out: the ablation's folder.
        results: of the runs in it.
        base: what all runs share, but for the heads, their own settings, seeds and budgets.

    Raises:
        ConfigError: naming the run, the key, and both values.
    """
    for result in results:
        if (out / result.folder / "config.yaml").exists():
            heads = HEAD_KEYS if result.kv_heads != result.heads else HEAD_KEYS[:3]  # the last is the GLU's width
            _refuse_other(out / result.folder, base, {"seed", "training.steps", *heads, *result.settings})


def _refuse_other(out: Path, config: Config, own: Container[str] = ()) -> None:
    try:
        saved = config_values(load_config(["--config", str(out / "config.yaml")]).config)
    except ConfigError as error:
        raise CheckpointError(f"{out / 'config.yaml'}: damaged: {error}; remove {out} to run it again") from None
    for key, value in config_values(config).items():
        if key in own or key in _FREE or key.startswith(("tracking.", "checkpoint.")):
            continue
        if saved[key] != (value := redact(value, key.rpartition(".")[2])):  # as it was saved
            raise ConfigError(
                f"--out: {out} holds a run with {key} {saved[key]!r}, expected {value!r}; give another --out"
            )


def _ending(out: Path) -> tuple[int | None, str]:
    """The exit code and the reason that a run left; None as the code of one that left none."""
    try:
        record = json.loads((out / "exit.json").read_bytes())
        return record["exit_code"], record["reason"]
    except (OSError, ValueError, KeyError, TypeError):
        return None, ""


@dataclass(frozen=True)
class Machine:
    """Where runs go: how many at once, and the GPUs that they take in turn (none: a CPU)."""

    parallel: int
    gpus: list[str]
    name: str

    def environment(self, slot: int) -> dict[str, str]:
        """Variables of the run in one of `parallel` slots."""
        from training.setup import count_cores

        threads = {"OMP_NUM_THREADS": str(max(1, count_cores() // self.parallel))}
        gpu = {"CUDA_VISIBLE_DEVICES": self.gpus[slot % len(self.gpus)]} if self.gpus else {}
        return os.environ | threads | gpu


def find_machine(parallel: int | None) -> Machine:
    """Look for GPUs; without a number one run a GPU at once, or one on a CPU."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    gpus = (visible.split(",") if visible else list(map(str, range(count))))[:count]
    return Machine(parallel or max(1, count), gpus, torch.cuda.get_device_name() if count else "cpu")


def run_jobs(jobs: Sequence[Job], machine: Machine, finished: Callable[[Job], None]) -> dict[str, str]:
    """Run what is not done; `finished` is called after each run that ended well.

    Returns:
        Why runs failed, by their names.

    Raises:
        ConfigError: a folder holds a run of other settings; before anything runs.
        Interrupted: a signal came; runs under way have saved and stopped.
    """
    waiting = [job for job in jobs if not job.is_done()]
    stop = StopSignal()
    stop.wait_for_step = True  # it is noted, and heeded here
    with stop.listening(), _Pool(jobs, waiting, machine, finished) as pool:
        while waiting or pool.running:
            pool.fill(waiting)
            time.sleep(_POLL_SECONDS)
            pool.collect()
            if stop.asked and not pool.stopping:
                pool.stop()
                waiting.clear()
        if pool.stopping:
            raise Interrupted(f"stopped by {stop.asked}; the same command goes on")
        return pool.failed


class _Pool:
    """Runs under way, one in a slot, and the line that tells of all.

    Args:
        jobs: all of the ablation, done ones too.
        waiting: those to run.
        machine: where.
        finished: called after each run that ended well.
    """

    def __init__(
        self, jobs: Sequence[Job], waiting: Sequence[Job], machine: Machine, finished: Callable[[Job], None]
    ) -> None:
        self.machine, self.finished = machine, finished
        self.running: dict[int, tuple[Job, subprocess.Popen]] = {}
        self.failed: dict[str, str] = {}
        self.stopping = False
        self._total, self._done = len(jobs), len(jobs) - len(waiting)
        self._left = list(waiting)
        self._tokens = sum(job.tokens for job in jobs)
        self._bar = tqdm(
            total=self._tokens,
            initial=self._tokens_done(),
            unit="token",
            unit_scale=True,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
            disable=not waiting,
        )

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *error: object) -> None:
        for _, process in self.running.values():  # none, unless something went wrong here
            process.terminate()
        self._bar.close()

    def fill(self, waiting: list[Job]) -> None:
        """Start waiting runs in free slots."""
        for slot in range(self.machine.parallel):
            if waiting and slot not in self.running:
                job = waiting.pop(0)
                _write_files(job)
                with job.log.open("ab") as log:
                    process = subprocess.Popen(
                        job.command,
                        env=self.machine.environment(slot),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,  # Ctrl-C comes here, and from here once to each run
                        preexec_fn=_end_with_parent,
                    )
                self.running[slot] = job, process

    def collect(self) -> None:
        """Take away runs that have ended, and tell how far the others are."""
        for slot, (job, process) in list(self.running.items()):
            if process.poll() is None:
                continue
            del self.running[slot]
            if process.returncode == 0:
                self._finish(job)
            elif not self.stopping:
                self.failed[job.name] = _reason(job, process.returncode)
                tqdm.write(f"{job.name} failed: {self.failed[job.name]}", file=sys.stderr)
        self._bar.set_postfix_str(self._status(), refresh=False)
        self._bar.update(self._tokens_done() - self._bar.n)

    def _finish(self, job: Job) -> None:
        try:
            self.finished(job)
            self._done += 1
        except RunError as error:
            self.failed[job.name] = str(error)

    def stop(self) -> None:
        """Ask every run to save and end."""
        self.stopping = True
        for _, process in self.running.values():
            process.terminate()

    def _tokens_done(self) -> int:
        return self._tokens - sum(job.tokens - job.last_record().get("tokens", 0) for job in self._left)

    def _status(self) -> str:
        failed = f", {len(self.failed)} failed" if self.failed else ""
        return "; ".join(
            [f"{self._done} of {self._total} runs{failed}", *(_progress(job) for job, _ in self.running.values())]
        )


def _end_with_parent() -> None:
    """Have the kernel ask this process to save and end should the one that started it be killed (Linux)."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _write_files(job: Job) -> None:
    """Write what the run reads, and make the folder of its log."""
    for path, text in job.files.items():
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, text.encode())
    with disk_errors(job.log):
        job.log.parent.mkdir(parents=True, exist_ok=True)


def _progress(job: Job) -> str:
    record = job.last_record()
    if not record:
        return f"{job.name} starts"
    share = record["step"] / job.config.training.steps
    loss = "" if record["loss"] is None else f" loss {record['loss']:.3f}"
    return f"{job.name} {share:.0%}{loss}"


def _reason(job: Job, code: int) -> str:
    """What a run says of its end: in `exit.json`, or as the last line of its log."""
    known, reason = _ending(job.out)
    if known != code:
        reason = (job.log.read_text(errors="replace").splitlines() or ["nothing printed"])[-1]
    return f"exit code {code}: {reason}; {job.log}"


def result_of(job: Job, device: str, root: Path) -> Result:
    """What a run that is done has measured.

    Raises:
        CheckpointError: its files do not tell.
    """
    steps, evaluations = read_records(job.out / "metrics.jsonl"), read_records(job.out / "evaluations.jsonl")
    total = job.config.training.steps
    if not steps or not evaluations or not steps[-1]["step"] == evaluations[-1]["step"] == total:
        raise CheckpointError(
            f"{job.out}: expected metrics.jsonl and evaluations.jsonl up to step {total}; remove the folder to run it"
            " again"
        )
    settled = steps[len(steps) // 10 :]  # the first ones allocate and compile
    speed = statistics.median(record["tokens_per_second"] for record in settled)
    last = [record["loss"] for record in steps[-max(1, len(steps) // 50) :] if record["loss"] is not None]
    losses = [record["validation_loss"] for record in evaluations if record["validation_loss"] is not None]
    pair, size = job.variant.pair, job.variant.size
    return Result(
        variant=job.variant.name,
        seed=job.seed,
        heads=pair.heads,
        head_dim=pair.width,
        kv_heads=pair.kv_heads,
        settings=job.variant.settings,
        parameters=size.parameters,
        state_size=size.state_size,
        flops_per_token=size.flops_per_token,
        steps=total,
        tokens=job.tokens,
        seconds=job.tokens / speed,
        tokens_per_second=speed,
        train_loss=statistics.mean(last or [math.nan]),
        validation_loss=evaluations[-1]["validation_loss"],
        best_validation_loss=min(losses, default=None),
        bits_per_byte=evaluations[-1]["bits_per_byte"],
        accuracy=evaluations[-1].get("accuracy"),  # which older runs have not
        device=device,
        folder=str(job.out.relative_to(root)),
    )
