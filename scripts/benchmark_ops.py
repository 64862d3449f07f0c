"""Time the attention operators and their peers, each behind a check: `python -m scripts.benchmark_ops --help`."""

import argparse
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .benchmark_cases import DTYPES, GROUPS, MASKS, OPERATORS, Case, traffic, work
from .benchmark_report import COLUMNS, Result, cells, growth, line, machine, markdown, plot
from .measure import float32_products, header, is_out_of_memory, peak_memory, repeated, saved_bytes, seconds, summary
from .operator_calls import (
    Call,
    Inputs,
    Truth,
    WrongResult,
    check,
    heads_at_once,
    implementations,
    inputs,
    truth,
    unavailable_reason,
)

WARM_UP = 3  # runs before the first time
ROTATED_BYTES = 200 * 2**20  # copies of the inputs take turns until they are larger than any cache of a GPU
SHAPE_OPTIONS: dict[str, Any] = {
    "operator": "masked", "batch": 1, "heads": 8, "kv_heads": None, "tokens": [1024], "width": 64, "value_width": None,
    "dtypes": ["float32"], "mask": None, "mask_grad": False, "forward_only": False, "qk_norm": False,
}  # fmt: skip
FIELD_OPTIONS = {
    "B": "batch", "H": "heads", "Gk": "kv-heads", "Gv": "kv-heads", "Lq": "tokens", "D": "width", "E": "value-width",
    "mask_grad": "mask-grad",
}  # fmt: skip


def measure_case(case: Case, names: Sequence[str], args: argparse.Namespace) -> Iterator[Result]:
    """Results of the named implementations on a case, the baseline's first."""
    device = torch.device(args.device)
    names = sorted(names, key=lambda name: name != args.baseline)
    try:
        given = inputs(case, device)
        expected = truth(case, given)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        for name in names:
            yield _result(case, name, status="out of memory", reason="inputs and float64 truth")
        return
    baseline: float | None = None
    for name in names:
        result = measure(case, name, given, expected, args)
        if result["status"] == "ok":
            median = result["seconds"]["median"]
            baseline = median if name == (args.baseline or names[0]) else baseline
            result["ratio"] = None if baseline is None else median / baseline
        yield result


def measure(case: Case, name: str, given: Inputs, expected: Truth, args: argparse.Namespace) -> Result:
    """Check one implementation, then time it and take its memory."""
    limit = int(args.score_memory * 2**30)
    reason = unavailable_reason(case, name, given, limit)
    if reason is not None:
        return _result(case, name, status="skipped", reason=reason)
    copies = [given]
    if given.q.is_cuda:
        copies += [given.copy() for _ in range(min(ROTATED_BYTES // given.bytes(), 64))]
    try:
        return _measured(Call(case, name, copies, heads_at_once(case, name, limit)), expected, args)
    except WrongResult as error:
        return _result(case, name, status="FAILED", reason=str(error))
    except Exception as error:  # noqa: BLE001 (one that can't do a shape must not cost the figures of the others)
        said = str(error).strip().splitlines() or [""]
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            return _result(case, name, status="out of memory", reason=said[0])
        traceback.print_exc()
        return _result(case, name, status="FAILED", reason=f"{type(error).__name__}: {said[0]}")


def _measured(call: Call, expected: Truth, args: argparse.Namespace) -> Result:
    case, device = call.case, torch.device(args.device)
    errors = None if call.implementation == "softmax" else check(call, expected)
    first = call.part(call.groups[0])
    if len(call.groups) == 1:
        for turn in range(max(WARM_UP, len(call.copies))):
            call.part(call.groups[0], turn)()
    peak = peak_memory(first, device)
    turns = iter(range(sys.maxsize))

    def once() -> float:
        turn = next(turns)
        return sum(seconds(call.part(heads, turn), device) for heads in call.groups)

    times = summary(repeated(once, args.repeats, args.seconds))
    some = len(call.groups) > 1
    return _result(
        case,
        call.implementation,
        status="ok",
        seconds={**asdict(times), "spread": times.spread},
        tflops=work(case) / times.median / 1e12,
        gbytes=traffic(case) / times.median / 1e9,
        peak_bytes=peak,
        saved_bytes=saved_bytes(first.forward) if case.backward else None,
        error=None if errors is None else max(errors.values()),
        note=f"{case.H // len(call.groups)} of {case.H} heads at a time" if some else "",
    )


def _result(case: Case, name: str, **figures: Any) -> Result:
    series = "-".join(part for part in str(case).split("-") if part[0] not in "LT")
    known = {"case": str(case), "fields": asdict(case), "series": series, "length": case.Lq, "implementation": name}
    return {**known, "reason": "", "error": None, "ratio": None, "note": "", **figures}


def benchmark(cases: Sequence[Case], args: argparse.Namespace) -> list[Result]:
    """Measure all cases, print a line for each implementation as it ends, keep the JSON file up to date."""
    record: dict[str, Any] = {"command": args.command, "header": header(torch.device(args.device))}
    if args.commit:
        record["header"]["commit"] = args.commit
    print(machine(record["header"]))
    width = max(len(str(case)) for case in cases)
    print(line(COLUMNS, width))
    results: list[Result] = []
    try:
        for case in cases:
            names = [n for n in implementations(case) if args.implementations is None or n in args.implementations]
            for result in measure_case(case, names, args):
                print(line(cells(result), width), flush=True)
                results.append(result)
                if args.json is not None:
                    _write(args.json, {**record, "results": results})
    finally:  # a run that is stopped draws what it has
        if args.plot is not None:
            _draw([(machine(record["header"]), results)], args.plot)
    return results


def _draw(runs: Sequence[tuple[str, Sequence[Result]]], target: Path) -> None:
    if any(result["status"] == "ok" for _, results in runs for result in results):
        plot(runs, target)
    else:
        print(f"nothing was measured, so {target} is not drawn", file=sys.stderr)


def _write(target: Path, record: dict[str, Any]) -> None:
    """A line for each result, all or nothing: a run that is cut off leaves what it had."""
    new = target.with_name(f".{target.name}.new")
    head = json.dumps({name: value for name, value in record.items() if name != "results"})
    rows = ",\n".join(json.dumps(result) for result in record["results"])
    new.write_text(f'{head[:-1]}, "results": [\n{rows}\n]}}\n')
    os.replace(new, target)


def show(args: argparse.Namespace) -> None:
    """Tables, growth with length and the plot of files that earlier runs wrote."""
    runs = []
    for file in args.from_json:
        try:
            record = json.loads(file.read_text())
            title, results = machine(record["header"]), record["results"]
            if not results:
                raise ValueError("no results")
            table = "\n".join([markdown(results) if args.markdown else _table(results), "", *growth(results)])
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            said = f"{type(error).__name__}: {error}"
            args.parser.error(f"--from-json: expected files that --json wrote, got {file}: {said}")
        print(f"{title}\n\n{table}\n")
        runs.append((title, results))
    if args.plot is not None:
        _draw(runs, args.plot)


def _table(results: Sequence[Result]) -> str:
    width = max(len(result["case"]) for result in results)
    return "\n".join(line(columns, width) for columns in [COLUMNS, *(cells(result) for result in results)])


def _cases(args: argparse.Namespace) -> list[Case]:
    """The named cases, or those that the options of shapes describe."""
    parser: argparse.ArgumentParser = args.parser
    given = [name for name in SHAPE_OPTIONS if getattr(args, name) is not None]
    if args.cases and given:
        parser.error(f"--cases: expected no options of shapes beside it, got --{given[0].replace('_', '-')}")
    if args.cases:
        every = {str(case): [case] for group in GROUPS.values() for case in group} | GROUPS
        for name in args.cases:
            if name not in every:
                parser.error(f"--cases: expected some of {', '.join(GROUPS)}, or cases that --list names, got {name}")
        return list(dict.fromkeys(case for name in args.cases for case in every[name]))
    o = {name: getattr(args, name) if name in given else value for name, value in SHAPE_OPTIONS.items()}
    kv = o["heads"] if o["kv_heads"] is None else o["kv_heads"]
    width = o["width"] if o["value_width"] is None else o["value_width"]
    mask = o["mask"] or ("shared" if o["operator"] == "masked" else "none")
    rest: dict[str, Any] = {"mask_grad": o["mask_grad"], "qk_norm": o["qk_norm"], "backward": not o["forward_only"]}
    try:
        return [
            Case(o["operator"], o["batch"], o["heads"], kv, kv, tokens, tokens, o["width"], width, dtype, mask, **rest)
            for dtype in dict.fromkeys(o["dtypes"])
            for tokens in dict.fromkeys(o["tokens"])
        ]
    except ValueError as problem:
        field, _, expected = str(problem).partition(":")
        parser.error(f"--{FIELD_OPTIONS.get(field, field)}:{expected}")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; ends with code 2 on a value that makes no sense."""
    p = argparse.ArgumentParser(prog="python -m scripts.benchmark_ops", allow_abbrev=False)
    p.description = "Time the attention operators and their peers, each behind a check of its numbers."
    p.add_argument("--list", action="store_true", help="name all cases by group, and end")
    p.add_argument("--cases", nargs="+", metavar="NAME", help=f"cases, or groups of them: {', '.join(GROUPS)}")
    p.add_argument("--implementations", nargs="+", metavar="NAME", help="those that know a case; all by default")
    p.add_argument("--baseline", metavar="NAME", help="implementation that ratios refer to; each case's first")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--precision", choices=["highest", "high"], default="highest", help="of float32 products")
    p.add_argument("--repeats", type=int, help="runs of a time; 30 on a GPU, 7 on a CPU")
    p.add_argument(
        "--seconds", type=float, default=20, help="no more runs (after 2) once this has passed (%(default)s)"
    )
    p.add_argument("--score-memory", type=float, default=8, metavar="GIB", help="of a materialised decay mask")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE, anew after each")
    p.add_argument("--plot", type=Path, metavar="FILE", help="draw the results to a .png or .svg file")
    p.add_argument("--from-json", type=Path, nargs="+", metavar="FILE", help="show files of --json, measure nothing")
    p.add_argument("--markdown", action="store_true", help="Markdown tables, with --from-json")
    p.add_argument("--commit", help="what to state as commit, where the code is no git checkout")
    shape = p.add_argument_group("shapes, instead of --cases")
    shape.add_argument("--operator", choices=OPERATORS, help="the others need it")
    shape.add_argument("--batch", type=int, help="sequences")
    shape.add_argument("--heads", type=int, help="query heads of each")
    shape.add_argument("--kv-heads", type=int, help="of k and v; as many as of q by default")
    shape.add_argument("--tokens", type=int, nargs="+", help="of each sequence; several make several cases")
    shape.add_argument("--width", type=int, help="of a head's q and k")
    shape.add_argument("--value-width", type=int, help="of a head's v; that of q by default")
    shape.add_argument("--dtypes", nargs="+", choices=list(DTYPES), help="of q, k and v")
    shape.add_argument("--mask", choices=MASKS, help="(1, 1, L, L), none, the same of bool, (B, H, L, L), or causal")
    for flag, help in (
        ("--mask-grad", "the mask's gradient as well"),
        ("--forward-only", "no backward pass"),
        ("--qk-norm", "divide q and k by their length in the operator"),
    ):
        shape.add_argument(flag, action="store_true", default=None, help=help)
    args = p.parse_args(argv)
    for mode, known in (("list", {"list"}), ("from_json", {"from_json", "markdown", "plot"})):
        others = [name for name, value in vars(args).items() if value != p.get_default(name) and name not in known]
        if getattr(args, mode) and others:
            p.error(f"--{mode.replace('_', '-')}: expected no --{others[0].replace('_', '-')} beside it")
    if args.markdown and not args.from_json:
        p.error("--markdown: expected --from-json beside it")
    args.parser = p
    args.command = " ".join(["python -m scripts.benchmark_ops", *(sys.argv[1:] if argv is None else argv)])
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    error = args.parser.error
    args.repeats = (30 if args.device == "cuda" else 7) if args.repeats is None else args.repeats
    if args.repeats < 2:
        error(f"--repeats: expected a whole number from 2, got {args.repeats}")
    for name, number in (("--seconds", args.seconds), ("--score-memory", args.score_memory)):
        if not 0 < number < math.inf:
            error(f"{name}: expected a number over 0, got {number}")
    for name, file in (("--json", args.json), ("--plot", args.plot)):
        if file is None:
            continue
        if not file.absolute().parent.is_dir() or file.is_dir():
            error(f"{name}: expected a file in a folder that exists, got {file}")
        if not os.access(file.absolute().parent, os.W_OK):
            error(f"{name}: expected a folder to write in, got {file.absolute().parent}")
    if args.plot is not None and args.plot.suffix not in (".png", ".svg"):
        error(f"--plot: expected a .png or .svg file, got {args.plot}")
    if args.from_json or args.list:
        return
    args.cases = _cases(args)
    known = list(dict.fromkeys(name for case in args.cases for name in implementations(case)))
    for name in args.implementations or ():
        if name not in known:
            error(f"--implementations: expected some of {', '.join(known)}, got {name}")
    measured = args.implementations or known
    if args.baseline is not None and args.baseline not in measured:
        error(f"--baseline: expected one of {', '.join(measured)}, got {args.baseline}")
    if args.device == "cuda" and not torch.cuda.is_available():
        error("--device: cuda needs a GPU, torch.cuda.is_available() is False")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 1 if a check of numbers failed, 130 if it was stopped by Ctrl-C."""
    args = arguments(argv)
    if args.list:
        for group, cases in GROUPS.items():
            print(group, *(f"  {case}" for case in cases), sep="\n")
        return 0
    if args.from_json:
        show(args)
        return 0
    try:
        with float32_products(args.precision):
            results = benchmark(args.cases, args)
    except KeyboardInterrupt:
        print("stopped; what was measured is above" + (f" and in {args.json}" if args.json else ""), file=sys.stderr)
        return 130
    for text in growth(results):
        print(text)
    return int(any(result["status"] == "FAILED" for result in results))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    sys.exit(main())
