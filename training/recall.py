"""Multi-query associative recall: rows of key-value pairs, each key asked for once; what a recurrent state can hold.

Source: Arora et al. 2023, "Zoology: Measuring and Improving Recall in Efficient Language Models", arXiv:2312.04927.
A row of T tokens, for N pairs: `k1 v1 ... kN vN`, then (T - 2N) / 2 places of two tokens. N of them hold a key and
its value; the others two random values. As in the paper each key in turn takes a free place, by a power law of its
distance from the end of the pairs; where few places are free, early pairs tend to be asked early. Other than there the
answer stands in the row, after its key: labels are the next token, as in any text, and those that are no answer don't
count. Keys and values are characters of their own, which the tokenizer takes as one token each.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from training.config import DataConfig
from training.errors import ConfigError

_FIRST_KEY, _FIRST_VALUE = 0x4E00, 0xAC00  # Chinese characters, Hangul syllables: 11,172 or more of each in a row
_MOST_SYMBOLS = 2 * 11_172
_CHUNK = 4096  # rows made at once


class Symbols(NamedTuple):
    """The characters of a task, K keys and V values."""

    keys: str
    values: str


class Rows(NamedTuple):
    """Rows of R examples.

    Attributes:
        symbols: (R, T) int64: below K a key, from K on a value.
        answers: (R, T) bool, whether a symbol is the answer to the key before it.
    """

    symbols: np.ndarray
    answers: np.ndarray


def check_recall(config: DataConfig) -> None:
    """Refuse a task that can't be.

    Raises:
        ConfigError: naming the key, what was expected and what came.
    """
    length, pairs, symbols = config.sequence_length, config.recall_pairs, config.recall_symbols
    if length % 2 or length < 4 * pairs:
        raise ConfigError(
            f"data.sequence_length: expected an even number from {4 * pairs}, 4 times data.recall_pairs, got {length}"
        )
    if not 4 * pairs <= symbols <= _MOST_SYMBOLS:
        raise ConfigError(
            f"data.recall_symbols: expected {4 * pairs}, 4 times data.recall_pairs, to {_MOST_SYMBOLS}, got {symbols}"
        )
    fewest = config.recall_fewest_pairs or pairs
    if fewest > pairs:
        raise ConfigError(f"data.recall_fewest_pairs: expected {pairs}, data.recall_pairs, or fewer, got {fewest}")
    if config.recall_examples < pairs - fewest + 1:
        raise ConfigError(
            f"data.recall_examples: expected {pairs - fewest + 1} or more, one for each number of pairs, got"
            f" {config.recall_examples}"
        )


def symbols_of(config: DataConfig) -> Symbols:
    """Return the characters of the task: half of `data.recall_symbols` are keys."""
    count = config.recall_symbols
    keys, values = range(_FIRST_KEY, _FIRST_KEY + count // 2), range(_FIRST_VALUE, _FIRST_VALUE + count - count // 2)
    return Symbols("".join(map(chr, keys)), "".join(map(chr, values)))


def training_rows(config: DataConfig) -> Rows:
    """Return `data.recall_examples` examples, from the fewest pairs to the most; `BatchOrder` mixes them."""
    numbers = range(config.recall_fewest_pairs or config.recall_pairs, config.recall_pairs + 1)
    counts = np.diff(np.arange(len(numbers) + 1) * config.recall_examples // len(numbers))
    parts = [recall_rows(replace(config, recall_pairs=n), 0, int(c)) for n, c in zip(numbers, counts, strict=True)]
    return _join(parts)


def validation_rows(config: DataConfig) -> Rows:
    """Return `data.validation_share` of that number, at least one, all with `data.recall_pairs` pairs."""
    return recall_rows(config, 1, max(1, round(config.validation_share * config.recall_examples)))


def recall_rows(config: DataConfig, stream: int, count: int) -> Rows:
    """Return `count` examples, the same for the same options and stream, whatever the seed of the run.

    Args:
        config: `sequence_length`, `recall_pairs`, `recall_symbols` and `recall_power`.
        stream: number of an independent series of examples.
        count: R.
    """
    raw = np.random.Philox(key=np.array([stream, config.recall_pairs], np.uint64))
    return _join([_rows(config, raw, min(_CHUNK, count - begin)) for begin in range(0, count, _CHUNK)])


def _join(rows: list[Rows]) -> Rows:
    return Rows(*(np.concatenate(parts) for parts in zip(*rows, strict=True)))


def _rows(config: DataConfig, raw: np.random.Philox, count: int) -> Rows:
    length, pairs = config.sequence_length, config.recall_pairs
    num_keys = config.recall_symbols // 2
    num_values = config.recall_symbols - num_keys
    places = (length - 2 * pairs) // 2
    keys = _choose(raw, count, pairs, num_keys)
    values = _choose(raw, count, pairs, num_values) + num_keys
    symbols = (raw.random_raw(count * length).reshape(count, length) % num_values).astype(np.int64) + num_keys
    symbols[:, 0 : 2 * pairs : 2], symbols[:, 1 : 2 * pairs : 2] = keys, values
    asked = 2 * pairs + 2 * _choose_places(raw, count, pairs, places, config.recall_power)  # (R, N)
    answers = np.zeros((count, length), bool)
    np.put_along_axis(symbols, asked, keys, axis=1)
    np.put_along_axis(symbols, asked + 1, values, axis=1)
    np.put_along_axis(answers, asked + 1, True, axis=1)
    return Rows(symbols, answers)


def _choose(raw: np.random.Philox, rows: int, count: int, total: int) -> np.ndarray:
    """Choose (rows, count) of `total` things, each of a row once: the first steps of a Fisher-Yates shuffle."""
    items = np.tile(np.arange(total), (rows, 1))
    row = np.arange(rows)
    for place, draws in enumerate(raw.random_raw(count * rows).reshape(count, rows)):
        other = place + (draws % (total - place)).astype(np.int64)
        items[row, place], items[row, other] = items[row, other], items[row, place]
    return items[:, :count]


def _choose_places(raw: np.random.Philox, rows: int, count: int, places: int, power: float) -> np.ndarray:
    """Choose (rows, count) of `places`, one after the other without return, place x from 1 by weight x^(power - 1).

    The smallest of exponential variables with the weights as rates: Efraimidis and Spirakis 2006.
    """
    weights = np.arange(1, places + 1) ** (power - 1.0)
    uniform = (raw.random_raw(rows * places).reshape(rows, places) >> 11) * 2.0**-53
    arrival = -np.log1p(-uniform) / weights
    return np.argsort(arrival, axis=1, kind="stable")[:, :count]


def texts(rows: Rows, symbols: Symbols) -> Iterator[str]:
    """Yield the text of each example."""
    alphabet = np.array(list(symbols.keys + symbols.values))
    return ("".join(row) for row in alphabet[rows.symbols])
