"""Associative recall: rows against the definition, their distribution, and what training and evaluation see of them."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model import TransnormerForCausalLM
from training.batches import collate, evaluation_batches
from training.config import Config, DataConfig, TokenizerConfig, load_config
from training.corpus import documents
from training.data import Prepared, prepare
from training.errors import ConfigError
from training.evaluation import Score, score
from training.recall import recall_rows, symbols_of, texts, training_rows, validation_rows
from training.setup import model_config
from training.tokenizer import OTHER_PIECES, load_tokenizer, token_byte_lengths

TASK = DataConfig(corpus="recall", recall_pairs=4, recall_symbols=43, recall_examples=60, sequence_length=24)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    data = replace(TASK, validation_share=0.2, cache_dir=str(tmp_path_factory.mktemp("cache")))
    return prepare(Config(data=data))


@pytest.mark.parametrize(("pairs", "length", "symbols"), [(4, 24, 43), (1, 4, 4), (8, 32, 32), (16, 128, 8187)])
def test_each_row_is_pairs_then_each_key_once_with_its_value(pairs: int, length: int, symbols: int) -> None:
    options = replace(TASK, recall_pairs=pairs, sequence_length=length, recall_symbols=symbols)
    keys, values = symbols_of(options)
    assert len(keys) + len(values) == symbols
    assert len(keys) == symbols // 2
    rows = recall_rows(options, stream=0, count=50)
    for text, answers in zip(texts(rows, symbols_of(options)), rows.answers, strict=True):
        assert len(text) == length
        given = dict(zip(text[0 : 2 * pairs : 2], text[1 : 2 * pairs : 2], strict=True))
        assert len(given) == pairs
        assert set(given) <= set(keys)
        assert set(given.values()) <= set(values)
        rest, marked = text[2 * pairs :], answers[2 * pairs :]
        assert not answers[: 2 * pairs].any()
        asked = [place for place in range(0, len(rest), 2) if rest[place] in keys]
        assert Counter(rest[place] for place in asked) == Counter(given.keys())
        assert all(rest[place + 1] == given[rest[place]] for place in asked)
        assert np.flatnonzero(marked).tolist() == [place + 1 for place in asked]
        assert all(
            set(rest[place : place + 2]) <= set(values) for place in range(0, len(rest), 2) if place not in asked
        )


def test_training_rows_may_have_fewer_pairs_but_validation_rows_not() -> None:
    options = replace(TASK, recall_fewest_pairs=2, recall_examples=100, validation_share=0.1)
    training, validation = training_rows(options), validation_rows(options)
    assert Counter(training.answers.sum(1).tolist()) == {2: 33, 3: 33, 4: 34}
    assert validation.answers.sum(1).tolist() == [4] * 10
    assert training_rows(TASK).answers.sum(1).tolist() == [4] * 60


def test_rows_depend_on_the_options_and_the_stream_alone() -> None:
    first, again, other = (recall_rows(TASK, stream, 5000).symbols for stream in (0, 0, 1))
    assert (first == again).all()
    assert (first[:100] != other[:100]).any(axis=1).all()
    assert len(np.unique(first, axis=0)) == 5000


def test_keys_values_and_order_are_uniform_and_places_follow_the_power() -> None:
    rows = recall_rows(TASK, stream=3, count=20_000)
    keys, values = rows.symbols[:, 0:8:2].ravel(), rows.symbols[:, 1:8:2].ravel()
    for found, first, last in ((keys, 0, 20), (values, 21, 42)):
        counts = np.bincount(found, minlength=43)[first : last + 1]
        expected = counts.sum() / len(counts)
        chi2 = ((counts - expected) ** 2 / expected).sum()
        assert counts.sum() == 80_000
        assert chi2 < 2.5 * len(counts)
    places = np.flatnonzero(rows.answers.any(axis=0)) // 2 - 4
    assert places.tolist() == list(range(8))
    one = recall_rows(replace(TASK, recall_pairs=1, sequence_length=18), stream=0, count=40_000)
    seen = one.answers[:, 3::2].mean(axis=0)
    weights = np.arange(1, 9) ** (0.01 - 1)
    assert seen == pytest.approx(weights / weights.sum(), abs=0.01)
    even = recall_rows(replace(TASK, recall_pairs=1, sequence_length=18, recall_power=1.0), stream=0, count=40_000)
    assert even.answers[:, 3::2].mean(axis=0) == pytest.approx(np.full(8, 1 / 8), abs=0.01)


def test_a_symbol_is_a_token_and_labels_are_the_answers(prepared: Prepared) -> None:
    tokenizer = load_tokenizer(prepared.tokenizer_folder)
    assert prepared.vocab_size == OTHER_PIECES + 43 == len(tokenizer)
    assert (prepared.train.num_rows(24), prepared.validation.num_rows(24)) == (60, 12)
    rows = recall_rows(TASK, stream=0, count=60)
    for number, text in enumerate(texts(rows, symbols_of(TASK))):
        assert tokenizer(text)["input_ids"] == prepared.train.ids[24 * number : 24 * number + 24].tolist()
    for boundaries in (True, False):
        batch = collate(prepared.train, np.array([5, 7]), 24, boundaries)
        inputs, labels = batch["input_ids"].view(2, 24), batch["shift_labels"].view(2, 24)
        for row, number in enumerate((5, 7)):
            counted = labels[row] >= 0
            assert counted.sum() == 4
            assert (labels[row][:-1][counted[:-1]] == inputs[row][1:][counted[:-1]]).all()
            assert counted[:-1].tolist() == rows.answers[number][1:].tolist()
            assert not counted[-1]


def test_training_and_validation_share_no_row(prepared: Prepared) -> None:
    train, validation = prepared.train.ids[:-1].reshape(60, 24), prepared.validation.ids[:-1].reshape(12, 24)
    assert not {row.tobytes() for row in train} & {row.tobytes() for row in validation}


def test_accuracy_is_the_share_of_answers_that_are_most_probable(prepared: Prepared) -> None:
    config = load_config(
        ["--model.hidden_size=16", "--model.num_attention_heads=2", "--model.num_hidden_layers=1"]
    ).config
    shape = model_config(replace(config, data=TASK), prepared.vocab_size, {})
    torch.manual_seed(0)
    model = TransnormerForCausalLM(shape)
    lengths = token_byte_lengths(load_tokenizer(prepared.tokenizer_folder))
    batches = list(evaluation_batches(prepared.validation, 24, 5, 10_000, boundaries=True))
    from contextlib import nullcontext

    nll, tokens, num_bytes, correct = score(model, batches, lengths, nullcontext).tolist()
    ids = torch.from_numpy(prepared.validation.ids[:-1].astype(np.int64)).view(12, 24)
    answers = torch.from_numpy(recall_rows(TASK, stream=1, count=12).answers)
    with torch.no_grad():
        logits = model.eval()(ids).logits[:, :-1]
    expected = ids[:, 1:][answers[:, 1:]]
    assert tokens == len(expected) == 48
    assert num_bytes == 3 * 48
    assert correct == (logits.argmax(-1)[answers[:, 1:]] == expected).sum()
    loss = torch.nn.functional.cross_entropy(logits[answers[:, 1:]], expected)
    assert Score(nll, 48, int(num_bytes), int(correct)).loss == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 14}, "data.sequence_length: expected an even number from 16"),
        ({"sequence_length": 25}, "data.sequence_length: expected an even number from 16"),
        ({"recall_symbols": 15}, "data.recall_symbols: expected 16, 4 times data.recall_pairs, to 22344, got 15"),
        ({"recall_symbols": 22_345}, "data.recall_symbols: expected 16"),
        ({"recall_fewest_pairs": 5}, "data.recall_fewest_pairs: expected 4, data.recall_pairs, or fewer, got 5"),
        ({"recall_fewest_pairs": 1, "recall_examples": 3}, "data.recall_examples: expected 4 or more, one for each"),
        ({"recall_examples": 0}, "data.recall_examples: expected 1 or more"),
        ({"paths": ["a.txt"]}, "data.paths: expected data.corpus text"),
    ],
)
def test_a_task_that_can_not_be_is_refused(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(Config(data=replace(TASK, cache_dir=str(tmp_path), **changes)))


def test_another_tokenizer_and_texts_are_refused(tmp_path: Path) -> None:
    data = replace(TASK, cache_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"tokenizer\.path: expected null for data\.corpus recall"):
        prepare(Config(data=data, tokenizer=TokenizerConfig(path=str(tmp_path))))
    with pytest.raises(ConfigError, match="recall, whose rows are generated"):
        documents(data, "train")
