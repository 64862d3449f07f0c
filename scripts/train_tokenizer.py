"""Train a SentencePiece tokenizer on the corpus of a config and check that transformers opens it exactly."""

import argparse
import sys
from pathlib import Path

from training.errors import ConfigError, RunError


def main() -> int:
    """Train into --out, print what was measured, return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.train_tokenizer",
        description=__doc__,
        epilog="Any key of the config can follow, as in --tokenizer.vocab_size 8192 --data.paths '[notes.txt]'.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="config whose corpus is read")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder of the tokenizer")
    arguments, _ = parser.parse_known_args()
    try:
        _train(sys.argv[1:], arguments.out)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _train(argv: list[str], out: Path) -> None:
    from training.config import load_config
    from training.corpus import open_corpus
    from training.progress import build_once
    from training.tokenizer import TokenizerReport, train_tokenizer

    config = load_config(argv).config
    if out.exists():
        raise ConfigError(f"--out: expected a new folder, got {out}, which exists")
    corpus = open_corpus(config.data)
    reports: list[TokenizerReport] = []
    build_once(
        out,
        "training the tokenizer",
        lambda folder: reports.append(train_tokenizer(corpus, config.tokenizer, folder)),
    )
    for report in reports:
        print(f"vocabulary: {report.vocab_size} pieces")
        print(f"held-out text: {report.bytes_per_token:.3f} bytes per token")
        print(f"round trip: transformers equals sentencepiece on {report.texts_checked} texts")
    print(f"tokenizer: {out}")


if __name__ == "__main__":
    sys.exit(main())
