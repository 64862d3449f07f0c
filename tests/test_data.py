"""Packed tokens and batches: against naive definitions, from one process or several, whole or killed."""

import hashlib
import json
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock

from training.batches import BatchOrder, batch_sha, collate, evaluation_batches
from training.config import Config, DataConfig, TokenizerConfig
from training.corpus import open_corpus
from training.data import PackedTokens, _open_tokens, _pack, _read_meta, cut, prepare
from training.errors import DataError, ResourceError
from training.progress import working
from training.tokenizer import load_sentencepiece

ROOT = Path(__file__).parents[1]
WORDS = ["alpha", "beta(", "gamma):\n", "   return", "12", "é漢", "<s>", "</s>", "delta_epsilon", "\t"]


def random_text(generator: random.Random, words: int) -> str:
    return " ".join(generator.choices(WORDS, k=words))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Config:
    """A corpus of 80 documents, one of which is large enough to be cut, and a tokenizer trained on it."""
    folder, generator = tmp_path_factory.mktemp("data"), random.Random(2)
    texts = ["", *(random_text(generator, generator.randrange(1, 300)) for _ in range(80))]
    texts.insert(40, random_text(generator, 60_000))
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = DataConfig(
        corpus="jsonl", paths=[str(path)], cache_dir=str(folder / "cache"), validation_share=0.2, sequence_length=16
    )
    return Config(data=data, tokenizer=TokenizerConfig(vocab_size=300))


def changed(config: Config, **options) -> Config:
    return replace(config, data=replace(config.data, **options))


def test_packed_tokens_are_the_documents(base):
    prepared = prepare(base)
    processor = load_sentencepiece(prepared.tokenizer_folder)
    assert prepared.vocab_size == 300
    assert prepared.skipped == {"empty": 1}
    for split, tokens in (("train", prepared.train), ("validation", prepared.validation)):
        texts = [text for side, text in open_corpus(base.data).documents({"empty": 0}) if side == split]
        assert tokens.ids.dtype == np.uint16
        assert tokens.documents == len(texts)
        assert tokens.num_bytes == sum(len(text.encode()) for text in texts)
        for index, text in enumerate(texts):
            ids = tokens.ids[tokens.offsets[index] : tokens.offsets[index + 1]]
            assert ids.tolist() == [1, *processor.encode(text), 2]
        assert tokens.offsets[-1] == len(tokens.ids)


def test_threads_change_nothing(base, tmp_path):
    one = prepare(changed(base, cache_dir=str(tmp_path), num_proc=1))
    three = prepare(changed(base, num_proc=3))
    assert one.fingerprint == three.fingerprint
    assert (one.train.ids == three.train.ids).all()


def test_cut_texts_encode_as_the_whole(base):
    processor = load_sentencepiece(prepare(base).tokenizer_folder)
    generator = random.Random(3)
    for _ in range(300):
        text = "".join(generator.choices([*WORDS, " ", "  ", "▁", "\n"], k=generator.randrange(1, 120)))
        parts = list(cut(text, generator.randrange(1, 30)))
        assert "".join(parts) == text
        assert all(parts)
        assert list(chain(*processor.encode(parts))) == processor.encode(text)


def test_token_budget_ends_after_the_document_that_reaches_it(base):
    whole, part = prepare(base).train, prepare(changed(base, token_budget=1000)).train
    assert (part.ids == whole.ids[: len(part.ids)]).all()
    assert part.offsets[-2] < 1000 <= part.offsets[-1]


def test_another_corpus_or_tokenizer_makes_other_tokens(base, tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text(Path(base.data.paths[0]).read_text())
    config = changed(base, paths=[str(path)])
    first = prepare(config)
    assert first.fingerprint == prepare(base).fingerprint
    path.write_text(path.read_text().replace("alpha", "ALPHA"))
    second = prepare(config)
    assert second.fingerprint != first.fingerprint
    third = prepare(replace(config, tokenizer=TokenizerConfig(vocab_size=290)))
    assert third.fingerprint != second.fingerprint
    assert third.vocab_size == 290


def test_tokenizer_of_a_folder(base, tmp_path):
    first = prepare(base)
    named = replace(base, tokenizer=TokenizerConfig(path=str(first.tokenizer_folder)))
    assert prepare(named).fingerprint == first.fingerprint
    with pytest.raises(DataError, match=r"tokenizer\.model"):
        prepare(replace(base, tokenizer=TokenizerConfig(path=str(tmp_path))))


def test_too_little_text_names_both_numbers(base, tmp_path):
    prepared = prepare(base)
    side, found = min(
        ("train", len(prepared.train.ids)), ("validation", len(prepared.validation.ids)), key=lambda x: x[1]
    )
    assert getattr(prepare(changed(base, sequence_length=found - 1)), side).num_rows(found - 1) == 1
    with pytest.raises(DataError, match=rf"expected at least {found + 1} {side} tokens .* got {found} in"):
        prepare(changed(base, sequence_length=found))
    path = tmp_path / "empty.jsonl"
    path.write_text('{"text": " "}\n')
    with pytest.raises(DataError, match="got 0"):
        prepare(changed(base, paths=[str(path)]))
    with pytest.raises(DataError, match=r"expected validation documents before data.token_budget 1, got none"):
        prepare(changed(base, token_budget=1))


@pytest.mark.parametrize("name", ["train.ids.bin", "validation.offsets.bin", "meta.json"])
@pytest.mark.parametrize("damage", ["truncated", "removed", "flipped"])
def test_damaged_token_files_are_noticed(base, tmp_path, name, damage):
    config = changed(base, cache_dir=str(tmp_path))
    config = replace(config, tokenizer=TokenizerConfig(path=str(prepare(base).tokenizer_folder)))
    path = tmp_path / "tokens" / prepare(config).fingerprint / name
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-4])
    elif damage == "removed":
        path.unlink()
    elif name == "meta.json":
        path.write_text(path.read_text().replace("<u2", "<i2"))
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(DataError, match=name):
        prepare(config)


def test_meta_holds_sizes_and_hashes(base):
    folder = Path(base.data.cache_dir) / "tokens" / prepare(base).fingerprint
    meta = json.loads((folder / "meta.json").read_text())
    assert {path.name for path in folder.iterdir()} == {"meta.json", *meta["files"]}
    for name, entry in meta["files"].items():
        data = (folder / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


class WideProcessor:
    """A tokenizer of `pieces` pieces, whose texts are numbers: their ids."""

    def __init__(self, pieces: int) -> None:
        self.get_piece_size = lambda: pieces
        self.bos_id, self.eos_id = (lambda: 1), (lambda: pieces - 1)
        self.id_to_piece = str

    def encode(self, texts: list[str], num_threads: int) -> list[list[int]]:
        return [[int(number) for number in text.split()] for text in texts]


@pytest.mark.parametrize(("pieces", "dtype"), [(2**16, "<u2"), (2**16 + 1, "<u4"), (200_000, "<u4")])
def test_ids_of_any_vocabulary_come_back(tmp_path, pieces, dtype):
    numbers = np.random.default_rng(0).integers(pieces, size=(40, 30)).tolist()
    sides = ["validation" if index % 4 == 0 else "train" for index in range(40)]
    texts = [(side, " ".join(map(str, ids))) for side, ids in zip(sides, numbers, strict=True)]
    corpus = SimpleNamespace(name="numbers", num_bytes=None, documents=lambda skipped: iter(texts))
    _pack(corpus, WideProcessor(pieces), tmp_path, None, threads=1)
    meta = _read_meta(tmp_path)
    assert meta["dtype"] == dtype
    for split in ("train", "validation"):
        tokens = _open_tokens(tmp_path, meta, split)
        mine = [ids for side, ids in zip(sides, numbers, strict=True) if side == split]
        expected = list(chain(*([1, *ids, pieces - 1] for ids in mine)))
        assert tokens.ids.tolist() == expected
        rows = np.arange(tokens.num_rows(7))
        batch = collate(tokens, rows, 7, boundaries=False)
        assert batch["input_ids"].flatten().tolist() == expected[: 7 * len(rows)]
        assert batch["shift_labels"].flatten().tolist() == expected[1 : 7 * len(rows) + 1]


PREPARE = """
import json, sys
from training.config import Config, DataConfig, TokenizerConfig
from training.data import prepare
from training.errors import RunError
data = DataConfig(corpus="text", paths=[sys.argv[1]], cache_dir=sys.argv[2], sequence_length=16, num_proc=1)
try:
    print(prepare(Config(data=data, tokenizer=TokenizerConfig(path=sys.argv[3]))).fingerprint)
except RunError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def large(base, tmp_path) -> Config:
    """Four megabytes of text: time enough to kill a preparation."""
    (tmp_path / "texts").mkdir()
    for index in range(4):
        (tmp_path / "texts" / f"{index}.txt").write_text(random_text(random.Random(index), 150_000))
    data = DataConfig(
        corpus="text", paths=[str(tmp_path / "texts")], cache_dir=str(tmp_path / "cache"), sequence_length=16
    )
    return Config(data=data, tokenizer=TokenizerConfig(path=str(prepare(base).tokenizer_folder)))


def start_preparing(config: Config) -> subprocess.Popen:
    arguments = [config.data.paths[0], config.data.cache_dir, str(config.tokenizer.path)]
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(found, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)


def test_killed_preparation_leaves_nothing_that_is_taken_for_whole(large):
    tokens = Path(large.data.cache_dir) / "tokens"
    process = start_preparing(large)
    wait_for(lambda: any(path.stat().st_size > 100_000 for path in tokens.glob(".*.building/train.ids.bin")))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [path.suffix for path in tokens.iterdir() if path.is_dir()] == [".building"]
    other = prepare(changed(large, validation_share=0.3))
    assert [path.name for path in tokens.iterdir() if path.is_dir()] == [other.fingerprint]
    again = prepare(large)
    assert (again.train.documents, again.validation.documents) in ((3, 1), (2, 2), (1, 3))
    fresh = prepare(changed(large, cache_dir=large.data.cache_dir + "-fresh"))
    assert (again.train.ids == fresh.train.ids).all()


def test_two_processes_make_one_file(large):
    fingerprint = prepare(changed(large, cache_dir=large.data.cache_dir + "-other")).fingerprint
    tokens = Path(large.data.cache_dir) / "tokens"
    tokens.mkdir(parents=True)
    lock = FileLock(tokens / f".{fingerprint}.lock")
    with lock:
        processes = [start_preparing(large) for _ in range(2)]
        for process in processes:
            assert process.stderr is not None
            assert any("waiting for another process: packing tokens" in line for line in process.stderr)
    results = [process.communicate() for process in processes]
    assert [out.strip() for out, _ in results] == [fingerprint, fingerprint]
    assert sum("100%" in err for _, err in results) == 1
    assert [path.name for path in tokens.iterdir() if path.is_dir()] == [fingerprint]


def test_full_disk_ends_with_its_own_code_and_no_leftover(large):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(ResourceError, match="packing tokens") as caught:
            prepare(large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 7
    assert not [path for path in Path(large.data.cache_dir, "tokens").iterdir() if path.is_dir()]


def test_a_long_step_says_that_it_is_alive(capsys):
    with working("some step"):
        time.sleep(1.6)
    assert capsys.readouterr().err.splitlines() == ["some step …", "some step … 1 s", "some step … 1.6 s in all"]


@pytest.mark.parametrize(("num_rows", "batch_size"), [(10, 4), (3, 8), (1, 2), (64, 64)])
def test_batch_order_reads_each_row_once_an_epoch(num_rows, batch_size):
    order = BatchOrder(num_rows, batch_size, seed=5)
    rows = np.concatenate([order.rows(step) for step in range(3 * num_rows)])
    epochs = rows.reshape(-1, num_rows)
    assert rows.dtype == np.int64
    assert (np.sort(epochs, axis=1) == np.arange(num_rows)).all()
    assert order.epoch(num_rows) == batch_size
    if num_rows > 3:
        assert (epochs[0] != epochs[1]).any()


def test_batch_order_is_a_pure_function_of_seed_and_step():
    forward = [BatchOrder(50, 8, 1).rows(step).tolist() for step in range(20)]
    backward = [BatchOrder(50, 8, 1).rows(step).tolist() for step in reversed(range(20))]
    assert forward == backward[::-1]
    assert forward != [BatchOrder(50, 8, 2).rows(step).tolist() for step in range(20)]
    assert BatchOrder(10, 10, 0).rows(0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]


def test_batch_sha_reads_ids_as_uint32():
    ids = np.array([[1, 2], [3, 70_000]])
    expected = hashlib.sha256(b"".join(int(i).to_bytes(4, "little") for i in ids.ravel())).hexdigest()
    assert batch_sha(ids) == expected
    assert batch_sha(ids.astype(np.uint32)) == expected
    assert batch_sha(ids.T) != expected


@pytest.fixture
def packed() -> PackedTokens:
    """Documents of 2 to 12 tokens; every id tells its place."""
    lengths = np.random.default_rng(0).integers(2, 13, size=40)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return PackedTokens(np.arange(offsets[-1], dtype=np.uint16), offsets, num_bytes=0)


@pytest.mark.parametrize("length", [1, 5, 16, 100])
def test_collate_with_boundaries_equals_the_token_by_token_definition(packed, length):
    rows = np.array([2, 0, 1]) % packed.num_rows(length)
    begins, labels, positions, starts = set(packed.offsets.tolist()), [], [], []
    for row in rows:
        for t in range(length):
            place = row * length + t
            if t == 0 or place in begins:
                starts.append(len(labels))
            positions.append(len(labels) - starts[-1])
            labels.append(-100 if place + 1 in begins else place + 1)
    batch = collate(packed, rows, length, boundaries=True)
    assert batch["input_ids"].tolist() == [[row * length + t for row in rows for t in range(length)]]
    assert batch["shift_labels"].tolist() == [labels]
    assert batch["position_ids"].tolist() == [positions]
    assert batch["cu_seq_lens_q"].tolist() == [*starts, len(labels)]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert {batch[name].dtype for name in ("input_ids", "shift_labels", "position_ids")} == {torch.int64}


@pytest.mark.parametrize("length", [1, 5, 16])
def test_rows_that_are_not_joined_are_the_same_rows(packed, length):
    rows = np.array([2, 0, 1])
    joined = collate(packed, rows, length, boundaries=True)
    apart = collate(packed, rows, length, boundaries=True, joined=False)
    assert apart.keys() == joined.keys() - {"cu_seq_lens_q"}
    for name, x in apart.items():
        assert x.shape == (3, length), name
        assert torch.equal(x.view(1, -1), joined[name]), name


def test_collate_without_boundaries_reads_across(packed):
    batch = collate(packed, np.array([3, 1]), 16, boundaries=False)
    assert batch.keys() == {"input_ids", "shift_labels"}
    assert batch["input_ids"].tolist() == [list(range(48, 64)), list(range(16, 32))]
    assert (batch["shift_labels"] == batch["input_ids"] + 1).all()


def test_evaluation_reads_rows_spread_evenly(packed):
    batches = list(evaluation_batches(packed, 16, micro_batch_size=2, max_tokens=90, boundaries=False))
    assert [batch["input_ids"].shape[0] for batch in batches] == [2, 2, 1]
    spread = [row * packed.num_rows(16) // 5 * 16 for row in range(5)]
    assert torch.cat([batch["input_ids"] for batch in batches])[:, 0].tolist() == spread
    everything = list(evaluation_batches(packed, 16, 2, 10**9, boundaries=True))
    assert sum(batch["input_ids"].numel() for batch in everything) == 16 * packed.num_rows(16)
    assert len(list(evaluation_batches(packed, 16, 2, 1, boundaries=True))) == 1
