"""Train one model in several variants, above all heads x width, over several seeds, and report with error bars.

python -m scripts.ablate_heads --config configs/ablation/heads.yaml --out runs/heads \\
  --pairs 12x64 4x192 1x768 --seeds 0 1 2 --tokens 60M
python -m scripts.ablate_heads --config configs/ablation/heads.yaml --out runs/decay \\
  --pairs 12x64 1x768 --vary model.decay fixed learned none --tokens 60M

Each run is an ordinary `train.py` in a folder of its own below --out. Runs that are done are skipped, runs that were
begun go on, so the same command may be given again after any end, with more pairs and seeds too.
"""

import argparse
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from scripts.ablation_report import METRICS, Result, read_results, write_report, write_results
from scripts.ablation_runs import Job, Machine, find_machine, refuse_other_base, result_of, run_jobs
from scripts.ablation_variants import BUDGETS, Base, Budget, Variant, make_variants, overlay_text
from training.config import check
from training.errors import CheckpointError, ConfigError, RunError
from training.imports import import_modules
from training.outcome import exit_code_of
from training.redaction import redact_arguments
from training.storage import disk_errors, replace_file

_TRAIN = Path(__file__).parents[1] / "train.py"
_PROBE_STEPS = 40
_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_SET_HERE = ("seed", "resume", "changed", "tracking.wandb_group")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or the exit code of what is wrong or of a run that failed."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    given = redact_arguments(list(sys.argv[1:] if arguments is None else arguments))
    command = shlex.join(["python", "-m", "scripts.ablate_heads", *given])
    return exit_code_of(lambda ending: _ablate(options, rest, command))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.ablate_heads",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any key of the config can follow, as in --optim.lr 2e-3, and holds for all runs.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", action="append", required=True, metavar="FILE", help="base config; several merge left to right")
    add("--out", type=Path, required=True, metavar="FOLDER", help="folder of all runs and of the report")
    add("--pairs", nargs="+", default=[], metavar="HxD", help="heads x width, as 12x64; 12x64/1 has 1 key/value head")
    add("--vary", nargs="+", action="append", default=[], metavar="X", help="a key of the config and its values")
    add("--overlays", nargs="+", default=[], metavar="FILE", help="configs of which each makes a variant")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(%(default)s)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--tokens", type=_amount, help="training tokens of a run, as 60M")
    budget.add_argument("--flops", type=_amount, help="training FLOPs of a run, as 30P")
    budget.add_argument("--seconds", type=_amount, help="seconds of training of a run, by a speed measured first")
    add("--parallel", type=int, metavar="N", help="runs at once; default: one a GPU, else one")
    add("--baseline", metavar="NAME", help="variant that the others are compared with; default: the first one")
    add("--metric", choices=METRICS, help="what is compared; default: accuracy for corpus recall, else validation_loss")
    add("--list", action="store_true", help="print the variants and their sizes, and run nothing")
    return parser


def _amount(text: str) -> float:
    found = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?(?:e\d{1,2})?)([KMGBTPE]?)", text)
    if not found or not (amount := float(found[1]) * _UNITS[found[2]]):
        raise argparse.ArgumentTypeError(f"expected a positive number such as 60M, 1e18 or 600, got {text}")
    return amount


def _ablate(options: argparse.Namespace, rest: list[str], command: str) -> None:
    from training.setup import check_out

    _check_options(options, rest)
    check_out(options.out)
    base = Base(options.config, rest)
    import_modules(base.imports())
    variants = make_variants(base, options.pairs, options.vary, options.overlays)
    _print_sizes(variants)
    if options.list:
        return
    machine = find_machine(options.parallel)
    record = _Record(options.out, machine.name, [variant.name for variant in variants])
    if options.baseline not in (None, *record.order):
        raise ConfigError(f"--baseline: expected one of the variants {', '.join(record.order)}, got {options.baseline}")
    refuse_other_base(options.out, record.read(), base.config())
    jobs = _jobs(options, base, variants, machine)
    failed: dict[str, str] = {}
    try:
        failed = run_jobs(jobs, machine, record.add)
    finally:
        damaged = record.add_all(jobs)
        failed |= damaged
        commands = [*_note_command(options.out, command), *(job.shell_command for job in jobs)]
        metric = options.metric or ("accuracy" if base.config().data.corpus == "recall" else "validation_loss")
        _report(options.out, record.read(), metric, options.baseline or record.order[0], failed, commands)
    for name, reason in damaged.items():  # the others were told as they failed
        print(f"{name} failed: {reason}", file=sys.stderr)
    if failed:
        raise RunError(f"{len(failed)} of {len(jobs)} runs failed; the same command tries them again")


def _note_command(out: Path, command: str) -> list[str]:
    """Add to `commands.txt` what fills the folder; return all such commands."""
    path = out / "commands.txt"
    with disk_errors(path):
        known = path.read_text().splitlines() if path.exists() else []
        if command not in known:
            known.append(command)
            replace_file(path, "".join(f"{line}\n" for line in known).encode())
    return known


def _report(
    out: Path,
    results: list[Result],
    metric: str,
    baseline: str | None,
    failed: dict[str, str],
    commands: list[str],
) -> None:
    if not results:
        return
    remarks = [f"Failed: {name}: {reason}" for name, reason in failed.items()]
    if baseline not in {result.variant for result in results}:
        remarks.append(f"No run of the baseline {baseline} is done.")
        baseline = None
    table = write_report(
        out,
        results,
        title=out.name,
        metric=metric,
        baseline=baseline,
        remarks=remarks,
        commands=commands,
    )
    print(f"{table}\nreport: {out / 'report.html'}")


def _check_options(options: argparse.Namespace, rest: Sequence[str]) -> None:
    for argument in rest:
        key = argument.removeprefix("--").partition("=")[0]
        if argument.startswith("--") and key in _SET_HERE:
            raise ConfigError(f"--{key}: expected no such key here, each run gets its own; see --seeds and --out")
    if options.parallel is not None and options.parallel < 1:
        raise ConfigError(f"--parallel: expected 1 or more runs at once, got {options.parallel}")
    if min(options.seeds) < 0 or len(set(options.seeds)) < len(options.seeds):
        raise ConfigError(f"--seeds: expected different numbers from 0, got {' '.join(map(str, options.seeds))}")


def _print_sizes(variants: Sequence[Variant]) -> None:
    width = max(len(variant.name) for variant in variants)
    print(f"{'variant':{width}}  {'parameters':>14}  {'state':>12}  {'FLOP a token':>13}")
    for variant in variants:
        size = variant.size
        row = f"{size.parameters:14,}  {size.state_size:12,}  {size.flops_per_token:13,.0f}"
        print(f"{variant.name:{width}}  {row}")


def _jobs(options: argparse.Namespace, base: Base, variants: Sequence[Variant], machine: Machine) -> list[Job]:
    """All runs, seed by seed, so that what is compared is trained one soon after the other."""
    budget = next((Budget(kind, amount) for kind in BUDGETS if (amount := getattr(options, kind))), None)
    speeds = _probe(options.out, base, variants, machine) if budget and budget.kind == "seconds" else {}
    steps = {
        variant.name: budget.steps(variant, speeds.get(variant.name)) if budget else variant.config.training.steps
        for variant in variants
    }
    return [
        _job(options.out, base, variant, seed, steps[variant.name]) for seed in options.seeds for variant in variants
    ]


def _job(out: Path, base: Base, variant: Variant, seed: int, steps: int, **training: Any) -> Job:
    """A run of so many steps, which an overlay in `overlays/` tells from the base."""
    config = replace(
        variant.config,
        training=replace(variant.config.training, steps=steps, **training),
        tracking=replace(variant.config.tracking, wandb_group=variant.name),
    )
    overlay = out / "overlays" / f"{variant.folder}.yaml"
    files = {overlay: overlay_text(base, config)}
    config = replace(config, seed=seed)
    check(config)
    folder, log = out / variant.folder / f"seed{seed}", out / "logs" / f"{variant.folder}_seed{seed}.log"
    options = [part for file in (*base.files, str(overlay)) for part in ("--config", file)]
    options += [f"--import={name}" for name in base.imports()]
    command = [sys.executable, str(_TRAIN), *options, f"--seed={seed}", "--out", str(folder)]
    return Job(variant, seed, config, folder, log, command, files)


def _probe(out: Path, base: Base, variants: Sequence[Variant], machine: Machine) -> dict[str, float]:
    """Tokens per second of each variant, by short runs that are kept without their checkpoints."""
    jobs = [
        _job(out / "probes", base, variant, 0, _PROBE_STEPS, eval_every=0, eval_tokens=1, sample_tokens=1)
        for variant in variants
    ]
    print(f"measuring speeds: {len(jobs)} runs of {_PROBE_STEPS} steps")
    failed = run_jobs(jobs, machine, lambda job: shutil.rmtree(job.out / "checkpoints"))
    if failed:
        raise RunError("the speed of a variant could not be measured")
    return {job.variant.name: job.last_record()["tokens_per_second"] for job in jobs}


class _Record:
    """`results.jsonl` of an ablation: runs of other commands stay in it as long as their folders are there.

    Args:
        out: folder of the ablation.
        device: on which runs are made now.
        variants: of this command.

    Attributes:
        order: names of all variants, those of other commands first.
    """

    def __init__(self, out: Path, device: str, variants: Sequence[str]) -> None:
        self._path, self._out, self._device = out / "results.jsonl", out, device
        others = (run.variant for run in self.read() if run.variant not in variants)
        self.order = [*dict.fromkeys(others), *variants]

    def read(self) -> list[Result]:
        """Return what is known of the runs whose folders are there."""
        try:
            known = read_results(self._path) if self._path.exists() else []
        except CheckpointError as error:
            raise CheckpointError(f"{error}; remove it, and every command adds its runs that are done again") from None
        return [result for result in known if (self._out / result.folder).is_dir()]

    def add_all(self, jobs: Sequence[Job]) -> dict[str, str]:
        """Take up what is done; return why runs that are done can't be."""
        failed = {}
        for job in (job for job in jobs if job.is_done()):
            try:
                self.add(job)
            except RunError as error:
                failed[job.name] = str(error)
        return failed

    def add(self, job: Job) -> None:
        """Take up a run that is done; another command may do so at the same time."""
        with FileLock(self._path.with_name(".results.lock")):
            known = {result.folder: result for result in self.read()}
            before = known.get(str(job.out.relative_to(self._out)))
            result = result_of(job, before.device if before else self._device, self._out)
            known[result.folder] = result
            order = [*self.order, *(other.variant for other in known.values())]
            results = sorted(known.values(), key=lambda other: (order.index(other.variant), other.seed))
            if result != before:
                write_results(self._path, results)


if __name__ == "__main__":
    sys.exit(main())
