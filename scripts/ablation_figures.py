"""A library, no command: figures of an ablation, the course of its trainings and the final metric over the state."""

import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.ablation_report import Estimate, Metric, Result, estimate
from training.errors import CheckpointError
from training.metrics import read_records

_DASHES: list[Any] = ["-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)), (0, (2, 1, 1, 1, 1, 1))]
_MARKERS = "osD^vPX*<>p"
_FEW = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")  # of Okabe and Ito
_SETTLED = 0.2  # of a run's tokens: evaluations before are too far off to share a linear axis with the last ones
_BEYOND = 0.04  # of what a share can be: intervals that reach farther are cut off
_NAME_HEIGHT = 0.2  # inches that a name in a legend takes
_NAMED = 12  # so many variants can have their names beside them, more are told by a legend
_WIDE = 20.0  # ratio of losses, or of the runs' ends, from which on a logarithmic axis reads better


@dataclass(frozen=True)
class Theme:
    """Colours of a figure: text and axes, what is behind, and the part of the ordered scale that stands out there."""

    text: str
    back: str
    scale: tuple[float, float]


LIGHT = Theme(text="#1d1f24", back="#ffffff", scale=(0.0, 0.82))
DARK = Theme(text="#e4e6eb", back="#16181d", scale=(0.37, 1.0))


@dataclass(frozen=True)
class Figures:
    """Contents of files by name, SVGs for dark displays by figure, and captions by figure."""

    files: dict[str, bytes]
    dark: dict[str, bytes]
    captions: dict[str, str]


@dataclass(frozen=True)
class Style:
    """How a variant is drawn: its heads are the colour, its other settings dashes and marker."""

    color: Any
    dashes: Any
    marker: str


@dataclass(frozen=True)
class Curve:
    """A run and its evaluations, those that have the metric."""

    result: Result
    tokens: list[int]
    values: list[float]

    @property
    def compute(self) -> list[float]:
        """Training FLOPs until each evaluation."""
        return [tokens * self.result.flops_per_token for tokens in self.tokens]

    @property
    def seconds(self) -> list[float]:
        """Seconds of training until each evaluation; NaN where the run's speed is not known."""
        speed = self.result.tokens_per_second
        return [tokens / speed if speed > 0 else math.nan for tokens in self.tokens]


def draw(out: Path, results: Sequence[Result], metric: Metric) -> Figures:
    """Draw both figures of the runs in a folder, each as PNG and SVG and as SVG for dark displays.

    Raises:
        CheckpointError: a file of evaluations is damaged.
    """
    curves = [read_curve(out, result, metric) for result in results]
    files: dict[str, bytes] = {}
    dark: dict[str, bytes] = {}
    for name, figure, on_dark in (
        ("curves", draw_curves(curves, metric, LIGHT), draw_curves(curves, metric, DARK)),
        ("state", draw_state(results, metric, LIGHT), draw_state(results, metric, DARK)),
    ):
        files |= {f"{name}.{kind}": render(figure, kind) for kind in ("png", "svg")}
        dark[name] = render(on_dark, "svg")
    captions = {
        "curves": f"{_course(metric).capitalize()} of each evaluation over the tokens, the computation and the time of"
        " training; a line is a run, a dot its last evaluation. The first evaluations may be outside.",
        "state": f"{metric.label.capitalize()} over the numbers of the recurrent state of a sequence. Open marks are"
        " runs, full ones means, bars their 95 % confidence intervals; lines join variants that differ in heads and"
        " width alone. Variants with other settings or shared keys stand to the right of the size that they have.",
    }
    return Figures(files, dark, captions)


def render(figure: Any, kind: str) -> bytes:
    """Return a figure's file, "png" or "svg", the same for the same figure."""
    import matplotlib

    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "ablation"}):
        metadata = {"Date": None} if kind == "svg" else {}
        figure.savefig(content, format=kind, dpi=200, metadata=metadata)
    return content.getvalue()


def read_curve(out: Path, result: Result, metric: Metric) -> Curve:
    """Read a run's evaluations that have the metric and a place on the token axis.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = out / result.folder / "evaluations.jsonl"
    points = []
    for record in read_records(path):
        tokens, value = record.get("tokens"), record.get(metric.recorded)
        if type(tokens) not in (int, type(None)) or type(value) not in (int, float, type(None)):
            raise CheckpointError(f"{path}: step {record['step']}: expected numbers as tokens and {metric.recorded}")
        if tokens is not None and value is not None and 0 <= tokens < 2**63 and math.isfinite(value):
            points.append((tokens, float(value)))
    return Curve(result, [tokens for tokens, _ in points], [value for _, value in points])


def styles(results: Sequence[Result], theme: Theme) -> dict[str, Style]:
    """Return each variant's style: colours follow the width of the heads, or tell settings apart."""
    from matplotlib import colormaps

    variants = {result.variant: result for result in results}
    shapes = sorted({_shape(result) for result in results})
    kinds = list(dict.fromkeys(_kind(result) for result in variants.values()))
    if len(shapes) < 2 and len(kinds) > 1:
        return {
            name: Style(_FEW[i % len(_FEW)], _DASHES[i // len(_FEW) % len(_DASHES)], _MARKERS[i % len(_MARKERS)])
            for i, name in enumerate(variants)
        }
    low, high = theme.scale
    scale = colormaps["viridis"]
    found = {}
    for name, result in variants.items():
        place, kind = shapes.index(_shape(result)) / max(len(shapes) - 1, 1), kinds.index(_kind(result))
        color = scale(low + (high - low) * place)
        found[name] = Style(color, _DASHES[kind % len(_DASHES)], _MARKERS[kind % len(_MARKERS)])
    return found


def _shape(result: Result) -> tuple[int, int, int]:
    return result.head_dim, result.heads, result.kv_heads


def _kind(result: Result) -> tuple[str, int]:
    """What is alike in variants that differ in heads and width alone."""
    return repr(result.settings), 0 if result.kv_heads == result.heads else result.kv_heads


def _figure(size: tuple[float, float], panels: int, theme: Theme) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", facecolor=theme.back)
    FigureCanvasAgg(figure)
    row = list(figure.subplots(1, panels, sharey=True, squeeze=False)[0])
    for axes in row:
        axes.set_facecolor(theme.back)
        axes.grid(color=theme.text, alpha=0.13, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(theme.text)
        axes.tick_params(which="both", colors=theme.text, labelsize=8.5)
    return figure, row


def _label(axes: Any, theme: Theme, x: str, y: str = "") -> None:
    axes.set_xlabel(x, color=theme.text, fontsize=9.5)
    axes.set_ylabel(y, color=theme.text, fontsize=9.5)


def draw_curves(curves: Sequence[Curve], metric: Metric, theme: Theme) -> Any:
    """Draw the metric over training tokens, FLOPs and seconds, a line a run; return matplotlib's figure."""
    from matplotlib.ticker import EngFormatter

    drawn = [curve for curve in curves if curve.tokens]
    names = len({curve.result.variant for curve in drawn})
    figure, panels = _figure((10, max(3.6, _NAME_HEIGHT * (names + 1))), 3, theme)
    seconds, unit = _time_unit([second for curve in drawn for second in curve.seconds if math.isfinite(second)])
    look = styles([curve.result for curve in curves], theme)
    for curve in drawn:
        xs: tuple[Sequence[float], ...] = (curve.tokens, curve.compute, [second / seconds for second in curve.seconds])
        for axes, x in zip(panels, xs, strict=True):
            _draw_curve(axes, x, curve.values, look[curve.result.variant])
    for axes, name in zip(panels, ("tokens", "compute (FLOP)", f"time ({unit})"), strict=True):
        _label(axes, theme, f"training {name}")
        _scale_x(axes)
    for axes in panels[:2]:
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    _label(panels[0], theme, "training tokens", _named(_course(metric), metric))
    _scale_y(panels[0], drawn, metric)
    _legend(figure, {curve.result.variant: look[curve.result.variant] for curve in drawn}, theme)
    if not drawn:
        _say_empty(panels[1], theme, "no evaluations yet")
    return figure


def _course(metric: Metric) -> str:
    return "validation loss" if metric.recorded == "validation_loss" else metric.label


def _named(label: str, metric: Metric) -> str:
    return f"{label} ({metric.unit})" if metric.unit and metric.unit != "%" else label


def _draw_curve(axes: Any, x: Sequence[float], y: list[float], style: Style) -> None:
    axes.plot(x, y, color=style.color, linestyle=style.dashes, linewidth=1.1, alpha=0.85)
    axes.plot(x[-1:], y[-1:], color=style.color, marker=style.marker, markersize=3.5, linestyle="none")


def _time_unit(seconds: Sequence[float]) -> tuple[float, str]:
    longest = max(seconds, default=0.0)
    return next(((size, name) for size, name in ((3600.0, "hours"), (60.0, "minutes")) if longest > 2 * size), (1, "s"))


def _scale_x(axes: Any) -> None:
    """Start at zero, or be logarithmic where the runs' ends are so far apart that the short ones would be flat."""
    ends = [line.get_xdata()[-1] for line in axes.lines if math.isfinite(line.get_xdata()[-1])]
    if ends and 0 < min(ends) * _WIDE < max(ends):
        axes.set_xscale("log")
    elif ends and max(ends) > 0:
        axes.set_xlim(0, max(ends) * 1.04)


def _scale_y(axes: Any, curves: Sequence[Curve], metric: Metric) -> None:
    """Fit the axis to evaluations of runs that have settled; all panels share it."""
    from matplotlib.ticker import PercentFormatter

    settled = [
        value
        for curve in curves
        for tokens, value in zip(curve.tokens, curve.values, strict=True)
        if tokens >= _SETTLED * curve.tokens[-1]
    ]
    if settled and min(settled) < max(settled):
        low, high = min(settled), max(settled)
        if metric.lower_is_better and 0 < low * _WIDE < high:
            axes.set_yscale("log")
            axes.set_ylim(low / 1.1, high * 1.1)
        else:
            axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    if metric.unit == "%":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _legend(figure: Any, look: dict[str, Style], theme: Theme) -> None:
    """Put names beside the panels: as they are, even if they look like formulas or start with an underscore."""
    from matplotlib.lines import Line2D

    if not look:
        return
    handles = [Line2D([], [], color=s.color, ls=s.dashes, marker=s.marker, markersize=3.5) for s in look.values()]
    placeholders = [str(i) for i in range(len(look))]
    legend = figure.legend(handles, placeholders, loc="outside right center", frameon=False, handlelength=4)
    for text, name in zip(legend.get_texts(), look, strict=True):
        text.set(text=name, parse_math=False, color=theme.text, fontsize=8.5)


def _say_empty(axes: Any, theme: Theme, words: str) -> None:
    axes.text(0.5, 0.5, words, color=theme.text, ha="center", va="center", transform=axes.transAxes)


@dataclass(frozen=True)
class _Point:
    """A variant's values; `shift` moves it aside, in points of 1/72 inch, so that it covers no other of its size."""

    result: Result
    found: Estimate
    values: list[float]
    shift: float


def draw_state(results: Sequence[Result], metric: Metric, theme: Theme) -> Any:
    """Draw the final metric over the state size, runs, means and intervals; return matplotlib's figure.

    Variants without a state, of size 0, have no place on the logarithmic axis and are left out.
    """
    from matplotlib.ticker import PercentFormatter

    look, lines = styles(results, theme), _lines(results, metric)
    names = [point.result.variant for line in lines for point in line]
    crowded = len(names) > _NAMED
    figure, (axes,) = _figure((8.4, max(4.2, _NAME_HEIGHT * (len(names) + 1))) if crowded else (6.4, 4.2), 1, theme)
    for line in lines:
        _draw_means(axes, line, look[line[0].result.variant].dashes, theme)
        for point in line:
            _draw_point(axes, point, look[point.result.variant], theme)
    _label(axes, theme, "numbers of the recurrent state of a sequence", _named(metric.label, metric))
    if metric.unit == "%":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if lines:
        _scale_state(axes, [point for line in lines for point in line], metric)
        if crowded:
            _legend(figure, {name: style for name, style in look.items() if name in names}, theme)
        else:
            _name_points(axes, lines, theme)
    else:
        _say_empty(axes, theme, "no finished runs yet")
    return figure


def _lines(results: Sequence[Result], metric: Metric) -> list[list[_Point]]:
    """Return variants with a value, those that differ in their heads alone in a list, by state size."""
    variants: dict[str, list[Result]] = {}
    for result in results:
        if metric.value(result) is not None and result.state_size > 0:
            variants.setdefault(result.variant, []).append(result)
    kinds = list(dict.fromkeys(_kind(runs[0]) for runs in variants.values()))
    lines: list[list[_Point]] = [[] for _ in kinds]
    for runs in sorted(variants.values(), key=lambda runs: runs[0].state_size):
        values = [value for run in runs if (value := metric.value(run)) is not None]
        kind = kinds.index(_kind(runs[0]))
        lines[kind].append(_Point(runs[0], estimate(values), values, kind * min(9.0, 45.0 / len(kinds))))
    return lines


def _aside(axes: Any, shift: float) -> Any:
    from matplotlib.transforms import ScaledTranslation

    return axes.transData + ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans)


def _draw_means(axes: Any, line: list[_Point], dashes: Any, theme: Theme) -> None:
    if len(line) > 1:
        x, y = [point.result.state_size for point in line], [point.found.mean for point in line]
        at = _aside(axes, line[0].shift)
        axes.plot(x, y, color=theme.text, alpha=0.45, lw=1.1, ls=dashes, zorder=1, transform=at, label="means")


def _draw_point(axes: Any, point: _Point, style: Style, theme: Theme) -> None:
    size, at = point.result.state_size, _aside(axes, point.shift)
    look = {"color": style.color, "marker": style.marker, "transform": at}
    bar = None if point.found.half is None else [point.found.half]
    axes.errorbar([size], [point.found.mean], yerr=bar, markersize=7, elinewidth=1.3, capsize=3.5, zorder=2, **look)
    if len(point.values) > 1:
        sizes = [size] * len(point.values)
        axes.plot(sizes, point.values, ls="none", markersize=4, mfc=theme.back, mew=1, zorder=3, label="runs", **look)


def _scale_state(axes: Any, points: Sequence[_Point], metric: Metric) -> None:
    """Mark the sizes that there are, as far apart as their labels need; matplotlib can't scale to points put aside."""
    from matplotlib.ticker import NullLocator

    from scripts.ablation_page import count

    sizes = [point.result.state_size for point in points]
    low, high = min(sizes), max(sizes)
    reach = max(high / low, 4.0)
    axes.set_xscale("log", base=2)
    axes.set_xlim(low / reach**0.08, high * reach**0.25)  # names stand to the right of their points
    marked: list[int] = []
    for size in sorted(set(sizes)):
        if not marked or size / marked[-1] > reach**0.1:
            marked.append(size)
    axes.set_xticks(marked, [count(size) for size in marked])
    axes.xaxis.set_minor_locator(NullLocator())
    ends = [value for point in points for value in point.values]
    ends += [point.found.mean + side * (point.found.half or 0) for point in points for side in (-1, 1)]
    margin = 0.07 * (max(ends) - min(ends)) or 0.01 * abs(ends[0]) or 0.01
    bottom, top = min(ends) - margin, max(ends) + margin
    axes.set_ylim((max(bottom, -_BEYOND), min(top, 1 + _BEYOND)) if metric.unit == "%" else (bottom, top))


def _name_points(axes: Any, lines: Sequence[list[_Point]], theme: Theme) -> None:
    """Write each variant's name to the right of its mean, off its line, and off names that are close."""
    from matplotlib.patheffects import withStroke

    low, high = axes.get_ylim()
    apart, reach = 0.05 * (high - low), math.log(axes.get_xlim()[1] / axes.get_xlim()[0])
    points = [point for line in lines for point in line]
    rises = {a.result.variant: b.found.mean - a.found.mean for line in lines for a, b in itertools.pairwise(line)}
    placed: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda p: (p.found.mean, p.result.variant)):
        size, rise = point.result.state_size, rises.get(point.result.variant, 0.0)
        y = point.found.mean - math.copysign(0.025 * (high - low), rise) * bool(rise)
        for other, height in placed:
            if abs(math.log(size / other)) < 0.15 * reach and y < height + apart:
                y = height + apart
        placed.append((size, y))
        axes.annotate(
            point.result.variant,
            (size, y),
            xytext=(9 + max(p.shift for p in points if p.result.state_size == size), 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=theme.text,
            parse_math=False,
            path_effects=[withStroke(linewidth=2.5, foreground=theme.back)],
        )
