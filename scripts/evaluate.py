"""Loss, perplexity and bits per byte of a model on text files or on the corpus of a config.

python -m scripts.evaluate runs/quickstart --text book.txt
python -m scripts.evaluate runs/quickstart --config configs/quickstart.yaml --split validation
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from training.errors import ConfigError, RunError
from training.imports import IMPORT_HELP, import_modules

if TYPE_CHECKING:
    from training.config import Config
    from training.evaluation import Score


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the scores; return 0, or the exit code of what is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="With --config any key of the config can follow, as in --data.paths '[notes.txt]'.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="a run, a checkpoint, a model folder or a hub name")
    parser.add_argument("--text", nargs="+", metavar="FILE", help="text files, each a document")
    parser.add_argument("--config", action="append", metavar="FILE", help="config whose corpus is read")
    parser.add_argument("--split", choices=("train", "validation"), default="validation", help="(%(default)s)")
    parser.add_argument(
        "--window", type=int, help="tokens that the model sees at most; default: the row length of its training"
    )
    parser.add_argument(
        "--batch-tokens",
        type=int,
        default=16_384,
        help="tokens run at once (%(default)s); masked attention runs windows one by one",
    )
    parser.add_argument("--max-tokens", type=int, help="stop after this many tokens")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (%(default)s)")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="(%(default)s)"
    )
    parser.add_argument("--import", dest="imports", action="append", default=[], metavar="MODULE", help=IMPORT_HELP)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options, overrides = parser.parse_known_args(arguments)
    if (options.text is None) == (options.config is None):
        parser.error("expected exactly one of --text and --config")
    if options.text and overrides:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    for name in ("window", "batch_tokens", "max_tokens"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected 1 or more, got {getattr(options, name)}")
    try:
        result = _evaluate(options, overrides)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    _print(result, as_json=options.json)
    return 0


def _evaluate(options: argparse.Namespace, overrides: list[str]) -> "Score":
    from training.config import DataConfig, load_config
    from training.corpus import all_documents, documents

    config = None
    if options.text:
        texts = all_documents(DataConfig(corpus="text", paths=options.text))
    else:
        files = [argument for file in options.config for argument in ("--config", file)]
        config = load_config([*files, *overrides]).config
        texts = iter(()) if config.data.corpus == "recall" else documents(config.data, options.split)
    from training.opening import open_model

    import_modules(options.imports)
    model, tokenizer, _ = open_model(options.model, options.device, options.dtype)
    from contextlib import nullcontext

    from tqdm import tqdm

    from training.evaluation import Score, score
    from training.tokenizer import token_byte_lengths

    if config is not None and config.data.corpus == "recall":
        batches = _recall_batches(config, options, tokenizer)
    else:
        window = options.window or model.config.max_position_embeddings
        rows = tqdm(_windows(texts, tokenizer, window), desc="evaluating", unit=" windows")
        at_once = options.batch_tokens if model.config.attention == "lightning" else 1
        batches = _packed(_up_to(rows, options.max_tokens), at_once)
    nll, tokens, num_bytes, correct = score(model, batches, token_byte_lengths(tokenizer), nullcontext).tolist()
    if not tokens:
        raise ConfigError("nothing to evaluate: no document with text")
    return Score(nll, int(tokens), int(num_bytes), int(correct))


def _recall_batches(config: "Config", options: argparse.Namespace, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Generated rows, whose answers alone are predicted, for a model that was trained on their symbols."""
    from training.batches import evaluation_batches
    from training.data import prepare

    data = prepare(config)
    if len(tokenizer) != data.vocab_size:
        raise ConfigError(
            f"data.recall_symbols: expected those of the model, whose tokenizer has {len(tokenizer)} pieces, got"
            f" {config.data.recall_symbols}, with which there are {data.vocab_size}"
        )
    tokens, length = getattr(data, options.split), config.data.sequence_length
    rows_at_once = max(1, options.batch_tokens // length)
    most = options.max_tokens or tokens.num_rows(length) * length
    return evaluation_batches(tokens, length, rows_at_once, most, boundaries=False)


def _windows(texts: Iterable[str], tokenizer: Any, window: int) -> Iterator[list[int]]:
    """Ids of each document, bos and eos included, in windows of T inputs and the T targets after each of them."""
    for text in texts:
        ids = tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"]
        ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
        for start in range(0, len(ids) - 1, window):
            yield ids[start : start + window + 1]


def _up_to(rows: Iterable[list[int]], max_tokens: int | None) -> Iterator[list[int]]:
    left = max_tokens
    for row in rows:
        if left is not None and left <= 0:
            return
        row = row if left is None else row[: left + 1]
        yield row
        left = None if left is None else left - (len(row) - 1)


def _packed(rows: Iterable[list[int]], batch_tokens: int) -> Iterator[dict[str, Any]]:
    """Windows packed one after the other, each a sequence of its own."""
    group: list[list[int]] = []
    size = 0
    for row in rows:
        group.append(row)
        size += len(row) - 1
        if size >= batch_tokens:
            yield _pack(group)
            group, size = [], 0
    if group:
        yield _pack(group)


def _pack(group: list[list[int]]) -> dict[str, Any]:
    import torch

    lengths = torch.tensor([0, *(len(row) - 1 for row in group)])
    return {
        "input_ids": torch.tensor([[token for row in group for token in row[:-1]]]),
        "shift_labels": torch.tensor([[token for row in group for token in row[1:]]]),
        "cu_seq_lens_q": lengths.cumsum(0).to(torch.int32),
    }


def _print(result: "Score", as_json: bool) -> None:
    values = {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "accuracy": result.accuracy,
        "tokens": result.tokens,
        "bytes": result.num_bytes,
    }
    if as_json:
        print(json.dumps(values))
        return
    print(f"loss: {result.loss:.4f} nats per token")
    print(f"perplexity: {result.perplexity:.2f} per token")
    print(f"bits per byte: {result.bits_per_byte:.4f}")
    print(f"accuracy: {result.accuracy:.1%} of the tokens were the most probable ones")
    print(f"text: {result.tokens:,} tokens, {result.num_bytes:,} bytes")


if __name__ == "__main__":
    sys.exit(main())
