"""The report of an ablation: statistics over seeds, the table, the figures and the page."""

import base64
import dataclasses
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from scripts.ablation_figures import DARK, LIGHT, draw_curves, draw_state, read_curve, render, styles
from scripts.ablation_page import count, notes, table
from scripts.ablation_report import (
    METRICS,
    NOTHING,
    Result,
    compare,
    estimate,
    holm,
    read_results,
    summarise,
    write_report,
    write_results,
)
from training.errors import CheckpointError, ConfigError

LOSS = METRICS["validation_loss"]
T2, T1 = 4.302653, 12.706205  # 97.5 % quantiles of Student's t with 2 and 1 degrees of freedom
MINUS = "\N{MINUS SIGN}"
FILES = {"results.jsonl", "table.md", "curves.png", "curves.svg", "state.png", "state.svg", "report.html"}


def result(variant: str = "4x192", seed: int = 0, loss: float | None = 3.0, **changes: Any) -> Result:
    heads, width = (int(number) for number in re.findall(r"\d+", variant)[:2]) if "x" in variant else (4, 192)
    values = {
        "variant": variant, "seed": seed, "heads": heads, "head_dim": width, "kv_heads": heads, "settings": {},
        "parameters": 44_000_000, "state_size": 12 * heads * width**2, "flops_per_token": 2.5e8, "steps": 100,
        "tokens": 1_000_000, "seconds": 20.0, "tokens_per_second": 50_000.0, "train_loss": 2.9, "validation_loss": loss,
        "best_validation_loss": loss, "bits_per_byte": loss and loss / 2, "accuracy": 0.4, "device": "cpu",
        "folder": f"{variant}/seed{seed}",
    }  # fmt: skip
    return Result(**{**values, **changes})


def results_of(losses: dict[str, list[float | None]]) -> list[Result]:
    return [result(variant, seed, loss) for variant, values in losses.items() for seed, loss in enumerate(values)]


def write_evaluations(out: Path, run: Result, losses: list[float | None], every: int = 100_000) -> None:
    folder = out / run.folder
    folder.mkdir(parents=True, exist_ok=True)
    records = [
        {"step": i, "tokens": i * every, "validation_loss": loss, "bits_per_byte": loss and loss / 2, "accuracy": None}
        for i, loss in enumerate(losses)
    ]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def report(out: Path, results: list[Result], **changes: Any) -> str:
    options = {"title": "Heads", "metric": "validation_loss", "baseline": None, "commands": [], **changes}
    markdown = write_report(out, results, **options)
    page = (out / "report.html").read_text()
    assert (out / "table.md").read_text() == markdown
    assert {path.name for path in out.iterdir() if path.is_file()} == FILES
    for text in (markdown, (out / "results.jsonl").read_text(), re.sub(r"base64,[^\"]*", "", page)):
        assert not re.search(r"\b(nan|inf|NaN|Infinity|None)\b", text), text
    for name in ("curves", "state"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (out / f"{name}.svg").read_text()
    return markdown


def cells(markdown: str, variant: str) -> list[str]:
    return next(line for line in markdown.splitlines() if line.startswith(f"| {variant} |")).strip("| ").split(" | ")


def test_the_interval_is_that_of_students_t() -> None:
    found = estimate([3.0, 3.1, 3.2])  # standard deviation 0.1
    assert (found.n, found.mean) == (3, pytest.approx(3.1))
    assert found.half == pytest.approx(T2 * 0.1 / math.sqrt(3), rel=1e-6)
    assert estimate([1.0, 3.0]).half == pytest.approx(T1, rel=1e-6)  # standard error 1
    assert estimate([2.5]).half is None
    assert estimate([2.5, 2.5]).half == 0


def test_differences_are_paired_by_seed() -> None:
    found = compare({2: 3.3, 0: 3.1, 1: 3.1, 7: 9.0}, {0: 3.0, 1: 3.0, 2: 3.1, 5: 1.0})  # 0.1, 0.1, 0.2
    assert found is not None
    mean, error = 0.4 / 3, math.sqrt(1 / 300) / math.sqrt(3)
    assert (found.difference.n, found.difference.mean) == (3, pytest.approx(mean))
    assert found.difference.half == pytest.approx(T2 * error, rel=1e-6)
    t = mean / error  # 4; the tail of 2 degrees of freedom has a closed form
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)


def test_too_few_pairs_have_no_interval_and_no_p() -> None:
    single = compare({0: 3.5}, {0: 3.0, 1: 2.0})
    assert single is not None
    assert (single.difference.mean, single.difference.half, single.p) == (0.5, None, None)
    assert compare({0: 3.0}, {1: 3.0}) is None


def test_differences_without_a_spread_do_not_look_certain() -> None:
    same = compare({0: 3.0, 1: 3.1}, {0: 3.0, 1: 3.1})
    assert same is not None
    assert (same.difference.mean, same.difference.half, same.p) == (0.0, 0.0, 1.0)
    shifted = compare({0: 3.3, 1: 2.2, 2: 1.4}, {0: 3.2, 1: 2.1, 2: 1.3})  # 0.1 each, up to rounding
    assert shifted is not None
    assert (shifted.difference.mean, shifted.difference.half, shifted.p) == (pytest.approx(0.1), 0.0, None)


def test_holm_multiplies_the_smallest_by_the_number_and_never_falls() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_table_shows_means_differences_and_adjusted_p(tmp_path: Path) -> None:
    runs = results_of({"12x64": [3.0, 3.0, 3.1], "4x192": [3.1, 3.1, 3.3], "1x768": [2.5], "2x384": [2.0, None, 2.3]})
    runs[0] = dataclasses.replace(runs[0], tokens_per_second=90_000.0)
    markdown = report(tmp_path, runs, baseline="12x64")
    base, heads, single, partial = (cells(markdown, name) for name in ("12x64", "4x192", "1x768", "2x384"))
    assert base[1:7] == ["3", "44.0M", "590k", "250M", "50,000", "1.00M"]
    assert base[7:] == ["3.0333 ± 0.1434", "3.0333 ± 0.1434", "baseline", NOTHING]
    assert heads[9:] == ["+0.1333 ± 0.1434", "0.057 (0.11)"]
    assert single[7:] == ["2.5000", "2.5000", f"{MINUS}0.5000", NOTHING]
    assert partial[1] == "2 of 3"
    assert partial[9].startswith(f"{MINUS}0.9000 ± 1.27")  # pairs 0 and 2: -1.0 and -0.8
    assert "Comparisons with 12x64: 2 tested of 3." in markdown
    assert "adjusted for 2 comparisons by Holm" in markdown
    assert "1 of 10 runs have no finite validation loss" in markdown
    assert [row.split(" | ")[0] for row in markdown.splitlines()[2:6]] == [f"| {run}" for run in (
        "12x64", "4x192", "1x768", "2x384")]  # fmt: skip


def test_accuracy_is_in_percent_with_the_loss_beside_it() -> None:
    runs = [result("4x192", seed, 3.0 + seed / 10, accuracy=0.4 + seed / 100) for seed in range(3)]
    metric = METRICS["accuracy"]
    header, row = table(summarise(runs, metric, None), metric, None)
    shown = dict(zip(header, row, strict=True))
    assert shown["accuracy in %"] == "41.00 ± 2.48"
    assert shown["validation loss in nats per token"] == "3.1000 ± 0.2484"
    assert "higher is better" in notes(summarise(runs, metric, None), metric, None)[0]


def test_the_order_of_results_changes_the_order_of_rows_alone() -> None:
    runs = results_of(
        {f"{heads}x{768 // heads}": [3 + 1 / heads + s**0.5 / 7 for s in range(4)] for heads in (1, 2, 4)}
    )
    header, *rows = table(summarise(runs, LOSS, "4x192"), LOSS, "4x192")
    random.Random(1).shuffle(runs)
    assert table(summarise(runs, LOSS, "4x192"), LOSS, "4x192")[0] == header
    assert sorted(table(summarise(runs, LOSS, "4x192"), LOSS, "4x192")[1:]) == sorted(rows)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00k"), (589_824, "590k"), (999_999, "1.00M"), (7_077_888, "7.08M")],
)
def test_counts_have_three_digits(number: int, text: str) -> None:
    assert count(number) == text


def test_results_survive_the_file(tmp_path: Path) -> None:
    runs = [result("1x768 decay=learned", 3, settings={"decay": "learned", "b": [1, 2]}), result(loss=None)]
    write_results(tmp_path / "new" / "results.jsonl", runs)
    assert read_results(tmp_path / "new" / "results.jsonl") == runs
    write_results(tmp_path / "results.jsonl", [result(loss=math.nan, train_loss=math.inf)])
    assert "NaN" not in (tmp_path / "results.jsonl").read_text()
    (back,) = read_results(tmp_path / "results.jsonl")
    assert back.validation_loss is None
    assert math.isnan(back.train_loss)


@pytest.mark.parametrize(
    "change",
    [{"seed": "0"}, {"seed": True}, {"tokens": -1}, {"settings": []}, {"folder": "../x"}, {"accuracy": "1"}, {"x": 1}],
)
def test_a_damaged_line_is_named(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    write_results(path, [result(), result(seed=1)])
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{json.dumps(json.loads(second) | change)}\n")
    with pytest.raises(CheckpointError, match=r"results\.jsonl:2: expected the result of a run"):
        read_results(path)
    path.write_text(f"{first[:50]}\n{second}\n")
    with pytest.raises(CheckpointError, match=r"results\.jsonl:1: "):
        read_results(path)


def test_results_that_contradict_each_other_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    one = result()
    for runs, message in (
        ([one, one], r"4x192: expected one run of each seed"),
        ([one, result(seed=1, parameters=5)], "they differ in parameters"),
    ):
        with pytest.raises(ConfigError, match=message):
            report(tmp_path, runs)
    with pytest.raises(ConfigError, match="baseline: expected one of 4x192, got '12x64'"):
        report(tmp_path, [one], baseline="12x64")
    with pytest.raises(ConfigError, match="metric: expected one of validation_loss, best"):
        report(tmp_path, [one], metric="loss")
    assert not list(tmp_path.iterdir())


def test_partial_results_make_a_report(tmp_path: Path) -> None:
    report(tmp_path / "none", [], baseline="12x64")
    lacking: dict[str, Any] = {"tokens_per_second": 0.0, "seconds": math.nan, "train_loss": math.nan}
    lacking |= {"accuracy": None, "state_size": 0}
    runs = [result("12x64", loss=None, **lacking), result("4x192", loss=3.25)]
    for metric in ("accuracy", "best_validation_loss"):
        markdown = report(tmp_path / metric, runs, metric=metric, baseline="12x64")
        assert cells(markdown, "12x64")[-2:] == ["baseline", NOTHING]
        assert cells(markdown, "4x192")[-2:] == [NOTHING, NOTHING]
    write_evaluations(tmp_path / "one", runs[0], [8.0, None, 4.0])
    report(tmp_path / "one", runs)


def test_curves_show_each_run_over_tokens_compute_and_time(tmp_path: Path) -> None:
    runs = [result("12x64", seed, flops_per_token=1e8, tokens_per_second=1000.0) for seed in range(2)]
    runs.append(result("4x192"))
    for run in runs[:2]:
        write_evaluations(tmp_path, run, [900.0, 5.0, None, 4.0, 3.5 - run.seed, *[3.25 - run.seed] * 6])
    curves = [read_curve(tmp_path, run, LOSS) for run in runs]
    assert not curves[2].tokens
    panels = draw_curves(curves, LOSS, LIGHT).axes
    tokens = [i * 100_000 for i in range(11) if i != 2]
    for axes, factor in zip(panels, (1.0, 1e8, 1 / 1000 / 60), strict=True):
        first, _, second, _ = axes.lines
        assert list(first.get_xdata()) == pytest.approx([x * factor for x in tokens])
        assert list(first.get_ydata()) == [900.0, 5.0, 4.0, 3.5, *[3.25] * 6]
        assert list(second.get_ydata())[-1] == 2.25
    low, high = panels[2].get_ylim()
    assert low < 2.25 < 4.0 < high < 5  # the first evaluations do not stretch it
    assert panels[2].get_xlabel() == "training time (minutes)"


def test_damaged_evaluations_are_named(tmp_path: Path) -> None:
    write_evaluations(tmp_path, result(), [3.0])
    (tmp_path / "4x192/seed0/evaluations.jsonl").write_text('{"step": 1, "tokens": 5, "validation_loss": "low"}\n')
    with pytest.raises(CheckpointError, match="expected numbers as tokens and validation_loss"):
        report(tmp_path, [result()])


def test_the_line_over_the_state_joins_variants_that_differ_in_their_heads_alone() -> None:
    runs = results_of({"1x768": [3.0, 3.2], "12x64": [3.4, 3.6], "4x192": [3.25]})
    runs.append(result("1x768 decay=learned", 0, 2.5, settings={"decay": "learned"}))
    runs.append(result("12x64/1", 0, 3.7, kv_heads=1))
    (axes,) = draw_state(runs, LOSS, LIGHT).axes
    (means,) = [line for line in axes.lines if line.get_label() == "means"]
    assert list(means.get_xdata()) == [589_824, 1_769_472, 7_077_888]
    assert list(means.get_ydata()) == pytest.approx([3.5, 3.25, 3.1])
    assert axes.get_xscale() == "log"
    seeds = sorted(y for line in axes.lines if line.get_label() == "runs" for y in line.get_ydata())
    assert seeds == [3.0, 3.2, 3.4, 3.6]
    assert {text.get_text() for text in axes.texts} == {run.variant for run in runs}
    low, high = axes.get_ylim()
    assert low < 2.5
    assert high > 3.5 + T1 * 0.1


def test_names_of_many_variants_fit_into_the_figure(tmp_path: Path) -> None:
    shapes = ("12x64", "4x192", "1x768")
    runs = [result(f"{shape} a={i}", loss=3 + i / 10, settings={"a": i}) for i in range(8) for shape in shapes]
    for run in runs:
        write_evaluations(tmp_path, run, [4.0, 3.5, 3.0])
    look = styles(runs, LIGHT)
    assert len({(repr(style.color), repr(style.dashes), style.marker) for style in look.values()}) == len(runs)
    curves = [read_curve(tmp_path, run, LOSS) for run in runs]
    for figure in (draw_curves(curves, LOSS, LIGHT), draw_state(runs, LOSS, LIGHT)):
        figure.draw_without_rendering()
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == [run.variant for run in runs]
        box, whole = legend.get_window_extent(), figure.bbox
        assert whole.y0 <= box.y0 < box.y1 <= whole.y1
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1
        assert not figure.axes[0].texts


def test_the_axis_of_a_share_ends_where_shares_do() -> None:
    runs = [result("1x768", seed, accuracy=share) for seed, share in enumerate((0.1, 1.0))]
    (axes,) = draw_state(runs, METRICS["accuracy"], LIGHT).axes
    low, high = axes.get_ylim()
    assert -0.1 < low <= 0 < 1 <= high < 1.1


def test_colours_follow_the_width_of_heads() -> None:
    names = ["1x768", "12x64", "4x192"]
    look = styles([result(name) for name in names] + [result("4x192 b=1", settings={"b": 1})], LIGHT)
    lightness = {name: sum(c * w for c, w in zip(look[name].color, (0.3, 0.6, 0.1), strict=False)) for name in look}
    assert lightness["12x64"] < lightness["4x192"] < lightness["1x768"]
    assert look["4x192 b=1"].color == look["4x192"].color
    assert look["4x192 b=1"].dashes != look["4x192"].dashes
    alike = styles([result(f"4x192 b={b}", settings={"b": b}) for b in range(6)], DARK)
    assert len({style.color for style in alike.values()}) == 6


class Links(HTMLParser):
    """Collects what a page would load and how its tags nest."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "style", "data")]
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_holds_foreign_text_as_text_and_loads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "a-very-secret-value")
    hostile = "4x192 <script>alert(1)</script> \"'&|`$\\frac{$ \x00\ud800"
    settings = {"<b>": "</td><i onclick=a()>", "api_key": "12345", "x": "a-very-secret-value"}
    runs = [result(hostile, seed, 3.0 + seed, settings=settings, folder=f"a/{seed}", device="<i>") for seed in range(2)]
    runs.append(result("_hidden", folder="b"))
    for run in runs:
        write_evaluations(tmp_path, run, [8.0, 4.0, 3.0])
    commands = ["run <x> --api_key abcdef --out 'a b'", "echo a-very-secret-value"]
    markdown = report(tmp_path, runs, title="<h1>&", baseline=hostile, commands=commands)
    page = (tmp_path / "report.html").read_text()
    seen = Links()
    seen.feed(page)
    assert not seen.open
    assert not seen.tags & {"script", "b", "i", "link", "iframe", "object"}
    assert seen.links
    assert all(link.startswith("data:image/svg+xml;base64,") for link in seen.links)
    assert not re.search(r"(src|href)\s*=\s*[\"']?http|url\(", page)
    for link in seen.links:
        svg = base64.b64decode(link.partition(",")[2]).decode()
        ElementTree.fromstring(svg)
        assert not re.search(r"href=\"(?!#)|url\((?!#)|<script", svg)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "run &lt;x&gt; --api_key [redacted] --out &#x27;a b&#x27;" in page
    for name in ("report.html", "table.md", "results.jsonl", "curves.svg", "state.svg"):
        assert not re.search('a-very-secret|12345"|abcdef ', (tmp_path / name).read_text()), name
    row = next(line for line in markdown.splitlines() if line.startswith("| 4x192"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 12
    assert "<script" not in markdown
    assert "_hidden" in (tmp_path / "curves.svg").read_text()


def test_a_figure_is_the_same_each_time() -> None:
    first, second = (render(draw_state([result()], LOSS, DARK), "svg") for _ in range(2))
    assert first == second
