"""SentencePiece tokenizers that transformers opens exactly: trained on a corpus, checked, measured in bytes."""

import hashlib
import heapq
import io
import json
import os
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from training.config import Config, TokenizerConfig
from training.corpus import Corpus, Skipped
from training.errors import ConfigError, DataError
from training.foreign import foreign_errors
from training.jsonfile import read_json_object, read_regular
from training.progress import build_once, working

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL_FILE = "tokenizer.model"
_FILES = (
    MODEL_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
SPACE = "▁"  # SentencePiece's sign for a space; a document that holds the sign itself gets a space back

# With a dummy prefix, another algorithm or a normalisation, transformers would encode otherwise without a word.
RECIPE: dict[str, Any] = {
    "model_type": "bpe",
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "byte_fallback": True,
    "split_digits": True,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": 3,
    "max_sentence_length": 8192,  # bytes; longer chunks are left out without a word
}
OTHER_PIECES = 4 + 256 + 1  # control pieces, bytes, the space
_CHUNK = 2000  # characters, at most 8,000 bytes
_HELD_OUT_CHARACTERS = 500_000
_TRICKY = ["", " ", "  a", "a \n\tb ", "1234 é ﬁ ① 漢 😀", "<s> </s> <pad> <unk>", "\r\n\0\u200b\ufeff", SPACE]


@dataclass(frozen=True)
class TokenizerReport:
    """What a trained tokenizer was seen to do.

    Attributes:
        vocab_size: pieces, control and byte pieces included.
        bytes_per_token: of held-out documents.
        texts_checked: texts that sentencepiece and the exported tokenizer encoded alike and gave back whole.
    """

    vocab_size: int
    bytes_per_token: float
    texts_checked: int


def resolve_tokenizer(config: Config, corpus: Corpus) -> Path:
    """Return the folder of the tokenizer that `config` names, or of one trained on `corpus`, once, in the cache."""
    if config.tokenizer.path is not None:
        folder = Path(config.tokenizer.path)
        with working("opening the tokenizer"):
            load_tokenizer(folder)
        return folder
    options = config.tokenizer
    parts = [corpus.identity, options.vocab_size, options.sample_bytes, RECIPE]
    fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    folder = Path(config.data.cache_dir) / "tokenizers" / fingerprint
    build_once(folder, "training the tokenizer", lambda target: train_tokenizer(corpus, options, target))
    return folder


def character_tokenizer(config: Config, characters: str) -> Path:
    """Return the folder of a tokenizer that takes each of `characters` as one token, made once in the cache.

    Its pieces are these, the space, and the control and byte pieces of every tokenizer.

    Raises:
        ConfigError: another tokenizer was asked for.
    """
    if config.tokenizer.path is not None:
        raise ConfigError(
            f"tokenizer.path: expected null for data.corpus {config.data.corpus}, which brings its own tokenizer, got"
            f" {config.tokenizer.path}"
        )
    fingerprint = hashlib.sha256(json.dumps([characters, RECIPE]).encode()).hexdigest()[:32]
    folder = Path(config.data.cache_dir) / "tokenizers" / fingerprint

    def make(target: Path) -> None:
        chunks = [SPACE + chunk for chunk in _chunks(characters)]
        target.mkdir(parents=True, exist_ok=True)
        (target / MODEL_FILE).write_bytes(_train_model(chunks, OTHER_PIECES + len(characters), character_coverage=1.0))
        _export(target)
        processor = load_sentencepiece(target)
        _check_round_trip(target, processor, [characters[:1000], *_random_texts(processor, 100)])

    build_once(folder, "making the tokenizer", make)
    return folder


def train_tokenizer(corpus: Corpus, options: TokenizerConfig, folder: Path) -> TokenizerReport:
    """Train on training documents of `corpus`, write `folder` for transformers, and check what was written.

    The same documents give the same model, byte for byte.

    Raises:
        ConfigError: the vocabulary is smaller than its necessary pieces or larger than the documents can fill.
        DataError: the exported tokenizer differs from sentencepiece.
    """
    with working("reading documents for the tokenizer"):
        chunks, held_out = _sample(corpus, options.sample_bytes)
    with working("training the tokenizer"):
        model = _train_model(chunks, options.vocab_size)
    with working("checking the tokenizer"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL_FILE).write_bytes(model)
        _export(folder)
        processor = load_sentencepiece(folder)
        texts = [*held_out, *chunks[:100], *_random_texts(processor, 500)]
        _check_round_trip(folder, processor, texts)
    tokens = sum(map(len, processor.encode(held_out)))
    num_bytes = sum(len(text.encode()) for text in held_out)
    return TokenizerReport(processor.get_piece_size(), num_bytes / tokens, len(texts))


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files of a tokenizer folder that make the tokenizer, none of them code; others are left alone.

    Raises:
        DataError: one is no regular file, or JSON that nothing should try to read.
    """
    files = [path for name in _FILES if os.path.lexists(path := Path(folder) / name)]
    for path in files:
        try:
            read_json_object(path) if path.suffix == ".json" else read_regular(path)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: unreadable: {error}") from error
    return files


def load_sentencepiece(folder: Path) -> SentencePieceProcessor:
    """Open the sentencepiece model of a tokenizer folder.

    Raises:
        DataError: there is none, it can't be read, or transformers would not encode as it does.
    """
    path = Path(folder) / MODEL_FILE
    tokenizer_files(folder)
    with foreign_errors(DataError, f"{path}: expected a sentencepiece model"):
        processor = SentencePieceProcessor(model_file=str(path))
        reason = _unfit(processor)
    if reason is not None:
        raise DataError(f"{path}: {reason}; train one by `python -m scripts.train_tokenizer`")
    return processor


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Open a tokenizer folder with transformers, after a look whether it encodes as its sentencepiece model does.

    Raises:
        DataError: the model was not trained by the recipe, or the two encode differently.
    """
    processor = load_sentencepiece(folder)
    return _check_round_trip(folder, processor, _TRICKY)


def token_byte_lengths(tokenizer: "PreTrainedTokenizerBase") -> np.ndarray:
    """Return (V,) int64: the UTF-8 bytes of text that each id stands for; control tokens 0, byte pieces 1."""
    control = set(tokenizer.all_special_ids)

    def length(index: int, piece: str) -> int:
        if index in control:
            return 0
        if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            return 1
        return len(piece.replace(SPACE, " ").encode())

    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return np.array([length(index, piece) for index, piece in enumerate(pieces)], dtype=np.int64)


def _sample(corpus: Corpus, sample_bytes: int) -> tuple[list[str], list[str]]:
    """Return `sample_bytes` of training chunks spread over the corpus, and some held-out text.

    The chunks with the smallest hashes are a sample that depends on the documents alone and takes one pass in
    bounded memory. Of a stream ten times the sample is read.
    """
    largest_first: list[tuple[int, str]] = []
    size, seen, room = 0, 0, _HELD_OUT_CHARACTERS
    held_out = []
    for side, text in corpus.documents(Skipped()):
        seen += len(text)
        if side == "validation":
            if room > 0:
                held_out.append(text[:room])
                room -= len(text)
            continue
        for chunk, data in ((chunk, chunk.encode()) for chunk in _chunks(text)):
            key = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
            heapq.heappush(largest_first, (-key, chunk))
            size += len(data)
            while size - (excess := len(largest_first[0][1].encode())) >= sample_bytes:
                heapq.heappop(largest_first)
                size -= excess
        if corpus.streamed and held_out and seen >= 10 * sample_bytes:
            break
    return [chunk for _, chunk in sorted(largest_first, reverse=True)], held_out


def _chunks(text: str) -> Iterator[str]:
    return (text[start : start + _CHUNK] for start in range(0, len(text), _CHUNK))


def _train_model(chunks: Iterable[str], vocab_size: int, **options: Any) -> bytes:
    if not 0 < vocab_size < 2**31:
        raise ConfigError(f"tokenizer.vocab_size: expected some thousands, got {vocab_size}")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(chunks),
            model_writer=model,
            vocab_size=vocab_size,
            minloglevel=2,
            **RECIPE,
            **options,
        )
    except RuntimeError as error:
        raise _vocabulary_error(str(error), vocab_size) from error
    return model.getvalue()


def _vocabulary_error(message: str, vocab_size: int) -> ConfigError | DataError:
    """Turn sentencepiece's complaint into one that names the key and the possible number."""
    if at_least := re.search(r"smaller than required_chars\D*\d+ vs (\d+)", message):
        return ConfigError(
            f"tokenizer.vocab_size: expected at least {at_least[1]} for this corpus (control pieces, bytes and "
            f"characters), got {vocab_size}"
        )
    if at_most := re.search(r"value <= (\d+)", message):
        return ConfigError(
            f"tokenizer.vocab_size: expected at most {at_most[1]}, all that the corpus can fill, got {vocab_size}"
        )
    return DataError(f"sentencepiece could not train on the corpus: {message}")


def _export(folder: Path) -> None:
    from transformers import LlamaTokenizer

    tokenizer = LlamaTokenizer.from_pretrained(
        folder,
        add_prefix_space=False,
        legacy=False,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        add_bos_token=False,
        add_eos_token=False,
        pad_token="<pad>",
    )
    tokenizer.save_pretrained(folder)


def _unfit(processor: SentencePieceProcessor) -> str | None:
    """Return why transformers would not encode as this model does, None if it would."""
    size = processor.get_piece_size()
    ids = {
        "unk": processor.unk_id(),
        "bos": processor.bos_id(),
        "eos": processor.eos_id(),
        "pad": processor.pad_id(),
    }
    if missing := [name for name, index in ids.items() if index < 0]:
        return f"expected the control pieces unk, bos, eos and pad, got none for {', '.join(missing)}"
    if not any(map(processor.is_byte, range(size))):
        return "expected byte fallback, got a model that loses unknown characters"
    scores = [processor.get_score(i) for i in range(size) if not (processor.is_control(i) or processor.is_byte(i))]
    if any(score != round(score) for score in scores):
        return "expected a BPE model, got the scores of another kind (unigram, char or word)"
    if processor.encode("a", out_type=str)[0].startswith(SPACE):
        return "expected no dummy prefix, got a space before each text (add_dummy_prefix)"
    text = "  a  b \t\n é ﬁ ① e\u0301"
    if processor.normalize(text) != text.replace(" ", SPACE):
        return "expected text as it is (identity), got a model with normalisation of characters or spaces"
    return None


def _check_round_trip(folder: Path, processor: SentencePieceProcessor, texts: list[str]) -> "PreTrainedTokenizerBase":
    """Open `folder` as a user would and compare it with sentencepiece on `texts`; raise where they differ."""
    from transformers import AutoTokenizer

    with foreign_errors(DataError, f"{folder}: expected a tokenizer that transformers opens"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if len(tokenizer) != processor.get_piece_size():
        raise DataError(
            f"{folder}: expected the {processor.get_piece_size()} pieces of {MODEL_FILE}, transformers opened "
            f"{len(tokenizer)}"
        )
    expected = (processor.bos_id(), processor.eos_id(), processor.pad_id())
    found = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    if found != expected:
        raise DataError(f"{folder}: expected bos, eos and pad {expected}, transformers opened {found}")
    for text in texts:
        ids = processor.encode(text)
        exported = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        if exported != ids:
            raise DataError(f"{folder}: transformers encodes {text[:80]!r} unlike sentencepiece")
        for decoded in (tokenizer.decode(ids), processor.decode(ids)):
            if decoded != text.replace(SPACE, " "):
                raise DataError(f"{folder}: {text[:80]!r} is not what its decoded ids say")
    return tokenizer


def _random_texts(processor: SentencePieceProcessor, count: int) -> list[str]:
    """Return texts of pieces, control signs, white space and characters from all of Unicode; always the same."""
    generator = random.Random(0)
    pieces = [processor.id_to_piece(index) for index in range(processor.get_piece_size())]

    def part() -> str:
        scalar = generator.randrange(0x110000 - 0x800)  # Unicode without its 0x800 surrogates
        character = chr(scalar if scalar < 0xD800 else scalar + 0x800)
        return generator.choice((generator.choice(pieces), character, generator.choice(" \n\t\r\0a1é漢")))

    return ["".join(part() for _ in range(generator.randrange(40))) for _ in range(count)]
