"""The benchmark of the operators: what it checks, measures, counts, writes and refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ops import blockwise, flash_linear_attention, lightning_attention
from scripts import operator_calls
from scripts.benchmark_cases import GROUPS, lightning, masked, traffic, work
from scripts.benchmark_ops import main
from scripts.benchmark_report import growth
from scripts.measure import allocations, peak_memory, saved_bytes, summary

CPU = torch.device("cpu")
SMALL = ["--batch", "2", "--heads", "4", "--tokens", "40", "--width", "8", "--repeats", "2"]


def results_of(file: Path) -> dict[str, dict[str, Any]]:
    """Results of the one case that a run measured, by implementation."""
    return {result["implementation"]: result for result in json.loads(file.read_text())["results"]}


def test_table_json_and_plot_of_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["normal", "split", "block", "inplace", "cuda", "plain", "torch", "fla", "softmax"]
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    assert main(["--cases", "quick", "--implementations", *names, "--repeats", "2", *files]) == 0
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "a.json").read_text())
    assert {"device", "threads", "python", "torch", "commit"} <= record["header"].keys()
    assert "--cases quick" in record["command"]
    ours = {"normal", "split", "block", "inplace", "torch"}
    for result in record["results"]:
        name, at = result["implementation"], (result["case"], result["implementation"])
        assert any(line.split()[:2] == list(at) for line in printed.splitlines()), at
        if result["status"] == "ok":
            assert 0 < result["seconds"]["least"] <= result["seconds"]["median"], at
            assert min(result["tflops"], result["gbytes"], result["peak_bytes"], result["saved_bytes"]) > 0, at
            assert (result["error"] is None) == (name == "softmax"), at
            assert result["error"] is None or result["error"] < 1e-5, at
        else:
            assert (result["status"], name in ours) == ("skipped", False), at
            assert result["reason"], at
    first = {result["case"]: result for result in reversed(record["results"])}
    assert all(result["ratio"] == 1 for result in first.values())
    assert "256 tokens take" in printed
    assert (tmp_path / "a.png").stat().st_size > 5000

    again = ["--from-json", *[str(tmp_path / "a.json")] * 2, "--plot", str(tmp_path / "b.svg")]
    assert main(again) == 0
    table = capsys.readouterr().out
    assert all(
        line in table
        for line in printed.splitlines()
        if line.startswith(("masked", "lightning")) and "take" not in line
    )
    assert main([*again, "--markdown"]) == 0
    assert capsys.readouterr().out.count("\n| masked") >= 7
    assert "<svg" in (tmp_path / "b.svg").read_text()


WRONG = {
    "sign": lambda o: -o,
    "scale": lambda o: o * 1.01,
    "nan": lambda o: o * torch.nan,
    "shape": lambda o: o[:, :, 1:],
    "gradient": lambda o: o.detach() + 0 * o,
    "head": lambda o: torch.cat([o[:, :-1], o[:, :1]], 1),
    "row": lambda o: torch.cat([o[:-1], o[:1]]),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("operator", ["masked", "lightning"])
def test_wrong_numbers_get_no_time(
    operator: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "flash_linear_attention" if operator == "masked" else "lightning_attention"
    right = flash_linear_attention if operator == "masked" else lightning_attention
    monkeypatch.setattr(operator_calls, name, lambda *a, **options: WRONG[wrong](right(*a, **options)))
    ours, peer = ("split", "plain") if operator == "masked" else ("torch", "plain")
    out = tmp_path / "a.json"
    argv = ["--operator", operator, *SMALL, "--implementations", ours, peer, "--json", str(out)]
    assert main(argv) == 1
    results = results_of(out)
    assert results[ours]["status"] == "FAILED"
    assert "seconds" not in results[ours]
    assert results[peer]["status"] == "ok"
    assert "FAILED: " in capsys.readouterr().out


def test_a_wrong_mask_gradient_gets_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(q, k, v, mask, **options):  # type: ignore[no-untyped-def]
        return flash_linear_attention(q, k, v, 2 * mask - mask.detach(), **options)

    monkeypatch.setattr(operator_calls, "flash_linear_attention", wrong)
    argv = [*SMALL, "--mask-grad", "--implementations", "block", "--json", str(tmp_path / "a.json")]
    assert main(argv) == 1
    assert "dmask is off by" in results_of(tmp_path / "a.json")["block"]["reason"]


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (torch.OutOfMemoryError("no memory left\nand more"), "out of memory", "no memory left"),
        (ValueError("no such shape\nand more"), "FAILED", "ValueError: no such shape"),
        (AssertionError(), "FAILED", "AssertionError: "),
    ],
    ids=["memory", "value", "nothing-said"],
)
def test_what_one_can_not_do_costs_the_others_nothing(
    error: Exception,
    status: str,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(operator_calls, "flash_linear_attention", fail)
    code = main([*SMALL, "--implementations", "split", "plain", "--json", str(tmp_path / "a.json")])
    assert code == (1 if status == "FAILED" else 0)
    assert ("Traceback" in capsys.readouterr().err) == (status == "FAILED")
    results = results_of(tmp_path / "a.json")
    assert (results["split"]["status"], results["split"]["reason"]) == (status, reason)
    assert (results["plain"]["status"], results["plain"]["ratio"]) == ("ok", None)


@pytest.mark.parametrize("mask", ["shared", "none", "bool", "full", "causal"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_every_kind_of_call_passes_the_check(mask: str, dtype: str, tmp_path: Path) -> None:
    grad = ["--mask-grad"] if mask in ("shared", "full", "causal") else []
    argv = [*SMALL, "--kv-heads", "2", "--value-width", "12", "--qk-norm", "--mask", mask, "--dtypes", dtype, *grad]
    ours = ["linear"] if mask == "none" else ["normal", "split", "block", "inplace"]
    assert main([*argv, "--implementations", *ours, "plain", "--json", str(tmp_path / "a.json")]) == 0
    assert {result["status"] for result in results_of(tmp_path / "a.json").values()} == {"ok"}


@pytest.mark.parametrize(("memory", "note"), [("0.0001", "1 of 4 heads at a time"), ("1", ""), ("1e-6", None)])
def test_a_materialised_decay_goes_by_groups_of_heads(memory: str, note: str | None, tmp_path: Path) -> None:
    argv = ["--operator", "lightning", *SMALL, "--implementations", "normal", "--score-memory", memory]
    assert main([*argv, "--json", str(tmp_path / "a.json")]) == 0
    result = results_of(tmp_path / "a.json")["normal"]
    assert result["note"] == (note or "")
    assert result["status"] == ("ok" if note is not None else "skipped")
    assert note is not None or "more than --score-memory 9.99e-07" in result["reason"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cases", "all"], "--cases: expected some of writings, masked, lengths,"),
        (["--cases", "quick", "--tokens", "5"], "--cases: expected no options of shapes beside it, got --tokens"),
        (["--implementations", "fast"], "--implementations: expected some of normal, split, block, inplace, cuda,"),
        (["--baseline", "torch"], "--baseline: expected one of normal,"),
        (["--implementations", "normal", "--baseline", "block"], "--baseline: expected one of normal, got block"),
        (["--repeats", "1"], "--repeats: expected a whole number from 2, got 1"),
        (["--seconds", "0"], "--seconds: expected a number over 0, got 0.0"),
        (["--score-memory", "inf"], "--score-memory: expected a number over 0, got inf"),
        (["--heads", "0"], "--heads: expected a whole number from 1, got 0"),
        (["--tokens", "16", "-1"], "--tokens: expected a whole number from 1, got -1"),
        (["--kv-heads", "0"], "--kv-heads: expected a whole number from 1, got 0"),
        (["--value-width", "0"], "--value-width: expected a whole number from 1, got 0"),
        (["--heads", "6", "--kv-heads", "4"], "--kv-heads: expected a divisor of 6 heads, got 4"),
        (
            ["--mask-grad", "--mask", "bool"],
            "--mask-grad: expected a backward pass and mask shared, full or causal, got mask bool",
        ),
        (["--operator", "lightning", "--mask", "full"], "--mask: expected none for lightning attention, got full"),
        (["--width", "1", "--qk-norm"], "--width: expected at least 2 with qk_norm"),
        (["--json", "nowhere/a.json"], "--json: expected a file in a folder that exists, got nowhere/a.json"),
        (["--json", "."], "--json: expected a file in a folder that exists, got ."),
        (["--plot", "a.gif"], "--plot: expected a .png or .svg file, got a.gif"),
        (["--from-json", "nothing.json"], "--from-json: expected files that --json wrote, got nothing.json"),
        (["--from-json", "a.json", "--cases", "quick"], "--from-json: expected no --cases beside it"),
        (["--list", "--heads", "3"], "--list: expected no --heads beside it"),
        (["--markdown"], "--markdown: expected --from-json beside it"),
        (["--dtypes", "int8"], "invalid choice: 'int8'"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_makes_no_sense_ends_with_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "record",
    [
        [],
        {"header": {}},
        {"header": [], "results": []},
        {"header": {}, "results": []},
        {"header": {}, "results": [{"case": "a"}]},
        {"header": {}, "results": [{"case": "a", "length": 1, "status": "ok", "implementation": "b", "series": "s"}]},
    ],
    ids=json.dumps,
)
@pytest.mark.parametrize("markdown", [[], ["--markdown"]], ids=["table", "markdown"])
def test_a_file_that_is_no_benchmark_is_refused(
    markdown: list[str], record: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, drawn = tmp_path / "a.json", tmp_path / "a.png"
    file.write_text(json.dumps(record))
    with pytest.raises(SystemExit) as end:
        main(["--from-json", str(file), "--plot", str(drawn), *markdown])
    assert end.value.code == 2
    assert f"expected files that --json wrote, got {file}: " in capsys.readouterr().err
    assert not drawn.exists()


def test_ctrl_c_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(operator_calls, "plain", stop)
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    assert main([*SMALL, "--implementations", "split", "plain", *files]) == 130
    assert list(results_of(tmp_path / "a.json")) == ["split"]
    assert (tmp_path / "a.png").exists()
    assert f"and in {tmp_path / 'a.json'}" in capsys.readouterr().err


def test_nothing_measured_draws_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--implementations", "cuda", "--plot", str(tmp_path / "a.png")]) == 0
    assert "nothing was measured" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


def test_a_length_named_twice_is_measured_once(tmp_path: Path) -> None:
    argv = [*SMALL, "--tokens", "16", "16", "--dtypes", "float32", "float32", "--implementations", "normal"]
    assert main([*argv, "--json", str(tmp_path / "a.json")]) == 0
    assert len(json.loads((tmp_path / "a.json").read_text())["results"]) == 1


def test_the_list_names_every_case_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    printed = capsys.readouterr().out.split()
    cases = [str(case) for group in GROUPS.values() for case in group]
    assert printed == [x for group, of_group in GROUPS.items() for x in (group, *map(str, of_group))]
    assert len(set(cases)) == len(set(case for group in GROUPS.values() for case in group))


@pytest.mark.parametrize("mask", ["shared", "none"])
def test_nominal_work_is_that_of_the_products(mask: str) -> None:
    case = replace(masked(2, 3, 5, 7, mask=mask), Lk=11, E=13)
    q, k, v = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 11, 7), torch.randn(2, 3, 11, 13)
    do, m = torch.randn(2, 3, 5, 13), torch.randn(1, 1, 5, 11)
    with FlopCounterMode(display=False) as forward:
        blockwise.linear_forward(q, k, v) if mask == "none" else blockwise.normal_forward(q, k, v, m)
    with FlopCounterMode(display=False) as backward:
        blockwise.linear_backward(do, q, k, v) if mask == "none" else blockwise.normal_backward(do, q, k, v, m, None)
    assert work(replace(case, backward=False)) == forward.get_total_flops()
    assert work(case) == forward.get_total_flops() + backward.get_total_flops()


def test_nominal_work_of_lightning_attention_by_hand() -> None:
    # A token of a head of width 10: 2 products of 10 · 10 with the state, 64 · 20 flop inside a chunk.
    assert work(lightning(2, 3, 100, 10, backward=False)) == 2 * 3 * 100 * (2 * 2 * 100 + 64 * 20)
    assert work(lightning(2, 3, 100, 10)) == 3.5 * work(lightning(2, 3, 100, 10, backward=False))


def test_nominal_traffic_by_hand() -> None:
    q = o = 2 * 4 * 8 * 16 * 2  # (2, 4, 8, 16) in bfloat16
    k = v = 2 * 1 * 8 * 16 * 2
    mask = 8 * 8 * 2
    case = masked(2, 4, 8, 16, "bfloat16", kv=1, mask_grad=True)
    assert traffic(replace(case, mask_grad=False, backward=False)) == q + k + v + mask + o
    assert traffic(case) == (q + k + v + mask + o) + (q + k + v + mask + o) + (q + k + v + mask)


def test_measures_of_memory_count_what_is_held() -> None:
    def run() -> torch.Tensor:
        a = torch.zeros(1000, 1000)
        b = a + 1
        del a
        return b * 2

    assert 8_000_000 <= peak_memory(run, CPU) < 8_000_100  # and a number or two
    assert allocations(run, CPU) >= 3
    x = torch.zeros(1000, requires_grad=True)
    assert saved_bytes(lambda: x.exp()) == 4000


def test_the_summary_of_times() -> None:
    times = summary([float(n) for n in range(11)])
    assert (times.median, times.p10, times.p90, times.least, times.runs) == (5, 1, 9, 0, 11)
    assert times.spread == 8 / 5


def test_growth_compares_the_two_longest() -> None:
    rows = [(1024, 1.0, 10), (4096, 8.0, 40), (2048, 2.0, 20)]
    results = [
        {"status": "ok", "series": "s", "implementation": "i", "length": n, "seconds": {"median": t}, "peak_bytes": p}
        for n, t, p in rows
    ]
    expected = "s i: 4,096 tokens take 4.00 times as long as 2,048 and hold 2.00 times the memory"
    assert growth(results) == [expected]
