"""Continue a prompt with a trained model: `python -m scripts.generate runs/quickstart --prompt "def "`."""

import argparse
import sys
from collections.abc import Sequence

from training.errors import RunError
from training.imports import IMPORT_HELP, import_modules


def main(arguments: Sequence[str] | None = None) -> int:
    """Print each completion; return 0, or the exit code of what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m scripts.generate", description=__doc__, allow_abbrev=False)
    parser.add_argument("model", help="a run, a checkpoint, a model folder or a hub name")
    parser.add_argument("--prompt", default="", help="text to continue; empty starts a document")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens to add (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (%(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="share of probability to sample from (%(default)s)")
    parser.add_argument("--samples", type=int, default=1, help="completions, each with the next seed (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (%(default)s)")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="(%(default)s)"
    )
    parser.add_argument("--import", dest="imports", action="append", default=[], metavar="MODULE", help=IMPORT_HELP)
    options = parser.parse_args(arguments)
    for name, value, least in (("--max-new-tokens", options.max_new_tokens, 1), ("--samples", options.samples, 1)):
        if value < least:
            parser.error(f"{name}: expected {least} or more, got {value}")
    if not 0 <= options.seed < 2**63:
        parser.error(f"--seed: expected 0 to 2^63 - 1, got {options.seed}")
    if not 0 <= options.temperature < float("inf") or not 0 < options.top_p <= 1:
        parser.error("--temperature: expected 0 or more; --top-p: expected more than 0, at most 1")
    try:
        _generate(options)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _generate(options: argparse.Namespace) -> None:
    from training.opening import open_model

    import_modules(options.imports)
    model, tokenizer, _ = open_model(options.model, options.device, options.dtype)
    from training.evaluation import complete

    sampling = {"temperature": options.temperature, "top_p": options.top_p}
    if options.temperature == 0:
        sampling = {"do_sample": False, "temperature": None, "top_p": None}
    for seed in range(options.seed, options.seed + options.samples):
        print(complete(model, tokenizer, options.prompt, options.max_new_tokens, seed, **sampling), flush=True)


if __name__ == "__main__":
    sys.exit(main())
