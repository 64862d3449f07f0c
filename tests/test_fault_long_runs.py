"""Long runs: memory that does not grow, records that are only ever added to."""

import os
import time
from pathlib import Path

import pytest
from fault_runs import Template, Workers, lines

pytestmark = pytest.mark.faults


def resident_bytes(run: Workers) -> int:
    """Return the memory of the run's only process."""
    pages = int(Path(f"/proc/{run.pids[0]}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def watch(run: Workers, path: Path) -> list[tuple[int, int]]:
    """Follow a run to its end; return (lines of `path`, bytes of memory) as often as it can be looked.

    Checks on the way that the file is only added to.
    """
    seen, before, inode = [], b"", 0
    assert run.wait_for(path.exists), run.said()
    while run.poll() == [None]:
        time.sleep(0.02)
        content = path.read_bytes()
        inode = inode or path.stat().st_ino
        assert path.stat().st_ino == inode, f"{path} was replaced while the run goes on"
        assert content.startswith(before), f"{path} was changed"
        before = content
        try:
            seen.append((content.count(b"\n"), resident_bytes(run)))
        except FileNotFoundError:
            break
    return seen


def test_memory_stays_and_records_are_added_to(
    template: Template, fault_arguments: list[str], tmp_path: Path, long_form: bool
) -> None:
    steps, every = (2000, 100) if long_form else (60, 20)
    out = tmp_path / "run"
    options = [f"--training.steps={steps}", f"--training.eval_every={every}", f"--checkpoint.every={every}"]
    run = template.start([*fault_arguments, *options, "--checkpoint.keep=2", f"--out={out}"], tmp_path / "log")
    seen = watch(run, out / "metrics.jsonl")
    assert run.wait() == [0], run.said()
    assert len(lines(out / "metrics.jsonl")) == steps
    assert len(lines(out / "evaluations.jsonl")) == steps // every
    assert len(seen) > 10
    if not long_form:
        return
    begin, *_, end = (memory for step, memory in seen if 200 <= step < steps)
    print(f"{begin / 1e6:.1f} MB at step 200, {end / 1e6:.1f} MB at step {steps - 1}: {end / begin - 1:+.2%}")
    assert abs(end / begin - 1) < 0.01
