"""Tokenizers: trained alike each time, opened by transformers exactly, measured in bytes, refused where unfit."""

import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer, LlamaTokenizer

from training.config import Config, DataConfig, TokenizerConfig
from training.corpus import open_corpus
from training.errors import ConfigError, DataError
from training.tokenizer import (
    MODEL_FILE,
    RECIPE,
    _sample,
    load_sentencepiece,
    load_tokenizer,
    resolve_tokenizer,
    token_byte_lengths,
    train_tokenizer,
)

ROOT = Path(__file__).parents[1]
TEXTS = [
    "def f(x):\n    return x + 1\n",
    "  two spaces, a tab\t, 1234 and a line\r\n\n",
    "é ﬁ ① 漢字 😀 \0 \u200b",
    "<s> a </s> <pad> <unk> <0x41>",
    "",
]


def corpus_config(folder: Path, documents: int = 60) -> DataConfig:
    words = random.Random(1).choices(["alpha", "beta(", "gamma):\n", "    return", "12", "é", "delta_epsilon"], k=9000)
    lines = (" ".join(words[start : start + 150]) for start in range(0, 150 * documents, 150))
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return DataConfig(corpus="jsonl", paths=[str(path)], cache_dir=str(folder / "cache"))


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    return Config(data=corpus_config(tmp_path_factory.mktemp("tokenizer")), tokenizer=TokenizerConfig(vocab_size=320))


@pytest.fixture(scope="module")
def folder(config) -> Path:
    return resolve_tokenizer(config, open_corpus(config.data))


def test_exported_tokenizer_equals_sentencepiece(folder):
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), load_sentencepiece(folder)
    assert len(tokenizer) == processor.get_piece_size() == 320
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 3)
    assert tokenizer.padding_side == "left"
    for text in TEXTS:
        ids = processor.encode(text)
        assert tokenizer(text, split_special_tokens=True).input_ids == ids
        assert tokenizer.decode(ids) == text
        assert not {0, 1, 2, 3} & set(ids)


def test_training_is_deterministic_and_reports(config, folder, tmp_path):
    report = train_tokenizer(open_corpus(config.data), config.tokenizer, tmp_path)
    assert (tmp_path / MODEL_FILE).read_bytes() == (folder / MODEL_FILE).read_bytes()
    assert report.vocab_size == 320
    assert report.texts_checked > 500
    held_out = "".join(text for side, text in open_corpus(config.data).documents({}) if side == "validation")
    tokens = len(load_sentencepiece(folder).encode(held_out))
    assert report.bytes_per_token == pytest.approx(len(held_out.encode()) / tokens, rel=0.01)


def test_trained_tokenizer_is_kept_until_something_changes(config, folder):
    model = folder / MODEL_FILE
    before = model.stat().st_mtime_ns
    assert resolve_tokenizer(config, open_corpus(config.data)) == folder
    assert model.stat().st_mtime_ns == before
    other = Config(data=config.data, tokenizer=TokenizerConfig(vocab_size=310))
    assert resolve_tokenizer(other, open_corpus(config.data)) != folder


def test_byte_lengths_add_up(folder):
    tokenizer, processor = load_tokenizer(folder), load_sentencepiece(folder)
    lengths = token_byte_lengths(tokenizer)
    assert lengths.shape == (320,)
    assert lengths[[0, 1, 2, 3]].tolist() == [0, 0, 0, 0]
    for text in TEXTS:
        assert lengths[processor.encode(text)].sum() == len(text.encode())


@pytest.mark.parametrize("vocab_size", [4096, 200])
def test_impossible_vocabulary_is_told_the_possible_one(tmp_path, vocab_size):
    corpus = open_corpus(corpus_config(tmp_path, documents=10))
    with pytest.raises(ConfigError, match=rf"tokenizer.vocab_size: expected .* got {vocab_size}") as caught:
        train_tokenizer(corpus, TokenizerConfig(vocab_size=vocab_size), tmp_path / "a")
    possible = next(int(word.strip(",")) for word in str(caught.value).split() if word.strip(",").isdigit())
    assert train_tokenizer(corpus, TokenizerConfig(vocab_size=possible), tmp_path / "b").vocab_size == possible


def test_sample_is_spread_over_the_corpus_and_blind_to_order(tmp_path):
    texts = [f"{index} " * 300 for index in range(400)]
    config = DataConfig(corpus="jsonl", paths=[str(tmp_path / "a.jsonl")])
    samples = []
    for order in (texts, [texts[0], texts[1], *reversed(texts[2:])]):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in order))
        samples.append(_sample(open_corpus(config), sample_bytes=60_000)[0])
    assert samples[0] == samples[1]
    assert 60_000 <= sum(map(len, samples[0])) <= 62_000
    indices = [int(chunk.split()[1]) for chunk in samples[0]]
    assert min(indices) < 100 < 300 < max(indices)


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"add_dummy_prefix": True}, "dummy prefix"),
        ({"model_type": "unigram"}, "BPE"),
        ({"model_type": "char", "vocab_size": 280}, "BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalisation"),
        ({"remove_extra_whitespaces": True}, "normalisation"),
        ({"byte_fallback": False, "vocab_size": 60}, "byte fallback"),
        ({"pad_id": -1}, "none for pad"),
    ],
    ids=["prefix", "unigram", "char", "nfkc", "spaces", "no-bytes", "no-pad"],
)
def test_models_of_another_recipe_are_refused(tmp_path, config, option, reason):
    chunks = [text for _, text in open_corpus(config.data).documents({})]
    with io.BytesIO() as model:
        options = RECIPE | {"vocab_size": 300, "hard_vocab_limit": False} | option
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(chunks), model_writer=model, minloglevel=2, **options
        )
        (tmp_path / MODEL_FILE).write_bytes(model.getvalue())
    with pytest.raises(DataError, match=reason):
        load_tokenizer(tmp_path)


def test_folders_without_a_usable_model(tmp_path, folder):
    with pytest.raises(DataError, match=MODEL_FILE):
        load_sentencepiece(tmp_path)
    (tmp_path / MODEL_FILE).write_bytes(b"not a model")
    with pytest.raises(DataError, match="expected a sentencepiece model"):
        load_sentencepiece(tmp_path)
    (tmp_path / MODEL_FILE).write_bytes((folder / MODEL_FILE).read_bytes())
    with pytest.raises(DataError, match="transformers opened"):
        load_tokenizer(tmp_path)


def test_an_export_that_encodes_otherwise_is_refused(tmp_path, folder):
    (tmp_path / MODEL_FILE).write_bytes((folder / MODEL_FILE).read_bytes())
    LlamaTokenizer.from_pretrained(tmp_path, pad_token="<pad>", add_prefix_space=True).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"unlike sentencepiece|not what its decoded ids say"):
        load_tokenizer(tmp_path)


def run_script(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "scripts.train_tokenizer", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)


def test_script(tmp_path, config):
    file, out = tmp_path / "config.yaml", tmp_path / "tokenizer"
    file.write_text(json.dumps({"data": {"corpus": "jsonl", "paths": config.data.paths}}))
    arguments = ["--config", str(file), "--out", str(out), "--tokenizer.vocab_size"]
    done = run_script(*arguments, "100")
    assert done.returncode == 2
    assert "tokenizer.vocab_size" in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()
    done = run_script(*arguments, "320")
    assert done.returncode == 0, done.stderr
    assert "vocabulary: 320 pieces" in done.stdout
    assert "bytes per token" in done.stdout
    assert "round trip" in done.stdout
    assert len(AutoTokenizer.from_pretrained(out)) == 320


def test_script_help():
    done = run_script("--help")
    assert done.returncode == 0
    assert "--config" in done.stdout
