"""A library, no command: the table of an ablation, as Markdown and inside a page that opens without a network."""

import base64
import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from html import escape

from scripts.ablation_figures import Figures
from scripts.ablation_report import CONFIDENCE, METRICS, NOTHING, Estimate, Metric, Result, Summary, estimate, plain

_MINUS = "\N{MINUS SIGN}"


# What a table shows beside the metric that is compared; a loss may have been lower before the end.
_BESIDE = {"accuracy": ("validation_loss",), "validation_loss": ("best_validation_loss",)}


def table(summaries: Sequence[Summary], metric: Metric, baseline: str | None) -> list[list[str]]:
    """Return the table as rows of cells, plain text; the first row is the header."""
    shown = [metric, *(METRICS[key] for key in _BESIDE.get(metric.key, ()))]
    names = [_heading(each) for each in shown]
    header = ["variant", "runs", "parameters", "state", "FLOP a token", "tokens/s", "tokens", *names]
    compared = [] if baseline is None else [f"difference to {baseline}", "p (Holm)"]
    return [[*header, *compared], *(_row(summary, shown, baseline) for summary in summaries)]


def _heading(metric: Metric) -> str:
    return f"{metric.label} in {metric.unit}" if metric.unit else metric.label


def _row(summary: Summary, shown: list[Metric], baseline: str | None) -> list[str]:
    first, runs, tokens = summary.runs[0], summary.runs, [run.tokens for run in summary.runs]
    counted = summary.estimate.n if summary.estimate else 0
    speeds = [run.tokens_per_second for run in runs if math.isfinite(run.tokens_per_second)]
    cells = [
        summary.variant,
        str(len(runs)) if counted == len(runs) else f"{counted} of {len(runs)}",
        count(first.parameters),
        count(first.state_size),
        count(round(first.flops_per_token)),
        _number(statistics.median(speeds), 0) if speeds else NOTHING,
        " to ".join(dict.fromkeys([count(min(tokens)), count(max(tokens))])),
        _interval(summary.estimate, shown[0]),
        *(_interval(_estimate(runs, other), other) for other in shown[1:]),
    ]
    if baseline is None:
        return cells
    if summary.variant == baseline:
        return [*cells, "baseline", NOTHING]
    found = summary.comparison
    difference = _interval(found.difference if found else None, shown[0], sign=True)
    if found is None or found.p is None or found.adjusted is None:
        return [*cells, difference, NOTHING]
    return [*cells, difference, f"{found.p:.2g} ({found.adjusted:.2g})"]


def _estimate(runs: list[Result], metric: Metric) -> Estimate | None:
    values = [value for run in runs if (value := metric.value(run)) is not None]
    return estimate(values) if values else None


def count(number: int) -> str:
    """Return a whole number with three significant digits and k, M, G or T, such as 1.77M."""
    size, unit = float(number), 0
    while float(f"{size:.3g}") >= 1000 and unit < 4:
        size, unit = size / 1000, unit + 1
    return f"{size:#.3g}".rstrip(".") + "kMGT"[unit - 1] if unit else str(number)


def _number(value: float | None, digits: int) -> str:
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{value:,.{digits}f}"


def _interval(found: Estimate | None, metric: Metric, sign: bool = False) -> str:
    if found is None:
        return NOTHING
    mean = f"{found.mean * metric.scale:{'+' if sign else ''}.{metric.digits}f}".replace("-", _MINUS)
    return mean if found.half is None else f"{mean} ± {found.half * metric.scale:.{metric.digits}f}"


def notes(summaries: Sequence[Summary], metric: Metric, baseline: str | None) -> list[str]:
    """Return what is to be known about the numbers of the table, a sentence or two an item."""
    runs = [run for summary in summaries for run in summary.runs]
    better = "lower" if metric.lower_is_better else "higher"
    items = [
        f"{len(runs)} runs of {len(summaries)} variants, seeds {_listed({run.seed for run in runs})}; of the"
        f" {metric.label}, {better} is better.",
        f"mean ± half the width of its {CONFIDENCE * 100:.0f} % confidence interval over the seeds, by Student's t with"
        f" n {_MINUS} 1 degrees of freedom; one run has no interval. tokens/s is the median over the seeds.",
        *_notes_on_comparisons(summaries, metric, baseline),
    ]
    missing = sum(metric.value(run) is None for run in runs)
    if missing:
        items.append(f"{missing} of {len(runs)} runs have no finite {metric.label} and are left out of the means.")
    if len({run.tokens for run in runs}) > 1:
        items.append("The runs differ in the tokens that they trained on: their last evaluations are not equally late.")
    if len({run.device for run in runs}) > 1:
        devices = ", ".join(sorted({run.device for run in runs}))
        items.append(f"The runs ran on different devices ({devices}): their tokens/s do not compare.")
    return items


def _listed(values: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(values))) or NOTHING


def _notes_on_comparisons(summaries: Sequence[Summary], metric: Metric, baseline: str | None) -> list[str]:
    if baseline is None:
        return ["Without a baseline there is no comparison."]
    others = [summary for summary in summaries if summary.variant != baseline]
    found = [summary.comparison for summary in others if summary.comparison]
    tested = sum(comparison.p is not None for comparison in found)
    unit = " in percentage points" if metric.unit == "%" else ""
    items = [
        f"Differences{unit} are variant {_MINUS} {baseline}, in pairs of the same seed, over the seeds that both have,"
        " with the same kind of interval.",
        f"Comparisons with {baseline}: {tested} tested of {len(others)}. p is of the two-sided paired t-test, which"
        f" needs two pairs; in brackets it is adjusted for {tested} comparison{'s' * (tested != 1)} by Holm's method.",
    ]
    if any(comparison.p is None and comparison.difference.n > 1 for comparison in found):
        items.append("Differences that are the same for all seeds have no spread, and so no p.")
    return items


def markdown(summaries: Sequence[Summary], metric: Metric, baseline: str | None, remarks: Sequence[str] = ()) -> str:
    """Return the table in GitHub's Markdown, and under it the notes and remarks."""
    header, *rows = [[_markdown(cell) for cell in row] for row in table(summaries, metric, baseline)]
    rule = [":---", *["---:"] * (len(header) - 1)]
    lines = [f"| {' | '.join(row)} |" for row in [header, rule, *rows]]
    return (
        "\n".join([*lines, "", *(f"- {_markdown(note)}" for note in [*notes(summaries, metric, baseline), *remarks])])
        + "\n"
    )


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*\[\]|])|(?<!\w)_|_(?!\w)", r"\\\g<0>", text).replace("<", "&lt;").replace(">", "&gt;")


_RUN_HEADER = [
    "variant", "seed", "heads", "width", "k/v heads", "settings", "steps", "tokens", "seconds", "tokens/s",
    "training loss", "validation loss", "best", "bits per byte", "accuracy in %", "device", "folder",
]  # fmt: skip


def _run_row(run: Result) -> list[str]:
    return [
        run.variant,
        str(run.seed),
        str(run.heads),
        str(run.head_dim),
        str(run.kv_heads),
        ", ".join(f"{key}={json.dumps(value, default=str)}" for key, value in run.settings.items()) or NOTHING,
        f"{run.steps:,}",
        f"{run.tokens:,}",
        _number(run.seconds, 1),
        _number(run.tokens_per_second, 0),
        _number(run.train_loss, 4),
        _number(run.validation_loss, 4),
        _number(run.best_validation_loss, 4),
        _number(run.bits_per_byte, 4),
        _number(None if run.accuracy is None else run.accuracy * 100, 2),
        run.device,
        plain(run.folder),
    ]


def page(
    title: str,
    summaries: Sequence[Summary],
    metric: Metric,
    baseline: str | None,
    figures: Figures,
    commands: Sequence[str],
    remarks: Sequence[str] = (),
) -> str:
    """Return the report as one HTML file without links to others, for light and dark displays.

    Args:
        title: its heading.
        summaries: of the variants; their texts may hold anything.
        metric: what is compared.
        baseline: the variant that the others are compared with.
        figures: to be shown.
        commands: those that repeat the ablation.
        remarks: more to be known about the numbers.
    """
    runs = [run for summary in summaries for run in summary.runs]
    items = "\n".join(f"<li>{escape(note)}</li>" for note in [*notes(summaries, metric, baseline), *remarks])
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<h2>Variants</h2>\n{_html_table(table(summaries, metric, baseline))}",
        *(_html_figure(figures, name, caption) for name, caption in figures.captions.items()),
        f"<h2>Method</h2>\n<ul>\n{items}\n{_METHOD}</ul>",
        f"<h2>Runs</h2>\n{_html_table([_RUN_HEADER, *map(_run_row, runs)])}",
    ]
    if commands:
        parts.append(f"<h2>Commands</h2>\n<pre><code>{escape(chr(10).join(commands))}</code></pre>")
    body = "\n".join(parts)
    return f"{_HEAD.format(title=escape(title))}<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"


def _html_table(rows: list[list[str]]) -> str:
    header, *body = rows
    lines = ["<tr>" + "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header) + "</tr>"]
    for first, *rest in body:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _html_figure(figures: Figures, name: str, caption: str) -> str:
    light, dark = (_data_uri(content) for content in (figures.files[f"{name}.svg"], figures.dark[name]))
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{escape(caption)}" src="{light}"></picture><figcaption>{escape(caption)}</figcaption></figure>'
    )


def _data_uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


_METHOD = """<li>All runs are evaluated on the same validation set; a metric is of the last evaluation unless it is
called best.</li>
<li>Training FLOPs are counted from the model's shape, three forward passes a token, not measured; seconds are tokens
over the measured tokens/s of the run, without evaluations and saving.</li>
<li>The state is all numbers that the layers carry from token to token for one sequence.</li>
"""

_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ --text: #1d1f24; --dim: #5b616e; --rule: #d8dbe2; --back: #ffffff; --soft: #f4f5f8; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --text: #e4e6eb; --dim: #a0a6b3; --rule: #3a3f4b; --back: #16181d; --soft: #20232a; }}
}}
body {{ margin: 0; background: var(--back); color: var(--text); font: 16px/1.55 system-ui, sans-serif; }}
main {{ max-width: 72rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }}
h1 {{ font-size: 1.7rem; line-height: 1.25; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.2rem; margin: 2.4rem 0 0.8rem; }}
li {{ max-width: 48rem; margin: 0.3rem 0; overflow-wrap: anywhere; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.35rem 0.7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }}
tr:first-child th {{ color: var(--dim); font-weight: 600; vertical-align: bottom; white-space: normal; }}
th:first-child {{ text-align: left; font-weight: 600; }}
figure {{ margin: 2.4rem 0; }}
img {{ display: block; max-width: 100%; height: auto; margin: 0 auto; }}
figcaption {{ max-width: 48rem; margin: 0.6rem auto 0; color: var(--dim); font-size: 0.9rem; }}
pre {{ padding: 0.9rem 1.1rem; background: var(--soft); border-radius: 6px; overflow-x: auto; font-size: 0.85rem; }}
</style>
</head>
"""
