"""A module for `--import`: rows lose labels, some a few at their begin and every eighth row all of them."""

import training.batches

collate = training.batches.collate


def ragged(tokens, rows, sequence_length, boundaries, joined=True):
    """A batch in which a row's number alone says which of its labels count."""
    batch = collate(tokens, rows, sequence_length, boundaries, joined)
    labels = batch["shift_labels"].view(len(rows), sequence_length)
    for row, mine in zip(rows.tolist(), labels, strict=True):
        mine[: sequence_length if row % 8 == 0 else row * 7 % sequence_length] = -100
    return batch


training.batches.collate = ragged
