"""Times and memory of the attention operators, each behind a check of its numbers.

All implementations compute causal attention with a decay per head on the same inputs; "softmax" is PyTorch's causal
scaled dot product attention, other maths of the same shape, and is not checked. The float64 truth is the chunkwise
definition on the first key/value head. Times are the median of repeated runs after one to warm up, by CUDA events on
a GPU and by the wall clock on a CPU. Peak memory is what one run holds at most over its inputs, by the CUDA
allocator's statistics, and on a CPU by the allocations that PyTorch's profiler records.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ops import flash_linear_attention, lightning_attention, normal_linear_attention
from ops.decay import alibi_slopes, causal_decay
from ops.reference import chunkwise

IMPLEMENTATIONS = {"lightning": ("torch", "normal", "softmax"), "masked": ("normal", "split", "softmax")}
DTYPES = ("float32", "bfloat16", "float16", "float64")
# Largest error allowed before a time is taken, relative to the largest value: some ulps of sums of thousands of terms.
TOLERANCE = {"float64": 1e-10, "float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
SCORE_COPIES = 6  # (T, T) tensors of a head that the materialised mask holds at once, its mask included


@dataclass(frozen=True)
class Case:
    """Shape of a call: q (B, H, T, D), k and v (B, G, T, D)."""

    operator: str
    B: int
    H: int
    G: int
    T: int
    D: int
    dtype: str
    device: str
    backward: bool
    qk_norm: bool

    def __str__(self) -> str:
        heads = f"H{self.H}" if self.H == self.G else f"H{self.H}/{self.G}"
        return f"{self.operator}-B{self.B}-{heads}-T{self.T}-D{self.D}-{self.dtype}" + ("-norm" if self.qk_norm else "")


@dataclass
class Result:
    """What was measured: seconds of each run, and bytes."""

    case: str
    tokens: int
    implementation: str
    median: float
    spread: float  # (largest - smallest) / median
    runs: int
    peak_bytes: int
    error: float | None  # largest error of the check relative to the largest value; None: not checked
    heads_at_once: int
    ratio: float | None = None  # time over the baseline's


class Call:
    """One implementation on the inputs of a case, a group of heads at a time where all at once don't fit."""

    def __init__(self, case: Case, implementation: str, memory: float) -> None:
        self.case, self.implementation = case, implementation
        self.group = _heads_at_once(case, memory) if implementation in ("normal", "split") else case.H
        self.device = torch.device(case.device)
        random = torch.Generator().manual_seed(0)
        dtype = getattr(torch, case.dtype)
        self.q, self.k, self.v, self.do = (
            torch.randn(case.B, heads, case.T, case.D, generator=random).to(self.device, dtype)
            for heads in (case.H, case.G, case.G, case.H)
        )
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.log_decay = -alibi_slopes(case.H, self.device).to(wide)

    def parts(self) -> Iterator[Callable[[], list[Tensor]]]:
        """A function for each group of heads that returns o and the gradients of q, k and v."""
        share = self.case.H // self.case.G
        for start in range(0, self.case.H, self.group):
            at = slice(start, start + self.group)
            at_kv = slice(start // share, (start + self.group) // share)
            inputs = [x.detach() for x in (self.q[:, at], self.k[:, at_kv], self.v[:, at_kv])]
            if self.case.backward:
                inputs = [x.requires_grad_() for x in inputs]
            attention = self._attention(at)
            yield lambda inputs=inputs, attention=attention, at=at: self._pass(inputs, attention, self.do[:, at])  # type: ignore[misc]

    def _pass(self, inputs: list[Tensor], attention: Callable[..., Any], do: Tensor) -> list[Tensor]:
        o = attention(*inputs)
        return [o.detach(), *torch.autograd.grad(o, inputs, do)] if self.case.backward else [o]

    def _attention(self, at: slice) -> Callable[..., Any]:
        norm, log_decay = self.case.qk_norm, self.log_decay[at]
        if self.implementation == "torch":
            return lambda q, k, v: lightning_attention(q, k, v, log_decay, qk_norm=norm, backend="torch")
        if self.implementation == "softmax":
            gqa = self.case.H != self.case.G
            sdpa = torch.nn.functional.scaled_dot_product_attention
            return lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=gqa)
        mask = causal_decay(log_decay, self.case.T)[None].to(self.q.dtype)  # (1, heads, T, T), not timed
        if self.implementation == "normal" and not norm:
            return lambda q, k, v: normal_linear_attention(q, k, v, mask)
        return lambda q, k, v: flash_linear_attention(q, k, v, mask, qk_norm=norm, implementation=self.implementation)

    def truth(self) -> list[Tensor]:
        """Float64 results of the first key/value head and its query heads."""
        share = self.case.H // self.case.G
        heads = ((self.q, share), (self.k, 1), (self.v, 1))
        q, k, v = inputs = [x[:, :n].double().requires_grad_() for x, n in heads]
        o, _ = chunkwise(q, k, v, self.log_decay[:share].double(), self.case.qk_norm, chunk_size=128)
        if not self.case.backward:
            return [o.detach()]
        return [o.detach(), *torch.autograd.grad(o, inputs, self.do[:, :share].double())]


def _heads_at_once(case: Case, memory: float) -> int:
    """The most heads, whole key/value groups that divide H, whose scores fit into `memory` bytes, but one at least."""
    item = 8 if case.dtype == "float64" else 4
    fits = memory / (SCORE_COPIES * item * case.B * case.T**2)
    share = case.H // case.G
    return max([n for n in range(share, case.H + 1, share) if case.H % n == 0 and n <= fits], default=share)


def check(call: Call) -> float | None:
    """Compare outputs and gradients with the truth; returns the largest relative error, raises ArithmeticError."""
    if call.implementation == "softmax":
        return None
    worst = 0.0
    results = next(call.parts())()
    for name, actual, expected in zip(("o", "dq", "dk", "dv"), results, call.truth(), strict=False):
        actual = actual[:, : expected.shape[1]]
        error = ((actual - expected).abs().max() / expected.abs().max()).item()
        if not error <= TOLERANCE[call.case.dtype]:
            raise ArithmeticError(
                f"{call.case} {call.implementation}: {name} is off by {error:.1e} of its largest value"
            )
        worst = max(worst, error)
    return worst


def measure(case: Case, implementation: str, repeats: int, seconds: float, memory: float) -> Result:
    """Check one implementation, then time it: `repeats` runs, fewer (but 2) once `seconds` have passed."""
    call = Call(case, implementation, memory)
    error = check(call)
    peak = peak_memory(next(call.parts()), call.device)  # warms up too
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 2 or (len(times) < repeats and time.perf_counter() - start < seconds):
        times.append(sum(_seconds(part, call.device) for part in call.parts()))
    median = statistics.median(times)
    spread = (max(times) - min(times)) / median
    return Result(str(case), case.T, implementation, median, spread, len(times), peak, error, call.group)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def peak_memory(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a run holds at most over what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    recorded = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    _quietly(recorded.start)
    run()
    _quietly(recorded.stop)
    held = peak = 0
    every: list[Any] = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    events = [e for e in every if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


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


def saved_bytes(forward: Callable[[], Any]) -> int:
    """Bytes of the tensors that a forward pass saves for its backward pass."""
    sizes: list[int] = []

    def pack(x: Tensor) -> Tensor:
        sizes.append(x.nbytes)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        forward()
    return sum(sizes)


def resident_growth(run: Callable[[], Any]) -> int | None:
    """Bytes by which the resident set of the process grows at most during a run, polled each ms; Linux only."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return None

    def resident() -> int:
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = peak = resident()
    done = threading.Event()

    def poll() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, resident())

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        run()
    finally:
        done.set()
        thread.join()
    return max(peak, resident()) - before


def benchmark(cases: Iterable[Case], args: argparse.Namespace) -> list[Result]:
    """Measure every implementation on every case and print a line for each as it ends."""
    print(
        f"\n{'case':44} {'implementation':14} {'median':>10} {'spread':>7} {'runs':>5} {'peak':>10} {'error':>8} ratio"
    )
    results: list[Result] = []
    for case in cases:
        of_case: dict[str, Result] = {}
        for name in sorted(args.implementations, key=lambda n: n != args.baseline):
            if name == "normal" and args.preset == "scaling" and case.T > 16384:
                continue
            of_case[name] = result = measure(case, name, args.repeats, args.seconds, args.score_memory * 2**30)
            if args.baseline in of_case:
                result.ratio = result.median / of_case[args.baseline].median
            print(_line(result, case), flush=True)
        results += of_case.values()
    return results


def _line(r: Result, case: Case) -> str:
    error = "other" if r.error is None else f"{r.error:.0e}"
    ratio = "" if r.ratio is None else f"{r.ratio:.2f}"
    note = "" if r.heads_at_once == case.H else f"  ({r.heads_at_once} of {case.H} heads at a time)"
    return (
        f"{r.case:44} {r.implementation:14} {r.median * 1e3:7.1f} ms {r.spread:6.0%} {r.runs:5}"
        f" {r.peak_bytes / 2**20:6.0f} MiB {error:>8} {ratio:>5}{note}"
    )


def scaling(results: list[Result]) -> dict[str, float]:
    """Growth from 16,384 to 32,768 tokens, and the materialised mask's time over the operator's at 16,384."""
    time_of = {(r.implementation, r.tokens): r.median for r in results}
    growth = time_of["torch", 32768] / time_of["torch", 16384]
    print(f"\nT = 32,768 takes {growth:.2f} times as long as T = 16,384 (at most 2.3)")
    summary = {"growth": growth}
    if ("normal", 16384) in time_of:
        summary["mask_over_chunks"] = time_of["normal", 16384] / time_of["torch", 16384]
        print(f"T = 16,384: the materialised mask takes {summary['mask_over_chunks']:.1f} times as long (at least 10)")
    return summary


def memory(case: Case) -> dict[str, int | None]:
    """What forward and backward of lightning attention store and hold at a length, printed and returned in bytes."""
    call = Call(case, "torch", 0)
    (run,) = call.parts()
    leaves = q, k, v = [x.detach().requires_grad_() for x in (call.q, call.k, call.v)]
    figures = {
        "inputs q, k, v": sum(x.nbytes for x in leaves),
        "saved for the backward pass": saved_bytes(lambda: lightning_attention(q, k, v, call.log_decay)),
        "peak over the inputs, forward + backward": peak_memory(run, call.device),
        "resident set growth of one run": resident_growth(run) if call.device.type == "cpu" else None,
        "(H, T, T) scores that are never made": case.B * case.H * case.T**2 * call.q.element_size(),
    }
    print(f"\nmemory of {case}")
    for name, size in figures.items():
        print(f"  {name:42} " + ("not measured" if size is None else f"{size / 2**20:10,.0f} MiB"))
    return figures


def header(device: str) -> dict[str, Any]:
    """Where and with what the figures are made."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": _commit(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    def git(*arguments: str) -> str:
        root = Path(__file__).parent.parent
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--porcelain", "ops") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not a git checkout"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; ends with code 2 on a value that makes no sense."""
    p = argparse.ArgumentParser(prog="python -m scripts.benchmark_ops", allow_abbrev=False)
    p.description = "Time the attention operators, each behind a check of its numbers."
    p.add_argument("--preset", choices=["scaling"], help="B 1, H 8, D 64, float32, T = 1,024 … 32,768")
    p.add_argument("--operator", choices=list(IMPLEMENTATIONS), default="lightning")
    p.add_argument("--implementations", help="comma-separated; all of the operator's by default, softmax only if named")
    p.add_argument("--baseline", help="implementation that ratios refer to; the first by default")
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--heads", type=int, default=8)
    p.add_argument("--kv-heads", type=int, help="a divisor of --heads; the same by default")
    p.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096])
    p.add_argument("--width", type=int, default=64, help="of a head's q, k and v")
    p.add_argument("--dtype", choices=DTYPES, default="float32")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--forward-only", action="store_true", help="leave the backward pass out")
    p.add_argument("--qk-norm", action="store_true")
    p.add_argument("--repeats", type=int, default=7, help="runs of a time")
    p.add_argument("--seconds", type=float, default=20, help="stop repeating (after 2 runs) once this has passed")
    p.add_argument("--score-memory", type=float, default=8, help="GiB that a materialised mask may take")
    p.add_argument("--memory", action="store_true", help="also what the backward pass stores at T = 65,536")
    p.add_argument("--json", type=Path, help="also write the figures to this file")
    args = p.parse_args(argv)
    if args.preset == "scaling":
        args.operator, args.batch, args.heads, args.width, args.dtype = "lightning", 1, 8, 64, "float32"
        args.kv_heads, args.tokens = 8, [2**n for n in range(10, 16)]
    valid = IMPLEMENTATIONS[args.operator]
    named = args.implementations.split(",") if args.implementations else [n for n in valid if n != "softmax"]
    if not set(named) <= set(valid):
        p.error(f"--implementations: expected some of {', '.join(valid)}, got {args.implementations}")
    args.implementations, args.baseline = named, args.baseline or named[0]
    if args.baseline not in named:
        p.error(f"--baseline: expected one of {', '.join(named)}, got {args.baseline}")
    if args.preset == "scaling" and "torch" not in named:
        p.error("--implementations: the scaling preset needs torch")
    args.kv_heads = args.kv_heads or args.heads
    if min(args.batch, args.heads, args.kv_heads, args.width, *args.tokens, args.repeats) < 1:
        p.error("--batch, --heads, --kv-heads, --width, --tokens, --repeats: expected whole numbers from 1")
    if args.heads % args.kv_heads:
        p.error(f"--kv-heads: expected a divisor of {args.heads} heads, got {args.kv_heads}")
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device: cuda needs a GPU, torch.cuda.is_available() is False")
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    args = arguments(argv)
    record: dict[str, Any] = {"header": header(args.device)}
    print(", ".join(f"{name}: {value}" for name, value in record["header"].items()))
    print("forward" if args.forward_only else "forward + backward")
    shape = (args.batch, args.heads, args.kv_heads)
    rest = (args.width, args.dtype, args.device, not args.forward_only, args.qk_norm)
    results = benchmark([Case(args.operator, *shape, tokens, *rest) for tokens in args.tokens], args)
    record["results"] = [asdict(r) for r in results]
    if args.preset == "scaling":
        record["scaling"] = scaling(results)
    if args.memory:
        record["memory"] = memory(Case(args.operator, *shape, 65536, *rest))
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
