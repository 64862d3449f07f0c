"""A library, no command: shows results of the operators' benchmark as tables, growth with length, and plots.

A result is a dictionary with these keys:
    case, fields, series, length    the case's id and fields; its id without the length, and the length, for plots
    implementation                  its name
    status, reason                  "ok", "skipped", "FAILED" or "out of memory", and why if it is not ok
    seconds                         median, p10, p90, least, spread (p90 - p10 over the median) and number of runs
    tflops, gbytes                  nominal work in 10¹² flop and traffic in 10⁹ bytes, a second of the median
    peak_bytes, saved_bytes         memory over the inputs, and what a forward pass saves for its backward pass
    error, ratio, note              largest relative error; median over the baseline's; what else is to be known
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]

COLUMNS = (
    "case", "implementation", "median ms", "spread", "runs", "TFLOP/s", "GB/s", "peak MiB", "saved MiB", "error",
    "ratio", "note",
)  # fmt: skip


def cells(result: Result) -> list[str]:
    """A result's columns as text; of one that was not measured, the reason is all there is."""
    named = [result["case"], result["implementation"]]
    if result["status"] != "ok":
        return [*named, f"{result['status']}: {result['reason']}"]
    times, error, ratio = result["seconds"], result["error"], result["ratio"]
    return [
        *named,
        _number(times["median"] * 1e3),
        f"{times['spread']:.0%}",
        str(times["runs"]),
        _number(result["tflops"]),
        _number(result["gbytes"]),
        _mebibytes(result["peak_bytes"]),
        _mebibytes(result["saved_bytes"]),
        "unchecked" if error is None else f"{error:.0e}",
        "" if ratio is None else f"{ratio:.2f}",
        result["note"],
    ]


def _number(x: float) -> str:
    return f"{x:,.3f}" if x < 10 else f"{x:,.1f}"


def _mebibytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.1f}"


def line(columns: Sequence[str], case_width: int) -> str:
    """A line of the table on the terminal: case and implementation to the left, numbers to the right."""
    left = f"{columns[0]:{case_width}}  {columns[1]:14}"
    if len(columns) < len(COLUMNS):
        return f"{left}   {columns[2]}"
    return f"{left}{''.join(f'{x:>11}' for x in columns[2:-1])}  {columns[-1]}".rstrip()


def markdown(results: Sequence[Result]) -> str:
    """A Markdown table of results."""
    rows = [cells(result) for result in results]
    rows = [[*row, *[""] * (len(COLUMNS) - len(row))] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [COLUMNS, ["---"] * len(COLUMNS), *rows])


def machine(facts: dict[str, Any]) -> str:
    """A header in one line."""
    return ", ".join(f"{name}: {fact}" for name, fact in facts.items())


def growth(results: Sequence[Result]) -> list[str]:
    """Of each implementation that ran at several lengths, time and memory at the longest over the one before."""
    lines = []
    for (series, name), of_length in _by_series(results).items():
        for before, after in itertools.pairwise(of_length[-2:]):
            time = after["seconds"]["median"] / before["seconds"]["median"]
            peak = after["peak_bytes"] / before["peak_bytes"]
            lines.append(
                f"{series} {name}: {after['length']:,} tokens take {time:.2f} times as long as {before['length']:,}"
                f" and hold {peak:.2f} times the memory"
            )
    return lines


def _by_series(results: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    """Measured results of each series and implementation, in the order of lengths."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in sorted(results, key=lambda r: r["length"]):
        if result["status"] == "ok":
            groups.setdefault((result["series"], result["implementation"]), []).append(result)
    return groups


def plot(runs: Sequence[tuple[str, Sequence[Result]]], target: Path) -> None:
    """Draw measured results, a column of panels for each run under its title, to a .png or .svg file.

    Where an implementation ran at several lengths, time and peak memory are lines over the length; else time is bars.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = [_by_series(results) for _, results in runs]
    by_length = any(len(of_length) > 1 for every in groups for of_length in every.values())
    bars = 0 if by_length else max(len(every) for every in groups)
    rows = 2 if by_length else 1
    figure = Figure(figsize=(6.5 * len(runs), max(4 * rows, 1.5 + 0.22 * bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, len(runs), squeeze=False, sharey="row" if by_length else "none")
    styles: dict[tuple[str, str], dict[str, Any]] = {
        key: {"color": f"C{i % 10}", "marker": "os^Dvx+"[i % 7], "markersize": 5, "alpha": 0.8}
        for i, key in enumerate(dict.fromkeys(key for every in groups for key in every))
    }
    for column, ((title, _), every) in enumerate(zip(runs, groups, strict=True)):
        axes[0, column].set_title(title, fontsize=8, wrap=True)
        if by_length:
            _draw_lines(axes[:, column], every, styles)
        else:
            _draw_bars(axes[0, column], every)
    handles = {label: h for ax in axes.flat for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(target, dpi=120)


def _draw_lines(axes: Any, groups: dict[tuple[str, str], list[Result]], styles: dict[tuple[str, str], Any]) -> None:
    for (series, name), of_length in groups.items():
        lengths, style = [r["length"] for r in of_length], styles[series, name]
        axes[0].plot(lengths, [r["seconds"]["median"] * 1e3 for r in of_length], label=f"{name}: {series}", **style)
        axes[1].plot(lengths, [r["peak_bytes"] / 2**20 for r in of_length], **style)
    for ax, label in zip(axes, ("time in ms, median", "peak memory over the inputs in MiB"), strict=True):
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
    axes[-1].set_xlabel("length in tokens")


def _draw_bars(ax: Any, groups: dict[tuple[str, str], list[Result]]) -> None:
    results = [of_length[0] for of_length in groups.values()][::-1]
    ax.barh([f"{r['case']}  {r['implementation']}" for r in results], [r["seconds"]["median"] * 1e3 for r in results])
    ax.tick_params(labelsize=7)
    ax.set_xlabel("time in ms, median")
