"""A library, no command: the results of an ablation as a file, as statistics over seeds, as tables and as a report."""

import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from training.errors import CheckpointError, ConfigError
from training.jsonfile import parse_json, read_regular
from training.redaction import redact, redact_arguments
from training.storage import disk_errors, replace_file

CONFIDENCE = 0.95
NOTHING = "\N{EN DASH}"  # in a cell without a number


@dataclass(frozen=True)
class Result:
    """One run of an ablation, a line of `results.jsonl`.

    Args:
        variant: such as "4x192" or "1x768 decay=learned": unique name of the settings.
        seed: of the run; runs of the same seed are pairs.
        heads: of the queries, in each layer.
        head_dim: width of a head.
        kv_heads: heads of keys and values.
        settings: keys of the config that differ from the base config besides the heads, {} for none.
        parameters: numbers that are trained.
        state_size: numbers of the recurrent state of one sequence, over all layers.
        flops_per_token: of training.
        steps: of the optimizer.
        tokens: trained.
        seconds: tokens / tokens_per_second: of training alone, without evaluations and saving.
        tokens_per_second: of training alone.
        train_loss: mean of the last steps, in nats per token; NaN if not finite.
        validation_loss: nats per token, of the last evaluation; None if not finite.
        best_validation_loss: least of all evaluations.
        bits_per_byte: of the last evaluation.
        accuracy: share of predicted tokens whose most probable token is right, at the last evaluation.
        device: on which it ran.
        folder: of the run, relative to the ablation's folder, such as "4x192/seed0".
    """

    variant: str
    seed: int
    heads: int
    head_dim: int
    kv_heads: int
    settings: dict[str, Any]
    parameters: int
    state_size: int
    flops_per_token: float
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    train_loss: float
    validation_loss: float | None
    best_validation_loss: float | None
    bits_per_byte: float | None
    accuracy: float | None
    device: str
    folder: str


@dataclass(frozen=True)
class Metric:
    """What variants are compared by: `recorded` is its key in `evaluations.jsonl`, `scale` a factor for tables."""

    key: str
    label: str
    recorded: str
    lower_is_better: bool = True
    unit: str = ""
    scale: float = 1.0
    digits: int = 4

    def value(self, result: Result) -> float | None:
        """Return a run's value, None for one that is missing or not finite."""
        value = getattr(result, self.key)
        return value if value is not None and math.isfinite(value) else None


METRICS = {
    metric.key: metric
    for metric in (
        Metric("validation_loss", "validation loss", "validation_loss", unit="nats per token"),
        Metric("best_validation_loss", "best validation loss", "validation_loss", unit="nats per token"),
        Metric("bits_per_byte", "bits per byte", "bits_per_byte"),
        Metric("accuracy", "accuracy", "accuracy", lower_is_better=False, unit="%", scale=100.0, digits=2),
    )
}


def write_results(path: Path, results: Iterable[Result]) -> None:
    """Write `results.jsonl`; numbers that are not finite become null, secrets are taken out.

    Raises:
        CheckpointError: it can't be written.
        ResourceError: the disk is full.
    """
    # The mapping as a whole would lose flops_per_token, which looks like the key of a secret.
    records = [{key: redact(value) for key, value in dataclasses.asdict(result).items()} for result in results]
    lines = [json.dumps(_finite(record), allow_nan=False) + "\n" for record in records]
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, "".join(lines).encode())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_results(path: Path) -> list[Result]:
    """Read what `write_results` has written.

    Raises:
        CheckpointError: the file can't be read, or names the line that is no result.
    """
    try:
        lines = read_regular(path).splitlines()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected a file of results: {error}") from error
    results = []
    for number, line in enumerate(lines, start=1):
        try:
            results.append(_result(parse_json(line)))
        except (ValueError, TypeError, OverflowError) as error:
            raise CheckpointError(f"{path}:{number}: expected the result of a run: {error}") from error
    return results


def _result(record: Any) -> Result:
    fields = {field.name: field.type for field in dataclasses.fields(Result)}
    if not isinstance(record, dict) or record.keys() != fields.keys():
        raise ValueError(f"expected an object with the keys {', '.join(fields)}")
    result = Result(**{name: _field(name, kind, record[name]) for name, kind in fields.items()})
    folder = PurePosixPath(result.folder)
    if folder.is_absolute() or ".." in folder.parts:
        raise ValueError(f"folder: expected a path inside the ablation's folder, got {result.folder!r}")
    return result


def _field(name: str, kind: Any, value: Any) -> Any:
    """Return a value as the type of its field; null as a number of type float is one that was not finite."""
    if kind in (float, float | None):
        if value is None or (type(value) is float and not math.isfinite(value)):
            return math.nan if kind is float else None
        if type(value) in (int, float):
            return float(value)
    elif type(value) is (dict if kind == dict[str, Any] else kind) and (type(value) is not int or 0 <= value < 2**63):
        return value
    raise ValueError(f"{name}: expected {getattr(kind, '__name__', kind)}, got {value!r:.200}")


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` seeds; `half` is half the width of its confidence interval, None for one seed."""

    n: int
    mean: float
    half: float | None


@dataclass(frozen=True)
class Comparison:
    """The paired difference to the baseline, its two-sided p-value and that adjusted for the number of comparisons."""

    difference: Estimate
    p: float | None
    adjusted: float | None = None


@dataclass(frozen=True)
class Summary:
    """A variant's runs, its mean, None without a finite value, and its comparison, None without a pair."""

    runs: list[Result]
    estimate: Estimate | None
    comparison: Comparison | None

    @property
    def variant(self) -> str:
        """The variant's name."""
        return self.runs[0].variant


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of at least one value, with its 95 % interval by Student's t of n - 1 degrees of freedom."""
    if len(values) == 1:
        return Estimate(1, values[0], None)
    from scipy import stats

    n = len(values)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
    return Estimate(n, statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(n))


def compare(values: dict[int, float], baseline: dict[int, float]) -> Comparison | None:
    """Compare values by seed in pairs, over the seeds that both have; None if they share none.

    Differences that are all the same, up to rounding, leave the t-test without a spread: p is 1 where they are all
    zero, as it is for any spread, and None otherwise, as it would depend on the spread alone.
    """
    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        return None
    differences = [values[seed] - baseline[seed] for seed in seeds]
    rounding = 4 * sys.float_info.epsilon * max(abs(x[seed]) for seed in seeds for x in (values, baseline))
    if max(differences) - min(differences) <= rounding:
        constant = statistics.fmean(differences)
        differences = [constant if abs(constant) > rounding else 0.0] * len(seeds)
    return Comparison(estimate(differences), _paired_p(differences))


def _paired_p(differences: list[float]) -> float | None:
    if len(differences) < 2:
        return None
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    if spread == 0:
        return None if mean else 1.0
    from scipy import stats

    return float(2 * stats.t.sf(abs(mean) / spread * math.sqrt(len(differences)), len(differences) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number (Holm 1979): the i-th smallest of m times m - i + 1, not falling, at most 1."""
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def summarise(results: Sequence[Result], metric: Metric, baseline: str | None) -> list[Summary]:
    """Summarise each variant, in the order of first appearance, and compare it with the baseline.

    Raises:
        ConfigError: there are results, but none of the baseline; a run is there twice, or a variant's runs differ in
            more than the seed.
    """
    variants: dict[str, list[Result]] = {}
    for result in results:
        variants.setdefault(result.variant, []).append(result)
    if variants and baseline is not None and baseline not in variants:
        raise ConfigError(f"baseline: expected one of {', '.join(variants)}, got {baseline!r}")
    values = {variant: _by_seed(runs, metric) for variant, runs in variants.items()}
    comparisons = {
        variant: compare(values[variant], values[baseline])
        for variant in variants
        if baseline is not None and variant != baseline
    }
    tested = {variant: found.p for variant, found in comparisons.items() if found is not None and found.p is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    return [
        Summary(
            runs,
            estimate(list(values[variant].values())) if values[variant] else None,
            _adjust(comparisons.get(variant), adjusted.get(variant)),
        )
        for variant, runs in variants.items()
    ]


def _by_seed(runs: list[Result], metric: Metric) -> dict[int, float]:
    first, seeds = runs[0], [run.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"{first.variant}: expected one run of each seed, got the seeds {sorted(seeds)}")
    for name in ("heads", "head_dim", "kv_heads", "settings", "parameters", "state_size", "flops_per_token"):
        if any(getattr(run, name) != getattr(first, name) for run in runs):
            raise ConfigError(f"{first.variant}: expected runs that differ in their seed alone, they differ in {name}")
    found = {run.seed: metric.value(run) for run in runs}
    return {seed: value for seed, value in sorted(found.items()) if value is not None}


def _adjust(comparison: Comparison | None, adjusted: float | None) -> Comparison | None:
    return None if comparison is None else dataclasses.replace(comparison, adjusted=adjusted)


def write_report(
    out: Path,
    results: list[Result],
    *,
    title: str,
    metric: str,
    baseline: str | None,
    commands: list[str],
    remarks: Sequence[str] = (),
) -> str:
    """Write `results.jsonl`, `table.md`, `curves` and `state` as .png and .svg, and `report.html` into a folder.

    Args:
        out: the ablation's folder, in which the runs' folders are; their `evaluations.jsonl` may be missing.
        results: of the runs so far.
        title: of the page.
        metric: a key of METRICS.
        baseline: the variant that the others are compared with, None for no comparison.
        commands: those that repeat the ablation, for the page.
        remarks: more to be known about the numbers, a sentence or two each.

    Returns:
        The content of `table.md`: the table as Markdown and what is to be known about its numbers.

    Raises:
        ConfigError: no such metric or baseline, or results that contradict each other; nothing was written.
        CheckpointError: a file of evaluations is damaged, or a file can't be written.
        ResourceError: the disk is full.
    """
    from scripts.ablation_figures import draw
    from scripts.ablation_page import markdown, page

    if metric not in METRICS:
        raise ConfigError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    shown = [_presentable(result) for result in results]
    against = None if baseline is None else plain(baseline)
    summaries = summarise(shown, METRICS[metric], against)
    told = list(map(plain, remarks))
    table = markdown(summaries, METRICS[metric], against, told)
    figures = draw(out, shown, METRICS[metric])
    plain_commands = ["\n".join(map(_plain_command, command.splitlines())) for command in commands]
    html = page(plain(title), summaries, METRICS[metric], against, figures, plain_commands, told)
    write_results(out / "results.jsonl", results)
    files = {"table.md": table.encode(), **figures.files, "report.html": html.encode()}
    for name, content in files.items():
        with disk_errors(out / name):
            replace_file(out / name, content)
    return table


def plain(text: str) -> str:
    """Return a text without secrets, and with the characters escaped that a figure or a page can't hold."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(redact(text)))


def _presentable(result: Result) -> Result:
    return dataclasses.replace(
        result,
        variant=plain(result.variant),
        device=plain(result.device),
        settings=redact(_finite(result.settings)),
    )


def _plain_command(line: str) -> str:
    return plain(" ".join(redact_arguments(line.split(" "))))
