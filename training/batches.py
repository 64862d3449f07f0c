"""Batches of a run: which rows a step reads from the packed tokens, and what the model gets of them."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from training.config import Config
from training.data import PackedTokens
from training.processes import Processes

_IGNORED = -100  # label that the loss leaves out


@lru_cache(maxsize=2)
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """Return (num_rows,) int64; numpy keeps the raw stream of Philox, unlike `permutation`, between versions."""
    raw = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(num_rows)
    return np.argsort(raw, kind="stable")


@dataclass(frozen=True)
class BatchOrder:
    """Which rows a step reads: one permutation of all rows after another, whatever came before.

    Args:
        num_rows: rows of the token file.
        batch_size: rows of a global batch.
        seed: of the permutations.
    """

    num_rows: int
    batch_size: int
    seed: int

    def rows(self, step: int) -> np.ndarray:
        """Return (batch_size,) int64 rows of the batch at `step`, counted from 0; it may run across epochs."""
        epochs, places = np.divmod(np.arange(self.batch_size) + step * self.batch_size, self.num_rows)
        rows = np.empty(self.batch_size, np.int64)
        for epoch in np.unique(epochs):
            rows[epochs == epoch] = _permutation(self.num_rows, self.seed, int(epoch))[places[epochs == epoch]]
        return rows

    def epoch(self, step: int) -> float:
        """Return how many times the data was read before `step`."""
        return step * self.batch_size / self.num_rows


def batch_sha(ids: np.ndarray) -> str:
    """Return the sha256 of ids in sample order, as little-endian uint32."""
    return hashlib.sha256(np.ascontiguousarray(ids, "<u4").data).hexdigest()


def collate(
    tokens: PackedTokens, rows: np.ndarray, sequence_length: int, boundaries: bool, joined: bool = True
) -> dict[str, torch.Tensor]:
    """Return the inputs and shifted labels of b rows of T tokens.

    The label of a token that is not to be predicted is -100. With `boundaries` so is one that belongs to the next
    document, and positions start at 0 in each row and document. `joined` rows lie one after the other: input_ids,
    shift_labels and position_ids (1, b T) int64, and cu_seq_lens_q (N + 1,) int32, begins of the N rows and documents,
    and b T. Else input_ids, shift_labels and position_ids are (b, T): what attention takes whose time grows with the
    square of a row. Without boundaries: input_ids and shift_labels (b, T).
    """
    places = rows[:, None] * sequence_length + np.arange(sequence_length + 1)  # (b, T + 1)
    ids = torch.from_numpy(tokens.ids[places].astype(np.int64))
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()  # (b, T)
    if tokens.predicted is not None:
        labels = labels.masked_fill(torch.from_numpy(~tokens.predicted[places[:, 1:]]), _IGNORED)
    if not boundaries:
        return {"input_ids": inputs, "shift_labels": labels}
    document = np.searchsorted(tokens.offsets, places, side="right")  # (b, T + 1)
    target_begins = document[:, 1:] != document[:, :-1]  # (b, T)
    begins = np.ones_like(target_begins)
    begins[:, 1:] = target_begins[:, :-1]
    starts = np.flatnonzero(begins)  # (N,)
    lengths = np.diff(starts, append=begins.size)
    batch = {
        "input_ids": inputs,
        "shift_labels": labels.masked_fill(torch.from_numpy(target_begins), _IGNORED),
        "position_ids": torch.from_numpy(np.arange(begins.size) - np.repeat(starts, lengths)).view_as(inputs),
    }
    if not joined:
        return batch
    bounds = torch.from_numpy(np.append(starts, begins.size).astype(np.int32))
    return {**{name: x.view(1, -1) for name, x in batch.items()}, "cu_seq_lens_q": bounds}


class Batch(NamedTuple):
    """What a process runs in a step, and what all processes know of the global batch."""

    micro_batches: list[dict[str, torch.Tensor]]
    labels: int  # predicted tokens of the global batch
    sha: str


def step_batch(
    config: Config, tokens: PackedTokens, order: BatchOrder, step: int, processes: Processes, micro_batches: int
) -> Batch:
    """Return the global batch of a step, a function of seed and step alone; a process keeps its share of the rows."""
    length, boundaries = config.data.sequence_length, config.data.document_boundaries
    rows = order.rows(step)
    whole = collate(tokens, rows, length, boundaries)
    labels = int((whole["shift_labels"] >= 0).sum())
    mine = np.array_split(rows, processes.count)[processes.rank]
    joined = config.model.attention == "lightning"
    parts = [collate(tokens, part, length, boundaries, joined) for part in np.array_split(mine, micro_batches)]
    return Batch(parts, labels, batch_sha(whole["input_ids"].numpy()))


def without_labels(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a batch in which nothing is predicted: for a process that only keeps others company."""
    return batch | {"shift_labels": torch.full_like(batch["shift_labels"], _IGNORED)}


def evaluation_batches(
    tokens: PackedTokens,
    sequence_length: int,
    micro_batch_size: int,
    max_tokens: int,
    boundaries: bool,
    joined: bool = True,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield rows spread evenly over the tokens, the same every time, `micro_batch_size` at a time.

    They hold at most `max_tokens` tokens, but at least one row.
    """
    available = tokens.num_rows(sequence_length)
    count = min(available, max(1, max_tokens // sequence_length))
    rows = np.arange(count) * available // count
    for first in range(0, count, micro_batch_size):
        yield collate(tokens, rows[first : first + micro_batch_size], sequence_length, boundaries, joined)
