"""The loss curve of one or more runs as a figure."""

import io
import math
from pathlib import Path
from typing import Any

from training.errors import CheckpointError, ConfigError
from training.metrics import read_records
from training.storage import disk_errors, replace_file

_SMOOTHED_SHARE = 0.02  # of the steps, to each side


def plot_runs(outs: list[Path], target: Path) -> None:
    """Draw training loss, raw and smoothed, and validation loss over training tokens.

    Args:
        outs: folders of runs, each one a colour; running ones may be among them.
        target: the figure's file; its suffix names the format (png, pdf, svg).

    Raises:
        ConfigError: a folder is no run with at least one step, or the format is unknown.
        CheckpointError: a file of metrics is damaged.
        ResourceError: the disk is full; an earlier figure is still there.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    runs = [_read_run(out) for out in outs]
    figure = Figure(figsize=(8, 5), layout="constrained")
    formats = FigureCanvasAgg(figure).get_supported_filetypes()
    if target.suffix[1:] not in formats:
        raise ConfigError(f"{target}: expected a suffix among {', '.join(sorted(formats))}")
    axes = figure.subplots()
    for index, (label, (steps, evaluations)) in enumerate(zip(_labels(outs), runs, strict=True)):
        _draw_run(axes, label, f"C{index}", steps, evaluations)
    axes.set_xlabel("training tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format=target.suffix[1:], dpi=150)
    with disk_errors(target, otherwise=ConfigError):
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(target, content.getvalue())


def _draw_run(axes: Any, label: str, color: str, steps: list[dict], evaluations: list[dict]) -> None:
    tokens = [record["tokens"] for record in steps]
    losses = [_number(record["loss"]) for record in steps]
    axes.plot(tokens, losses, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(
        tokens,
        smooth(losses, round(_SMOOTHED_SHARE * len(losses))),
        color=color,
        linewidth=1.8,
        label=f"{label}, training",
    )
    if evaluations:
        axes.plot(
            [record["tokens"] for record in evaluations],
            [_number(record["validation_loss"]) for record in evaluations],
            color=color,
            linestyle="--",
            linewidth=1.2,
            marker="o",
            markersize=5,
            markeredgecolor="white",
            label=f"{label}, validation",
        )


def smooth(values: list[float], radius: int) -> list[float]:
    """Return the mean over up to `radius` values to each side; gaps (NaN) are left out.

    The window is as wide to the left as to the right even at the start, where the loss is steep and would lag.
    """
    import numpy as np

    series = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(series)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, series, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    centre = np.arange(len(series))
    reach = np.minimum(centre, radius)
    first, end = centre - reach, np.minimum(centre + reach + 1, len(series))
    count = counts[end] - counts[first]
    return np.where(count > 0, (sums[end] - sums[first]) / np.maximum(count, 1), np.nan).tolist()


def _read_run(out: Path) -> tuple[list[dict], list[dict]]:
    steps = _read_numbers(out / "metrics.jsonl", "loss")
    if not steps:
        raise ConfigError(f"{out}: expected a run with a metrics.jsonl of at least one step, there is none")
    return steps, _read_numbers(out / "evaluations.jsonl", "validation_loss")


def _read_numbers(path: Path, loss: str) -> list[dict]:
    """Read records that have the tokens and the loss of a point; null is a loss that was not finite."""
    records = read_records(path)
    for record in records:
        tokens, value = record.get("tokens"), record.get(loss, "")
        if type(tokens) is not int or not 0 <= tokens < 2**63 or not isinstance(value, int | float | None):
            raise CheckpointError(
                f"{path}: step {record['step']}: expected numbers as tokens and {loss}, got {record!r:.200}"
            )
    return records


def _labels(outs: list[Path]) -> list[str]:
    """Return the folders' names, or whole paths where two names are the same."""
    names = [out.resolve().name for out in outs]
    return names if len(set(names)) == len(names) else [str(out) for out in outs]


def _number(value: float | None) -> float:
    return math.nan if value is None else value
