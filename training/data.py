"""Tokens of a run: documents packed into one file for each side, made once; or generated ones."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sentencepiece import SentencePieceProcessor
from tqdm import tqdm

from training.config import Config
from training.corpus import Corpus, Skipped, Split, check_options, open_corpus
from training.errors import DataError
from training.progress import build_once, working
from training.recall import Rows, check_recall, symbols_of, training_rows, validation_rows
from training.tokenizer import MODEL_FILE, SPACE, character_tokenizer, load_sentencepiece, resolve_tokenizer

SPLITS: tuple[Split, ...] = ("train", "validation")
_FORMAT = 1
_PIECE = 65_536  # characters that one thread encodes at once
_GROUP = 4 * _PIECE  # characters in flight for each thread: a fraction of a second


@dataclass(frozen=True)
class PackedTokens:
    """The documents of one side, one after the other, each as bos + ids + eos.

    Attributes:
        ids: (n,) uint16 or uint32, mapped from the file.
        offsets: (documents + 1,) int64 begin of each document, and n.
        num_bytes: UTF-8 bytes of the documents.
        predicted: (n,) bool, which ids are predicted; None where all are.
    """

    ids: np.ndarray
    offsets: np.ndarray
    num_bytes: int
    predicted: np.ndarray | None = None

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1

    def num_rows(self, sequence_length: int) -> int:
        """Return how many rows of T inputs and T targets there are; row r is ids[r T : r T + T + 1]."""
        return max(0, (len(self.ids) - 1) // sequence_length)


@dataclass(frozen=True)
class Prepared:
    """Everything that training reads.

    Attributes:
        train: tokens for training.
        validation: tokens for validation.
        tokenizer_folder: what AutoTokenizer opens.
        fingerprint: of corpus, tokenizer and packing; another one means other tokens.
        tokenizer_sha256: of the sentencepiece model.
        vocab_size: V of the tokenizer.
        skipped: documents left out, by reason.
    """

    train: PackedTokens
    validation: PackedTokens
    tokenizer_folder: Path
    fingerprint: str
    tokenizer_sha256: str
    vocab_size: int
    skipped: dict[str, int]


def prepare(config: Config) -> Prepared:
    """Return the tokens of `config`, made once in `data.cache_dir` whichever process comes first.

    Raises:
        ConfigError: options of the corpus don't fit each other.
        DataError: documents, tokenizer or token file can't be used, or hold less than one row.
        ResourceError: the disk is full.
    """
    return _generate(config) if config.data.corpus == "recall" else _prepare_documents(config)


def _generate(config: Config) -> Prepared:
    """Make the rows of associative recall; quick enough to be made anew by each process."""
    check_options(config.data)
    check_recall(config.data)
    symbols = symbols_of(config.data)
    tokenizer_folder = character_tokenizer(config, "".join(symbols))
    processor = load_sentencepiece(tokenizer_folder)
    ids = np.array(processor.piece_to_id(list("".join(symbols))))
    train, validation = (
        _generated(rows, ids, processor.eos_id()) for rows in (training_rows(config.data), validation_rows(config.data))
    )
    identity = hashlib.sha256()
    for tokens in (train, validation):
        identity.update(tokens.ids.data)
    return Prepared(
        train,
        validation,
        tokenizer_folder,
        identity.hexdigest()[:32],
        _model_hash(tokenizer_folder),
        processor.get_piece_size(),
        skipped={},
    )


def _generated(rows: Rows, ids: np.ndarray, end: int) -> PackedTokens:
    """Pack rows as documents of T tokens without bos, and one `end` that gives the last token a successor."""
    count, length = rows.symbols.shape
    return PackedTokens(
        ids=np.append(ids[rows.symbols], end).astype("<u2"),
        offsets=np.append(np.arange(count + 1) * length, count * length + 1),
        num_bytes=3 * count * length,  # of each symbol in UTF-8
        predicted=np.append(rows.answers, False),
    )


def _model_hash(tokenizer_folder: Path) -> str:
    return hashlib.sha256((tokenizer_folder / MODEL_FILE).read_bytes()).hexdigest()


def _prepare_documents(config: Config) -> Prepared:
    length, budget = config.data.sequence_length, config.data.token_budget
    corpus = open_corpus(config.data)
    tokenizer_folder = resolve_tokenizer(config, corpus)
    processor = load_sentencepiece(tokenizer_folder)
    model_hash = _model_hash(tokenizer_folder)
    identity = [_FORMAT, corpus.identity, model_hash, budget]
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    folder = Path(config.data.cache_dir) / "tokens" / fingerprint
    threads = config.data.num_proc or os.cpu_count() or 1
    build_once(folder, "packing tokens", lambda target: _pack(corpus, processor, target, budget, threads))
    meta = _read_meta(folder)
    train, validation = (_open_tokens(folder, meta, split) for split in SPLITS)
    for split, tokens in (("train", train), ("validation", validation)):
        if len(tokens.ids) <= length:
            raise DataError(
                f"{corpus.name}: expected at least {length + 1} {split} tokens (data.sequence_length + 1), got "
                f"{len(tokens.ids)} in {tokens.documents} documents; a shorter data.sequence_length, a larger "
                "data.validation_share, or data.validation_paths or validation_split of your own helps"
            )
    return Prepared(
        train, validation, tokenizer_folder, fingerprint, model_hash, processor.get_piece_size(), meta["skipped"]
    )


class _Piece(NamedTuple):
    side: Split
    text: str
    is_first: bool
    is_last: bool


class _Writer:
    """Appends documents to the files of one side and takes their hashes on the way."""

    def __init__(self, folder: Path, split: Split, dtype: np.dtype) -> None:
        self.dtype, self.documents, self.tokens, self.num_bytes = dtype, 0, 0, 0
        self._files = {name: (folder / name).open("wb") for name in _file_names(split)}
        self._hashes = {name: hashlib.sha256() for name in self._files}
        self._ids, self._offsets = self._files
        self._append(self._offsets, np.zeros(1, "<i8"))

    def add(self, ids: list[int], num_bytes: int) -> None:
        self._append(self._ids, np.array(ids, self.dtype))
        self.tokens += len(ids)
        self.num_bytes += num_bytes

    def end_document(self) -> None:
        self.documents += 1
        self._append(self._offsets, np.array([self.tokens], "<i8"))

    def close(self) -> dict[str, dict[str, int | str]]:
        """Close the files and return the size and the hash of each."""
        for file in self._files.values():
            file.close()
        return {
            name: {"size": os.path.getsize(file.name), "sha256": self._hashes[name].hexdigest()}
            for name, file in self._files.items()
        }

    def _append(self, name: str, values: np.ndarray) -> None:
        self._files[name].write(values.data)
        self._hashes[name].update(values.data)


def _file_names(split: Split) -> tuple[str, str]:
    return f"{split}.ids.bin", f"{split}.offsets.bin"


def _pack(corpus: Corpus, processor: SentencePieceProcessor, folder: Path, budget: int | None, threads: int) -> None:
    """Encode the documents of `corpus` into the files of `folder`, up to `budget` tokens for training."""
    skipped = Skipped()
    dtype = np.dtype("<u2" if processor.get_piece_size() <= 2**16 else "<u4")
    writers = {split: _Writer(folder, split, dtype) for split in SPLITS}
    documents = corpus.documents(skipped)
    with tqdm(
        total=None if budget else corpus.num_bytes, desc="packing tokens", unit="B", unit_scale=True, mininterval=0.5
    ) as bar:
        for size in _encode_into(writers, processor, documents, budget, threads):
            bar.update(size)
    for split, writer in writers.items():
        if not writer.documents:
            raise DataError(f"{corpus.name}: expected {split} documents before data.token_budget {budget}, got none")
    files = {name: entry for writer in writers.values() for name, entry in writer.close().items()}
    meta: dict[str, Any] = {
        "format": _FORMAT,
        "dtype": dtype.str,
        "skipped": dict(skipped),
        "files": files,
        **{
            split: {"documents": writer.documents, "tokens": writer.tokens, "bytes": writer.num_bytes}
            for split, writer in writers.items()
        },
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def _encode_into(
    writers: dict[Split, _Writer],
    processor: SentencePieceProcessor,
    documents: Iterable[tuple[Split, str]],
    budget: int | None,
    threads: int,
) -> Iterator[int]:
    """Write each document as bos + ids + eos, yield bytes done; end after the document that reaches `budget`."""
    bos, eos = [processor.bos_id()], [processor.eos_id()]
    for group in _groups(_pieces(documents, _can_cut(processor)), _GROUP * threads):
        encoded = processor.encode([piece.text for piece in group], num_threads=threads)
        done = 0
        for piece, ids in zip(group, encoded, strict=True):
            size = len(piece.text.encode())
            writer = writers[piece.side]
            writer.add(bos * piece.is_first + ids + eos * piece.is_last, size)
            done += size
            if piece.is_last:
                writer.end_document()
                if budget and writers["train"].tokens >= budget:
                    yield done
                    return
        yield done


def _can_cut(processor: SentencePieceProcessor) -> bool:
    """Return whether no piece reaches across the begin of white space, where a text then encodes in two parts."""
    pieces = (processor.id_to_piece(index) for index in range(processor.get_piece_size()))
    return not any(SPACE in piece.lstrip(SPACE) for piece in pieces)


def cut(text: str, size: int) -> Iterator[str]:
    """Yield `text` in parts of about `size` characters, each begun by a space that follows something else."""
    boundary = re.compile(f"[^ {SPACE}](?=[ {SPACE}])")
    start = 0
    while len(text) - start > size and (match := boundary.search(text, start + size - 1)):
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]


def _pieces(documents: Iterable[tuple[Split, str]], can_cut: bool) -> Iterator[_Piece]:
    """Cut large documents: they are encoded in bounded memory, and by all threads."""
    for side, text in documents:
        size, end = _PIECE if can_cut else len(text), 0
        for part in cut(text, size):
            begin, end = end, end + len(part)
            yield _Piece(side, part, is_first=begin == 0, is_last=end == len(text))


def _groups(pieces: Iterable[_Piece], size: int) -> Iterator[list[_Piece]]:
    group, held = [], 0
    for piece in pieces:
        group.append(piece)
        held += len(piece.text)
        if held >= size:
            yield group
            group, held = [], 0
    if group:
        yield group


def _read_meta(folder: Path) -> dict:
    """Return meta.json after a look whether the files are what it tells: reading them takes a second for a GB."""
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_bytes())
        files = {name: (entry["size"], entry["sha256"]) for name, entry in meta["files"].items()}
        sizes = {split: meta[split]["tokens"] * np.dtype(meta["dtype"]).itemsize for split in SPLITS}
        found = {split: meta["files"][_file_names(split)[0]]["size"] for split in SPLITS}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: expected the description of a token file, got {error!r}; remove {folder}") from error
    if sizes != found or meta["dtype"] not in ("<u2", "<u4"):
        raise DataError(f"{path}: expected ids of 2 or 4 bytes in files of {sizes} bytes, got {found}; remove {folder}")
    with working("checking the tokens"):
        for name, (size, sha256) in files.items():
            _check_file(folder / name, size, sha256)
    return meta


def _check_file(path: Path, size: int, sha256: str) -> None:
    again = f"remove {path.parent} to make it again"
    try:
        if path.stat().st_size != size:
            raise DataError(f"{path}: expected {size} bytes, got {path.stat().st_size}; {again}")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: expected a file of {size} bytes, got {error}; {again}") from error
    if found != sha256:
        raise DataError(f"{path}: expected the sha256 {sha256} that was taken as it was made, got {found}; {again}")


def _open_tokens(folder: Path, meta: dict, split: Split) -> PackedTokens:
    ids, offsets = (folder / name for name in _file_names(split))
    return PackedTokens(
        ids=np.memmap(ids, meta["dtype"], mode="r"),
        offsets=np.memmap(offsets, "<i8", mode="r"),
        num_bytes=meta[split]["bytes"],
    )
