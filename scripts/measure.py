"""A library, no command: measures runs (time, memory, allocations) and says on what machine."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], Any]
# About a millisecond: a run on a GPU starts behind it, so that its launches are queued before its time begins.
_WAIT_CYCLES = 2_000_000


@dataclass(frozen=True)
class Times:
    """Seconds of single runs: median, 10th and 90th percentile, least, and how many runs there were."""

    median: float
    p10: float
    p90: float
    least: float
    runs: int

    @property
    def spread(self) -> float:
        return (self.p90 - self.p10) / self.median


def summary(seconds: list[float]) -> Times:
    """Sum up the seconds of at least two runs."""
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return Times(statistics.median(seconds), tenths[0], tenths[-1], min(seconds), len(seconds))


def repeated(once: Callable[[], float], repeats: int, budget: float) -> list[float]:
    """Seconds that `once` returns, `repeats` times, or fewer (but 2) once `budget` seconds have passed."""
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 2 or (len(times) < repeats and time.perf_counter() - start < budget):
        times.append(once())
    return times


def seconds(run: Run, device: torch.device) -> float:
    """Seconds of one run: by CUDA events on a GPU, by the wall clock on a CPU.

    On a GPU up to a millisecond of launching is hidden, as behind the kernels of a model; what a run launches for
    longer than that counts.
    """
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(_WAIT_CYCLES)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def median_seconds(run: Run, repeats: int, device: torch.device) -> float:
    """Median of `seconds` of as many runs, behind a few that are not counted."""
    for _ in range(3):
        run()
    return statistics.median(seconds(run, device) for _ in range(repeats))


def peak_memory(run: Run, device: torch.device) -> int:
    """Bytes that a run holds at most over what was allocated before it, its results included.

    A first run also allocates what stays, such as the workspaces of cuBLAS: measure a later one.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    held = peak = 0
    for size in _allocated_and_freed(run):
        held += size
        peak = max(peak, held)
    return peak


def allocations(run: Run, device: torch.device) -> int:
    """How often PyTorch's allocator of the device hands out memory during a run."""
    if device.type == "cuda":
        run()  # a first run makes workspaces
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        run()
        return int(torch.cuda.memory_stats()["allocation.all.allocated"]) - before
    return sum(size > 0 for size in _allocated_and_freed(run))


def _allocated_and_freed(run: Run) -> list[int]:
    """Bytes of each allocation (positive) and release (negative) of CPU memory, in the order of time."""
    recorded = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    _quietly(recorded.start)
    try:
        run()
    finally:
        _quietly(recorded.stop)
    every: list[Any] = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    events = [e for e in every if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def _quietly(action: Callable[[], None]) -> None:
    """Without what the profiler's library writes to the process's standard error at every start and stop."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        action()
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def saved_bytes(forward: Run) -> int:
    """Bytes of the tensors that a forward pass saves for its backward pass."""
    sizes: list[int] = []

    def pack(x: Tensor) -> Tensor:
        sizes.append(x.nbytes)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        forward()
    return sum(sizes)


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """With `torch.set_float32_matmul_precision`."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out: on a GPU by its type, on a CPU by its text alone."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def installed(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def header(device: torch.device) -> dict[str, str | int]:
    """Where and with what figures are made; what this machine lacks is left out."""
    on_gpu = device.type == "cuda"
    facts: dict[str, str | int | None] = {
        "device": torch.cuda.get_device_name() if on_gpu else _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "CUDA": torch.version.cuda if on_gpu else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "triton": _version("triton"),
        "fla": _version("flash-linear-attention") or _version("fla-core"),
        "float32 products": torch.get_float32_matmul_precision(),
        "commit": _commit(),
    }
    return {name: fact for name, fact in facts.items() if fact is not None}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    head = _output("git", "rev-parse", "--short", "HEAD")
    changes = _output("git", "status", "--porcelain", "ops", "scripts")
    if head is None:
        return "unknown: not a git checkout"
    return f"{head} with changes" if changes else head


def _output(*command: str) -> str | None:
    """The first line that a command prints, "" if there is none; None if it can't run or fails."""
    if shutil.which(command[0]) is None:
        return None
    ended = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    return next(iter(ended.stdout.splitlines()), "") if ended.returncode == 0 else None
