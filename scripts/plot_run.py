"""Draw the loss curves of runs into one figure: `python -m scripts.plot_run RUN [RUN ...] --out loss.png`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from training.errors import RunError
from training.report import plot_runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the figure and print its path; return 0, or the exit code of what is wrong with a run."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.plot_run",
        description="Draw training and validation loss of one or more runs into one figure.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, with metrics.jsonl")
    parser.add_argument(
        "--out", type=Path, default=Path("loss.png"), help="the figure: .png, .pdf or .svg (%(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        plot_runs(options.runs, options.out)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
